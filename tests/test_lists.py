"""Lists and snoozes: kept in every store, seen by every worker, looked into by rules, recorded with the decision."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from fraud.checks.audit import replay
from fraud.cli.lists import app
from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.lists import ListEntry, Lists, stored_value
from fraud.decisions.rules.sets import Rules
from fraud.errors import InvalidRequest, RuleError, StoreDown, StoreError
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.serving.front_door import FrontDoor
from fraud.serving.lists import list_routes
from fraud.serving.routes import Router
from fraud.stores.followed_lists import FollowedLists
from fraud.stores.lists import AT_ONCE, ListStore, SqliteLists, open_lists
from fraud.stores.log import decode_record
from fraud.stores.opening import StoreOptions
from fraud.stores.personal import keyed_hash
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.conftest import STORES
from tests.test_profiles import Service, elsewhere
from tests.test_rule_sets import rule, rule_set
from tests.tiny import TRANSACTION_SPEC, transactions


@pytest.fixture(params=STORES)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], ListStore]:
    """Opens the lists of one and the same store, as several workers would."""
    first, _, behind = str(request.param).partition("+")
    fixture = {"redis": "redis_server", "postgresql": "postgres_server"}
    url = "sqlite:" if first == "sqlite" else request.getfixturevalue(fixture[first]).url
    cold = request.getfixturevalue(fixture[behind]).url if behind else None
    return lambda: open_lists(url, StoreOptions(tmp_path, cold_store=cold))


def entries_of(name: str, *values: str, **more: Any) -> list[ListEntry]:
    return [ListEntry(name, value, author="anna", changed_ms=5, **more) for value in values]


def last_revision(store: ListStore) -> int:
    revision = 0
    while changes := store.since(revision):
        revision = changes[-1].revision
    return revision


def test_a_store_keeps_entries_and_numbers_every_change(opened: Callable[[], ListStore], tmp_path: Path) -> None:
    name = f"l{abs(hash(str(tmp_path)))}"  # servers are shared by the tests of this module
    one, other = opened(), opened()
    before = last_revision(one)
    assert one.change(entries_of(name, "c1", "c2", "ü/1", reason="chargeback")) == before + 3
    assert other.change(entries_of(name, "c2", removed=True)) == before + 4
    assert other.change(entries_of(name, "c1", until_ms=9, reason="until then")) == before + 5
    changes = one.since(before)
    assert [(entry.value, entry.removed, entry.revision - before) for entry in changes] == [
        ("ü/1", False, 3),
        ("c2", True, 4),
        ("c1", False, 5),
    ]
    assert changes[-1] == ListEntry(name, "c1", 9, "until then", "anna", 5, False, before + 5)
    assert [entry.value for entry in one.entries(name)] == ["c1", "ü/1"]
    assert [entry.value for entry in other.entries(name, "c1", 1)] == ["ü/1"]
    assert one.since(before + 5) == []
    one.close()
    other.close()


def test_a_store_takes_many_entries_and_gives_them_in_parts(opened: Callable[[], ListStore], tmp_path: Path) -> None:
    name = f"m{abs(hash(str(tmp_path)))}"
    store = opened()
    before = last_revision(store)
    assert store.change(entries_of(name, *(f"v{i}" for i in range(AT_ONCE + 100)))) == before + AT_ONCE + 100
    first = store.since(before)
    assert len(first) == AT_ONCE
    assert len(store.since(first[-1].revision)) == 100
    store.close()


def test_another_worker_sees_a_change_within_two_seconds(opened: Callable[[], ListStore], tmp_path: Path) -> None:
    name = f"s{abs(hash(str(tmp_path)))}"

    async def both() -> float:
        one, other = FollowedLists(opened(), Lists()), FollowedLists(opened(), Lists())
        await one.start()
        await other.start()
        await one.change(entries_of(name, "c1"))
        assert one.lists.holds(name, "c1")
        began = time.monotonic()
        while not other.lists.holds(name, "c1"):
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 10
        seconds = time.monotonic() - began
        await one.close()
        await other.close()
        return seconds

    assert asyncio.run(both()) < 2.0


def test_a_store_that_cannot_be_read_leaves_the_lists_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "lists.db"

    async def follow() -> None:
        followed = FollowedLists(SqliteLists(path), Lists())
        await followed.start()
        await followed.change(entries_of("blocked", "c1"))
        for beside in tmp_path.iterdir():
            beside.unlink()
        path.write_bytes(b"no database" * 1000)
        with pytest.raises(StoreDown):
            await followed.refresh()
        with pytest.raises(StoreError):
            await followed.change(entries_of("blocked", "c2"))
        await followed._look()
        assert followed.describe() == {"revision": 1, "failed": True}
        assert followed.lists.holds("blocked", "c1")
        path.unlink()
        await followed._look()
        assert followed.describe() == {"revision": 1, "failed": False}
        await followed.close()

    asyncio.run(follow())


def test_an_entry_is_a_value_a_network_or_a_domain() -> None:
    lists = Lists()
    for i, value in enumerate(("c1", " 10.1.2.3/8 ", "2001:db8::/32", "@Example.COM", "192.0.2.7"), 1):
        lists.apply([ListEntry("some", stored_value(value, None), revision=i)])
    assert lists.revision == 5
    on = ("c1", "10.200.0.1", "2001:db8::1", "anna@example.com", "192.0.2.7")
    off = ("C1", "11.0.0.1", "2001:db9::1", "anna@mail.example.com", "example.com", "::ffff:10.0.0.1", "x/y", "")
    assert [lists.holds("some", text) for text in (*on, *off)] == [True] * len(on) + [False] * len(off)
    assert not lists.holds("other", "c1")
    lists.apply([ListEntry("some", "10.0.0.0/8", removed=True, revision=6)])
    assert not lists.holds("some", "10.200.0.1")
    for wrong in ("", " ", "x" * 129):
        with pytest.raises(InvalidRequest, match="1 to 128 are allowed"):
            stored_value(wrong, None)


def test_an_entry_ends_at_its_time() -> None:
    lists = Lists()
    lists.apply([ListEntry("some", "c1", until_ms=1000), ListEntry("some", "c2", until_ms=3000)])
    lists.apply([ListEntry("some", "c2", until_ms=2000), ListEntry("some", "c3", until_ms=2000)])
    lists.apply([ListEntry("some", "c3")])
    lists.expire(2000)
    assert [lists.holds("some", f"c{i}") for i in (1, 2, 3)] == [False, False, True]


def test_personal_values_are_kept_as_keyed_hashes() -> None:
    hashed = keyed_hash("a key")
    lists = Lists(hashed)
    values = [stored_value(value, hashed) for value in ("c1", "10.0.0.0/8", "@example.com")]
    assert values == [hashed("c1"), "10.0.0.0/8", "@example.com"]
    lists.apply([ListEntry("some", value) for value in values])
    assert all(lists.holds("some", text) for text in ("c1", "10.1.1.1", "a@example.com", hashed("c1")))
    assert not lists.holds("some", "c2")


def with_lists(*rules: dict[str, Any]) -> Any:
    some = rule_set(*rules)
    return msgspec.structs.replace(some, lists=("blocked", "trusted"))


def test_rules_name_their_lists() -> None:
    Rules(with_lists(rule("a", "customer_id in blocked && !(merchant_id in trusted)")), TRANSACTION_SPEC)
    Rules(with_lists(rule("a", "category in blocked")), TRANSACTION_SPEC)
    for when, said in (
        ("customer_id in bloked", "column 16: no list 'bloked'; did you mean 'blocked'?"),
        ("amount in blocked", "column 1: a list holds texts; this is amount (a number)"),
        ('default(customer_id, "x") in blocked', "column 1: a list holds texts"),
    ):
        with pytest.raises(RuleError) as refused:
            Rules(with_lists(rule("a", when)), TRANSACTION_SPEC)
        assert said in refused.value.message


def test_memberships_and_snoozes_are_recorded_and_replayed_from_the_record(scorer: Scorer, tmp_path: Path) -> None:
    some = with_lists(
        rule("listed", "customer_id in blocked", "decline"),
        rule("known", "merchant_id in trusted && amount < 1000", "approve"),
    )
    lists = Lists()
    instances = transactions(120, 31, customers=4, merchants=3)

    async def decide() -> list[dict[str, Any]]:
        pipeline = Pipeline({scorer.name.name: scorer}, SqliteStore(tmp_path / "history.db", durable=False))
        pipeline.rules = {scorer.name.digest: RulesInForce(Rules(some, scorer.spec), lists=lists)}
        rows = await ask(pipeline, instances[:40])
        lists.apply([ListEntry("blocked", "c1", revision=1), ListEntry("trusted", "m2", revision=2)])
        rows += await ask(pipeline, instances[40:80])
        lists.apply([ListEntry("snooze:listed", "customer_id:c1", revision=3)])
        lists.apply([ListEntry("trusted", "m2", removed=True, revision=4)])
        rows += await ask(pipeline, instances[80:])
        await pipeline.close()
        return rows

    rows = asyncio.run(decide())
    for i, (instance, row) in enumerate(zip(instances, rows, strict=True)):
        is_known = 40 <= i < 80 and instance.get("merchant_id") == "m2"
        is_listed = 40 <= i < 80 and instance["customer_id"] == "c1"
        assert row["rules_hit"] == ["known"] * is_known + ["listed"] * is_listed
        assert row["decided_by"] == (row["rules_hit"] or ["model"])[0]
    records = [decode_record(logged.record) for logged, _ in SqliteLog(tmp_path / "history.db").rows()]
    rulings = [record.ruling for record in records if record.ruling is not msgspec.UNSET]
    assert [ruling.lists_revision for ruling in rulings] == [0] * 40 + [2] * 40 + [4] * 40
    snoozed = [ruling.snoozed_hits == ["listed"] for ruling in rulings]
    assert snoozed == [i >= 80 and instance["customer_id"] == "c1" for i, instance in enumerate(instances)]
    assert any(snoozed)
    result = replay(SqliteLog(tmp_path / "history.db"), lambda name, digest: scorer, lambda digest: some)
    assert (result.rows, result.differences, result.failures) == ({scorer.name.digest: 120}, [], {})


class ListService(Service):
    """The routes of lists over a SQLite file."""

    def __init__(self, path: Path) -> None:
        self.runner = asyncio.Runner()
        self.followed = FollowedLists(SqliteLists(path), Lists())
        self.router = Router(list_routes(lambda: self.followed))
        self.door = FrontDoor(self.router, elsewhere)
        self.headers: dict[str, str] = {}

    def __exit__(self, *_: object) -> None:
        self.runner.run(self.followed.close())
        self.runner.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ListService]:
    with ListService(tmp_path / "lists.db") as service:
        yield service


def test_the_routes_change_and_show_a_list(service: ListService) -> None:
    body = {"add": [{"value": "c1", "reason": "chargeback", "until": "2090-01-01T00:00:00Z"}, {"value": "10.0.0.9/8"}]}
    assert service.call("POST", "/v1/lists/blocked", body) == (200, {"revision": 2})
    assert service.followed.lists.holds("blocked", "10.3.4.5")
    status, answer = service.call("GET", "/v1/lists/blocked")
    assert status == 200
    assert answer["size"] == 2
    assert [(e["value"], e["reason"], e["until"]) for e in answer["entries"]] == [
        ("10.0.0.0/8", "", None),
        ("c1", "chargeback", "2090-01-01T00:00:00.000Z"),
    ]
    assert service.call("POST", "/v1/lists/blocked", {"remove": ["c1"]}) == (200, {"revision": 3})
    assert service.call("GET", "/v1/lists/blocked?after=0&limit=5")[1]["size"] == 1
    snooze = {"field": "customer_id", "value": "c7", "until": "2090-01-01T00:00:00Z", "reason": "on holiday"}
    assert service.call("POST", "/v1/rules/burst/snooze", snooze) == (200, {"revision": 4})
    assert service.followed.lists.holds("snooze:burst", "customer_id:c7")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/lists/Blocked", {"add": [{"value": "c1"}]}, "$.name"),
        ("/v1/lists/blocked", {}, "0 add and remove arrived; 1 to 1000 a call are allowed"),
        ("/v1/lists/blocked", {"add": [{"value": "  "}]}, "$.add[0]"),
        ("/v1/lists/blocked", {"add": [{"value": "c1", "until": "2090-01-01T00:00:00"}]}, "$.add[0].until"),
        ("/v1/lists/blocked", {"add": [{"value": "c1", "why": "x"}]}, "$.add[0]"),
        ("/v1/rules/burst/snooze", {"field": "amount", "value": "1", "until": "2090-01-01T00:00:00Z"}, "$.field"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(service: ListService, path: str, body: Any, said: str) -> None:
    status, answer = service.call("POST", path, body)
    assert status == 422
    assert said in f"{answer['error']['path']} {answer['error']['message']}"
    assert service.followed.store.since(0) == []


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path))

    def fraud(*arguments: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, list(arguments))
        return ended.exit_code, ended.output + str(ended.exception or "")

    file = tmp_path / "values.txt"
    file.write_text("\n".join(f"card{i}" for i in range(10_500)) + "\n\n")
    assert fraud("add", "blocked", "c1", "10.0.0.0/8", "--reason", "chargeback", "--until", "2090-01-01")[0] == 0
    assert "blocked: 10500 added, revision 10502" in fraud("import", "blocked", str(file))[1]
    assert fraud("remove", "blocked", "c1")[0] == 0
    said = fraud("show", "blocked", "--limit", "3")[1]
    assert "chargeback" in said
    assert "card0" in said
    assert "c1 " not in said
    assert fraud("snooze", "burst", "c7", "--until", "2090-01-01")[0] == 0
    (entry,) = SqliteLists(tmp_path / "lists.db").entries("snooze:burst")
    assert (entry.value, entry.until_ms) == (
        "customer_id:c7",
        int(datetime(2090, 1, 1, tzinfo=UTC).timestamp() * 1000),
    )
    assert fraud("add", "No list", "c1")[0] == 1
