"""Cases: derived from the decision log once and in order, worked by one analyst at a time, back as labels."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psycopg
import pytest
from typer.testing import CliRunner

from fraud.cases.case import Case, CaseRules, Resolution
from fraud.cli.cases import app
from fraud.decisions.labels import LabelValue
from fraud.decisions.policy import Action
from fraud.decisions.record import DecisionRecord
from fraud.errors import CaseConflict, StoreDown, StoreError, UnknownCase
from fraud.history.state import TRANSACTION
from fraud.serving.cases import case_routes
from fraud.serving.front_door import FrontDoor
from fraud.serving.routes import Router
from fraud.settings import Settings
from fraud.stores.case_tables import PostgresCases, SqliteCases
from fraud.stores.case_work import settle
from fraud.stores.cases import AT_ONCE, CaseStore, open_cases
from fraud.stores.opening import StoreOptions, open_log, open_store
from fraud.stores.protocol import Store
from tests.servers import Server
from tests.test_profiles import Service, elsewhere
from tests.tiny import START_MS

HOUR_MS = 3_600_000


def record(
    name: str, customer: str, amount: float, probability: float, at_ms: int = START_MS, decision: Action = "review"
) -> DecisionRecord:
    return DecisionRecord(
        *(name, b"", "m", f"sha256:{'a' * 64}", b"", 0.0, probability, True),
        risk_level="high",
        decision=decision,
        degraded=[],
        event_time_ms=at_ms - 5,
        processing_time_ms=at_ms,
        request_id="",
        customer_id=customer,
        merchant_id="m1",
        amount=amount,
        reasons=[("amount", 1.5)],
    )


class Place:
    """One store of decisions with its cases, as any number of processes would open them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.now_ms = START_MS

    def opened(self) -> Store:
        return open_store(self.url, StoreOptions(self.folder, budget_ms=5000.0, cold_budget_ms=10_000.0, durable=False))

    def cases(self, rules: CaseRules | None = None) -> CaseStore:
        tables = SqliteCases(self.folder / "cases.db") if self.url == "sqlite:" else PostgresCases(self.url)
        return CaseStore(tables, lambda: open_log(self.url, self.folder), rules, lambda: self.now_ms)

    async def record(self, *records: DecisionRecord) -> None:
        store = self.opened()
        await store.record(list(records), np.zeros(len(records), TRANSACTION))
        await store.close()  # which links them in PostgreSQL

    async def labels(self, transaction_id: str) -> list[tuple[str, str, str]]:
        store = self.opened()
        found = await store.labels(transaction_id)
        await store.close()
        return [(label.value, label.source, label.actor) for label in found]

    async def settle(self, cases: CaseStore) -> int:
        store = self.opened()
        n = await settle(cases, store)
        await store.close()
        return n


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "sqlite":
        yield Place("sqlite:", tmp_path)
        return
    server: Server = request.getfixturevalue("postgres_server")
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DROP SCHEMA IF EXISTS fraud CASCADE")  # one server for all tests of this module
    yield Place(server.url, tmp_path)


def derived(cases: CaseStore) -> int:
    n = 0
    while read := cases.derive():
        n += read
    return n


def test_reviews_of_a_customer_are_one_case_for_a_day(place: Place) -> None:
    cases = place.cases()
    asyncio.run(
        place.record(
            record("t1", "c1", 100.0, 0.5),
            record("t2", "c2", 10.0, 0.9),
            record("t3", "c1", 50.0, 0.25, START_MS + HOUR_MS),
            record("t4", "c3", 50.0, 0.25, START_MS, "decline"),
            record("t5", "c3", 50.0, 0.01, START_MS, "approve"),
            record("t6", "c1", 10.0, 0.5, START_MS + 25 * HOUR_MS),
            record("t7", "", 0.0, 0.5, START_MS),
            record("t8", "", 0.0, 0.6, START_MS),
        )
    )
    assert derived(cases) == 8
    assert derived(cases) == 0
    found = [(case.customer_id, case.transactions, case.expected_loss) for case in cases.find()]
    assert found == [("c1", 2, 62.5), ("c2", 1, 9.0), ("c1", 1, 5.0), (None, 1, 0.0), (None, 1, 0.0)]
    (case,) = cases.of_transaction("t3")
    case, transactions, trail = cases.whole(case.id)
    assert [(t.transaction_id, t.amount, t.score, t.reasons) for t in transactions] == [
        ("t1", 100.0, 0.5, [("amount", 1.5)]),
        ("t3", 50.0, 0.25, [("amount", 1.5)]),
    ]
    assert [(e.number, e.step, e.detail, e.actor) for e in trail] == [
        (1, "opened", "t1", "decision log"),
        (2, "joined", "t3", "decision log"),
    ]
    assert case.revision == 2
    assert cases.of_transaction("t1") == [case]
    with pytest.raises(UnknownCase, match="there is no case 99"):
        cases.whole(99)
    cases.close()


def test_several_derive_at_once_and_each_decision_counts_once(place: Place) -> None:
    n = 3 * AT_ONCE + 7
    asyncio.run(place.record(*(record(f"t{i}", f"c{i % 50}", 10.0, 0.5) for i in range(n))))
    some = [place.cases() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(derived, some)) == n
    found = some[0].find(limit=1000)
    assert (len(found), sum(case.transactions for case in found)) == (50, n)
    log = list(open_log(place.url, place.folder).rows())
    for case in found[:5]:
        _, transactions, trail = some[0].whole(case.id)
        names = [key for _, key in log if f"c{int(key[1:]) % 50}" == case.customer_id]
        assert [t.transaction_id for t in transactions] == [entry.detail for entry in trail] == names
    for cases in some:
        cases.close()


def test_a_claim_is_exclusive_and_ends(place: Place) -> None:
    cases, other = place.cases(), place.cases()
    asyncio.run(place.record(record("t1", "c1", 100.0, 0.5), record("t2", "c2", 10.0, 0.9)))
    derived(cases)
    first = cases.claim_next("anna")
    second = other.claim_next("ben")
    assert first is not None
    assert second is not None
    assert (first.id, second.id, other.claim_next("ben")) == (1, 2, None)
    with pytest.raises(CaseConflict, match="case 1 stays as it is: anna has claimed it"):
        other.claim(1, "ben")
    with pytest.raises(CaseConflict, match="anna has claimed it"):
        other.resolve(1, "ben", "legitimate", first.revision)
    place.now_ms += 15 * 60_000
    with pytest.raises(CaseConflict, match="it is open; claim it first"):
        cases.resolve(1, "anna", "legitimate", first.revision)
    taken = other.claim_next("ben")
    assert taken is not None
    assert (taken.id, taken.claimed_by) == (1, "ben")
    other.release(1, "ben")
    again = cases.claim_next("anna")
    assert again is not None
    assert again.id == 1
    asyncio.run(place.record(record("t3", "c1", 5.0, 0.5)))
    derived(cases)
    with pytest.raises(CaseConflict, match="it is at revision 6, not 5: look at it again"):
        cases.resolve(1, "anna", "legitimate", again.revision)
    assert cases.get(1).claimed_by == "anna"
    cases.close()
    other.close()


def test_a_resolution_can_be_undone_for_ten_seconds_and_then_is_the_label(place: Place) -> None:
    cases = place.cases()
    asyncio.run(place.record(record("t1", "c1", 100.0, 0.5), record("t2", "c1", 10.0, 0.9)))
    derived(cases)
    case = cases.claim(1, "anna")
    case = cases.resolve(1, "anna", "confirmed_fraud", case.revision)
    assert case.status == "resolving"
    place.now_ms += 9_999
    assert asyncio.run(place.settle(cases)) == 0
    with pytest.raises(CaseConflict, match="anna resolved it"):
        cases.undo(1, "ben")
    case = cases.undo(1, "anna")
    case = cases.resolve(1, "anna", "confirmed_fraud", case.revision)
    assert asyncio.run(place.labels("t1")) == []
    place.now_ms += 10_000
    assert cases.due()[0][0].status == "settling"  # and the process ends here
    with pytest.raises(CaseConflict, match="it is settling"):
        cases.undo(1, "anna")
    assert asyncio.run(place.settle(cases)) == 1
    assert asyncio.run(place.settle(cases)) == 0
    expected = [("fraud", "case", "anna")]
    assert [asyncio.run(place.labels(name)) for name in ("t1", "t2")] == [expected, expected]
    assert cases.whole(1)[2][-1].detail == "2 applied"

    with pytest.raises(CaseConflict, match="it is resolved"):
        cases.claim(1, "ben")
    place.now_ms += 1
    cases.reopen(1, "carla")
    case = cases.claim(1, "ben")
    cases.resolve(1, "ben", "legitimate", case.revision)
    place.now_ms += 10_000
    assert asyncio.run(place.settle(cases)) == 1
    assert asyncio.run(place.labels("t1")) == [*expected, ("legitimate", "case", "ben")]
    cases.reopen(1, "carla")
    case = cases.claim(1, "ben")
    cases.resolve(1, "ben", "unsure", case.revision)
    place.now_ms += 10_000
    assert asyncio.run(place.settle(cases)) == 1
    assert asyncio.run(place.labels("t1"))[-1] == ("none", "case", "ben")
    steps = [entry.step for entry in cases.whole(1)[2]]
    assert steps[:8] == ["opened", "joined", "claimed", "resolved", "undone", "resolved", "labelled", "reopened"]
    cases.close()


def test_labels_that_are_written_twice_after_a_kill_count_once(place: Place) -> None:
    cases = place.cases()
    asyncio.run(place.record(record("t1", "c1", 100.0, 0.5)))
    derived(cases)
    cases.resolve(1, "anna", "confirmed_fraud", cases.claim(1, "anna").revision)
    place.now_ms += 10_000

    async def written() -> None:
        store = place.opened()
        ((_, labels),) = cases.due()
        await store.apply_labels(labels)  # and the process ends before it says so
        await store.close()

    asyncio.run(written())
    assert asyncio.run(place.settle(cases)) == 1
    assert asyncio.run(place.labels("t1")) == [("fraud", "case", "anna")]
    cases.close()


def test_twenty_analysts_never_work_one_case_twice(place: Place) -> None:
    n = 200
    asyncio.run(place.record(*(record(f"t{i}", f"c{i}", 10.0 + i, 0.5) for i in range(n))))
    workers = [place.cases(), place.cases()]
    derived(workers[0])
    kinds: tuple[Resolution, ...] = ("confirmed_fraud", "legitimate", "unsure")

    def analyst(number: int) -> list[tuple[int, Resolution]]:
        cases, done = workers[number % 2], []
        while (case := cases.claim_next(f"a{number}")) is not None:
            kind = kinds[case.id % 3]
            cases.note(case.id, "carla", "seen")  # which makes the claimed revision old
            with pytest.raises(CaseConflict, match="look at it again"):
                cases.resolve(case.id, f"a{number}", kind, case.revision)
            cases.resolve(case.id, f"a{number}", kind, case.revision + 1)
            done.append((case.id, kind))
        return done

    with ThreadPoolExecutor(20) as threads:
        done = [pair for some in threads.map(analyst, range(20)) for pair in some]
    assert sorted(case_id for case_id, _ in done) == list(range(1, n + 1))
    place.now_ms += 10_000
    assert asyncio.run(place.settle(workers[1])) == n

    names = {case.id: case.customer_id.replace("c", "t") for case in workers[0].find(limit=n) if case.customer_id}

    async def said() -> dict[int, list[LabelValue]]:
        store = place.opened()
        found = {case_id: [label.value for label in await store.labels(name)] for case_id, name in names.items()}
        await store.close()
        return found

    value: dict[Resolution, list[LabelValue]] = {
        "confirmed_fraud": ["fraud"],
        "legitimate": ["legitimate"],
        "unsure": [],
    }
    assert asyncio.run(said()) == {case_id: value[kind] for case_id, kind in done}
    expected = ["opened", "claimed", "noted", "resolved", "labelled"]
    assert all([e.step for e in workers[0].whole(case_id)[2]] == expected for case_id in range(1, n + 1))
    for cases in workers:
        cases.close()


def test_the_trail_is_append_only(place: Place) -> None:
    cases = place.cases()
    asyncio.run(place.record(record("t1", "c1", 100.0, 0.5)))
    derived(cases)
    if place.url == "sqlite:":
        with sqlite3.connect(place.folder / "cases.db") as db:
            for statement in ("UPDATE case_trail SET actor = 'x'", "DELETE FROM case_trail"):
                with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                    db.execute(statement)
        db.close()
    else:
        for statement in ("UPDATE fraud.case_trail SET actor = 'x'", "DELETE FROM fraud.case_trail"):
            with psycopg.connect(place.url) as connection, pytest.raises(psycopg.Error, match="append-only"):
                connection.execute(statement.encode())
    assert [entry.actor for entry in cases.whole(1)[2]] == ["decision log"]
    cases.close()


def test_another_log_is_refused(tmp_path: Path) -> None:
    place = Place("sqlite:", tmp_path)
    cases = place.cases()
    place.folder = tmp_path / "elsewhere"
    with pytest.raises(StoreError, match="there is no decision log"):
        cases.derive()
    place.folder = tmp_path
    asyncio.run(place.record(record("t1", "c1", 1.0, 0.5), record("t2", "c1", 1.0, 0.5)))
    derived(cases)
    for file in tmp_path.glob("history.db*"):
        file.unlink()
    asyncio.run(place.record(record("t3", "c1", 1.0, 0.5)))
    with pytest.raises(StoreError, match="derived up to row 2 of a decision log that ends at row 1"):
        cases.derive()
    cases.close()
    (tmp_path / "cases.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreDown, match="cannot be used"):
        cases.find()


def test_a_hundred_thousand_open_cases_and_the_next_one_in_20_ms(place: Place) -> None:
    cases = place.cases()
    asyncio.run(place.record(record("t0", "c0", 1.0, 0.5)))
    derived(cases)
    rows = [
        (i, f"s{i}", "open", 0, loss, msgspec.msgpack.encode(Case(i, f"s{i}", 0, 0, "open", 1, 1, loss)))
        for i in range(2, 100_001)
        for loss in (i * 7919 % 100_003 / 1e3,)
    ]
    if place.url == "sqlite:":
        with sqlite3.connect(place.folder / "cases.db") as db:
            db.executemany("INSERT INTO cases VALUES (?, ?, ?, ?, ?, ?)", rows)
        db.close()
    else:
        with psycopg.connect(place.url) as connection, connection.cursor() as cursor:
            with cursor.copy("COPY fraud.cases FROM STDIN") as copy:
                for row in rows:
                    copy.write_row(row)
            cursor.execute("ANALYZE fraud.cases")
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        case = cases.claim_next("anna")
        assert case is not None
        seconds.append(time.perf_counter() - began)
    assert sorted(seconds)[7] < 0.02
    cases.close()


class CaseService(Service):
    """The routes of cases over a SQLite file."""

    def __init__(self, cases: CaseStore) -> None:
        self.runner = asyncio.Runner()
        self.router = Router(case_routes(lambda: cases))
        self.door = FrontDoor(self.router, elsewhere)
        self.headers: dict[str, str] = {}

    def __exit__(self, *_: object) -> None:
        self.runner.close()


def test_the_routes_work_a_case(tmp_path: Path) -> None:
    place = Place("sqlite:", tmp_path)
    place.now_ms = time.time_ns() // 1_000_000
    cases = place.cases()
    hostile = "<img src=x onerror=alert(1)>"
    asyncio.run(place.record(record(hostile, "c1", 100.0, 0.5)))
    derived(cases)
    with CaseService(cases) as service:
        status, answer = service.call("GET", "/v1/cases?status=open")
        assert (status, answer["cases"][0]["expected_loss"]) == (200, 50.0)
        status, answer = service.call("POST", "/v1/next-case")
        assert (status, answer["case"]["status"], answer["case"]["revision"]) == (200, "claimed", 2)
        assert service.call("POST", "/v1/next-case") == (200, {"case": None})
        assert service.call("POST", "/v1/cases/1/note", {"text": hostile})[0] == 200
        stale = service.call("POST", "/v1/cases/1/resolve", {"resolution": "legitimate", "revision": 2})
        assert (stale[0], stale[1]["error"]["code"]) == (409, "case_conflict")
        status, answer = service.call("POST", "/v1/cases/1/resolve", {"resolution": "legitimate", "revision": 3})
        assert (status, answer["case"]["status"], answer["case"]["resolution"]) == (200, "resolving", "legitimate")
        assert service.call("POST", "/v1/cases/1/undo")[1]["case"]["status"] == "claimed"
        assert service.call("POST", "/v1/cases/1/release")[1]["case"]["status"] == "open"
        assert service.call("POST", "/v1/cases/1/reopen")[0] == 409
        status, answer = service.call("GET", "/v1/cases/1")
        assert (status, answer["transactions"][0]["transaction_id"]) == (200, hostile)
        assert service.headers["content-type"] == "application/json"
        assert [step["step"] for step in answer["trail"]] == [
            *("opened", "claimed", "noted", "resolved", "undone", "released")
        ]
        for path, body, code, says in (
            ("/v1/cases/7/claim", b"", 404, "there is no case 7"),
            ("/v1/cases/x/claim", b"", 422, "Expected `int`"),
            ("/v1/cases/1/resolve", {"resolution": "fraud", "revision": 1}, 422, "Invalid enum value 'fraud'"),
            ("/v1/cases/1/note", {"text": ""}, 422, "length >= 1"),
        ):
            status, answer = service.call("POST", path, body)
            assert status == code
            assert says in answer["error"]["message"]
    scopes = {(route.method, route.path): route.scope for route in case_routes(lambda: cases)}
    assert scopes["POST", "/v1/cases/{id}/reopen"] == "supervisor"
    assert scopes["POST", "/v1/cases/{id}/claim"] == "analyst"
    assert scopes["GET", "/v1/cases/{id}"] == "read"


def test_the_commands_work_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("FRAUD_CASES_UNDO_S", "0")
    place = Place("sqlite:", tmp_path)
    asyncio.run(place.record(record("t1", "c1", 100.0, 0.5)))

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "1 decisions read, 0 cases resolved" in said("work", "--once")
    assert "case 1, revision 2: claimed by" in said("claim")
    assert "no case is open" in said("claim")
    assert "revision 3" in said("note", "1", "called")
    assert "resolving as legitimate" in said("resolve", "1", "legitimate", "--revision", "3")
    assert "0 decisions read, 1 cases resolved" in said("work", "--once")
    assert "1 applied" in said("show", "1")
    assert "resolved" in said("list")
    assert asyncio.run(place.labels("t1"))[0][:2] == ("legitimate", "case")
    assert "open" in said("reopen", "1")


def test_redis_alone_keeps_no_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STORE", "redis://localhost:1/0")
    with pytest.raises(StoreError, match="Redis alone keeps no cases: set FRAUD_COLD_STORE"):
        open_cases(Settings.read())


def test_a_killed_process_of_cases_loses_nothing_and_its_next_one_is_current_in_two_seconds(tmp_path: Path) -> None:
    place = Place("sqlite:", tmp_path)
    asyncio.run(place.record(*(record(f"t{i}", f"c{i}", 1.0, 0.5) for i in range(3 * AT_ONCE))))
    cases = place.cases()
    environment = {**os.environ, "FRAUD_STATE_DIR": str(tmp_path)}

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "fraud.serving.case_process", str(os.getpid())], env=environment)

    def wait_for(n: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while sum(case.transactions for case in cases.find(limit=10_000)) < n:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    process = started()
    wait_for(1, 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = started()
    try:
        wait_for(3 * AT_ONCE, 60)
        asyncio.run(place.record(record("last", "c-last", 1.0, 0.5)))
        wait_for(3 * AT_ONCE + 1, 2)
    finally:
        process.terminate()
        process.wait()
    assert len(cases.find(limit=10_000)) == 3 * AT_ONCE + 1
