"""The service as `bentoml serve` starts it: BentoML's clients, its OpenAPI document, its own pages."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bentoml
import jsonschema_rs
import pytest

from fraud.checks.servers import DIRECT
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.models.bento_store import BentoStore
from fraud.serving.scopes import SCOPES
from fraud.serving.security import new_key
from tests.servers import bentoml_serve, wait_until
from tests.tiny import ready_rows, store_of_tiny_models, transactions, write_tiny_bundle

ROOT = Path(__file__).parent.parent
SECRET, KEY = new_key(SCOPES)
LOGGING = {"FRAUD_LOG_FORMAT": "text", "FRAUD_LOG_REQUESTS": "all"}


@dataclass(frozen=True)
class Served:
    url: str
    environment: dict[str, str]
    log: Path

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, _parsed(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("bentoml")
    both = store_of_tiny_models(home)
    bundle = write_tiny_bundle(home / "anomaly", "transaction", name="tiny-anomaly", algorithm=ISOLATION_FOREST)
    models = f"{both['FRAUD_MODEL']},{BentoStore(home).import_bundle(bundle, {})}"
    return {**both, "FRAUD_MODEL": models, "FRAUD_API_KEYS": KEY.line(), **LOGGING}


@pytest.fixture(scope="module")
def served(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    with bentoml_serve(environment, log) as url:
        yield Served(url, environment, log)
    assert "Traceback" not in log.read_text()


def test_both_models_score_and_say_which_answered(served: Served) -> None:
    status, answer = served.ask("/predict", {"instances": transactions(3, 1)})
    assert status == 200
    assert [p["transaction_id"] for p in answer["predictions"]] == ["t1-0", "t1-1", "t1-2"]
    assert {p["model"]["name"] for p in answer["predictions"]} == {"tiny-transaction"}
    status, answer = served.ask("/explain", {"instances": ready_rows(2, 1), "model": "tiny-features"})
    assert status == 200
    for p in answer["predictions"]:
        assert p["base_value"] + sum(p["contributions"].values()) == pytest.approx(p["raw_margin"], abs=1e-9)
    status, answer = served.ask("/predict", {"instances": ready_rows(1, 1), "model": "other"})
    assert (status, answer["error"]["code"]) == (404, "unknown_model")


def test_a_model_without_a_probability_answers_with_an_anomaly(served: Served) -> None:
    asked = {"instances": transactions(3, 71), "model": "tiny-anomaly"}
    status, answer = served.ask("/explain", asked)
    assert status == 200
    for p in answer["predictions"]:
        assert p["fraud_probability"] is None
        assert p["anomaly"]["score"] == pytest.approx(2 ** p["raw_margin"])
        assert p["base_value"] + sum(p["contributions"].values()) == pytest.approx(p["raw_margin"], abs=1e-9)
        assert p["unit"] == "log2 of the anomaly score"
        assert p["model"]["name"] == "tiny-anomaly"
    with bentoml.SyncHTTPClient(served.url) as client:
        again = client.predict(instances=asked["instances"], model="tiny-anomaly")["predictions"]
    assert [row["anomaly"] for row in again] == [row["anomaly"] for row in answer["predictions"]]
    identity = answer["predictions"][0]["transaction_id"]
    status, kept = served.ask(f"/v1/decisions/{identity}", Authorization=f"Bearer {SECRET}")
    assert (status, kept["decision"]["fraud_probability"]) == (200, None)
    assert kept["decision"]["anomaly"] == answer["predictions"][0]["anomaly"]


def unnamed(answer: Any) -> list[Any]:
    """The rows of an answer without their ids: those sent without one may be given another each time."""
    return [{**row, "transaction_id": None} for row in answer["predictions"]]


def test_concurrent_answers_equal_single_ones(served: Served) -> None:
    bodies = [{"instances": [row], "model": "tiny-features"} for row in ready_rows(200, 2)]
    bad = {"instances": [{**ready_rows(1, 2)[0], "income": "much"}], "model": "tiny-features"}
    alone = [unnamed(served.ask("/predict", body)[1]) for body in bodies]
    with ThreadPoolExecutor(32) as pool:
        together = list(
            pool.map(lambda body: served.ask("/predict", body), [b for body in bodies for b in (body, bad)])
        )
    assert [unnamed(answer) for _, answer in together[::2]] == alone
    assert {(status, answer["error"]["path"]) for status, answer in together[1::2]} == {(422, "$.instances[0].income")}


def test_bentoml_clients_call_both_apis(served: Served) -> None:
    rows = ready_rows(4, 3)
    expected = served.ask("/predict", {"instances": rows, "model": "tiny-features"})[1]
    with bentoml.SyncHTTPClient(served.url) as client:
        assert client.is_ready()
        assert unnamed(client.predict(instances=rows, model="tiny-features")) == unnamed(expected)
        with pytest.raises(bentoml.exceptions.BentoMLException, match="unknown_model"):
            client.predict(instances=rows, model="other")

    async def explain() -> list[Any]:
        async with bentoml.AsyncHTTPClient(served.url) as client:
            calls = [client.explain(instances=[row], model="tiny-features") for row in rows]
            return [answer["predictions"][0] for answer in await asyncio.gather(*calls)]

    explained = asyncio.run(explain())
    assert [e["fraud_probability"] for e in explained] == [p["fraud_probability"] for p in expected["predictions"]]
    assert all(e["reasons"] for e in explained)


def test_a_bad_row_comes_back_in_its_place_through_bentomls_client(served: Served) -> None:
    good, bad = ready_rows(2, 4)
    del bad["income"]
    with bentoml.SyncHTTPClient(served.url) as client:
        answers = client.predict(instances=[good, bad], model="tiny-features")["predictions"]
    assert answers[0]["decision"] in ("approve", "review", "decline")
    assert answers[1]["error"]["path"] == "$.instances[1]"
    assert "income" in answers[1]["error"]["message"]


def test_the_openapi_document_describes_what_is_answered(served: Served) -> None:
    status, document = served.ask("/docs.json")
    assert (status, document["openapi"]) == (200, "3.1.0")

    def holds(path: str, body: Any, expected_status: int, method: str = "", **names: str) -> None:
        method = method or ("GET" if body is None else "POST")
        status, answer = served.ask(path.format(**names), body, method, Authorization=f"Bearer {SECRET}")
        assert status == expected_status
        operation = document["paths"][path][method.lower()]
        schema = operation["responses"][str(status)]["content"]["application/json"]["schema"]
        jsonschema_rs.validate({**schema, "components": document["components"]}, answer)

    row, bad = ready_rows(2, 5)
    bad["has_phone"] = "yes"
    for path in ("/predict", "/explain"):
        holds(path, {"instances": [row], "model": "tiny-features"}, 200)
        holds(path, {"instances": [row, bad], "model": "tiny-features"}, 200)
        holds(path, {"instances": [bad], "model": "tiny-features"}, 422)
        holds(path, {"instances": []}, 422)
        holds(path, {"instances": [row], "model": "other"}, 404)
    holds("/readyz", None, 200)
    payments = [{**payment, "customer_id": "a/b"} for payment in transactions(3, 8)]
    assert served.ask("/predict", {"instances": payments})[0] == 200
    label = {"transaction_id": payments[0]["transaction_id"], "is_fraud": True}
    profile = "/v1/users/{id}/profile"
    holds(profile, None, 200, id="a%2Fb")
    holds("/v1/labels", {"labels": [label, {**label, "is_fraud": False}, label]}, 200)
    holds("/v1/labels", {"labels": [{**label, "label_time": "soon"}]}, 422)
    holds("/v1/labels", {"labels": []}, 422)
    holds(profile, None, 200, id="a%2Fb")
    holds(profile, None, 200, "DELETE", id="a%2Fb")
    holds(profile, None, 404, "DELETE", id="a%2Fb")
    holds(profile, None, 404, id="a%2Fb")
    holds(profile, None, 422, id="%FF")
    request = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**request, "components": document["components"]}, {"instances": transactions(2, 6)})
    references = set(_references(document))
    assert references <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for value in part:
            yield from _references(value)


def test_bentomls_own_pages_stay(served: Served) -> None:
    assert served.ask("/livez")[0] == 200
    assert "bentoml_service_request" in served.ask("/metrics")[1]
    assert served.ask("/schema.json")[1]["name"] == "fraud_bento"
    with DIRECT.open(f"{served.url}/") as page:
        assert page.status == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
    status, answer = served.ask("/nothing")
    assert (status, answer["error"]["code"]) == (404, "not_found")


def refused(served: Served, route: str) -> float:
    """Return how many calls of a route were answered with 404, as metrics have it."""
    found = re.search(
        rf'fraud_requests_total{{route="{re.escape(route)}",status="404"}} (\S+)', served.ask("/metrics")[1]
    )
    return float(found[1]) if found else 0.0


def test_what_is_not_declared_is_closed_and_named_nowhere(served: Served) -> None:
    """No redirect that the Host header could turn elsewhere, no series and no line of a caller's own."""
    before = refused(served, "other")
    undeclared = [
        "/livez/",
        "/who-77",
        "/v1/users/who-77/profile/",
        "/v1/users/who-77",
        "/static_content/who-77",
    ]
    for path in [*undeclared, "/x%0a2026-11-26T00:00:00.000+00:00%20who-77"]:
        for method in ("GET", "POST"):
            status, answer = served.ask(path, {} if method == "POST" else None, Host="evil.example")
            assert (status, answer["error"]["code"]) == (404, "not_found"), path
    assert served.ask("/v1/users/who-77/profile")[0] == 404
    wait_until(lambda: refused(served, "other") >= before + 12 and refused(served, "/v1/users/{id}/profile") >= 1, 10)
    assert "who-77" not in served.ask("/metrics")[1]
    log = served.log.read_text()
    assert "path=other status=404" in log
    assert "who-77" not in log


def test_head_is_answered_wherever_get_is(served: Served) -> None:
    for path in (
        "/readyz",
        "/livez",
        "/healthz",
        "/metrics",
        "/docs.json",
        "/schema.json",
        "/",
        "/static_content/index.css",
    ):
        assert served.ask(path, method="HEAD") == (200, ""), path


BENTOML_ALONE = """
import asyncio, json, sys
import bentoml, httpx
from service import FraudBento

async def main():
    app = bentoml.Service.to_asgi(FraudBento)  # BentoML's own application, without the front door
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bento") as client:
            bodies = json.load(sys.stdin)
            answers = await asyncio.gather(*[client.post("/predict", json=body) for body in bodies])
            print(json.dumps([answer.json() for answer in answers]))

asyncio.run(main())
"""


def test_bentomls_own_way_scores_with_the_same_code(served: Served, tmp_path: Path) -> None:
    bodies = [{"instances": [row], "model": "tiny-features"} for row in ready_rows(20, 7)]
    environment = {**served.environment, "FRAUD_STATE_DIR": str(tmp_path)}
    script = subprocess.run(
        [sys.executable, "-c", BENTOML_ALONE],
        input=json.dumps(bodies),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(script.stdout.splitlines()[-1])
    assert [unnamed(answer) for answer in answers] == [unnamed(served.ask("/predict", body)[1]) for body in bodies]


def test_without_a_model_serving_fails_at_once_and_says_what_to_do(environment: dict[str, str], tmp_path: Path) -> None:
    empty = {**environment, "BENTOML_HOME": str(tmp_path), "FRAUD_MODEL": "fraud-transaction"}
    serve = subprocess.run(
        [Path(sys.executable).parent / "bentoml", "serve", "service:FraudBento", "--port", "0"],
        cwd=ROOT,
        env=empty,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert serve.returncode != 0
    assert "the Bento store has no version of 'fraud-transaction'; train, import and promote one" in serve.stderr
