"""The decision log in PostgreSQL, as auditors read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg

from fraud.decisions.chain import Anchor, Logged
from fraud.errors import StoreError
from fraud.stores.log import DecisionLog, Entry

ROWS = "SELECT seq, record, link, key FROM fraud.decisions WHERE seq > %s AND seq <= %s ORDER BY seq"
FETCH_AT_ONCE = 1000


class PostgresLog(DecisionLog):
    """The decisions in a PostgreSQL store: those that have their place in the chain, as all have after a second.

    Parameters
    ----------
    url : str

    Raises
    ------
    StoreError
        The server cannot be reached, or holds no such store.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            with self._connect() as db:
                found = db.execute("SELECT to_regclass('fraud.chain')").fetchone()
        except psycopg.OperationalError as error:
            raise StoreError(f"the decision log cannot be reached: {error}") from error
        if found is None or found[0] is None:
            raise StoreError("this PostgreSQL database holds no decision log; set FRAUD_STORE as for the service")

    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        with self._connect() as db, db.cursor("log", binary=True) as cursor:
            cursor.itersize = FETCH_AT_ONCE
            cursor.execute(ROWS, (after, 2**62 if until is None else until))
            for sequence, record, link, key in cursor:
                yield Entry(Logged(sequence, record, link), key)

    def _remove(self, last: Anchor, keys: list[str]) -> None:
        with self._connect() as db:
            db.execute("DELETE FROM fraud.decisions WHERE seq <= %s", [last.sequence])
            db.execute("DELETE FROM fraud.frauds WHERE key = ANY (%s)", [keys])
            db.execute("UPDATE fraud.chain SET seq = %s, link = %s WHERE place = 'anchor'", [*last])

    def _place(self, place: str) -> Anchor:
        with self._connect() as db:
            row = db.execute("SELECT seq, link FROM fraud.chain WHERE place = %s", [place], binary=True).fetchone()
        if row is None:
            raise StoreError(f"the decision log has no {place}: its table fraud.chain was changed")
        return Anchor(*row)

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._url, connect_timeout=5, application_name="fraud-audit")
