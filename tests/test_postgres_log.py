"""The chain of decisions in PostgreSQL: made behind the answer, whole, and as telling as the embedded one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from fraud.checks.audit import exported, verify_chain
from fraud.cli.audit import log_of
from fraud.decisions.chain import Anchor, key_of
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.settings import Settings
from fraud.stores.log import decode_record
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.postgres import PostgresStore
from fraud.stores.postgres_log import PostgresLog
from tests.servers import Postgres, Server, running

KEY = key_of("a secret")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(Postgres) as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    """A database of its own."""
    with psycopg.connect(server.url, autocommit=True) as db:
        db.execute("DROP DATABASE IF EXISTS log WITH (FORCE)")
        db.execute("CREATE DATABASE log")
    return server.url.replace("/postgres", "/log")


def decided(i: int) -> DecisionRecord:
    return DecisionRecord(f"t{i}", b"f", "m", "sha256:0", b"", 0.0, 0.5, False, "low", "approve", [], 0, 1000 + i, "")


async def record(url: str, first: int, last: int, *, step: int = 10) -> None:
    store = PostgresStore(url, audit_key=KEY)
    for start in range(first, last, step):
        await store.record([decided(i) for i in range(start, min(start + step, last))], None)
    await store.close()


def test_what_was_recorded_is_a_whole_chain(url: str) -> None:
    asyncio.run(record(url, 0, 1203, step=100))
    log = PostgresLog(url)
    result = verify_chain(log, KEY)
    assert (result.rows, result.broken) == (1203, None)
    assert log.head().sequence == 1203
    assert {e["transaction_id"] for e in exported(log)} == {f"t{i}" for i in range(1203)}
    assert verify_chain(log, key_of("another")).broken is not None


def test_workers_at_once_make_one_chain(url: str) -> None:
    async def both() -> None:
        await asyncio.gather(*(record(url, first, first + 300) for first in (0, 300, 150)))
        late = PostgresStore(url, audit_key=KEY)  # whoever comes next links what is left
        await late.link()
        await late.close()

    asyncio.run(both())
    log = PostgresLog(url)
    assert verify_chain(log, KEY).broken is None
    assert {entry.key for entry in log.rows()} == {decided(i).key for i in range(600)}


def test_what_a_killed_worker_left_is_linked_by_the_next(url: str) -> None:
    async def run() -> None:
        store = PostgresStore(url, audit_key=KEY)
        await store.record([decided(1), decided(2)], None)
        assert store._linker is not None
        store._linker.cancel()  # as if the process had ended before its turn
        for line in (store._reading, store._writing, store._linking):
            await line.close()
        assert PostgresLog(url).head() == Anchor()
        following = PostgresStore(url, audit_key=KEY)
        await following.open()
        await following.close()

    asyncio.run(run())
    assert verify_chain(PostgresLog(url), KEY).rows == 2


@pytest.mark.parametrize(
    ("statement", "row"),
    [
        ("UPDATE fraud.decisions SET record = set_byte(record, 5, get_byte(record, 5) # 1) WHERE seq = 7", 7),
        ("UPDATE fraud.decisions SET link = set_byte(link, 0, get_byte(link, 0) # 1) WHERE seq = 4", 4),
        ("UPDATE fraud.decisions SET key = 'other' WHERE seq = 9", 9),
        ("DELETE FROM fraud.decisions WHERE seq = 5", 5),
    ],
)
def test_tampering_names_the_row(url: str, statement: str, row: int) -> None:
    asyncio.run(record(url, 0, 20))
    with psycopg.connect(url) as db:
        db.execute(statement.encode())
    broken = verify_chain(PostgresLog(url), KEY).broken
    assert broken is not None
    assert broken.sequence == row


def test_retention_moves_the_beginning(url: str) -> None:
    asyncio.run(record(url, 0, 30))
    log = PostgresLog(url)
    assert log.forget(1010) == 10
    assert log.anchor().sequence == 10
    assert verify_chain(log, KEY).broken is None
    asyncio.run(record(url, 30, 40))
    assert {decode_record(e.logged.record).transaction_id for e in log.rows(38)} == {"t38", "t39"}
    assert verify_chain(log, KEY).rows == 30


def test_the_settings_name_the_log(url: str) -> None:
    asyncio.run(record(url, 0, 3))
    settings = Settings(store="redis://127.0.0.1:1/0", cold_store=url)
    assert log_of(settings).head().sequence == 3
    with pytest.raises(StoreError, match="decisions are kept by sqlite: and postgresql: stores"):
        log_of(Settings(store="redis://127.0.0.1:1/0"))


def test_a_database_without_a_log_is_said_to_have_none(url: str) -> None:
    with pytest.raises(StoreError, match="holds no decision log"):
        PostgresLog(url)
    with pytest.raises(StoreError, match="cannot be reached"):
        PostgresLog("postgresql://fraud@127.0.0.1:1/none")


def test_the_service_links_within_a_second(url: str) -> None:
    async def run() -> None:
        store = open_store(url, StoreOptions(audit_key=KEY, cold_budget_ms=5000))
        await store.open()
        await store.record([decided(1)], None)
        async with asyncio.timeout(10):
            while await asyncio.to_thread(lambda: PostgresLog(url).head().sequence) == 0:
                await asyncio.sleep(0.05)
        await store.close()

    asyncio.run(run())
    assert verify_chain(PostgresLog(url), KEY).rows == 1
