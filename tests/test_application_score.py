"""The contract application-score on a real server: its answers, its errors, and every form of a value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import requests

from tests.servers import bentoml_serve
from tests.tiny import ready_rows, store_of_tiny_models


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("home")
    with bentoml_serve({**store_of_tiny_models(home), "FRAUD_DURABLE": "false"}, home / "log") as url:
        yield url


@pytest.fixture(scope="module")
def client() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def test_a_score_says_what_predict_and_explain_say(url: str, client: requests.Session) -> None:
    for row in ready_rows(8, 3):
        explained = client.post(f"{url}/explain", json={"instances": [row], "model": "tiny-features"}).json()
        (said,) = explained["predictions"]
        answer = client.post(f"{url}/api/v1/score", json={"features": row, "request_id": None})
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


def test_a_name_that_is_no_text_is_quoted_without_what_an_answer_cannot_carry(
    url: str, client: requests.Session
) -> None:
    body = json.dumps({"features": {"vel\ud800ocity": math.nan}})
    answer = client.post(f"{url}/api/v1/score", data=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (400, {"detail": "Invalid value for feature vel?ocity: nan"})
