"""The contract registry-predict, by `requests` on a real server under a path prefix, with its old system's names."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import requests

import fraud
from fraud.checks.servers import free_port
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import read_manifest, short
from fraud.models.registry import Registry
from tests.servers import bentoml_serve
from tests.tiny import KINDS, ready_rows, store_of_tiny_models, transactions, write_tiny_bundle

ADMIN = "k3y-0f-operations"
ROOT = "/fraud"
FEATURES, TRANSACTION = "tiny-features", "tiny-transaction"


@dataclass
class Service:
    """A server with two versions of a features model; `champion` names the first, which is served."""

    url: str
    registry: Registry
    digests: list[str]
    log: Path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("home")
    environment = store_of_tiny_models(home)
    BentoStore(home).import_bundle(write_tiny_bundle(home / "other", "features", name=FEATURES, seed=1), {})
    registry = Registry.beside(home, ("champion", "production", "staging"))
    digests = []
    for kind, folder in [*[(kind, home / kind) for kind in KINDS], ("features", home / "other")]:
        digest, manifest = read_manifest(folder)
        registry.register(manifest.name, digest, manifest.preprocessor_digest, who="a test")
        registry.move(manifest.name, digest, "staging", who="a test", why="")
        digests += [digest] if kind == "features" else []
    registry.move(FEATURES, digests[0], "champion", who="a test", why="")
    environment |= {
        "FRAUD_MODEL": f"{TRANSACTION},{FEATURES}",
        "FRAUD_MODEL_ALIASES": "champion,production,staging",
        "FRAUD_MODEL_POLL_S": "600",
        "FRAUD_CONTRACT_MODELS": f"registry-predict={FEATURES}",
        "FRAUD_ROOT_PATH": ROOT,
        "FRAUD_DURABLE": "false",
        "PORT": str(free_port()),
        "WORKERS": "1",
        "LOG_LEVEL": "warn",
        "API_KEYS": f"{ADMIN}, another",
        "CORS_ORIGINS": '["https://pages.example"]',
        "WANDB_MODE": "offline",
    }
    with bentoml_serve(environment, home / "log") as url:
        yield Service(url, registry, digests, home / "log")


@pytest.fixture(params=[ROOT, ""], ids=["prefix passed on", "prefix stripped"])
def base(service: Service, request: pytest.FixtureRequest) -> str:
    return service.url + str(request.param)


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_it_predicts_as_predict_does(base: str, client: requests.Session) -> None:
    rows = [{**row, "transaction_id": f"same-{i}"} for i, row in enumerate(ready_rows(3, 5))]
    own = client.post(f"{base}/predict", json={"instances": rows, "model": FEATURES})
    answer = client.post(f"{base}/v1/predict", json={"model": "lightgbm", "instances": rows})
    assert (answer.status_code, answer.content) == (200, own.content), "bit for bit, one decision each"
    decided = [prediction["decision"] for prediction in answer.json()["predictions"]]
    assert answer.headers["x-fraud-decision"] == ", ".join(decided)
    unnamed = client.post(f"{base}/v1/predict", json={"instances": rows})
    assert unnamed.content == answer.content


def test_another_model_may_be_named(base: str, client: requests.Session) -> None:
    (row,) = transactions(1, 7)
    answer = client.post(f"{base}/v1/predict", json={"model": TRANSACTION, "instances": [row]})
    assert answer.json()["predictions"][0]["model"]["name"] == TRANSACTION
    unknown = client.post(f"{base}/v1/predict", json={"model": "xgboost", "instances": [row]})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_model")


def test_its_decisions_are_recorded_with_its_name(service: Service, client: requests.Session) -> None:
    (row,) = ready_rows(1, 11)
    headers = {"X-Request-ID": "trace-2", "Idempotency-Key": "order-2"}
    answer = client.post(f"{service.url}/v1/predict", json={"model": "lightgbm", "instances": [row]}, headers=headers)
    assert answer.headers["x-request-id"] == "trace-2"
    query = {"model": FEATURES}
    shown = client.get(f"{service.url}/v1/decisions/order-2", params=query).json()["decision"]
    assert (shown["contract"], shown["request_id"]) == ("registry-predict", "trace-2")
    assert shown["fraud_probability"] == answer.json()["predictions"][0]["fraud_probability"]


def test_a_request_without_an_id_gets_one(base: str, client: requests.Session) -> None:
    given = [client.get(f"{base}/v1/version").headers["x-request-id"] for _ in range(2)]
    assert len(set(given)) == 2


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "lightgbm", "instances": []}, 422, "invalid_request"),
        ({"model": 7, "instances": [{}]}, 422, "invalid_request"),
        ({"model": "lightgbm", "instances": [{"income": -1}]}, 422, "invalid_request"),
        ([], 422, "invalid_request"),
    ],
)
def test_its_errors_are_those_of_predict(
    body: Any, status: int, code: str, service: Service, client: requests.Session
) -> None:
    headers = {"X-Request-ID": "same"}
    answer = client.post(f"{service.url}/v1/predict", json=body, headers=headers)
    named = {**body, "model": FEATURES} if isinstance(body, dict) and body["model"] == "lightgbm" else body
    own = client.post(f"{service.url}/predict", json=named, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json() == own.json()


def test_it_says_its_versions_and_is_ready_with_models(base: str, service: Service, client: requests.Session) -> None:
    said = client.get(f"{base}/v1/version").json()
    assert (said["service"], said["version"]) == ("fraud_bento", fraud.__version__)
    assert [model["name"] for model in said["models"]] == [TRANSACTION, FEATURES]
    assert client.get(f"{base}/livez").status_code == 200
    ready = client.get(f"{base}/readyz")
    assert ready.status_code == 200
    assert ready.json()["aliases"] == {TRANSACTION: "staging", FEATURES: "champion"}
    assert {"name": "registry-predict", "model": FEATURES, "problem": None} in ready.json()["contracts"]
    assert "fraud_requests_total" in client.get(f"{base}/metrics").text


@pytest.mark.parametrize("path", ["/v1/admin/refresh-models", "/admin/refresh-models"])
def test_a_refresh_takes_over_what_the_alias_in_force_names(
    path: str, base: str, service: Service, client: requests.Session
) -> None:
    assert client.post(f"{base}{path}").status_code == 401
    assert client.post(f"{base}{path}", headers={"X-API-Key": ADMIN[:-1]}).status_code == 401
    served = client.get(f"{service.url}/v1/version").json()["models"][1]["digest"]
    wanted = next(digest for digest in service.digests if digest != served)
    service.registry.move(FEATURES, wanted, "champion", who="a test", why="")
    answer = client.post(f"{base}{path}", headers={"X-API-Key": ADMIN})
    assert answer.status_code == 200
    said = answer.json()
    assert said["status"] == "ready"
    assert said["wandb_look"].startswith("not asked: W&B is off here")
    assert {model["name"]: model["version"] for model in said["models"]}[FEATURES] == short(wanted)
    assert client.get(f"{base}/readyz").json()["models"][1]["digest"] == wanted


def test_old_names_of_the_environment_are_said_in_the_log(service: Service) -> None:
    said = service.log.read_text()
    for old, own in {"PORT": "BENTOML_PORT", "WORKERS": "FRAUD_WORKERS", "API_KEYS": "FRAUD_API_KEYS"}.items():
        assert f"{old} is read as {own}" in said
    assert ADMIN not in said
    assert '"level":"info"' not in "".join(line for line in said.splitlines() if '"logger":"fraud.' in line)


def test_browsers_may_call_it_from_the_old_origins(service: Service, client: requests.Session) -> None:
    headers = {"Origin": "https://pages.example", "Access-Control-Request-Method": "POST"}
    headers |= {"Access-Control-Request-Headers": "x-api-key, x-request-id, idempotency-key"}
    allowed = client.options(f"{service.url}{ROOT}/v1/predict", headers=headers)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://pages.example")
    refused = client.options(f"{service.url}/v1/predict", headers={**headers, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in refused.headers


def test_paths_under_the_prefix_are_the_services_and_others_are_not(service: Service, client: requests.Session) -> None:
    known = client.get(f"{service.url}{ROOT}/v1/decisions/order%2F2")
    assert known.json()["error"]["code"] == "unknown_transaction", "a path with a parameter and an encoded slash"
    for path in (f"{ROOT}{ROOT}/readyz", "/fraudulent/readyz", f"{ROOT}/nowhere"):
        assert client.get(service.url + path).status_code == 404, path
    bare = client.get(f"{service.url}{ROOT}", allow_redirects=False)
    assert (bare.status_code, bare.headers["location"]) == (307, f"{service.url}{ROOT}/"), (
        "for the page's relative links"
    )
    assert client.get(f"{service.url}{ROOT}/").status_code == client.get(service.url).status_code == 200
    assert client.get(f"{service.url}{ROOT}/static_content/index.css").status_code == 200, (
        "a mounted application's file"
    )


class Loads(HTMLParser):
    """What a page loads or links: the values of its `src`, `href` and `spec-url`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "spec-url")]


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_load_nothing_from_outside(page: str, base: str, client: requests.Session) -> None:
    answer = client.get(base + page)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "//" not in answer.text, "no address of another host"
    loaded = [part for part in Loads(answer.text).found if part != "data:,"]
    assert len(loaded) >= 2
    for part in loaded:
        found = client.get(urljoin(base + page, part))
        assert found.status_code == 200, part
        if part.endswith(".css"):
            assert all(url.startswith(("data:", "#")) for url in re.findall(r"url\(\"?([^)]*)", found.text))
        if part.endswith("start.js"):
            assert "//" not in found.text
            assert client.get(urljoin(base + page, "docs.json")).json()["servers"] == [{"url": ROOT}]
    sources = [s for part in answer.headers["content-security-policy"].split(";") for s in part.split()[1:]]
    hashes = [source for source in sources if source.startswith("'sha256-")]
    assert {*sources} - {*hashes} <= {"'self'", "'none'", "data:", "blob:"}


@pytest.mark.skipif(not shutil.which("chromium"), reason="opens the pages; on Debian: apt-get install chromium")
@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_a_browser_shows_the_pages_without_a_network(page: str, service: Service, tmp_path: Path) -> None:
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=8000", "--dump-dom", f"{service.url}{ROOT}{page}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "/v1/admin/refresh-models" in shown.stdout
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
