"""The decision log as auditors read it: row by row in the order of its chain, beside the running service."""

from __future__ import annotations

import fcntl
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from fraud.chain import Anchor, Logged
from fraud.errors import StoreError
from fraud.events import Decided

FORGET_AT_ONCE = 5000
decode_record = msgspec.msgpack.Decoder(Decided).decode


class Entry(NamedTuple):
    """One row of the log: what the chain holds, and the key it is found by."""

    logged: Logged
    key: str


class DecisionLog(ABC):
    """A log that can be read in the order of its chain."""

    def anchor(self) -> Anchor:
        """Return where the chain begins."""
        return self._place("anchor")

    def head(self) -> Anchor:
        """Return the last place that was written, as the log itself says."""
        return self._place("head")

    @abstractmethod
    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        """Yield the rows after one place up to another, in order; what is written meanwhile may be missed."""

    def forget(self, before_ms: int) -> int:
        """Remove the oldest decisions up to the first that was made at `before_ms` or later.

        The chain begins after them from then on. A transaction forgotten counts as new when it comes again.
        Works in small steps, so that a running service waits for none of them.

        Returns
        -------
        int
            How many were removed.
        """
        removed = 0
        while True:
            last = self.anchor()
            keys: list[str] = []
            for logged, key in self.rows():
                if len(keys) == FORGET_AT_ONCE or decode_record(logged.record).processing_time_ms >= before_ms:
                    break
                last = Anchor(logged.sequence, logged.link)
                keys.append(key)
            if not keys:
                return removed
            self._remove(last, keys)
            removed += len(keys)

    @abstractmethod
    def _place(self, place: str) -> Anchor: ...

    @abstractmethod
    def _remove(self, last: Anchor, keys: list[str]) -> None:
        """Remove the rows up to `last`, which have these keys, and let the chain begin after them."""


def open_log(url: str, state_dir: Path) -> DecisionLog:
    """Return the log of the store that a URL names, as for `fraud.stores.open_store`.

    Raises
    ------
    StoreError
        That store keeps no log, or is not there.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        return SqliteLog(Path(rest.removeprefix("//")) if rest else state_dir / "history.db")
    if scheme in ("postgresql", "postgres"):
        from fraud.stores.postgres_log import PostgresLog

        return PostgresLog(url)
    raise StoreError(f"{scheme}: keeps no chain of decisions; decisions are kept by sqlite: and postgresql: stores")


class SqliteLog(DecisionLog):
    """The decisions in a SQLite store.

    Parameters
    ----------
    path : Path
        The store's file.

    Raises
    ------
    StoreError
        There is no such store.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise StoreError(
                f"there is no decision log at {path}; set FRAUD_STATE_DIR or FRAUD_STORE as for the service"
            )
        self.path = path

    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        query = "SELECT seq, record, link, key FROM decisions WHERE seq > ? AND seq <= ? ORDER BY seq"
        with closing(self._read()) as db:
            for sequence, record, link, key in db.execute(query, (after, 2**62 if until is None else until)):
                yield Entry(Logged(sequence, bytes(record), bytes(link)), str(key))

    def _remove(self, last: Anchor, keys: list[str]) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM decisions WHERE seq <= ?", (last.sequence,))
            db.executemany("DELETE FROM frauds WHERE key = ?", [(key,) for key in keys])
            db.execute("UPDATE chain SET seq = ?, link = ? WHERE place = 'anchor'", last)

    def _place(self, place: str) -> Anchor:
        with closing(self._read()) as db:
            sequence, link = db.execute("SELECT seq, link FROM chain WHERE place = ?", (place,)).fetchone()
        return Anchor(sequence, bytes(link))

    def _read(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, in turn with the workers of a running service, which use the same lock."""
        with open(f"{self.path}-lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with closing(sqlite3.connect(self.path, timeout=10)) as db, db:
                db.execute("PRAGMA synchronous = FULL")
                yield db
