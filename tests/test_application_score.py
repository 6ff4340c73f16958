"""The contract application-score on a real server: its answers, its errors, and every form of a value."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests

from fraud.models.registry import Registry
from fraud.schema import Feature, FeatureSpec, RowDecoder
from fraud.serving.contracts.application_features import EMAIL, EMAIL_CODES, BadFeatures, FeatureReader
from fraud.serving.contracts.application_score import read_body
from fraud.serving.security import new_key
from tests.servers import bentoml_serve
from tests.tiny import ready_rows, register_tiny, store_of_tiny_models

CLIENT = Path(__file__).parent / "clients" / "application_score.php"
ROW = ready_rows(1, 5)[0]
SECRET, KEY = new_key(["admin", "score", "read"])
ADMIN = {"X-API-Key": SECRET}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """A server whose one model, of ready features, follows the registry."""
    environment = store_of_tiny_models(home)
    register_tiny(home, "features", "production")
    environment |= {"FRAUD_DURABLE": "false", "FRAUD_API_KEYS": KEY.line(), "FRAUD_MODEL": "tiny-features"}
    with bentoml_serve(environment, home / "log") as url:
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


class Scoring:
    """The service as a client of the contract sees it."""

    def __init__(self, url: str, client: requests.Session) -> None:
        self.url = url
        self.client = client

    def score(self, features: Any, **headers: str) -> requests.Response:
        """Post features as Python writes them, NaN and Infinity too."""
        body = json.dumps({"features": features, "request_id": None})
        return self.post(body, **headers)

    def post(self, body: str, **headers: str) -> requests.Response:
        given = {"Content-Type": "application/json", **headers}
        return self.client.post(f"{self.url}/api/v1/score", data=body.encode(), headers=given)

    def predicted(self, row: dict[str, Any], path: str = "predict") -> dict[str, Any]:
        answer = self.client.post(f"{self.url}/{path}", json={"instances": [row]}).json()
        found: dict[str, Any] = answer["predictions"][0]
        return found


@pytest.fixture(scope="module")
def scoring(url: str, client: requests.Session) -> Scoring:
    return Scoring(url, client)


def test_a_score_says_what_explain_says(scoring: Scoring) -> None:
    for row in ready_rows(8, 3):
        said = scoring.predicted(row, "explain")
        answer = scoring.score(row)
        probability, version = said["fraud_probability"], said["model"]["version"]
        strongest = sorted(said["contributions"].items(), key=lambda item: -abs(item[1]))[:5]
        scored = answer.json()
        assert isinstance(scored.pop("inference_time_ms"), int)
        assert scored == {
            "confidence_score": probability,
            "confidence_band": "low" if probability < 0.3 else "medium" if probability < 0.7 else "high",
            "top_features": [
                {
                    "feature": name,
                    "importance": value,
                    "direction": "increases_risk" if value > 0 else "decreases_risk",
                }
                for name, value in strongest
            ],
            "model_version": version,
            "calibration_version": f"{version}_isotonic",
        }
        assert answer.headers["x-fraud-decision"] == said["decision"]


def test_every_band_occurs_among_the_scores(scoring: Scoring) -> None:
    assert {scoring.score(row).json()["confidence_band"] for row in ready_rows(40, 4)} == {"low", "medium", "high"}


def test_values_in_every_form_give_the_score_of_the_canonical_ones(scoring: Scoring) -> None:
    row = {"income": 50000.0, "velocity": -0.25, "has_phone": True, "email_domain": "free"}
    expected = scoring.predicted(row)["fraud_probability"]
    changes: tuple[dict[str, Any], ...] = (
        {"income": "50000"},
        {"income": 50000, "velocity": "-2.5e-1"},
        {"has_phone": 1},
        {"has_phone": "1"},
        {"has_phone": 1.0, "extra": None, "other": [1, {"a": "b"}]},
        {"transaction_id": "t-1"},
        {"transaction_id": []},
    )
    for change in changes:
        answer = scoring.score({**row, **change})
        assert (answer.status_code, answer.json()["confidence_score"]) == (200, expected), change
    escaped = json.dumps({"features": row}).replace("income", "\\u0069ncome")
    assert scoring.post(escaped).json()["confidence_score"] == expected
    flag = scoring.score({**row, "income": True}).json()["confidence_score"]
    assert flag == scoring.predicted({**row, "income": 1.0})["fraud_probability"]


def test_a_missing_value_is_null_where_the_model_may_miss_it(scoring: Scoring) -> None:
    expected = scoring.predicted({**ROW, "velocity": None})["fraud_probability"]
    assert scoring.score({**ROW, "velocity": None}).json()["confidence_score"] == expected
    without = {name: value for name, value in ROW.items() if name != "velocity"}
    assert scoring.score(without).json() == {"detail": "Missing features: ['velocity']"}


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"income": math.nan}, "Invalid value for feature income: nan"),
        ({"income": math.inf}, "Invalid value for feature income: inf"),
        ({"income": -math.inf}, "Invalid value for feature income: -inf"),
        ({"income": "NaN"}, "Invalid value for feature income: nan"),
        ({"income": "-Infinity"}, "Invalid value for feature income: -inf"),
        ({"income": "1e999"}, "Invalid value for feature income: inf"),
        ({"income": 10**400}, "Invalid value for feature income: inf"),
        ({"income": "much"}, "Cannot encode categorical feature income with value much"),
        ({"income": None}, "Unsupported data type for feature income: null"),
        ({"income": [1]}, "Unsupported data type for feature income: array"),
        ({"has_phone": {}}, "Unsupported data type for feature has_phone: object"),
        ({"has_phone": 2}, "Invalid value for feature has_phone: Expected `bool`"),
        ({"income": -1}, "Invalid value for feature income: Expected `float` >= 0.0"),
        ({"email_domain": "moon"}, "Invalid value for feature email_domain: unknown category 'moon'"),
        ({"email_domain": 7}, "Invalid value for feature email_domain: unknown category '7'"),
        ({"email_domain": 10**400}, "Invalid value for feature email_domain: unknown category '1000"),
        ({"email_domain": 1e999}, "Invalid value for feature email_domain: inf"),
    ],
)
def test_a_value_that_is_none_is_refused_with_400(scoring: Scoring, change: dict[str, Any], detail: str) -> None:
    answer = scoring.score({**ROW, **change})
    assert (answer.status_code, answer.json().keys()) == (400, {"detail"})
    assert answer.json()["detail"].startswith(detail)


def test_missing_features_are_named(scoring: Scoring) -> None:
    answer = scoring.score({"income": 1.0, "email_domain": "free", "noise": 1})
    assert (answer.status_code, answer.json()) == (400, {"detail": "Missing features: ['velocity', 'has_phone']"})


@pytest.mark.parametrize(
    ("body", "kind", "loc"),
    [
        ('{"features": {}}', "value_error", ["body", "features"]),
        ('{"features": { }, "request_id": "r"}', "value_error", ["body", "features"]),
        ('{"features": []}', "dict_type", ["body", "features"]),
        ('{"features": null}', "dict_type", ["body", "features"]),
        ('{"feature": {"a": 1}}', "missing", ["body", "features"]),
        ('{"features": {"a": 1}, "request_id": 7}', "value_error", ["body", "request_id"]),
        ("[]", "value_error", ["body"]),
        ("{", "json_invalid", ["body"]),
        ('{"features": {"email_domain": "\\ud800"}}', "json_invalid", ["body"]),
        ("", "json_invalid", ["body"]),
        ('{"features": {"a": 1}, "request_id": NaN}', "json_invalid", ["body"]),
    ],
)
def test_a_malformed_body_is_refused_in_fastapis_shape(scoring: Scoring, body: str, kind: str, loc: list[str]) -> None:
    answer = scoring.post(body)
    (invalid,) = answer.json()["detail"]
    assert (answer.status_code, invalid["type"], invalid["loc"]) == (422, kind, loc)
    assert invalid["msg"]


def test_extra_features_are_counted_and_each_is_logged_once(scoring: Scoring, home: Path) -> None:
    for _ in range(3):
        assert scoring.score({**ROW, "shoe_size": 43, "transaction_id": "x"}).status_code == 200
    assert (home / "log").read_text().count("shoe_size") == 1


def test_an_idempotency_key_makes_one_decision_with_predict_and_a_request_id_none(scoring: Scoring) -> None:
    by_predict = scoring.predicted({**ROW, "transaction_id": "a-1"})["fraud_probability"]
    key = {"Idempotency-Key": "a-1"}
    assert scoring.score(ROW, **key).json()["confidence_score"] == by_predict
    conflict = scoring.score({**ROW, "income": 1.0}, **key)
    assert (conflict.status_code, conflict.json().keys()) == (409, {"detail"})
    for income in (1.0, 2.0):
        traced = scoring.post(json.dumps({"features": {**ROW, "income": income}, "request_id": "r-77"}))
        assert traced.status_code == 200
    found = scoring.client.get(f"{scoring.url}/v1/decisions").json()["decisions"]
    assert [(d["request_id"], d["contract"]) for d in found[:2]] == [("r-77", "application-score")] * 2
    assert found[0]["transaction_id"] != found[1]["transaction_id"]


def test_a_name_that_is_no_text_is_quoted_without_what_an_answer_cannot_carry(scoring: Scoring) -> None:
    answer = scoring.score({"vel\ud800ocity": math.nan})
    assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid value for feature vel?ocity: nan"})


def test_the_model_and_the_health_are_told(scoring: Scoring) -> None:
    info = scoring.client.get(f"{scoring.url}/api/v1/model/info").json()
    health = scoring.client.get(f"{scoring.url}/health").json()
    version = scoring.predicted(ROW)["model"]["version"]
    assert (info["model_version"], info["feature_names"]) == (version, list(ROW))
    assert info["metadata"]["calibration_version"] == f"{version}_isotonic"
    assert health == {
        "status": "healthy",
        "model_version": version,
        "model_loaded_at": info["loaded_at"],
        "features_count": 4,
    }


def test_a_reload_promotes_the_version_that_it_names_and_an_unknown_one_changes_nothing(
    scoring: Scoring, home: Path
) -> None:
    def reload(query: str = "", headers: dict[str, str] = ADMIN) -> requests.Response:
        return scoring.client.post(f"{scoring.url}/api/v1/model/reload{query}", headers=headers)

    first = scoring.score(ROW).json()
    second = register_tiny(home, "features", seed=1)
    assert reload(headers={}).status_code == 401
    unknown = reload("?version=000000000000")
    assert (unknown.status_code, unknown.json().keys()) == (500, {"detail"})
    assert unknown.json()["detail"].startswith("Failed to reload model: ")
    wrong = reload("?model=x")
    assert (wrong.status_code, wrong.json()["detail"][0]["loc"]) == (422, ["query"])
    assert scoring.score(ROW).json()["model_version"] == first["model_version"]
    assert reload(f"?version={second}").json() == {"status": "success", "version": second}
    assert scoring.score(ROW).json()["model_version"] == second
    assert reload().json() == {"status": "success", "version": second}
    moves = [event for event in Registry.beside(home).events("tiny-features") if event.alias == "production"]
    assert moves[0].why.startswith("/api/v1/model/reload, request ")
    assert reload(f"?version={first['model_version']}").json()["version"] == first["model_version"]
    assert scoring.score(ROW).json()["confidence_score"] == first["confidence_score"]


@pytest.mark.skipif(not shutil.which("php"), reason="runs a PHP client; on Debian: apt-get install php-cli php-curl")
def test_a_php_client_runs_as_it_is(scoring: Scoring) -> None:
    rows = ready_rows(3, 9)
    done = subprocess.run(["php", CLIENT, scoring.url, json.dumps(rows)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["healthy"] is True
    assert [score["confidence_score"] for score in said["scores"]] == [
        scoring.predicted(row)["fraud_probability"] for row in rows
    ]
    assert said["info"]["model_version"] == said["scores"][0]["model_version"]
    status, _, body = said["refused"].partition(": ")
    assert (status, json.loads(body)["detail"][0]["loc"]) == ("422", ["body", "features"])


def spec_of(email: Feature) -> FeatureSpec:
    return FeatureSpec("features", (Feature("income", "request"), email))


NAMES = tuple(EMAIL_CODES)


@pytest.mark.parametrize(
    ("feature", "given", "column"),
    [
        (Feature(EMAIL, "request"), "canadian_provider", 1.0),
        (Feature(EMAIL, "request"), "moon", 4.0),
        (Feature(EMAIL, "request"), "2", 4.0),
        (Feature(EMAIL, "request"), 2, 2.0),
        (Feature(EMAIL, "request", "categorical", NAMES[::-1]), "disposable", 1.0),
        (Feature(EMAIL, "request", "categorical", NAMES[::-1]), "moon", 0.0),
        (Feature(EMAIL, "request", "categorical", NAMES[::-1]), 0, 4.0),
        (Feature(EMAIL, "request", "categorical", ("0", "1", "2", "3", "4")), "business", 2.0),
        (Feature(EMAIL, "request", "categorical", ("0", "1", "2", "3", "4")), "moon", 4.0),
        (Feature(EMAIL, "request", "categorical", ("0", "1", "2", "3", "4")), 3, 3.0),
        (Feature(EMAIL, "request", "categorical", ("free", "business"), missing=True), "business", 1.0),
        (Feature(EMAIL, "request", "categorical", ("free", "business"), missing=True), "moon", math.nan),
        (Feature(EMAIL, "request", "categorical", ("free", "business"), unknown="missing"), "moon", math.nan),
    ],
)
def test_an_email_domain_category_is_named_or_numbered_as_the_model_has_it(
    feature: Feature, given: object, column: float
) -> None:
    spec = spec_of(feature)
    features = msgspec.Raw(json.dumps({"income": 1, EMAIL: given}).encode())
    row, extra = FeatureReader().row(features, spec)
    assert extra == 0
    assert RowDecoder(spec).decode(row, "$").values == pytest.approx((1.0, column), nan_ok=True, abs=0, rel=0)


def test_a_category_that_the_model_cannot_take_is_refused() -> None:
    spec = spec_of(Feature(EMAIL, "request", "categorical", ("free", "business")))
    row, _ = FeatureReader().row(msgspec.Raw(b'{"income": 1, "email_domain_category": "moon"}'), spec)
    with pytest.raises(Exception, match="unknown category 'moon'; allowed: free, business"):
        RowDecoder(spec).decode(row, "$")


def test_many_and_long_features_are_refused_with_400() -> None:
    spec = spec_of(Feature(EMAIL, "request"))
    many = msgspec.Raw(json.dumps({f"f{i}": i for i in range(1001)}).encode())
    with pytest.raises(BadFeatures, match="1001 fields arrived; 1000 are allowed"):
        FeatureReader().row(many, spec)
    long = read_body(b'{"features": {"income": "' + b"1" * 70_000 + b'"}}').features
    with pytest.raises(BadFeatures, match="65536 are allowed"):
        FeatureReader().row(long, spec)
