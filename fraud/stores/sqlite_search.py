"""Search rows in the SQLite store: written behind the decisions, many at a time, and complete before each answer."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest
from fraud.stores.rows import decode_record, search_row
from fraud.stores.search import SEARCH_S, TOO_WIDE, conditions, page_of
from fraud.stores.sqlite_file import select_in

ALL = -1
"""No limit, as SQLite says it."""


def unindexed(db: sqlite3.Connection) -> int:
    """Return about how many decisions have no search row yet, and 0 only if all have one."""
    query = "SELECT (SELECT max(seq) FROM decisions), (SELECT max(seq) FROM search)"
    recorded, indexed = db.execute(query).fetchone()
    return int((recorded or 0) - (indexed or 0))


def index_decisions(db: sqlite3.Connection, at_most: int = ALL) -> int:
    """Write the search rows of the next decisions without one, in the transaction that is open; return how many.

    Decisions are numbered without a gap and indexed in order, so the last search row tells which are missing.
    """
    (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM search").fetchone()
    models: dict[tuple[str, str], int] = {}
    found = []
    for sequence, blob in db.execute(
        "SELECT seq, record FROM decisions WHERE seq > ? ORDER BY seq LIMIT ?", (last, at_most)
    ):
        record = decode_record(blob)
        version = record.model_name, record.model_digest
        if version not in models:
            models[version] = _number_of(db, record)
        found.append((sequence, *search_row(record, models[version])))
    db.executemany("INSERT INTO search VALUES (?, ?, ?, ?, ?, ?, ?)", found)
    return len(found)


def _number_of(db: sqlite3.Connection, record: DecisionRecord) -> int:
    """Return the number of the model version that made a decision."""
    version = record.model_name, record.model_digest
    db.execute("INSERT OR IGNORE INTO models (name, digest) VALUES (?, ?)", version)
    (number,) = db.execute("SELECT id FROM models WHERE name = ? AND digest = ?", version).fetchone()
    return int(number)


def decisions_by_key(db: sqlite3.Connection, keys: Sequence[str]) -> dict[str, DecisionRecord]:
    """Return the decisions on record under some keys."""
    rows = select_in(db, "SELECT key, record FROM decisions WHERE key IN ({})", keys)
    return {key: decode_record(record) for key, record in rows}


def find_decisions(db: sqlite3.Connection, query: DecisionQuery) -> Page:
    """Return the decisions with a search row that a query asks for.

    Raises
    ------
    InvalidRequest
        It takes more than `SEARCH_S`.
    """
    where, values = conditions(query, "seq", "models", "?")
    statement = (
        "SELECT s.seq, s.time_ms, s.label, d.record FROM search AS s JOIN decisions AS d ON d.seq = s.seq "
        f"WHERE {where} ORDER BY s.time_ms DESC, s.seq DESC LIMIT ?"
    )
    deadline = time.monotonic() + SEARCH_S
    db.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        rows = db.execute(statement, [*values, query.limit + 1]).fetchall()
    except sqlite3.OperationalError as error:
        if time.monotonic() <= deadline:
            raise
        raise InvalidRequest(TOO_WIDE) from error
    finally:
        db.set_progress_handler(None, 0)
    return page_of(rows, query)
