"""The decision log in SQLite, as auditors read it."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.marks import place_mark
from fraud.errors import StoreError
from fraud.stores.log import DecisionLog, Entry, Place
from fraud.stores.sqlite_schema import migrate


class SqliteLog(DecisionLog):
    """The decisions in a SQLite store.

    Parameters
    ----------
    path : Path
        The store's file.
    audit_key : bytes
        Key of the chain, for `forget`; see `fraud.decisions.chain`.

    Raises
    ------
    StoreError
        There is no such store.
    """

    def __init__(self, path: Path, audit_key: bytes = b"") -> None:
        super().__init__(audit_key)
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

    def beyond(self, key: bytes) -> str | None:
        with closing(self._read()) as db:
            query = "SELECT seq, (SELECT max(seq) FROM decisions) FROM chain WHERE place = 'head'"
            end, last = db.execute(query).fetchone()
        return f"row {last} stands behind the end of the log, row {end}" if last is not None and last > end else None

    def labels(self) -> Iterator[Entry]:
        with closing(self._read()) as db:
            if db.execute("SELECT count(*) FROM chain WHERE place = 'labels'").fetchone() == (0,):
                return
            for sequence, label, link, key in db.execute("SELECT seq, label, link, key FROM labels ORDER BY seq"):
                yield Entry(Logged(sequence, bytes(label), bytes(link)), str(key))

    def place(self, place: str) -> Place:
        with closing(self._read()) as db:
            row = db.execute("SELECT * FROM chain WHERE place = ?", (place,)).fetchone()
            if row is None and place == "labels" and db.execute("PRAGMA user_version").fetchone()[0] < 3:
                return Place(Anchor(), None, has_marks=False)
        if row is None:
            raise StoreError(f"the decision log has no {place}: its table chain was changed")
        _, sequence, link, *mark = row
        return Place(Anchor(sequence, bytes(link)), mark[0] if mark else None, has_marks=bool(mark))

    def _remove(self, last: Anchor, keys: list[str]) -> None:
        with self._writing() as db:
            db.execute("DELETE FROM decisions WHERE seq <= ?", (last.sequence,))
            db.execute("DELETE FROM search WHERE seq <= ?", (last.sequence,))
            db.executemany("UPDATE known_frauds SET key = NULL WHERE key = ?", [(key,) for key in keys])
            mark = place_mark("anchor", last, self.audit_key)
            db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'anchor'", (*last, mark))

    def _read(self) -> sqlite3.Connection:
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, in turn with the workers of a running service, which use the same lock."""
        with open(f"{self.path}-lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as db:
                migrate(db, str(self.path), self.audit_key)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
