"""What the SQLite store writes behind its commits, states and search rows: exact at any moment, whole after any end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fraud.decisions.chain import audit_key_of
from fraud.decisions.labels import Label
from fraud.decisions.queries import DecisionQuery
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreDown
from fraud.features.featurizer import transactions_of
from fraud.history.encoding import decode
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.schema import Row
from fraud.stores import sqlite, sqlite_states
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from fraud.stores.sqlite_search import unindexed
from fraud.stores.states import Change
from tests.tiny import START_MS

CUSTOMERS, MERCHANTS = [f"c{i}" for i in range(7)], [f"m{i}" for i in range(3)]
KEY = audit_key_of("a secret")


def rows_of(names: Sequence[str]) -> list[Row]:
    """Transactions by their ids, such as ``w1-17``, whose number says the rest; one in five is at no merchant."""
    numbers = [int(name.rpartition("-")[2]) for name in names]
    return [
        Row(
            name,
            (),
            b"",
            event_time_ms=START_MS + i * 60_000,
            customer_id=CUSTOMERS[i % 7],
            amount=1.0 + i,
            roles={} if i % 5 == 0 else {"merchant_id": MERCHANTS[i % 3]},
        )
        for name, i in zip(names, numbers, strict=True)
    ]


def decided_of(rows: Sequence[Row]) -> list[DecisionRecord]:
    return [
        DecisionRecord(
            *(row.transaction_id, b"", "m", "sha256:" + "a" * 64, b"", 0.0, 0.5, False, "low", "approve", []),
            event_time_ms=row.event_time_ms,
            processing_time_ms=row.event_time_ms,
            request_id="",
            customer_id=row.customer_id,
            merchant_id=row.text_role("merchant_id"),
            amount=row.amount,
        )
        for row in rows
    ]


def named(prefix: str, numbers: range) -> list[str]:
    return [f"{prefix}-{i}" for i in numbers]


async def record(store: SqliteStore, names: Sequence[str], recalled: Any = None) -> list[bool]:
    """Record some transactions; return of each whether it was new."""
    rows = rows_of(names)
    decided = decided_of(rows)
    recorded = await store.record(decided, transactions_of(rows), recalled)
    return [kept is given for kept, given in zip(recorded.decided, decided, strict=True)]


async def assert_holds(store: SqliteStore, names: Sequence[str]) -> None:
    """The store has these decisions, finds each once, and its states are those of a serial run."""
    recalled = await store.recall(names, CUSTOMERS, MERCHANTS)
    assert set(recalled.decided) == set(names)
    rows = rows_of(names)
    customers, merchants = Change.of(decided_of(rows), transactions_of(rows)).apply({}, {})
    for states, blobs, every, dtype in (
        (recalled.histories.customers, customers, CUSTOMERS, CUSTOMER),
        (recalled.histories.merchants, merchants, MERCHANTS, MERCHANT),
    ):
        assert states.tobytes() == decode([blobs.get(name) for name in every], dtype).tobytes()
    page = await store.find(DecisionQuery(limit=len(names) + 1))
    assert sorted(str(found.record.transaction_id) for found in page.found) == sorted(names)


def opened(folder: Path, *, durable: bool = False) -> SqliteStore:
    store = open_store("sqlite:", StoreOptions(folder, durable=durable, audit_key=KEY))
    assert isinstance(store, SqliteStore)
    return store


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """States and search rows catch up after every few decisions."""
    monkeypatch.setattr(sqlite, "CATCH_UP_ROWS", 11)
    monkeypatch.setattr(sqlite, "INDEX_AT_ONCE", 3)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("kept_states", [10_000, 4])
def test_workers_that_take_turns_agree_with_a_serial_run(
    kept_states: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever merges, and whatever a reader still keeps of the states before."""
    monkeypatch.setattr(sqlite_states, "KEPT_STATES", kept_states)
    rng = random.Random(5)

    async def run() -> None:
        stores = [opened(tmp_path) for _ in range(3)]
        names: list[str] = []
        for turn in range(60):
            some = named(f"w{turn}", range(len(names), len(names) + rng.randrange(1, 6)))
            assert all(await record(rng.choice(stores), some))
            names += some
            if turn % 7 == 0:
                await rng.choice(stores).expire(0)  # which merges, and finds none to forget
            await assert_holds(rng.choice(stores), names)
        for store in stores:
            await assert_holds(store, names)
            await store.close()

    asyncio.run(run())


def test_a_decision_between_recall_and_record_counts(tmp_path: Path) -> None:
    async def run() -> None:
        one, two = opened(tmp_path), opened(tmp_path)
        names = named("t", range(4))
        recalled = await one.recall(names, CUSTOMERS, MERCHANTS)
        assert await record(two, names[:2]) == [True, True]
        assert await record(one, names, recalled) == [False, False, True, True]
        await assert_holds(one, names)
        for store in (one, two):
            await store.close()

    asyncio.run(run())


def test_labels_resets_and_profiles_follow_what_is_not_merged_yet(tmp_path: Path) -> None:
    async def run() -> None:
        store = opened(tmp_path)
        names = named("t", range(21))
        await record(store, names)
        profile = await store.profile("c3")
        assert profile is not None
        assert profile.state["count"].tolist() == [3]
        assert await store.profile("nobody") is None
        assert await store.apply_labels([Label("t-3", True, START_MS)]) == ["applied"]
        (found,) = (await store.find(DecisionQuery(label="fraud"))).found
        assert found.record.transaction_id == "t-3"
        await record(store, named("u", range(21, 28)))
        profile = await store.profile("c3")
        assert profile is not None
        assert (profile.state["count"].tolist(), profile.state["fraud_count"].tolist()) == ([4], [1])
        assert await store.reset("c3")
        assert await store.profile("c3") is None
        assert not await store.reset("c3")
        await record(store, named("v", range(28, 35)))
        profile = await store.profile("c3")
        assert profile is not None
        assert profile.state["count"].tolist() == [1]
        await store.close()

    asyncio.run(run())


def test_a_merge_that_fails_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async def run() -> None:
        store = opened(tmp_path)
        monkeypatch.setattr(sqlite, "CATCH_UP_ROWS", 5)
        with monkeypatch.context() as broken:
            broken.setattr(sqlite, "merge_recent", fails)
            for i in range(3):
                assert all(await record(store, named("t", range(i * 6, i * 6 + 6))))
                await until(lambda: "states and search rows wait: the store" in caplog.text)
            broken.setattr(sqlite, "index_decisions", fails)
            with pytest.raises(StoreDown, match="disk I/O error"):  # an incomplete answer is none
                await store.find(DecisionQuery())
            assert store.breaker.outage is None
        await assert_holds(store, named("t", range(18)))
        await store.close()

    asyncio.run(run())


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.005)


def test_whatever_of_the_write_ahead_log_reached_the_disk_is_whole(tmp_path: Path) -> None:
    """After a loss of power the log ends anywhere: before, between and within commits, merges and search rows."""
    home = tmp_path / "home"
    names = named("t", range(40))

    async def write() -> list[int]:
        store = opened(home)
        store._writer.execute("PRAGMA wal_autocheckpoint = 0")
        ends = [os.path.getsize(home / "history.db-wal")]
        for start in range(0, 40, 4):
            await record(store, names[start : start + 4])
            ends.append(os.path.getsize(home / "history.db-wal"))
            if start % 12 == 8:
                store._merge()
                ends.append(os.path.getsize(home / "history.db-wal"))
                store._index_some()
                ends.append(os.path.getsize(home / "history.db-wal"))
        shutil.copytree(home, tmp_path / "copy")  # closing would empty the log
        await store.close()
        return ends

    async def check(at: int) -> int:
        folder = tmp_path / f"cut{at}"
        shutil.copytree(tmp_path / "copy", folder)
        (folder / "history.db-shm").unlink(missing_ok=True)
        os.truncate(folder / "history.db-wal", at)
        store = opened(folder)
        await store.open()
        n = len((await store.recall(names, [], [])).decided)
        assert n % 4 == 0
        await assert_holds(store, names[:n])
        await record(store, named("after", range(40, 43)))
        await assert_holds(store, [*names[:n], *named("after", range(40, 43))])
        await store.close()
        shutil.rmtree(folder)
        return n

    ends = asyncio.run(write())
    rng = random.Random(1)
    cuts = {end + more for end in ends for more in (0, -1, 32)} | {rng.randrange(ends[0], ends[-1]) for _ in range(20)}
    counts = [asyncio.run(check(at)) for at in sorted(cut for cut in cuts if ends[0] <= cut <= ends[-1])]
    assert counts == sorted(counts)
    assert set(counts) == set(range(0, 41, 4))


def worker(folder: Path, prefix: str, answered: Any) -> None:
    """Record batches until killed; tell each one that is on record."""
    sqlite.CATCH_UP_ROWS, sqlite.INDEX_AT_ONCE = 11, 3

    async def run() -> None:
        store = opened(folder, durable=True)
        for start in range(0, 100_000, 3):
            some = named(prefix, range(start, start + 3))
            assert all(await record(store, some, await store.recall(some, CUSTOMERS, MERCHANTS)))
            answered.send(some)

    asyncio.run(run())


def test_killed_workers_leave_what_they_answered(tmp_path: Path) -> None:
    """Two workers on one folder are killed at once, again and again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(2)
    kept: list[str] = []

    async def check(told: list[str]) -> None:
        store = opened(tmp_path)
        await store.open()
        on_record = [entry.key for entry in SqliteLog(tmp_path / "history.db", KEY).rows()]
        assert len(set(on_record)) == len(on_record)
        assert set(told) <= set(on_record)
        assert len(on_record) - len(told) <= 3 * 2 * (kill + 1)  # what was on its way
        await assert_holds(store, on_record)
        await store.close()

    for kill in range(6):
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        running = [
            context.Process(target=worker, args=(tmp_path, f"k{kill}{i}", pipe[1])) for i, pipe in enumerate(pipes)
        ]
        for process in running:
            process.start()
        for heard, said in pipes:
            said.close()
            kept += heard.recv()
        time.sleep(rng.random() * 0.15)  # anywhere in what they do
        for process in running:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process, (heard, _) in zip(running, pipes, strict=True):
            process.join()
            while True:
                try:
                    kept += heard.recv()
                except EOFError:
                    break
        asyncio.run(check(kept))


def test_a_file_of_the_release_before_is_taken_over(tmp_path: Path) -> None:
    """It had the same tables without `recent`, all states and a search row of every decision."""

    async def run() -> None:
        store = opened(tmp_path)
        await record(store, named("t", range(20)))
        await store.expire(0)
        await store.close()
        with closing(sqlite3.connect(tmp_path / "history.db")) as db, db:
            assert db.execute("SELECT count(*) FROM search").fetchone() == (20,)
            db.execute("DROP TABLE recent")
            db.execute("PRAGMA user_version = 3")
        store = opened(tmp_path)
        await record(store, named("t", range(20, 25)))
        await assert_holds(store, named("t", range(25)))
        await store.close()

    asyncio.run(run())


def test_the_write_ahead_log_begins_anew_while_decisions_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four writers that read as well, without a pause; the log's salt changes each time that it begins anew."""
    monkeypatch.setattr(sqlite, "CATCH_UP_ROWS", 64)
    monkeypatch.setattr(sqlite, "LOG_PAGES", 256)
    salts: set[bytes] = set()

    async def run() -> None:
        store = opened(tmp_path)
        log = Path(f"{store.path}-wal")

        async def write(writer: int) -> None:
            for start in range(0, 2400, 8):
                await record(store, named(f"w{writer}", range(start, start + 8)))
                await store.recall([], CUSTOMERS, MERCHANTS)
                with log.open("rb") as file:
                    salts.add(file.read(32)[16:20])

        await asyncio.gather(*(write(writer) for writer in range(4)))
        await store.close()

    asyncio.run(run())
    assert len(salts) >= 2


def test_what_has_no_search_row_yet_stays_bounded_under_bulk_requests(tmp_path: Path) -> None:
    """Each commit of 1,000 decisions is followed by one of search rows; 128 of them would leave ever more behind."""

    async def run() -> list[int]:
        store = opened(tmp_path)
        behind = []
        for start in range(0, 60_000, 1000):
            await record(store, named("w", range(start, start + 1000)))
            behind.append(unindexed(store._searcher))
        query = DecisionQuery(limit=1)
        assert (await store.find(query)).found[0].record.transaction_id == "w-59999"
        await store.close()
        return behind

    behind = asyncio.run(run())
    assert max(behind) < 20_000, behind
