"""What the first release, commit 9521b23, left behind: it is read, verified and replayed as then, and goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

from fraud.checks.audit import replay, verify_chain
from fraud.decisions.chain import audit_key_of
from fraud.decisions.labels import Label
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import short
from fraud.models.registry import Registry
from fraud.models.rule_sets import RuleSets
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.log import DecisionLog
from fraud.stores.opening import StoreOptions, open_log, open_store
from fraud.stores.protocol import Store
from fraud.stores.redis_labels import SCHEMA, STEPS
from fraud.stores.sqlite import SqliteStore
from tests.asking import ask
from tests.servers import Postgres, Redis, Server, running
from tests.tiny import transactions

FIXTURE = Path(__file__).parent / "fixtures" / "release_9521b23"
KEY = audit_key_of("a secret")
INSTANCES = [*transactions(30, 77, customers=4, merchants=3), *transactions(10, 78, customers=4, merchants=3)]
"""Of which the first 30 were scored."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(Postgres) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a Bento store, a registry and a history, as that release left it."""
    return Path(shutil.copytree(FIXTURE / "home", tmp_path / "home"))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, home: Path) -> str:
    """A store with a decision log, as that release left it."""
    if request.param == "sqlite":
        return f"sqlite:{home / 'state' / 'history.db'}"
    server: Server = request.getfixturevalue("server")
    return restored(server)


def restored(server: Server) -> str:
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DROP DATABASE IF EXISTS earlier WITH (FORCE)")
        db.execute("CREATE DATABASE earlier")
    url = server.url.replace("/postgres", "/earlier")
    with psycopg.connect(url, autocommit=True) as db:
        db.execute((FIXTURE / "postgres.sql").read_bytes())
    return url


def opened(url: str, key: bytes = KEY) -> Store:
    return open_store(url, StoreOptions(audit_key=key, durable=False, budget_ms=5000, cold_budget_ms=5000))


def scorer_of(home: Path, name: str, digest: str) -> Scorer:
    return Scorer.load(*BentoStore(home).bundle_paths(f"{name}:{short(digest)}"))


def assert_replays(log: DecisionLog, home: Path, rows: int) -> None:
    result = replay(log, lambda name, digest: scorer_of(home, name, digest), RuleSets(home).read)
    assert (result.differences, result.failures) == ([], {})
    assert sum(result.rows.values()) == rows
    assert len(result.rows) == 2


def test_its_log_verifies_and_replays_before_it_is_opened_and_goes_on(url: str, home: Path) -> None:
    log = open_log(url, home, KEY)
    verified = verify_chain(log, KEY)
    assert (verified.rows, verified.broken) == (33, None)
    noted = verified.head
    assert_replays(log, home, 33)

    async def go_on() -> list[list[dict[str, Any]]]:
        store = opened(url)
        await store.open()
        (version,) = BentoStore(home).versions("tiny-transaction")
        scorer = Scorer.load(*BentoStore(home).bundle_paths(f"tiny-transaction:{version}"))
        pipeline = Pipeline({"tiny-transaction": scorer}, store)
        answers = [await ask(pipeline, some) for some in (INSTANCES[:30], INSTANCES[24:40])]
        await pipeline.close()
        return answers

    first, second = asyncio.run(go_on())
    assert first[24:] == second[:6]  # those on record
    verified = verify_chain(log, KEY, noted)
    assert (verified.rows, verified.broken) == (43, None)
    assert_replays(log, home, 43)
    assert log.forget(2**62) == 43
    assert verify_chain(log, KEY).broken is None


def test_its_log_is_adopted_only_whole_and_under_its_key(url: str, home: Path) -> None:
    async def use(key: bytes) -> None:
        store = opened(url, key)
        try:
            await store.recall(["t77-1"], [], [])
        finally:
            await store.close()

    with pytest.raises(StoreError, match="is not what the first release recorded under this key; set FRAUD_AUDIT_KEY"):
        asyncio.run(use(b""))
    execute(url, "DELETE FROM decisions WHERE seq > 20")
    with pytest.raises(StoreError, match="does not end where it says"):
        asyncio.run(use(KEY))
    assert verify_chain(open_log(url, home), KEY).broken == (21, "the log ends at row 20 instead of 33")


def test_a_log_of_this_release_cannot_pass_for_one_of_the_first(tmp_path: Path) -> None:
    """Whoever takes its marks and its schema's number from it is found out by the links."""
    path = tmp_path / "history.db"

    async def record(n: int) -> None:
        store = SqliteStore(path, durable=False, audit_key=KEY)
        for i in range(n):
            some = DecisionRecord(f"t{i}", b"", "m", "", b"", 0, 0, False, "low", "approve", [], 0, 0, "", "c")
            await store.record([some], None)
        await store.close()

    asyncio.run(record(9))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("ALTER TABLE chain DROP COLUMN mark")
        db.execute("PRAGMA user_version = 1")
        db.execute("DELETE FROM decisions WHERE seq > 5")
        db.execute(
            "UPDATE chain SET (seq, link) = (SELECT seq, link FROM decisions WHERE seq = 5) WHERE place = 'head'"
        )
    with pytest.raises(StoreError, match="is not what the first release recorded"):
        asyncio.run(record(1))


DAY_MS = 86_400_000
TOLD = (3, 8, 20)
"""Which of the transactions were told as fraud, each as many days after the first of them."""


async def assert_same(store: Store, other: Store) -> None:
    """Both hold the same histories, and no state that they could not read."""
    names = [f"c{i}" for i in range(4)], [f"m{i}" for i in range(3)]
    recalled, expected = await store.recall([], *names), await other.recall([], *names)
    assert not any(recalled.is_unread(customer, None) for customer in names[0])
    assert recalled.histories.customers["count"].min() > 0
    for kept, wanted in zip(
        (recalled.histories.customers, recalled.histories.merchants),
        (expected.histories.customers, expected.histories.merchants),
        strict=True,
    ):
        assert kept.tobytes() == wanted.tobytes()


def test_its_redis_is_brought_up_recalled_and_goes_on(home: Path, tmp_path: Path) -> None:
    """Beside a store in which this release did all of it, whose histories are the same to the byte."""
    kept = {bytes.fromhex(k): bytes.fromhex(v) for k, v in json.loads((FIXTURE / "redis.json").read_text()).items()}
    (version,) = BentoStore(home).versions("tiny-transaction")
    scorer = Scorer.load(*BentoStore(home).bundle_paths(f"tiny-transaction:{version}"))

    async def go_on(server: Server) -> None:
        store, own = opened(server.url), opened(f"sqlite:{tmp_path / 'own.db'}")
        await store.open()
        pipeline, beside = (Pipeline({"tiny-transaction": scorer}, some) for some in (store, own))
        answers = [row for i in range(0, 30, 6) for row in await ask(beside, INSTANCES[i : i + 6])]
        first_ms = (await own.recall(["t77-3"], [], [])).decided["t77-3"].event_time_ms
        frauds = [Label(f"t77-{i}", True, first_ms + i * DAY_MS) for i in TOLD]
        assert await own.apply_labels(frauds) == ["applied"] * 3

        assert await ask(pipeline, INSTANCES[:30]) == answers  # those on record
        assert set((await store.recall([f"tiny-features\x1ff{i}" for i in range(3)], [], [])).decided) == {
            f"tiny-features\x1ff{i}" for i in range(3)
        }
        for label in frauds:
            (had,) = await store.labels(label.key)
            assert (had.is_fraud, had.label_time_ms) == (True, label.label_time_ms)
        await assert_same(store, own)

        assert await ask(pipeline, INSTANCES[24:]) == await ask(beside, INSTANCES[24:])
        more = [
            frauds[2],
            Label("t77-8", False, first_ms + 60 * DAY_MS),
            Label("t77-3", None, first_ms + 60 * DAY_MS),
            Label("t78-1", True, first_ms + 60 * DAY_MS),
        ]
        for some in (store, own):
            assert await some.apply_labels(more) == ["known", "applied", "applied", "applied"]
        await assert_same(store, own)
        await pipeline.close()
        await beside.close()

    with running(Redis) as server, redis.Redis(port=server.port) as client:
        client.mset(kept)
        asyncio.run(go_on(server))
        assert client.get(SCHEMA) == str(len(STEPS)).encode()
        client.set(SCHEMA, len(STEPS) + 1)
        with pytest.raises(
            StoreError, match=f"Redis has schema {len(STEPS) + 1}; this release reads schema {len(STEPS)} and"
        ):
            asyncio.run(opened_and_closed(server.url))


async def opened_and_closed(url: str) -> None:
    store = opened(url)
    try:
        await store.open()
    finally:
        await store.close()


def test_its_registry_is_read_brought_up_and_goes_on(home: Path) -> None:
    registry = Registry.beside(home)
    for name in ("tiny-transaction", "tiny-features"):
        (version,) = BentoStore(home).versions(name)
        served = registry.resolve(name, "production")
        assert (served.version, short(served.digest)) == (0, version)
        assert registry.resolve(name, "candidate") == served
        assert [(event.kind, event.who, event.why) for event in registry.events(name)] == [
            ("promote", "ann@desk", "the first"),
            ("register", "ann@desk", ""),
        ]
    assert [pending.name for pending in registry.pending()] == ["tiny-transaction", "tiny-features"]
    before = registry.resolve("tiny-transaction", "production")
    registry.register("tiny-transaction", "sha256:" + "1" * 64, before.preprocessor_digest, who="bob@desk")
    registry.move("tiny-transaction", "v1", "production", who="bob@desk", why="the second")
    assert registry.resolve("tiny-transaction", "previous").digest == before.digest
    assert registry.rollback("tiny-transaction", who="bob@desk", why="too strict").digest == before.digest
    assert len(registry.pending()) == 4


def execute(url: str, statement: str) -> None:
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:"))) as file, file:
            file.execute(statement)
    else:
        with psycopg.connect(url) as server:
            server.execute(statement.replace("FROM ", "FROM fraud.").encode())
