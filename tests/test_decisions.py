"""Recorded decisions can be asked for: by id and by question, in every store, page by page."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from typer.testing import CliRunner

from fraud.cli.decisions import app
from fraud.decisions.labels import Label
from fraud.decisions.queries import DecisionQuery, Position
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest
from fraud.history.state import TRANSACTION
from fraud.models.scorer import Scorer
from fraud.serving.decisions import decision_routes
from fraud.serving.front_door import FrontDoor
from fraud.serving.routes import Router
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store
from tests.test_profiles import Service, elsewhere
from tests.test_stores import of_run
from tests.tiny import START_MS, transactions

CHOICES: list[Literal["approve", "review", "decline"]] = ["approve", "review", "decline"]
DIGESTS = [f"sha256:{letter * 64}" for letter in "ab"]


def records(run: str, n: int = 40) -> list[DecisionRecord]:
    """Decisions of some customers and merchants, several of one millisecond, by two versions."""
    rng = np.random.default_rng(3)
    return [
        DecisionRecord(
            *(f"{run}t{i}", b"", f"{run}m", DIGESTS[i % 2], b"", 0.0, 0.5, False),
            risk_level="low",
            decision=CHOICES[rng.integers(3)],
            degraded=[],
            event_time_ms=START_MS,
            processing_time_ms=START_MS + int(rng.integers(0, 8)) * 1000,
            request_id="",
            customer_id=f"{run}c{rng.integers(4)}",
            merchant_id=None if i % 5 == 0 else f"{run}m{rng.integers(3)}",
            amount=1.0,
        )
        for i in range(n)
    ]


async def walk(store: Store, **question: Any) -> list[str]:
    """All pages of a question, three at a time."""
    names: list[str] = []
    after: Position | None = None
    while True:
        page = await store.find(DecisionQuery(**question, after=after, limit=3))
        assert len(page.found) <= 3
        names += [str(found.record.transaction_id) for found in page.found]
        if page.next is None:
            return names
        after = Position.of(page.next.cursor())


def test_every_question_finds_what_a_plain_filter_does(opened: Callable[[], Store]) -> None:
    async def run() -> None:
        store = opened()
        name = f"q{id(store)}-"
        made = records(name)
        for start in range(0, len(made), 7):
            some = made[start : start + 7]
            await store.record(some, np.zeros(len(some), TRANSACTION))
        labels = [Label(f"{name}t{i}", i % 3 == 0, START_MS) for i in range(12)]
        labels += [Label(f"{name}t3", None, START_MS + 1)]
        await store.apply_labels(labels)
        verdicts = {f"{name}t{i}": "fraud" if i % 3 == 0 else "legitimate" for i in range(12)} | {f"{name}t3": "none"}
        questions: list[tuple[dict[str, Any], Callable[[DecisionRecord], bool]]] = [
            ({}, lambda d: True),
            ({"customer_id": f"{name}c1"}, lambda d: d.customer_id == f"{name}c1"),
            ({"merchant_id": f"{name}m2"}, lambda d: d.merchant_id == f"{name}m2"),
            ({"decision": "review"}, lambda d: d.decision == "review"),
            ({"decision": "approve"}, lambda d: d.decision == "approve"),
            ({"version": "a" * 16}, lambda d: d.model_digest == DIGESTS[0]),
            ({"since_ms": START_MS + 3000}, lambda d: d.processing_time_ms >= START_MS + 3000),
            ({"until_ms": START_MS + 3000}, lambda d: d.processing_time_ms < START_MS + 3000),
            ({"label": "fraud"}, lambda d: verdicts.get(str(d.transaction_id)) == "fraud"),
            ({"label": "legitimate"}, lambda d: verdicts.get(str(d.transaction_id)) == "legitimate"),
            ({"label": "none"}, lambda d: verdicts.get(str(d.transaction_id), "none") == "none"),
            (
                {"customer_id": f"{name}c1", "decision": "decline", "since_ms": START_MS + 1000},
                lambda d: (
                    (d.customer_id, d.decision) == (f"{name}c1", "decline") and d.processing_time_ms >= START_MS + 1000
                ),
            ),
        ]
        for question, wanted in questions:
            if type(getattr(store, "remote", None)).__name__ == "RedisStore":
                with pytest.raises(InvalidRequest, match="Redis alone finds a decision by its transaction id"):
                    await walk(store, **question)
                continue
            found = await walk(store, model=f"{name}m", **question)
            assert sorted(found) == sorted(str(d.transaction_id) for d in made if wanted(d)), question
            times = {d.transaction_id: d.processing_time_ms for d in made}
            assert [times[x] for x in found] == sorted((times[x] for x in found), reverse=True)
        await store.close()

    asyncio.run(run())


class Asked(Service):
    """A service with the routes of decisions as well."""

    def __init__(self, scorer: Scorer, store: Store) -> None:
        super().__init__(scorer, store)
        routes = [*self.router.routes, *decision_routes(lambda: self.pipeline.store)]
        self.router = Router(routes)
        self.door = FrontDoor(self.router, elsewhere)


def test_one_decision_has_its_transaction_its_reasons_and_its_labels(
    opened: Callable[[], Store], scorer: Scorer
) -> None:
    with Asked(scorer, opened()) as service:
        (instance,) = of_run(f"one{id(service)}", transactions(1, 61))
        service.pipeline.record_reasons = True
        service.score([instance])
        name = instance["transaction_id"]
        service.outcomes([{"transaction_id": name, "is_fraud": True, "label_time": "2026-02-01T00:00:00Z"}])
        status, answer = service.call("GET", f"/v1/decisions/{name}")
        assert status == 200
        decision = answer["decision"]
        assert decision["transaction"] == instance
        assert decision["label"] == "fraud"
        assert decision["customer_id"] == instance["customer_id"]
        assert len(decision["reasons"]) == 5
        (label,) = answer["labels"]
        assert (label["label"], label["label_time"], label["source"]) == ("fraud", "2026-02-01T00:00:00.000Z", "http")
        status, answer = service.call("GET", "/v1/decisions/never-scored")
        assert (status, answer["error"]["code"]) == (404, "unknown_transaction")


def test_ids_in_a_question_are_hidden_as_they_are_in_the_store(scorer: Scorer, tmp_path: Path) -> None:
    options = StoreOptions(tmp_path, durable=False, personal_fields=("customer_id", "device_id"), personal_key="k")
    with Asked(scorer, open_store("sqlite:", options)) as service:
        service.score([{**transactions(1, 62)[0], "customer_id": "dora", "device_id": "her phone"}])
        found = service.runner.run(service.pipeline.store.find(DecisionQuery(customer_id="dora"))).found
        assert len(found) == 1
        sent = json.loads(found[0].record.transaction)
        assert sent["customer_id"] == found[0].record.customer_id != "dora"
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"dora" not in content
    assert b"her phone" not in content


def test_decisions_are_asked_for_over_http(scorer: Scorer, tmp_path: Path) -> None:
    with Asked(scorer, open_store("sqlite:", StoreOptions(tmp_path, durable=False))) as service:
        instances = transactions(6, 91, customers=2)
        service.score(instances)
        own = [row["transaction_id"] for row in instances if row["customer_id"] == instances[0]["customer_id"]][::-1]
        version = scorer.name.digest.removeprefix("sha256:")[:8]
        path = f"/v1/decisions?customer_id={instances[0]['customer_id']}&version={version}&limit=1"
        found: list[str] = []
        cursor: str | None = ""
        while cursor is not None:
            status, answer = service.call("GET", path + (f"&cursor={cursor}" if cursor else ""))
            assert status == 200
            found += [row["transaction_id"] for row in answer["decisions"]]
            cursor = answer["next"]
        assert sorted(found) == sorted(own)
        status, answer = service.call("GET", "/v1/decisions?since=2026-01-01T00:00:00Z&until=2100-01-01T00:00:00Z")
        assert (status, len(answer["decisions"])) == (200, 6)
        assert service.call("GET", "/v1/decisions?since=2100-01-01T00:00:00Z") == (200, {"decisions": [], "next": None})
        status, answer = service.call("GET", "/v1/decisions?version=v7")
        assert (status, answer["error"]["code"], answer["error"]["path"]) == (422, "invalid_request", "$.version")


def test_a_cursor_that_is_none_is_refused() -> None:
    for cursor in ("x", "abcd", "ä", "A" * 40):
        with pytest.raises(InvalidRequest, match="send the cursor as an earlier answer gave it"):
            Position.of(cursor)
    assert Position.of(Position(5, -7).cursor()) == Position(5, -7)


def test_the_commands_show_list_and_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path))

    async def fill() -> None:
        store = open_store("sqlite:", StoreOptions(tmp_path, durable=False))
        await store.record(records(""), np.zeros(40, TRANSACTION))
        await store.close()

    asyncio.run(fill())
    runner = CliRunner()
    shown = runner.invoke(app, ["show", "t3"])
    assert json.loads(shown.output)["decision"]["transaction_id"] == "t3"
    out = tmp_path / "all.csv"
    assert runner.invoke(app, ["list", "--since", "2026-01-01", "--out", str(out)]).exit_code == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["transaction_id"] for row in rows} == {f"t{i}" for i in range(40)}
    out = tmp_path / "some.jsonl"
    assert runner.invoke(app, ["list", "--customer", "c1", "--out", str(out)]).exit_code == 0
    assert {json.loads(line)["customer_id"] for line in out.read_text().splitlines()} == {"c1"}
    assert runner.invoke(app, ["list", "--decision", "maybe"]).exit_code == 2
