"""The tables of the SQLite store, and the steps that bring an older file to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.marks import place_mark
from fraud.stores.migrations import check_adopted, steps_after

Step = Callable[[sqlite3.Connection, bytes], None]


def _first(db: sqlite3.Connection, audit_key: bytes) -> None:
    _run(
        db,
        """
        CREATE TABLE customers (key INTEGER PRIMARY KEY, id TEXT NOT NULL, state BLOB NOT NULL);
        CREATE TABLE merchants (key INTEGER PRIMARY KEY, id TEXT NOT NULL, state BLOB NOT NULL);
        CREATE TABLE decisions (
            seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL, link BLOB NOT NULL
        );
        CREATE TABLE chain (place TEXT PRIMARY KEY, seq INTEGER NOT NULL, link BLOB NOT NULL) WITHOUT ROWID;
        INSERT INTO chain VALUES ('anchor', 0, zeroblob(32)), ('head', 0, zeroblob(32));
        CREATE TABLE frauds (key TEXT PRIMARY KEY, label_time_ms INTEGER NOT NULL) WITHOUT ROWID;
        """,
    )


def _marks(db: sqlite3.Connection, audit_key: bytes) -> None:
    """Mark where the chain begins and ends."""
    _run(db, "ALTER TABLE chain ADD COLUMN mark BLOB")
    places = {
        place: Anchor(sequence, bytes(link))
        for place, sequence, link in db.execute("SELECT place, seq, link FROM chain")
    }
    rows = db.execute("SELECT seq, record, link FROM decisions ORDER BY seq DESC LIMIT 2")
    last = [Logged(sequence, bytes(record), bytes(link)) for sequence, record, link in rows]
    check_adopted(places["anchor"], places["head"], last, audit_key, "SQLite")
    for place, anchor in places.items():
        db.execute("UPDATE chain SET mark = ? WHERE place = ?", (place_mark(place, anchor, audit_key), place))


STEPS: tuple[Step, ...] = (_first, _marks)


def migrate(db: sqlite3.Connection, where: str, audit_key: bytes) -> None:
    """Bring a file to this release's schema; the caller holds the file's lock, and `db` is in no transaction.

    Raises
    ------
    StoreError
        A later release wrote the file, or its decision log is not what it says.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for number, step in steps_after(version, STEPS, where):
        db.execute("BEGIN IMMEDIATE")
        try:
            step(db, audit_key)
            db.execute(f"PRAGMA user_version = {number}")
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")


def _run(db: sqlite3.Connection, statements: str) -> None:
    """Run statements inside the transaction that is open, which `executescript` would end."""
    for statement in filter(None, map(str.strip, statements.split(";"))):
        db.execute(statement)
