"""Small tables beside the decisions, such as lists and cases: in a SQLite file of their own, or in PostgreSQL.

They never wait for the lock of the decisions. Calls block: they are made in a thread, or by a command.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psycopg

from fraud.stores.migrations import steps_after
from fraud.stores.urls import checked

Connection = psycopg.Connection[tuple[Any, ...]]


def opened_file(path: Path, steps: Sequence[Sequence[str]]) -> sqlite3.Connection:
    """Return a connection to a SQLite file, which is made, or brought to this release, by the steps that it lacks.

    Raises
    ------
    sqlite3.Error, OSError
        The file cannot be used.
    StoreError
        A later release wrote it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != len(steps):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            (version,) = db.execute("PRAGMA user_version").fetchone()
            for number, statements in steps_after(version, steps, str(path)):
                for statement in statements:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


class PostgresTables:
    """Tables in the schema ``fraud`` of a PostgreSQL, and transactions on them, by one thread at a time.

    Parameters
    ----------
    url : str
    steps : sequence of str
        The migrations.
    kept_in : str
        The table that has their numbers.
    lock : int
        The advisory lock under which they run.
    what : str
        For messages, such as ``the lists in PostgreSQL``.
    """

    def __init__(self, url: str, steps: Sequence[str], kept_in: str, lock: int, what: str) -> None:
        self._url = checked(url)
        self._steps = steps
        self._kept_in = kept_in
        self._lock = lock
        self._what = what
        self._db: Connection | None = None
        self._turn = threading.Lock()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction on the one connection, which is made anew after a failure; raises `psycopg.Error`."""
        with self._turn:
            if self._db is None or self._db.closed:
                self._db = psycopg.connect(self._url, connect_timeout=5, autocommit=True, prepare_threshold=None)
                self._migrate(self._db)
            try:
                with self._db.transaction():
                    self._db.execute("SET LOCAL statement_timeout = '30s'")
                    yield self._db
            except psycopg.OperationalError:
                self._db.close()
                raise

    @contextmanager
    def alone(self) -> Iterator[Connection]:
        """A transaction that takes turns with all others of its kind."""
        with self.transaction() as db:
            db.execute("SELECT pg_advisory_xact_lock(%s)", [self._lock])
            yield db

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _migrate(self, db: Connection) -> None:
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", [self._lock])
            db.execute("CREATE SCHEMA IF NOT EXISTS fraud")
            db.execute(f"CREATE TABLE IF NOT EXISTS fraud.{self._kept_in} (version int PRIMARY KEY)".encode())
            found = db.execute(f"SELECT coalesce(max(version), 0) FROM fraud.{self._kept_in}".encode()).fetchone()
            for number, step in steps_after(cast(int, (found or (0,))[0]), self._steps, self._what):
                db.execute(step.encode())
                db.execute(f"INSERT INTO fraud.{self._kept_in} VALUES (%s)".encode(), [number])
