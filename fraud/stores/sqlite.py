"""The embedded store: one SQLite file, shared by all workers of one server.

Each process has one thread that writes and one that reads. Writers of several processes take turns by a
lock on a file beside the database, which the kernel hands on at once and lets go of when a process dies;
SQLite's own waiting would sleep in steps of up to 100 ms.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from fraud.errors import InvalidRequest, StoreDown, StoreError
from fraud.features.featurizer import Records
from fraud.history.encoding import decode, encode, is_readable, last_time_of
from fraud.history.profile import Profile
from fraud.history.state import CUSTOMER
from fraud.stores.protocol import Outage, Recalled, Recorded, States, StoreHealth, StoreStats
from fraud.stores.resilient import PATIENT_S, CircuitBreaker
from fraud.stores.rows import decode_record, encode_record, row_key, search_row
from fraud.stores.search import SEARCH_S, TOO_WIDE, conditions, page_of
from fraud.stores.sqlite_file import StoreFile, translated
from fraud.stores.sqlite_labels import apply_label, keep_frauds, labels_of
from fraud.stores.sqlite_schema import migrate
from fraud.stores.states import Blobs, Change, Written, histories_of

WAIT_S = 2.0
"""Longest wait for the file: for its disk, or for another process that keeps it locked."""
CLOSE_S = 5.0
EXPIRE_AT_ONCE = 1000
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
        self._models: dict[tuple[str, str], int] = {}
        try:
            self._file = StoreFile(path)
            self._writer = self._connect(durable)
            self._reader = self._connect(durable)
            self._searcher = self._connect(durable)
            self._file.remember()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"the store {path} cannot be opened: {error}") from error
        self._write_thread = ThreadPoolExecutor(1, "store-write")
        self._read_thread = ThreadPoolExecutor(1, "store-read")
        self._search_thread = ThreadPoolExecutor(1, "store-search")
        self.breaker = CircuitBreaker(_Probe(self), WAIT_S, _nothing)

    def _connect(self, durable: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            with self._file.locked_at_start():
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                connection.execute("PRAGMA cache_size = -16384")
                connection.execute("PRAGMA mmap_size = 1073741824")
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
        return await self._on(self._write_thread, lambda: self._record(decided, transactions))

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return await self._on(self._write_thread, lambda: self._apply_labels(labels))

    async def labels(self, key: str) -> list[Label]:
        return await self._on(self._read_thread, lambda: labels_of(self._reader, key))

    async def find(self, query: DecisionQuery) -> Page:
        return await self._run(self._search_thread, lambda: self._find(query), PATIENT_S)  # no sign of an outage

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
        for thread, connection in (
            (self._write_thread, self._writer),
            (self._read_thread, self._reader),
            (self._search_thread, self._searcher),
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
        db = self._reader
        db.execute("BEGIN")  # one snapshot for all three
        try:
            decided = _decisions(db, keys)
            customers = _blobs(db, "customers", customer_ids)
            merchants = _blobs(db, "merchants", merchant_ids)
        finally:
            db.execute("COMMIT")
        histories, unread = histories_of(customer_ids, merchant_ids, customers, merchants)
        return Recalled(decided, histories, unread=unread)

    def _record(self, decided: Sequence[DecisionRecord], transactions: Records | None) -> Recorded:
        with self._writing() as db:
            before = _decisions(db, [d.key for d in decided])
            fresh = [i for i, d in enumerate(decided) if d.key not in before]
            end = self._log(db, [decided[i] for i in fresh]) if fresh else self._seen
            if transactions is not None and fresh:
                _change(db, Change([decided[i] for i in fresh], transactions[fresh]))
        self._seen = end
        return Recorded([before.get(d.key, d) for d in decided])

    def _log(self, db: sqlite3.Connection, decided: Sequence[DecisionRecord]) -> Anchor:
        """Chain decisions and write them; return where the chain ends now."""
        head = self._head(db)
        rows = list(extend(head, map(encode_record, decided), self._audit_key))
        db.executemany(
            "INSERT INTO decisions VALUES (?, ?, ?, ?)",
            [(row.sequence, d.key, row.record, row.link) for d, row in zip(decided, rows, strict=True)],
        )
        db.executemany(
            "INSERT INTO search VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(row.sequence, *search_row(d, self._model(db, d))) for d, row in zip(decided, rows, strict=True)],
        )
        head = Anchor(rows[-1].sequence, rows[-1].link)
        mark = place_mark("head", head, self._audit_key)
        db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'head'", (*head, mark))
        return head

    def _model(self, db: sqlite3.Connection, decided: DecisionRecord) -> int:
        """Return the number of the model version that decided."""
        version = decided.model_name, decided.model_digest
        if version not in self._models:
            db.execute("INSERT OR IGNORE INTO models (name, digest) VALUES (?, ?)", version)
            query = "SELECT id FROM models WHERE name = ? AND digest = ?"
            (self._models[version],) = db.execute(query, version).fetchone()
        return self._models[version]

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
        with self._writing() as db:
            recorded = _decisions(db, [label.key for label in labels])
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
            keys = [row_key(name) for name in names]
            order = sorted(range(len(keys)), key=keys.__getitem__)  # rows in the order of the tree
            with self._writing() as db:
                db.executemany(
                    f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)",
                    ((keys[i], names[i], encode(records[i])) for i in order),
                )
                db.executemany(
                    f"UPDATE known_frauds SET {table[:-1]} = NULL WHERE {table[:-1]} = ?", [(k,) for k in keys]
                )
        with self._writing() as db:
            keep_frauds(db, states.frauds)

    def _expire(self, table: str, before_ms: int, after: int) -> tuple[int, int | None]:
        """Look at some rows after one; return how many were old, and the last row looked at if there are more."""
        with self._writing() as db:
            rows = db.execute(
                f"SELECT key, state FROM {table} WHERE key > ? ORDER BY key LIMIT {EXPIRE_AT_ONCE}", (after,)
            ).fetchall()
            old = [(key,) for key, state in rows if is_readable(state) and last_time_of(state) < before_ms]
            db.executemany(f"DELETE FROM {table} WHERE key = ?", old)
            db.executemany(f"UPDATE known_frauds SET {table[:-1]} = NULL WHERE {table[:-1]} = ?", old)
        return len(old), rows[-1][0] if len(rows) == EXPIRE_AT_ONCE else None

    def _find(self, query: DecisionQuery) -> Page:
        where, values = conditions(query, "seq", "models", "?")
        statement = (
            "SELECT s.seq, s.time_ms, s.label, d.record FROM search AS s JOIN decisions AS d ON d.seq = s.seq "
            f"WHERE {where} ORDER BY s.time_ms DESC, s.seq DESC LIMIT ?"
        )
        deadline = time.monotonic() + SEARCH_S
        self._searcher.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        try:
            rows = self._searcher.execute(statement, [*values, query.limit + 1]).fetchall()
        except sqlite3.OperationalError as error:
            if time.monotonic() <= deadline:
                raise
            raise InvalidRequest(TOO_WIDE) from error
        return page_of(rows, query)

    def _profile(self, customer_id: str) -> Profile | None:
        blob = _blobs(self._reader, "customers", [customer_id]).get(customer_id)
        return Profile(customer_id, decode([blob], CUSTOMER)) if blob else None

    def _reset(self, customer_id: str) -> bool:
        with self._writing() as db:
            db.execute("UPDATE known_frauds SET customer = NULL WHERE customer = ?", (row_key(customer_id),))
            return db.execute("DELETE FROM customers WHERE key = ?", (row_key(customer_id),)).rowcount > 0

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._file.locked():
            self._file.expect_same()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._file.expect_time()
                self._writer.execute("COMMIT")
            except BaseException:
                self._models.clear()  # what was added may have gone with it
                if self._writer.in_transaction:  # which a full disk may have ended
                    self._writer.execute("ROLLBACK")
                raise


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


def _decisions(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, DecisionRecord]:
    rows = _select(db, "SELECT key, record FROM decisions WHERE key IN ({})", keys)
    return {key: decode_record(record) for key, record in rows}


def _blobs(db: sqlite3.Connection, table: str, names: Sequence[str]) -> Blobs:
    return dict(_select(db, f"SELECT id, state FROM {table} WHERE key IN ({{}})", [row_key(name) for name in names]))


def _select(
    db: sqlite3.Connection, query: str, values: Sequence[object], at_once: int = 512
) -> Iterable[tuple[str, bytes]]:
    """Run a query over values, the last one repeated up to a power of two: so few statements are compiled and kept."""
    for start in range(0, len(values), at_once):
        some = list(values[start : start + at_once])
        some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        yield from db.execute(query.format(",".join("?" * len(some))), some)


def _change(db: sqlite3.Connection, change: Change) -> None:
    customers, merchants = change.apply(
        _blobs(db, "customers", change.customer_ids), _blobs(db, "merchants", change.merchant_ids)
    )
    _write(db, "customers", customers)
    _write(db, "merchants", merchants)


def _write(db: sqlite3.Connection, table: str, blobs: Written) -> None:
    db.executemany(
        f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state",
        [(row_key(name), name, blob) for name, blob in blobs.items()],
    )
