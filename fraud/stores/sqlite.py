"""The embedded store: one SQLite file, shared by all workers of one server.

Each process has one thread that writes and one that reads. Writers of several processes take turns by a
lock on a file beside the database, which the kernel hands on at once and lets go of when a process dies;
SQLite's own waiting would sleep in steps of up to 100 ms.

A commit writes decisions and the transactions of their histories. The states (`fraud.stores.sqlite_states`) and the
rows that decisions are found by (`fraud.stores.sqlite_search`) follow in groups, and before whatever needs them.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from fraud.decisions.chain import Anchor, extend
from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.marks import is_marked, place_mark
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreDown, StoreError
from fraud.features.featurizer import Records
from fraud.history.encoding import decode
from fraud.history.profile import Profile
from fraud.history.state import CUSTOMER
from fraud.stores.protocol import Outage, Recalled, Recorded, States, StoreHealth, StoreStats
from fraud.stores.resilient import PATIENT_S, CircuitBreaker
from fraud.stores.rows import encode_record, row_key
from fraud.stores.sqlite_file import StoreFile, checkpoint, configure, translated
from fraud.stores.sqlite_labels import apply_label, keep_frauds, labels_of
from fraud.stores.sqlite_schema import migrate
from fraud.stores.sqlite_search import decisions_by_key, find_decisions, index_decisions, unindexed
from fraud.stores.sqlite_states import (
    LatestStates,
    add_recent,
    expire_states,
    merge_recent,
    replace_states,
    state_blobs,
)

logger = logging.getLogger("fraud.stores")

WAIT_S = 2.0
"""Longest wait for the file: for its disk, or for another process that keeps it locked."""
CLOSE_S = 5.0
CATCH_UP_ROWS = 256
"""Decisions after which states and search rows catch up: more write fewer pages, and keep decisions waiting."""
LOG_PAGES = 4096
"""Pages of the write-ahead log, of 4 KiB, beyond which the last of them are copied into the file between decisions."""
INDEX_AT_ONCE, MOST_AT_ONCE = 128, 4096
"""Search rows of one commit, after which decisions get their turn: an eighth of what waits, which so stays bounded."""
T = TypeVar("T")


class SqliteStore:
    """The store in one file; see `fraud.stores.protocol.Store`.

    Parameters
    ----------
    path : Path
        The database file; made with its folder if it is not there.
    durable : bool
        Whether a commit waits for the disk. Without, a crash of the machine (not of the process) loses the
        last seconds; the file stays whole.
    audit_key : bytes
        Key of the decisions' chain; see `fraud.decisions.chain`.

    Raises
    ------
    StoreError
        The file cannot be opened, or another release wrote it.
    """

    name = "sqlite"

    def __init__(self, path: Path, *, durable: bool = True, audit_key: bytes = b"") -> None:
        self.path = path
        self._audit_key = audit_key
        self._seen = Anchor()
        self._durable = durable
        self._latest = LatestStates()
        self._catching_up: asyncio.Task[None] | None = None
        try:
            self._file = StoreFile(path)
            self._writer = self._connect()
            self._reader = self._connect()
            self._searcher = self._connect()
            self._copier = self._connect()
            self._file.remember()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the store {path} cannot be opened: {error}") from error
        self._write_thread = ThreadPoolExecutor(1, "store-write")
        self._read_thread = ThreadPoolExecutor(1, "store-read")
        self._search_thread = ThreadPoolExecutor(1, "store-search")
        self._copy_thread = ThreadPoolExecutor(1, "store-copy")
        self.breaker = CircuitBreaker(_Probe(self), WAIT_S, _nothing)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            with self._file.locked_at_start():
                configure(connection, durable=self._durable)
                migrate(connection, str(self.path), self._audit_key)
                connection.execute(f"PRAGMA busy_timeout = {round(WAIT_S * 1000)}")
        except BaseException:
            connection.close()
            raise
        return connection

    async def open(self) -> None:
        """Refuse a decision log whose end is not what a service with this audit key wrote."""
        await self._on(self._read_thread, lambda: self._head(self._reader), PATIENT_S)

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        return await self._on(self._read_thread, lambda: self._recall(keys, customer_ids, merchant_ids))

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        recorded, behind = await self._on(self._write_thread, lambda: self._record(decided, transactions, recalled))
        if behind >= CATCH_UP_ROWS and (self._catching_up is None or self._catching_up.done()):
            self._catching_up = asyncio.ensure_future(self._catch_up_behind())
        return recorded

    async def _catch_up_behind(self) -> None:
        """Bring states and search rows up to the latest decision, in steps between which decisions are recorded."""
        try:
            await self._run(self._write_thread, self._merge, PATIENT_S)
            while await self._run(self._write_thread, self._index_some, PATIENT_S) >= INDEX_AT_ONCE:
                pass
            if await self._run(self._copy_thread, lambda: checkpoint(self._copier), PATIENT_S) > LOG_PAGES:
                await self._run(self._write_thread, lambda: checkpoint(self._writer), PATIENT_S)  # it begins anew
        except StoreError as error:  # tried again after the next decision
            logger.warning("states and search rows wait: %s", error.message)

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return await self._on(self._write_thread, lambda: self._apply_labels(labels))

    async def labels(self, key: str) -> list[Label]:
        return await self._on(self._read_thread, lambda: labels_of(self._reader, key))

    async def find(self, query: DecisionQuery) -> Page:
        """Answer from search rows; a query that fails is no sign of an outage."""
        behind = await self._run(self._search_thread, lambda: unindexed(self._searcher), PATIENT_S)
        while behind > 0 and (indexed := await self._run(self._write_thread, self._index_some, PATIENT_S)):
            behind -= indexed
        return await self._run(self._search_thread, lambda: find_decisions(self._searcher, query), PATIENT_S)

    async def profile(self, customer_id: str) -> Profile | None:
        return await self._on(self._read_thread, lambda: self._profile(customer_id))

    async def reset(self, customer_id: str) -> bool:
        return await self._on(self._write_thread, lambda: self._reset(customer_id))

    async def expire(self, before_ms: int) -> int:
        forgotten = 0
        for table in ("customers", "merchants"):
            after: int | None = -(2**63)
            while after is not None:
                step = partial(self._expire, table, before_ms, after)
                n, after = await self._on(self._write_thread, step, PATIENT_S)
                forgotten += n
        return forgotten

    def stats(self) -> StoreStats:
        return self.breaker.stats()

    def health(self) -> StoreHealth:
        """Return what is wrong with the file; nothing is scored without it."""
        outage = self.breaker.outage
        if outage is None:
            try:
                self._file.expect_same()
            except StoreDown as error:
                outage = Outage(self.name, time.time_ns() // 1_000_000, error.message, error.is_permanent)
        return StoreHealth() if outage is None else StoreHealth((outage,), "the store takes none")

    async def ping(self) -> None:
        """Write what changes nothing: a full disk, or a lock that is kept, does not show in a read."""
        await self._run(self._write_thread, self._write_nothing, WAIT_S)

    async def close(self) -> None:
        await self.breaker.close()
        if self._catching_up is not None:
            await asyncio.wait([self._catching_up], timeout=CLOSE_S)
        for thread, connection in (
            (self._write_thread, self._writer),
            (self._read_thread, self._reader),
            (self._search_thread, self._searcher),
            (self._copy_thread, self._copier),
        ):
            await asyncio.wait([self._run(thread, connection.close, CLOSE_S)], timeout=CLOSE_S)
            thread.shutdown(wait=False, cancel_futures=True)  # it may wait for a lock that another process keeps
        self._file.close()

    async def backfill(self, states: States) -> None:
        await self._run(self._write_thread, lambda: self._backfill(states), float("inf"))

    async def _on(self, thread: ThreadPoolExecutor, job: Callable[[], T], budget_s: float = WAIT_S) -> T:
        return await self.breaker.call(lambda: self._run(thread, job, budget_s), budget_s)

    def _run(self, thread: ThreadPoolExecutor, job: Callable[[], T], budget_s: float) -> asyncio.Future[T]:
        """Begin a job; one whose turn comes too late does nothing, as its caller was told that it failed."""
        give_up_at = time.monotonic() + budget_s

        def run() -> T:
            if time.monotonic() > give_up_at:
                raise StoreDown(f"the store {self.path} is behind")
            if thread is self._write_thread:
                self._file.give_up_at = give_up_at
            try:
                return job()
            except sqlite3.Error as error:
                raise translated(self.path, error) from error

        return asyncio.get_running_loop().run_in_executor(thread, run)

    def _write_nothing(self) -> None:
        with self._writing() as db:
            db.execute("UPDATE chain SET seq = seq WHERE place = 'anchor'")

    def _recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        with self._reading() as db:
            decided = decisions_by_key(db, keys)
            histories, unread = self._latest.histories(db, customer_ids, merchant_ids)
            (end,) = db.execute("SELECT seq FROM chain WHERE place = 'head'").fetchone()
        return Recalled(decided, histories, unread=unread, end=end)

    def _record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None
    ) -> tuple[Recorded, int]:
        """Record decisions; returns also how many have no search row yet."""
        with self._writing() as db:
            end = self._head(db)
            if recalled is not None and recalled.end == end.sequence:  # nothing was recorded since
                before = recalled.decided
            else:
                before = decisions_by_key(db, [d.key for d in decided])
            fresh = [i for i, d in enumerate(decided) if d.key not in before] if before else range(len(decided))
            if fresh:
                some = decided if len(fresh) == len(decided) else [decided[i] for i in fresh]
                end = self._log(db, end, some)
                if transactions is not None:
                    add_recent(db, end.sequence, some, transactions if some is decided else transactions[fresh])
            behind = unindexed(db)
        self._seen = end
        return Recorded([before.get(d.key, d) for d in decided]), behind

    def _merge(self) -> None:
        with self._writing(durable=False) as db:
            merge_recent(db)

    def _index_some(self) -> int:
        with self._writing(durable=False) as db:
            return index_decisions(db, min(max(unindexed(db) // 8, INDEX_AT_ONCE), MOST_AT_ONCE))

    def _log(self, db: sqlite3.Connection, head: Anchor, decided: Sequence[DecisionRecord]) -> Anchor:
        """Chain decisions behind the head and write them; return where the chain ends now."""
        rows = list(extend(head, map(encode_record, decided), self._audit_key))
        db.executemany(
            "INSERT INTO decisions VALUES (?, ?, ?, ?)",
            [(row.sequence, d.key, row.record, row.link) for d, row in zip(decided, rows, strict=True)],
        )
        head = Anchor(rows[-1].sequence, rows[-1].link)
        mark = place_mark("head", head, self._audit_key)
        db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'head'", (*head, mark))
        return head

    def _head(self, db: sqlite3.Connection) -> Anchor:
        """Return where the chain ends.

        Raises
        ------
        StoreError
            The service did not write this end, or a later one was seen before.
        """
        sequence, link, mark = db.execute("SELECT seq, link, mark FROM chain WHERE place = 'head'").fetchone()
        head = Anchor(sequence, bytes(link))
        if not is_marked("head", head, mark, self._audit_key):
            raise StoreError(
                f"the decision log in {self.path} was changed at its end, row {sequence}, or FRAUD_AUDIT_KEY is "
                "another one: nothing is recorded behind it"
            )
        if sequence < self._seen.sequence:
            raise StoreError(
                f"the decision log in {self.path} went back from row {self._seen.sequence} to row {sequence}: "
                "nothing is recorded behind it until the service is started anew"
            )
        self._seen = head
        return head

    def _apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        with self._caught_up() as db:
            recorded = decisions_by_key(db, [label.key for label in labels])
            return [
                "unknown" if record is None else apply_label(db, label, record, self._audit_key)
                for label in labels
                for record in (recorded.get(label.key),)
            ]

    def _backfill(self, states: States) -> None:
        for table, names, records in (
            ("customers", states.customer_ids, states.customers),
            ("merchants", states.merchant_ids, states.merchants),
        ):
            with self._caught_up() as db:
                replace_states(db, table, names, records)
        with self._writing() as db:
            keep_frauds(db, states.frauds)

    def _expire(self, table: str, before_ms: int, after: int) -> tuple[int, int | None]:
        with self._caught_up() as db:
            return expire_states(db, table, before_ms, after)

    def _profile(self, customer_id: str) -> Profile | None:
        with self._reading() as db:
            blob = state_blobs(db, "customers", [customer_id]).get(customer_id)
            histories, (unread, _) = self._latest.histories(db, [customer_id], [])
        state = decode([blob], CUSTOMER) if unread else histories.customers  # which says why it cannot be read
        return Profile(customer_id, state) if blob is not None or state["count"][0] else None

    def _reset(self, customer_id: str) -> bool:
        with self._caught_up() as db:
            db.execute("UPDATE known_frauds SET customer = NULL WHERE customer = ?", (row_key(customer_id),))
            return db.execute("DELETE FROM customers WHERE key = ?", (row_key(customer_id),)).rowcount > 0

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """One snapshot for all that is read."""
        self._reader.execute("BEGIN")
        try:
            yield self._reader
        finally:
            self._reader.execute("COMMIT")

    @contextmanager
    def _caught_up(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Write with states and search rows brought up to the latest decision."""
        with self._writing(durable=durable) as db:
            merge_recent(db)
            index_decisions(db)
            yield db

    @contextmanager
    def _writing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Hold the lock and a transaction; one that need not be durable is on the disk with the next that is."""
        with self._file.locked(), self._synced(durable):
            self._file.expect_same()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._file.expect_time()
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:  # which a full disk may have ended
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _synced(self, durable: bool) -> Iterator[None]:
        if durable or not self._durable:
            yield
            return
        self._writer.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._writer.execute("PRAGMA synchronous = FULL")


class _Probe:
    """The file as the circuit breaker asks it, past the breaker."""

    name = SqliteStore.name

    def __init__(self, store: SqliteStore) -> None:
        self._store = store

    async def open(self) -> None:
        pass

    async def ping(self) -> None:
        await self._store.ping()


async def _nothing() -> None:
    pass
