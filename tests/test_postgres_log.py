"""The chain of decisions in PostgreSQL: made behind the answer, whole, and as telling as the embedded one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from fraud.checks.audit import Verified, exported, verify_chain
from fraud.cli.audit import log_of
from fraud.decisions.chain import Anchor, audit_key_of
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.settings import Settings, StoreSettings
from fraud.stores.log import decode_record
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.postgres import PostgresStore
from fraud.stores.postgres_linker import CHAIN_LOCK
from fraud.stores.postgres_log import PostgresLog
from tests.servers import Postgres, Server, running

KEY = audit_key_of("a secret")


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
    assert verify_chain(log, audit_key_of("another")).broken is not None


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
        assert store._linker.task is not None
        store._linker.task.cancel()  # as if the process had ended before its turn
        for line in (store._reading, store._writing, store._linker._connection):
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


def forge(url: str, *statements: str) -> None:
    with psycopg.connect(url) as db:
        for statement in statements:
            db.execute(statement.encode())


def save_head(url: str) -> str:
    """Keep a copy of the chain's head; return the statement that puts it back."""
    forge(url, "CREATE TABLE saved AS SELECT * FROM fraud.chain WHERE place = 'head'")
    return (
        "UPDATE fraud.chain AS c SET seq = s.seq, link = s.link, mark = s.mark, writers = s.writers "
        "FROM saved AS s WHERE c.place = s.place"
    )


TAKE_PLACES = "UPDATE fraud.decisions SET seq = NULL, link = NULL WHERE seq >= 7"
SET_BACK = (
    "UPDATE fraud.chain SET seq = 6, link = (SELECT link FROM fraud.decisions WHERE seq = 6) WHERE place = 'head'"
)
REWRITE = "UPDATE fraud.decisions SET record = set_byte(record, 5, get_byte(record, 5) # 1) WHERE seq = 7"


@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        ((REWRITE, "DELETE FROM fraud.decisions WHERE seq = 9", TAKE_PLACES, SET_BACK), "end at row 6: it was cut off"),
        ((TAKE_PLACES, SET_BACK), "did not let the log end at row 6: it was cut off"),
        ((TAKE_PLACES,), "row 7 is missing: row 13 follows 6"),
        (("DELETE FROM fraud.decisions WHERE seq > 6", SET_BACK), "did not let the log end at row 6: it was cut off"),
        (("UPDATE fraud.chain SET mark = NULL",), "did not let the log end at row"),
        (("UPDATE fraud.chain SET writers = ''",), "did not let the log end at row"),
        (("UPDATE fraud.decisions SET seq = 99 WHERE seq = 12",), "row 12 is missing: row 13 follows 11"),
    ],
)
def test_what_is_forged_is_not_linked_again(url: str, forged: tuple[str, ...], reason: str) -> None:
    """Whatever is changed by SQL alone, the service does not sign it with its next decision."""

    async def run() -> None:
        store = PostgresStore(url, audit_key=KEY)
        for i in range(12):
            await store.record([decided(i)], None)
        await store.link()
        forge(url, *forged)
        await store.record([decided(12)], None)
        await store.close()

    asyncio.run(run())
    broken = verify_chain(PostgresLog(url), KEY).broken
    assert broken is not None
    assert reason in broken.reason


@pytest.mark.parametrize("start_anew", [True, False])
@pytest.mark.parametrize(
    ("forged", "reason"),
    [
        ((TAKE_PLACES,), None),  # the same rows are linked to the same chain again
        ((REWRITE, TAKE_PLACES), "its mark does not fit: it is not what was recorded"),
        (("DELETE FROM fraud.decisions WHERE seq = 9", TAKE_PLACES), "record 9 of its writer is missing"),
        (("UPDATE fraud.decisions SET mark = NULL WHERE seq = 8", TAKE_PLACES), "it carries no mark"),
        (("UPDATE fraud.decisions SET key = 'other' WHERE seq = 8", TAKE_PLACES), "its mark does not fit"),
        (
            (
                "UPDATE fraud.decisions AS d SET mark = o.mark FROM fraud.decisions AS o WHERE d.seq = 8 AND o.seq = 9",
                TAKE_PLACES,
            ),
            "its mark does not fit",
        ),
        ((), "row 12 stands behind the end of the log, row 6"),
    ],
)
def test_an_old_head_brings_no_mixture_of_old_and_new(
    url: str, forged: tuple[str, ...], reason: str | None, *, start_anew: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With a head that was valid once, only all of the rows behind it can be linked again, as they were."""

    async def run() -> None:
        store = PostgresStore(url, audit_key=KEY)
        for i in range(12):
            await store.record([decided(i)], None)
            if i == 5:
                await store.link()
                put_back = save_head(url)
        await store.link()
        forge(url, *forged, put_back)
        if start_anew:
            await store.close()
            store = PostgresStore(url, audit_key=KEY)
        await store.record([decided(12)], None)
        await store.close()

    asyncio.run(run())
    verified = verify_chain(PostgresLog(url), KEY)
    if not start_anew:
        assert "the chain of decisions went back from row 12 to row 6" in caplog.text
    if not reason:
        assert (verified.rows, verified.broken) == (13 if start_anew else 6, None)
        return
    assert verified.broken is not None
    assert reason in verified.broken.reason
    assert not start_anew or not forged or reason in caplog.text


def test_a_decision_deleted_before_it_was_linked_shows(url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        store = PostgresStore(url, audit_key=KEY)
        with psycopg.connect(url, autocommit=True) as held:
            await store.record([decided(0)], None)
            await store.link()
            held.execute("SELECT pg_advisory_lock(%s)", [CHAIN_LOCK])  # whoever can write can also hold up the linker
            for i in (1, 2, 3):
                await store.record([decided(i)], None)
            forge(url, "DELETE FROM fraud.decisions WHERE key LIKE '%t2'")
            held.execute("SELECT pg_advisory_unlock(%s)", [CHAIN_LOCK])
        async with asyncio.timeout(10):
            while PostgresLog(url).head().sequence < 2:
                await store.link()
        verified = verify_chain(PostgresLog(url), KEY)
        assert verified.rows == 2
        assert verified.broken is not None
        assert "record 3 of its writer is missing" in verified.broken.reason
        forge(url, "DELETE FROM fraud.decisions WHERE key LIKE '%t3'")  # now its end is missing, which the writer knows
        assert store._linker.task is not None
        await store._linker.task
        await store.link()
        assert "records of this worker up to its 4th were deleted before they were linked" in caplog.text
        await store.close()

    asyncio.run(run())


def test_transactions_that_two_workers_recorded_leave_no_gap(url: str) -> None:
    async def run() -> None:
        first, second = (PostgresStore(url, audit_key=KEY) for _ in range(2))
        await first.record([decided(i) for i in range(4)], None)
        recorded = await second.record([decided(i) for i in (8, 1, 9, 2, 7)], None)
        assert [d.transaction_id for d in recorded.decided] == ["t8", "t1", "t9", "t2", "t7"]
        await second.record([decided(3)], None)
        await second.record([decided(10)], None)
        await first.close()
        await second.close()

    asyncio.run(run())
    verified = verify_chain(PostgresLog(url), KEY)
    assert (verified.rows, verified.broken) == (8, None)
    with psycopg.connect(url) as db:
        assert db.execute("SELECT count(*) FROM fraud.voids").fetchone() == (0,)


def test_what_a_database_lets_vanish_is_not_acknowledged(url: str) -> None:
    async def run() -> None:
        store = PostgresStore(url, audit_key=KEY)
        await store.record([decided(0)], None)
        forge(
            url,
            "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER vanish BEFORE INSERT ON fraud.decisions FOR EACH ROW EXECUTE FUNCTION nothing()",
        )
        with pytest.raises(StoreError, match="postgresql neither recorded 1 decisions nor has them on record"):
            await store.record([decided(1)], None)
        forge(url, "DROP TRIGGER vanish ON fraud.decisions")
        await store.record([decided(1)], None)
        await store.close()

    asyncio.run(run())
    assert verify_chain(PostgresLog(url), KEY) == Verified(2, PostgresLog(url).head())


def test_a_beginning_that_was_moved_shows(url: str) -> None:
    asyncio.run(record(url, 0, 20))
    forge(
        url,
        SET_BACK.replace("head", "anchor"),
        "DELETE FROM fraud.decisions WHERE seq <= 6",
    )
    assert verify_chain(PostgresLog(url), KEY).broken == (6, "the service did not let the log begin after row 6")
    with pytest.raises(StoreError, match="was changed where it begins or ends"):
        PostgresLog(url, KEY).forget(1010)


def test_retention_moves_the_beginning(url: str) -> None:
    asyncio.run(record(url, 0, 30))
    log = PostgresLog(url, KEY)
    assert log.forget(1010) == 10
    assert log.anchor().sequence == 10
    assert verify_chain(log, KEY).broken is None
    asyncio.run(record(url, 30, 40))
    assert {decode_record(e.logged.record).transaction_id for e in log.rows(38)} == {"t38", "t39"}
    assert verify_chain(log, KEY).rows == 30


def test_the_settings_name_the_log(url: str) -> None:
    asyncio.run(record(url, 0, 3))
    settings = Settings(store=StoreSettings(FRAUD_STORE="redis://127.0.0.1:1/0", FRAUD_COLD_STORE=url))
    assert log_of(settings).head().sequence == 3
    with pytest.raises(StoreError, match="decisions are kept by sqlite: and postgresql: stores"):
        log_of(Settings(store=StoreSettings(FRAUD_STORE="redis://127.0.0.1:1/0")))


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
