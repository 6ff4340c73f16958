"""The decision log in PostgreSQL, as auditors read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.marks import Turns, Unlinked, in_turn, place_mark
from fraud.errors import StoreError
from fraud.stores.log import DecisionLog, Entry, Place
from fraud.stores.postgres_connection import check_conninfo
from fraud.stores.postgres_schema import STEPS

ROWS = "SELECT seq, record, link, key FROM fraud.decisions WHERE seq > %s AND seq <= %s ORDER BY seq"
PLACE = "SELECT * FROM fraud.chain WHERE place = %s"
BEYOND = """
SELECT head.seq, (SELECT max(seq) FROM fraud.decisions) FROM fraud.chain AS head WHERE head.place = 'head'
"""
WAITING = "SELECT id, key, record, mark FROM fraud.decisions WHERE seq IS NULL ORDER BY id"
FETCH_AT_ONCE = 1000


class PostgresLog(DecisionLog):
    """The decisions in a PostgreSQL store: those that have their place in the chain, as all have after a second.

    Parameters
    ----------
    url : str
    audit_key : bytes
        Key of the chain, for `forget`; see `fraud.decisions.chain`.

    Raises
    ------
    StoreError
        The server cannot be reached, or holds no such store.
    """

    def __init__(self, url: str, audit_key: bytes = b"") -> None:
        super().__init__(audit_key)
        check_conninfo(url)
        self._url = url
        try:
            with self._connect() as db:
                found = db.execute("SELECT to_regclass('fraud.chain')").fetchone()
        except psycopg.Error as error:
            raise StoreError(f"the decision log cannot be reached: {error}") from error
        if found is None or found[0] is None:
            raise StoreError("this PostgreSQL database holds no decision log; set FRAUD_STORE as for the service")

    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        with self._connect() as db, db.cursor("log", binary=True) as cursor:
            cursor.itersize = FETCH_AT_ONCE
            cursor.execute(ROWS, (after, 2**62 if until is None else until))
            for sequence, record, link, key in cursor:
                yield Entry(Logged(sequence, record, link), key)

    def beyond(self, key: bytes) -> str | None:
        """Look at what stands behind the end, and at what waits for its place: each must carry its writer's mark."""
        with self._connect() as db:
            db.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one snapshot for all of it
            end, last = _one(db.execute(BEYOND))
            if last is not None and last > end:
                return f"row {last} stands behind the end of the log, row {end}"
            place = self._read_place(db, "head")
            if not place.has_marks:
                return None
            voids = {mark for (mark,) in db.execute("SELECT mark FROM fraud.voids", binary=True)}
            waiting = (Unlinked(*row) for row in db.execute(WAITING, binary=True))
            _, refused = in_turn(waiting, Turns.decode(place.writers), voids, key)
        for number, reason in refused.items():
            return f"the decision with id {number} waits for its place and may not have one: {reason}"
        return None

    def labels(self) -> Iterator[Entry]:
        with self._connect() as db:
            if _one(db.execute("SELECT to_regclass('fraud.labels')")) == (None,):
                return
            with db.cursor("labels", binary=True) as cursor:
                cursor.execute("SELECT seq, label, link, key FROM fraud.labels ORDER BY seq")
                for sequence, label, link, key in cursor:
                    yield Entry(Logged(sequence, label, link), key)

    def place(self, place: str) -> Place:
        with self._connect() as db:
            return self._read_place(db, place)

    def _expect_schema(self, db: psycopg.Connection[Any]) -> None:
        (version,) = _one(db.execute("SELECT max(version) FROM fraud.migrations"))
        if version != len(STEPS):
            raise StoreError(
                f"the PostgreSQL database has schema {version}; this release removes from schema {len(STEPS)}: "
                "start its service once"
            )

    def _read_place(self, db: psycopg.Connection[Any], place: str) -> Place:
        row = db.execute(PLACE, [place], binary=True).fetchone()
        if row is None:
            if place == "labels" and _one(db.execute("SELECT to_regclass('fraud.labels')")) == (None,):
                return Place(Anchor(), None, has_marks=False)
            raise StoreError(f"the decision log has no {place}: its table fraud.chain was changed")
        _, sequence, link, *marks = row
        return Place(Anchor(sequence, link), *marks) if marks else Place(Anchor(sequence, link), None, has_marks=False)

    def _remove(self, last: Anchor, keys: list[str]) -> None:
        mark = place_mark("anchor", last, self.audit_key)
        with self._connect() as db:
            self._expect_schema(db)
            db.execute(
                "DELETE FROM fraud.search WHERE id IN (SELECT id FROM fraud.decisions WHERE seq <= %s)", [last.sequence]
            )
            db.execute("DELETE FROM fraud.decisions WHERE seq <= %s", [last.sequence])
            db.execute("UPDATE fraud.known_frauds SET key = NULL WHERE key = ANY (%s)", [keys])
            db.execute("UPDATE fraud.chain SET seq = %s, link = %s, mark = %s WHERE place = 'anchor'", [*last, mark])

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._url, connect_timeout=5, application_name="fraud-audit", prepare_threshold=None)


def _one(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row = cursor.fetchone()
    if row is None:
        raise StoreError("the decision log has no head: its table fraud.chain was changed")
    return tuple(row)
