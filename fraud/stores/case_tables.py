"""The tables of cases in SQLite and PostgreSQL, and transactions on them: one writer at a time."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg

from fraud.errors import StoreDown
from fraud.stores.side_tables import Connection, PostgresTables, opened_file

Execute = Callable[[str, Sequence[object]], list[tuple[Any, ...]]]
"""Runs one statement, with ``{table}`` for a table and ``?`` for each value; returns its rows."""
TABLES = ("cases", "case_transactions", "case_trail", "case_cursor")


class CaseTables(Protocol):
    """The tables of cases, in a database."""

    def writing(self) -> AbstractContextManager[Execute]:
        """One transaction that nobody else writes beside; an error in the block takes it back.

        Raises
        ------
        StoreDown
            The database does not take it.
        """

    def reading(self) -> AbstractContextManager[Execute]:
        """One transaction that sees one state; raises `StoreDown`."""

    def close(self) -> None:
        """Let go of connections."""


class SqliteCases:
    """Cases in one SQLite file, shared by all processes of one server."""

    STEPS = (
        (
            """
            CREATE TABLE cases (
                id INTEGER PRIMARY KEY, subject TEXT NOT NULL, status TEXT NOT NULL, until_ms INTEGER NOT NULL,
                expected_loss REAL NOT NULL, body BLOB NOT NULL
            )
            """,
            "CREATE INDEX cases_by_status ON cases (status, expected_loss DESC, id)",
            "CREATE INDEX cases_by_loss ON cases (expected_loss DESC, id)",
            "CREATE INDEX cases_by_subject ON cases (subject, id)",
            """
            CREATE TABLE case_transactions (
                seq INTEGER PRIMARY KEY, case_id INTEGER NOT NULL, transaction_id TEXT NOT NULL, body BLOB NOT NULL
            )
            """,
            "CREATE INDEX case_transactions_by_case ON case_transactions (case_id, seq)",
            "CREATE INDEX case_transactions_by_id ON case_transactions (transaction_id)",
            """
            CREATE TABLE case_trail (
                case_id INTEGER NOT NULL, number INTEGER NOT NULL, time_ms INTEGER NOT NULL, actor TEXT NOT NULL,
                step TEXT NOT NULL, detail TEXT NOT NULL, PRIMARY KEY (case_id, number)
            ) WITHOUT ROWID
            """,
            """
            CREATE TRIGGER case_trail_stays BEFORE UPDATE ON case_trail
            BEGIN SELECT RAISE(ABORT, 'the trail of cases is append-only'); END
            """,
            """
            CREATE TRIGGER case_trail_is_kept BEFORE DELETE ON case_trail
            BEGIN SELECT RAISE(ABORT, 'the trail of cases is append-only'); END
            """,
            "CREATE TABLE case_cursor (seq INTEGER NOT NULL)",
            "INSERT INTO case_cursor VALUES (0)",
        ),
    )

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: sqlite3.Connection | None = None
        """Kept open and unused: the last connection of all copies the write-ahead log into the file as it closes."""

    @contextmanager
    def writing(self) -> Iterator[Execute]:
        with self._translated(), self._locked(), closing(self._connected()) as db:
            if self._open is None:
                self._open = self._connected()
                self._open.execute("SELECT seq FROM case_cursor").fetchone()  # which opens the log
            db.execute("BEGIN IMMEDIATE")
            with db:  # commits, or rolls back after an error
                yield _sqlite(db)

    @contextmanager
    def reading(self) -> Iterator[Execute]:
        if not self._path.is_file():
            with self.writing():  # which makes it, in turn
                pass
        with self._translated(), closing(self._connected()) as db:
            db.execute("BEGIN")
            with db:
                yield _sqlite(db)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreDown(f"the cases in {self._path} cannot be used: {error}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Take turns by a lock that the kernel hands on at once; SQLite's own waiting sleeps in steps."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{self._path}-lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _connected(self) -> sqlite3.Connection:
        db = opened_file(self._path, self.STEPS)
        db.execute("PRAGMA synchronous = FULL")
        return db


def _sqlite(db: sqlite3.Connection) -> Execute:
    names = {name: name for name in TABLES}
    return lambda statement, values: db.execute(statement.format(**names), values).fetchall()


class PostgresCases:
    """Cases in PostgreSQL, beside the decisions."""

    STEPS = (
        """
        CREATE TABLE fraud.cases (
            id bigint PRIMARY KEY, subject text NOT NULL, status text NOT NULL, until_ms bigint NOT NULL,
            expected_loss double precision NOT NULL, body bytea NOT NULL
        );
        CREATE INDEX cases_by_status ON fraud.cases (status, expected_loss DESC, id);
        CREATE INDEX cases_by_loss ON fraud.cases (expected_loss DESC, id);
        CREATE INDEX cases_by_subject ON fraud.cases (subject, id);
        CREATE TABLE fraud.case_transactions (
            seq bigint PRIMARY KEY, case_id bigint NOT NULL, transaction_id text NOT NULL, body bytea NOT NULL
        );
        CREATE INDEX case_transactions_by_case ON fraud.case_transactions (case_id, seq);
        CREATE INDEX case_transactions_by_id ON fraud.case_transactions (transaction_id);
        CREATE TABLE fraud.case_trail (
            case_id bigint NOT NULL, number bigint NOT NULL, time_ms bigint NOT NULL, actor text NOT NULL,
            step text NOT NULL, detail text NOT NULL, PRIMARY KEY (case_id, number)
        );
        CREATE FUNCTION fraud.case_trail_stays() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'the trail of cases is append-only'; END $$;
        CREATE TRIGGER case_trail_stays BEFORE UPDATE OR DELETE ON fraud.case_trail
            FOR EACH ROW EXECUTE FUNCTION fraud.case_trail_stays();
        CREATE TABLE fraud.case_cursor (seq bigint NOT NULL);
        INSERT INTO fraud.case_cursor VALUES (0);
        """,
    )
    LOCK = 0x43415345

    def __init__(self, url: str) -> None:
        self._tables = PostgresTables(url, self.STEPS, "case_migrations", self.LOCK, "the cases in PostgreSQL")

    @contextmanager
    def writing(self) -> Iterator[Execute]:
        with self._translated(), self._tables.alone() as db:
            yield _postgres(db)

    @contextmanager
    def reading(self) -> Iterator[Execute]:
        with self._translated(), self._tables.transaction() as db:
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield _postgres(db)

    def close(self) -> None:
        self._tables.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except psycopg.Error as error:
            raise StoreDown(f"the cases in PostgreSQL cannot be used: {' '.join(str(error).split())}") from error


def _postgres(db: Connection) -> Execute:
    names = {name: f"fraud.{name}" for name in TABLES}

    def execute(statement: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
        cursor = db.execute(statement.format(**names).replace("?", "%s").encode(), values)
        return cursor.fetchall() if cursor.description is not None else []

    return execute
