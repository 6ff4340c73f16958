"""Profiles over HTTP: readable, resettable, refused without the scope, and noted in the log."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Self

import pytest

from fraud.decisions.labels import Label
from fraud.history.profile import Profile, readable_profile
from fraud.history.state import CUSTOMER, new_states
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.serving.front_door import FrontDoor
from fraud.serving.labels import label_routes
from fraud.serving.profiles import profile_routes
from fraud.serving.routes import Router
from fraud.stores.protocol import Store
from fraud.stores.sqlite import SqliteStore
from tests.asking import ask
from tests.tiny import START_MS, transactions


async def elsewhere(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    raise AssertionError("nothing is asked of what stands behind the front door")


class Service:
    """A pipeline, and the routes of profiles and labels over its store."""

    def __init__(self, scorer: Scorer, store: Store) -> None:
        self.runner = asyncio.Runner()
        self.pipeline = Pipeline({"m": scorer}, store)
        routes = [*label_routes(lambda: self.pipeline, 300_000), *profile_routes(lambda: self.pipeline.store)]
        self.router = Router(routes)
        self.door = FrontDoor(self.router, elsewhere)
        self.headers: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.pipeline.close())
        self.runner.close()

    def score(self, instances: list[dict[str, Any]]) -> None:
        self.runner.run(ask(self.pipeline, instances))

    def call(self, method: str, path: str, body: Any = b"") -> tuple[int, Any]:
        sent: list[MutableMapping[str, Any]] = []
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def receive() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": content}

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": []}
        scope["query_string"] = query.encode()
        self.runner.run(self.door(scope, receive, send))
        self.headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], json.loads(sent[1]["body"] or b"null")

    def outcomes(self, labels: list[dict[str, Any]]) -> list[str]:
        """Tell labels that are all taken; return what became of each."""
        status, answer = self.call("POST", "/v1/labels", {"labels": labels})
        assert status == 200, answer
        return [row["outcome"] for row in answer["labels"]]


@pytest.fixture
def service(scorer: Scorer, tmp_path: Path) -> Iterator[Service]:
    with Service(scorer, SqliteStore(tmp_path / "history.db", durable=False)) as service:
        yield service


def test_a_profile_says_what_a_person_asks(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    instances = [
        {**instance, "customer_id": "anna/ö", "merchant_id": f"m{i % 2}", "amount": 10.0 * (i + 1)}
        for i, instance in enumerate(transactions(4, 41))
    ]
    service.score(instances)
    with caplog.at_level(logging.INFO, "fraud.serving.profiles"):
        status, profile = service.call("GET", "/v1/users/anna%2F%C3%B6/profile")
    assert status == 200
    assert profile["customer_id"] == "anna/ö"
    assert profile["transactions"] == 4
    assert profile["amount_mean"] == 25.0
    assert profile["amount_standard_deviation"] == pytest.approx(12.91, abs=0.01)
    assert profile["windows"]["7d"] == {"transactions": 4, "amount_mean": 25.0, "amount_max": 40.0, "frauds": 0}
    assert profile["known_merchants_recent"] == 2
    assert [r["amount"] for r in profile["recent"]] == [40.0, 30.0, 20.0, 10.0]
    assert profile["last_seen"] == instances[-1]["event_time"].replace("+00:00", "Z")
    assert profile["usual_weekdays"] == ["thursday"]
    assert profile["state_bytes"] < 2000
    assert "profile read: customer" in caplog.text
    assert "anna" not in caplog.text


def test_windows_end_with_the_last_transaction_and_not_with_a_label(service: Service) -> None:
    """Labels become known days after the transactions, and later than the days that are kept."""
    instances = [{**instance, "customer_id": "cara"} for instance in transactions(2, 43)]
    service.score(instances)
    before = service.call("GET", "/v1/users/cara/profile")[1]["windows"]
    for days in (3, 60):
        label_time_ms = START_MS + days * 86_400_000
        told = service.pipeline.store.apply_labels([Label(instances[days % 2]["transaction_id"], True, label_time_ms)])
        assert service.runner.run(told) == ["applied"]
        profile = service.call("GET", "/v1/users/cara/profile")[1]
        frauds = {"transactions": 2, "frauds": 1} if days == 3 else {"transactions": 0, "frauds": 0}
        assert {key: profile["windows"]["1d"][key] for key in frauds} == frauds
        assert before["1d"]["transactions"] == 2
    assert (profile["transactions"], profile["frauds"]) == (2, 2)


def test_a_reset_leaves_nothing(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.score([{**transactions(1, 42)[0], "customer_id": "ben"}])
    with caplog.at_level(logging.INFO, "fraud.serving.profiles"):
        assert service.call("DELETE", "/v1/users/ben/profile") == (200, {"customer_id": "ben", "reset": True})
    assert "profile reset: customer" in caplog.text
    for method in ("GET", "DELETE"):
        status, answer = service.call(method, "/v1/users/ben/profile")
        assert (status, answer["error"]["code"]) == (404, "unknown_customer")
        assert answer["error"]["message"] == "nothing is known of this customer"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/users//profile", 422, "invalid_request"),
        ("GET", f"/v1/users/{'x' * 129}/profile", 422, "invalid_request"),
        ("GET", "/v1/users/%ff/profile", 422, "invalid_request"),
        ("GET", "/v1/users/%00/profile", 422, "invalid_request"),
        ("POST", "/v1/users/anna/profile", 405, "method_not_allowed"),
        ("GET", "/v1/users/anna", 404, "not_found"),
    ],
)
def test_what_is_refused(service: Service, method: str, path: str, status: int, code: str) -> None:
    answered, answer = service.call(method, path)
    assert (answered, answer["error"]["code"]) == (status, code)


def test_reading_and_resetting_ask_for_their_scopes(service: Service) -> None:
    for method, scope in (("GET", "read"), ("HEAD", "read"), ("DELETE", "admin")):
        route, names = service.router.find({"path": "/v1/users/anna/profile", "method": method})
        assert (route.scope, names) == (scope, {"id": "anna"})


def test_a_profile_of_nothing_divides_by_nothing() -> None:
    profile = readable_profile(Profile("x", new_states(CUSTOMER, 1)))
    assert profile["transactions"] == 0
    assert profile["first_seen"] is None
    assert profile["windows"]["30d"]["amount_mean"] is None
