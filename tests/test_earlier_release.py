"""What the first release, commit 9521b23, left behind: it is read, verified and replayed as then, and goes on."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fraud.checks.audit import replay, verify_chain
from fraud.decisions.chain import audit_key_of
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import short
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.log import DecisionLog
from fraud.stores.opening import StoreOptions, open_log, open_store
from fraud.stores.protocol import Store
from fraud.stores.sqlite import SqliteStore
from tests.asking import ask
from tests.servers import Postgres, Server, running
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
    result = replay(log, lambda name, digest: scorer_of(home, name, digest))
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


def execute(url: str, statement: str) -> None:
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:"))) as file, file:
            file.execute(statement)
    else:
        with psycopg.connect(url) as server:
            server.execute(statement.replace("FROM ", "FROM fraud.").encode())
