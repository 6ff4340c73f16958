"""States in the SQLite store: a commit appends its transactions to `recent`; they are merged into the states later.

A transaction takes about 100 bytes in `recent`, where the states of its customer and merchant take 2.2 KB. A merge of
some hundred transactions writes each state once, in the same commit that empties `recent`. So the file always holds
each transaction once: in the states, or in `recent`. Whoever reads or changes states elsewhere merges first;
`LatestStates` reads both.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import msgspec
import numpy as np

from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Histories, Records
from fraud.history.encoding import decode, encode, is_readable, last_time_of
from fraud.history.state import CUSTOMER, MERCHANT, TRANSACTION, new_states
from fraud.stores.protocol import Unread
from fraud.stores.rows import row_key
from fraud.stores.sqlite_file import select_in
from fraud.stores.states import Blobs, Change, Written, apply_transactions

EXPIRE_AT_ONCE = 1000
KEPT_STATES = 10_000
"""States that a reader keeps in memory at most, of customers and merchants together: 22 MB."""


class _Transactions(msgspec.Struct, array_like=True):
    """The transactions of one commit: whose they are, and (n,) records of `TRANSACTION`."""

    customer_ids: list[str]
    merchant_ids: list[str | None]
    records: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Transactions).decode


def _records(blob: bytes) -> Records:
    return np.frombuffer(bytearray(blob), TRANSACTION)  # writable, as the kernels were compiled for


def add_recent(db: sqlite3.Connection, sequence: int, decided: Sequence[DecisionRecord], transactions: Records) -> None:
    """Append the transactions of some decisions, under the number of the last decision in the chain."""
    some = _Transactions(
        [d.customer_id for d in decided], [d.merchant_id for d in decided], np.ascontiguousarray(transactions).tobytes()
    )
    db.execute("INSERT INTO recent VALUES (?, ?)", (sequence, _encode(some)))


def merge_recent(db: sqlite3.Connection) -> None:
    """Merge the recent transactions into the states, in the transaction that is open."""
    recent = [_decode(blob) for (blob,) in db.execute("SELECT transactions FROM recent ORDER BY seq")]
    if not recent:
        return
    change = Change(
        [name for some in recent for name in some.customer_ids],
        [name for some in recent for name in some.merchant_ids],
        _records(b"".join([some.records for some in recent])),
    )
    customers, merchants = change.apply(
        state_blobs(db, "customers", change.customer_ids), state_blobs(db, "merchants", change.merchant_ids)
    )
    _write(db, "customers", customers)
    _write(db, "merchants", merchants)
    db.execute("DELETE FROM recent")


class LatestStates:
    """States as they are with the recent transactions, kept in memory by one reading connection.

    They are kept as long as `recent` begins with the same row. A merge empties it, and whatever else changes a state
    (labels, a reset, a backfill, expiry) merges first, so then the states are read again.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._last = 0
        self._customers = _KeptStates("customers", CUSTOMER)
        self._merchants = _KeptStates("merchants", MERCHANT)

    def histories(
        self, db: sqlite3.Connection, customer_ids: list[str], merchant_ids: list[str]
    ) -> tuple[Histories, Unread]:
        """Return copies of the states of some customers and merchants, and the indices of those that cannot be read.

        The caller has a read transaction open.
        """
        try:
            self._follow(db)
            customers = self._customers.places(db, customer_ids)
            merchants = self._merchants.places(db, merchant_ids)
        except BaseException:
            self._forget(None)
            raise
        histories = Histories(
            customer_ids, merchant_ids, self._customers.states[customers], self._merchants.states[merchants]
        )
        return histories, (self._customers.unread_among(customers), self._merchants.unread_among(merchants))

    def _follow(self, db: sqlite3.Connection) -> None:
        """Apply the transactions that were recorded since, by any worker."""
        (first,) = db.execute("SELECT min(seq) FROM recent").fetchone()
        if first is None or first != self._first or len(self._customers) + len(self._merchants) > KEPT_STATES:
            self._forget(first)
        if first is None:
            return
        for sequence, blob in db.execute(
            "SELECT seq, transactions FROM recent WHERE seq > ? ORDER BY seq", [self._last]
        ):
            self._apply(db, _decode(blob))
            self._last = sequence

    def _apply(self, db: sqlite3.Connection, some: _Transactions) -> None:
        customers = self._customers.places(db, some.customer_ids)
        found = iter(self._merchants.places(db, [name for name in some.merchant_ids if name is not None]).tolist())
        merchants = np.array([-1 if name is None else next(found) for name in some.merchant_ids], np.int64)
        apply_transactions(self._customers.states, self._merchants.states, customers, merchants, _records(some.records))
        self._customers.clear_unread()
        self._merchants.clear_unread()

    def _forget(self, first: int | None) -> None:
        self._first, self._last = first, 0
        self._customers.forget()
        self._merchants.forget()


class _KeptStates:
    """The states of one table by name: those that were read, with what was applied since."""

    def __init__(self, table: str, dtype: np.dtype[np.void]) -> None:
        self.states: Records = new_states(dtype, 256)
        self._table = table
        self._dtype = dtype
        self._places: dict[str, int] = {}
        self._unread: set[int] = set()

    def __len__(self) -> int:
        return len(self._places)

    def places(self, db: sqlite3.Connection, names: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return where the states of some customers or merchants are in `states`; those missing are read."""
        known = self._places
        missing = [name for name in names if name not in known]
        if missing:
            self._read(db, list(dict.fromkeys(missing)))
        return np.array([known[name] for name in names], np.int64)

    def _read(self, db: sqlite3.Connection, names: Sequence[str]) -> None:
        blobs = state_blobs(db, self._table, names)
        unread: list[int] = []
        read = decode([blobs.get(name) for name in names], self._dtype, unread)
        begin = len(self._places)
        end = begin + len(names)
        if end > len(self.states):
            self.states = np.concatenate([self.states[:begin], new_states(self._dtype, end)])
        self.states[begin:end] = read
        self._unread.update(begin + place for place in unread)
        self._places.update(zip(names, range(begin, end), strict=True))

    def unread_among(self, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> frozenset[int]:
        """Return which of some places, by their index, hold a state that a later release wrote."""
        if not self._unread:
            return frozenset()
        return frozenset(i for i, place in enumerate(places.tolist()) if place in self._unread)

    def clear_unread(self) -> None:
        """Let states that a later release wrote count as nobody's."""
        for place in self._unread:
            self.states[place] = new_states(self._dtype, 1)[0]

    def forget(self) -> None:
        self._places.clear()
        self._unread.clear()


def replace_states(db: sqlite3.Connection, table: str, names: Sequence[str], records: Records) -> None:
    """Write states in place of what stood there; of these, no fraud can be withdrawn any more."""
    keys = [row_key(name) for name in names]
    order = sorted(range(len(keys)), key=keys.__getitem__)  # rows in the order of the tree
    db.executemany(
        f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", ((keys[i], names[i], encode(records[i])) for i in order)
    )
    db.executemany(f"UPDATE known_frauds SET {table[:-1]} = NULL WHERE {table[:-1]} = ?", [(key,) for key in keys])


def expire_states(db: sqlite3.Connection, table: str, before_ms: int, after: int) -> tuple[int, int | None]:
    """Remove old states among some rows after one; return how many, and the last row looked at if there are more."""
    rows = db.execute(
        f"SELECT key, state FROM {table} WHERE key > ? ORDER BY key LIMIT {EXPIRE_AT_ONCE}", (after,)
    ).fetchall()
    old = [(key,) for key, state in rows if is_readable(state) and last_time_of(state) < before_ms]
    db.executemany(f"DELETE FROM {table} WHERE key = ?", old)
    db.executemany(f"UPDATE known_frauds SET {table[:-1]} = NULL WHERE {table[:-1]} = ?", old)
    return len(old), rows[-1][0] if len(rows) == EXPIRE_AT_ONCE else None


def state_blobs(db: sqlite3.Connection, table: str, names: Sequence[str]) -> Blobs:
    """Return the encoded states of some customers or merchants; those without one are missing."""
    keys = [row_key(name) for name in names]
    return dict(select_in(db, f"SELECT id, state FROM {table} WHERE key IN ({{}})", keys))


def _write(db: sqlite3.Connection, table: str, blobs: Written) -> None:
    rows = sorted((row_key(name), name, blob) for name, blob in blobs.items())  # in the order of the tree
    db.executemany(f"INSERT INTO {table} VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state", rows)
