"""Contracts: chosen by a setting, each with its model, errors and name in the log; a team's own one from the docs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fraud.checks.carriers import without_id
from fraud.errors import SettingsError
from fraud.serving.app import declared, service_routes
from fraud.serving.contracts.registered import CONTRACTS, contracts_of
from fraud.serving.engine import Engine
from fraud.serving.openapi import document
from fraud.settings import ContractSettings, Settings
from tests.servers import bentoml_serve
from tests.tiny import ready_rows, store_of_tiny_models, transactions

PAGE = (Path(__file__).parent.parent / "docs" / "contracts.md").read_text()
OWN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
SPEC = "from fraud.serving.contracts.protocol import *\nfrom fraud.serving.contracts.fastapi import fastapi_errors\n"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the docs' own contract in it, as the docs say."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ours").mkdir()
    (folder / "ours" / "checkout.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def url(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    environment = {
        **store_of_tiny_models(home),
        "FRAUD_CONTRACTS": "all,ours.checkout",
        "FRAUD_DURABLE": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(own), os.environ.get("PYTHONPATH")])),
    }
    with bentoml_serve(environment, home / "log") as url:
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def row(seed: int = 1) -> dict[str, Any]:
    return ready_rows(1, seed)[0]


def test_the_docs_own_contract_is_about_forty_lines() -> None:
    assert len([line for line in OWN.splitlines() if line.strip()]) <= 42


def test_a_teams_own_contract_scores_as_predict_does(url: str, client: requests.Session) -> None:
    predicted = client.post(f"{url}/predict", json={"instances": [row()], "model": "tiny-features"}).json()
    (prediction,) = predicted["predictions"]
    answer = client.post(f"{url}/checkout/risk", json={"basket": row()})
    assert answer.json() == {
        "colour": "red" if prediction["prediction"] else "green",
        "probability": prediction["fraud_probability"],
    }
    assert answer.headers["x-fraud-decision"] == prediction["decision"]


def test_every_error_of_a_contract_has_its_shape(url: str, client: requests.Session) -> None:
    for answer, status in (
        (client.post(f"{url}/checkout/risk", data=b"{", headers={"Content-Type": "application/json"}), 400),
        (client.post(f"{url}/checkout/risk", json={"basket": {}}), 422),
        (client.post(f"{url}/checkout/risk", data=b"{}", headers={"Content-Type": "text/plain"}), 415),
        (client.put(f"{url}/checkout/risk"), 405),
        (client.get(f"{url}/checkout/nowhere"), 404),
    ):
        assert (answer.status_code, answer.json().keys()) == (status, {"oops"})
    assert client.get(f"{url}/checkouts").json()["error"]["code"] == "not_found"


def test_an_idempotency_key_is_the_id_of_a_row_without_one(url: str, client: requests.Session) -> None:
    key = {"Idempotency-Key": '"order-77"'}
    by_contract = client.post(f"{url}/checkout/risk", json={"basket": row(7)}, headers=key).json()
    named = {**row(7), "transaction_id": "order-77"}
    by_predict = client.post(f"{url}/predict", json={"instances": [named], "model": "tiny-features"}).json()
    assert by_predict["predictions"][0]["fraud_probability"] == by_contract["probability"]
    both: dict[str, Any] = {"instances": [row(7), row(8)], "model": "tiny-features"}
    ids = [p["transaction_id"] for p in client.post(f"{url}/predict", json=both, headers=key).json()["predictions"]]
    assert ids == ["order-77:0", "order-77:1"]
    other = client.post(f"{url}/checkout/risk", json={"basket": row(8)}, headers=key)
    assert (other.status_code, other.json().keys()) == (409, {"oops"})
    for wrong in ("", "k" * 129, "caf\u00e9"):
        given = {"Idempotency-Key": wrong.encode("latin-1")}
        assert client.post(f"{url}/checkout/risk", json={"basket": row(7)}, headers=given).status_code == 422
    query = {"model": "tiny-features"}
    shown = client.get(f"{url}/v1/decisions/order-77", params=query).json()["decision"]
    assert (shown["contract"], shown["fraud_probability"]) == ("checkout", by_contract["probability"])
    assert client.get(f"{url}/v1/decisions/order-77:1", params=query).json()["decision"]["contract"] is None


def test_an_idempotency_key_is_the_id_of_a_transaction_too(url: str, client: requests.Session) -> None:
    def predict(instances: list[Any], key: str = "order-88") -> Any:
        body: dict[str, Any] = {"instances": instances}
        return client.post(f"{url}/predict", json=body, headers={"Idempotency-Key": key}).json()

    first, second = map(without_id, transactions(2, 31))
    (one,) = predict([first])["predictions"]
    assert one["transaction_id"] == "order-88"
    assert predict([first])["predictions"] == [one]
    assert predict([{**first, "transaction_id": "order-88"}], "other")["predictions"] == [one]
    assert predict([second])["error"]["code"] == "idempotency_conflict"
    assert [p["transaction_id"] for p in predict([second, first], "k")["predictions"]] == ["k:0", "k:1"]
    refused = predict([{"amount": 1}])["error"]
    assert refused["message"].startswith("missing event_time, customer_id")
    assert predict([{}])["error"]["message"].startswith("missing event_time, customer_id")


def test_a_request_id_traces_and_makes_no_repeat(url: str, client: requests.Session) -> None:
    for seed in (20, 21):
        answer = client.post(f"{url}/checkout/risk", json={"basket": row(seed)}, headers={"X-Request-ID": "trace-1"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "trace-1")
    found = client.get(f"{url}/v1/decisions", params={"limit": 5}).json()["decisions"]
    assert [d["request_id"] for d in found if d["contract"] == "checkout"][:2] == ["trace-1", "trace-1"]


def test_readiness_says_what_each_contract_scores_with(url: str, client: requests.Session) -> None:
    ready = client.get(f"{url}/readyz")
    contracts = {contract["name"]: contract for contract in ready.json()["contracts"]}
    assert contracts.keys() == {*CONTRACTS, "checkout"}
    assert contracts["checkout"] == {"name": "checkout", "model": "tiny-features", "problem": None}


def test_a_contract_without_a_model_answers_503_and_readiness_stays(
    own: Path, tmp_path: Path, client: requests.Session
) -> None:
    environment = store_of_tiny_models(tmp_path)
    environment |= {
        "FRAUD_MODEL": environment["FRAUD_MODEL"].split(",")[0],
        "FRAUD_CONTRACTS": "all,ours.checkout",
        "PYTHONPATH": str(own),
    }
    with bentoml_serve(environment, tmp_path / "log") as url:
        ready = client.get(f"{url}/readyz")
        assert ready.status_code == 200
        checkout = {contract["name"]: contract for contract in ready.json()["contracts"]}["checkout"]
        problem = "tiny-transaction: it is a transaction model; a features model is needed"
        assert checkout == {"name": "checkout", "model": None, "problem": problem}
        refused = client.post(f"{url}/checkout/risk", json={"basket": row()})
        assert (refused.status_code, refused.json()) == (503, {"oops": problem})
        assert client.get(f"{url}/health").status_code == 503
        assert client.get(f"{url}/health").json().keys() == {"detail"}


def settings_of(names: str = "all", models: str = "") -> Settings:
    given = {"FRAUD_CONTRACTS": names, "FRAUD_CONTRACT_MODELS": models}
    return Settings(contracts=ContractSettings.model_validate(given))


def test_contracts_are_chosen_by_name() -> None:
    chosen = contracts_of(Engine(), settings_of("application-score"))
    assert [model.contract.name for model in chosen] == ["application-score"]
    assert contracts_of(Engine(), settings_of("")) == []
    every = contracts_of(Engine(), settings_of("application-score,all"))
    assert sorted(model.contract.name for model in every) == sorted(CONTRACTS)


@pytest.mark.parametrize(
    ("names", "models", "message"),
    [
        ("aplication-score", "", "did you mean 'application-score'.*allowed: all, application-score"),
        ("nowhere.contract", "", "module 'nowhere.contract' cannot be imported: ModuleNotFoundError"),
        ("broken.syntax", "", "module 'broken.syntax' cannot be imported: SyntaxError"),
        ("broken.empty", "", "module 'broken.empty' has no CONTRACT"),
        ("all,broken.taken", "", "module 'broken.taken' takes the name 'application-score'"),
        ("broken.routeless", "", "contract 'routeless' has no routes: KeyError: 'nothing'"),
        ("all,broken.claims", "", "POST /predict is declared twice"),
        ("all", "application-score", "write contract=model"),
        ("all", "checkout=loans", "FRAUD_CONTRACT_MODELS names 'checkout'; contracts here: "),
        ("all", "application-score=a,application-score=b", "two models"),
    ],
)
def test_a_wrong_setting_is_refused_before_a_worker_starts(
    names: str, models: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    made = 'CONTRACT = Contract("{}", fastapi_errors(), lambda model, settings: {}, needs_probability("features"))\n'
    claim = '[Route("POST", "/predict", None, None, "")]'
    for name, source in {
        "syntax": "CONTRACT = (",
        "empty": "",
        "taken": SPEC + made.format("application-score", "[]"),
        "routeless": SPEC + made.format("routeless", '{}["nothing"]'),
        "claims": SPEC + made.format("claims", claim),
    }.items():
        (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(SettingsError, match=message):
        declared(settings_of(names, models))


def test_the_document_has_every_contract_and_no_dangling_name() -> None:
    engine, settings = Engine(), settings_of()
    contracts = contracts_of(engine, settings)
    made = document(service_routes(engine, settings, contracts), "Fraud Bento", "", "1")
    text = json.dumps(made)
    names = {reference.rpartition("/")[2] for reference in re.findall(r'"\$ref": "([^"]*)"', text)}
    assert names <= made["components"]["schemas"].keys()
    for contract in CONTRACTS.values():
        for route in contract.routes(contracts[0], settings):
            assert route.method.lower() in made["paths"][route.path]
