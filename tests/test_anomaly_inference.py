"""The contract anomaly-inference on a real server, with an anomaly model beside the champion, and without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from fraud.models.scorer import Scorer
from fraud.schema import Feature, FeatureSpec, Role
from fraud.serving.contracts.anomaly_inference import FEATURES, misfit
from fraud.serving.security import new_key
from tests.servers import bentoml_serve
from tests.tiny import ready_rows, store_of_tiny_models, tiny_anomaly_model, transactions

SECRET, KEY = new_key(["admin", "score", "read"])
THRESHOLD = 0.55


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def anomaly(home: Path) -> Scorer:
    tiny_anomaly_model(home)
    return Scorer.load(home / "anomaly")


@pytest.fixture(scope="module")
def url(home: Path, anomaly: Scorer) -> Iterator[str]:
    environment = store_of_tiny_models(home)
    tag = f"tiny-anomaly:{anomaly.name.version}"
    environment |= {"FRAUD_DURABLE": "false", "FRAUD_API_KEYS": KEY.line(), "FRAUD_ANOMALY_MODEL": tag}
    environment |= {"ANOMALY_THRESHOLD": str(THRESHOLD)}
    with bentoml_serve(environment, home / "log") as url:
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def post(url: str, client: requests.Session, user: Any, **transaction: Any) -> requests.Response:
    return client.post(f"{url}/v1/inference", json={"user_id": user, "transaction": transaction})


def explained(url: str, client: requests.Session, row: dict[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = client.post(f"{url}/explain", json={"instances": [row]}).json()["predictions"][0]
    return said


def test_a_verdict_is_that_of_explain_with_the_features_that_were_scored(
    url: str, client: requests.Session, anomaly: Scorer
) -> None:
    anomalies = set()
    for i, row in enumerate(transactions(60, 21, customers=2)):
        amount = 8_000.0 if i % 9 == 8 else row["amount"]
        merchant, user = row.get("merchant_id"), f"user-{row['customer_id']}"
        sent = {"tx_id": f"in-{i}", "amount": amount, "currency": "EUR", "merchant": merchant}
        answer = post(url, client, user, **sent, time=row["event_time"])
        assert answer.status_code == 200, answer.text
        said = answer.json()
        again = explained(
            url,
            client,
            {
                "transaction_id": f"in-{i}",
                "customer_id": user,
                "amount": amount,
                "merchant_id": merchant,
                "event_time": row["event_time"],
            },
        )
        assert {name: said[f] for name, f in (("severity", "severity"), ("explanation", "explanation"))} == {
            name: again["anomaly"][name] for name in ("severity", "explanation")
        }
        assert said["anomaly_score"] == again["anomaly"]["score"]
        assert said["is_anomaly"] == (said["anomaly_score"] > THRESHOLD)
        assert said["model_version"] == anomaly.name.version == again["anomaly_model"]["version"]
        assert answer.headers["x-fraud-decision"] == again["decision"]
        assert list(said["features"]) == list(FEATURES)
        assert said["features"]["is_new_user"] is (i < 20 or said["features"]["is_new_user"])
        assert said["features"]["global_amount_flag"] is (amount > 500.0)
        anomalies.add(said["is_anomaly"])
    assert anomalies == {True, False}
    assert said["features"]["is_new_user"] is False
    assert said["features"]["time_since_last"] > 0


def test_the_first_transaction_of_a_user_has_no_habits(url: str, client: requests.Session) -> None:
    features = post(url, client, "nobody", tx_id="first", amount=20, merchant="m1").json()["features"]
    assert features == {
        "log_amount": pytest.approx(2.9957, abs=1e-4),
        "amount_zscore": None,
        "amount_percentile": None,
        "velocity_ratio": None,
        "hour_deviation": None,
        "day_deviation": None,
        "time_since_last": None,
        "merchant_familiarity": 0.0,
        "is_new_user": True,
        "global_amount_flag": False,
    }


def test_the_same_transaction_without_a_time_is_the_same_again(url: str, client: requests.Session) -> None:
    first = post(url, client, 77, tx_id=1, amount=12.5, currency="EUR", merchant=5)
    again = post(url, client, "77", tx_id="1", amount=12.5, currency="EUR", merchant="5")
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    other = post(url, client, 77, tx_id=1, amount=13.5, currency="EUR", merchant=5)
    assert other.status_code == 409
    assert "scored before with other contents" in other.json()["detail"]
    headers = {"X-API-Key": SECRET}
    shown = client.get(f"{url}/v1/decisions/1", headers=headers).json()["decision"]
    assert (shown["contract"], shown["anomaly"]["score"]) == ("anomaly-inference", first.json()["anomaly_score"])
    profile = client.get(f"{url}/v1/users/77/profile", headers=headers).json()
    assert (profile["customer_id"], profile["transactions"]) == ("77", 1)


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ("{", ["body"]),
        ('{"user_id": "u"}', ["body", "transaction"]),
        ('{"transaction": {"tx_id": "t", "amount": 1}}', ["body", "user_id"]),
        ('{"user_id": "u", "transaction": []}', ["body", "transaction"]),
        ('{"user_id": "u", "transaction": {"amount": 1}}', ["body", "transaction", "tx_id"]),
        ('{"user_id": "u", "transaction": {"tx_id": "bad-1"}}', ["body", "transaction", "amount"]),
        ('{"user_id": "u", "transaction": {"tx_id": "bad-2", "amount": -1}}', ["body", "transaction", "amount"]),
        ('{"user_id": "u", "transaction": {"tx_id": "bad-3", "amount": "x"}}', ["body", "transaction", "amount"]),
        ('{"user_id": [], "transaction": {"tx_id": "bad-4", "amount": 1}}', ["body", "user_id"]),
        ('{"user_id": "u", "transaction": {"tx_id": "b", "amount": 1, "time": "x"}}', ["body", "transaction", "time"]),
    ],
)
def test_errors_have_the_contracts_shape_and_its_names(
    url: str, client: requests.Session, body: str, loc: list[str]
) -> None:
    answer = client.post(f"{url}/v1/inference", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    (detail,) = answer.json()["detail"]
    assert detail["loc"] == loc, detail


def test_health_names_the_model_that_measures(url: str, client: requests.Session, anomaly: Scorer) -> None:
    answer = client.get(f"{url}/v1/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "healthy")
    assert answer.json()["model_version"] == anomaly.name.version
    ready = client.get(f"{url}/readyz").json()
    assert ready["anomaly_model"]["digest"] == anomaly.name.digest
    assert ready["anomaly_model"]["beside"] == ["tiny-transaction"]
    assert {"name": "anomaly-inference", "model": "tiny-transaction", "problem": None} in ready["contracts"]


def test_a_ready_features_model_beside_it_says_that_it_has_no_anomaly(url: str, client: requests.Session) -> None:
    row = ready_rows(1, 3)[0]
    (said,) = client.post(f"{url}/predict", json={"instances": [row], "model": "tiny-features"}).json()["predictions"]
    assert "anomaly" not in said
    assert said["degraded"] == ["anomaly"]


def test_without_a_model_that_measures_anomalies_it_says_so(tmp_path: Path, client: requests.Session) -> None:
    environment = {**store_of_tiny_models(tmp_path), "FRAUD_DURABLE": "false"}
    with bentoml_serve(environment, tmp_path / "log") as url:
        for answer in (post(url, client, "u", tx_id="t", amount=1), client.get(f"{url}/v1/health")):
            assert answer.status_code == 503
            assert "FRAUD_ANOMALY_MODEL names no model that does" in answer.json()["detail"]


def test_a_model_that_needs_more_than_clients_send_does_not_fit(anomaly: Scorer) -> None:
    assert misfit(anomaly) is None
    strict = Scorer(anomaly.bundle)
    roles = (Role("device_id"), Role("merchant_id"))
    strict.spec = FeatureSpec("transaction", (Feature("age", "request"), *anomaly.spec.features[-1:]), roles)
    assert misfit(strict) == "it needs age, device_id, which clients of the contract do not send"
