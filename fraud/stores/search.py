"""Queries of decisions as SQL conditions on search rows."""

from __future__ import annotations

from collections.abc import Iterable

from fraud.decisions.queries import DecisionQuery, FoundDecision, Page, Position
from fraud.decisions.verdict import ACTIONS
from fraud.stores.rows import LABEL_VALUES, decode_record, row_key

SEARCH_S = 2.0
"""The longest time for one query, seconds."""
TOO_WIDE = (
    f"the query takes more than {SEARCH_S:g} s; ask for a customer or a merchant, or narrow it by since and until"
)


def conditions(query: DecisionQuery, number: str, models: str, mark: str) -> tuple[str, list[object]]:
    """Return the condition on search rows, and its values.

    Parameters
    ----------
    number : str
        The column that numbers decisions.
    models : str
        The table of model versions.
    mark : str
        The placeholder of a value, such as ``?``.
    """
    clauses: list[str] = []
    values: list[object] = []

    def add(clause: str, *given: object) -> None:
        clauses.append(clause.replace("?", mark))
        values.extend(given)

    if query.customer_id is not None:
        add("s.customer = ?", row_key(query.customer_id))
    if query.merchant_id is not None:
        add("s.merchant = ?", row_key(query.merchant_id))
    if query.decision is not None:
        value = ACTIONS.index(query.decision)
        add("s.decision = ?" + (" AND s.decision > 0" if value else ""), value)
    if query.label is not None:
        value = LABEL_VALUES.index(query.label)
        add("s.label = ?" + (" AND s.label > 0" if value else ""), value)
    if query.model is not None:
        add(f"s.model IN (SELECT id FROM {models} WHERE name = ?)", query.model)
    if query.version is not None:
        digest = f"sha256:{query.version.removeprefix('sha256:')}"
        add(f"s.model IN (SELECT id FROM {models} WHERE digest >= ? AND digest < ?)", digest, digest + "g")
    if query.since_ms is not None:
        add("s.time_ms >= ?", query.since_ms)
    if query.until_ms is not None:
        add("s.time_ms < ?", query.until_ms)
    if query.after is not None:
        add(f"(s.time_ms, s.{number}) < (?, ?)", *query.after)
    return " AND ".join(clauses) or "1 = 1", values


def page_of(rows: Iterable[tuple[int, int, int, bytes]], query: DecisionQuery) -> Page:
    """Return rows of (number, time, label, record) as a page; one row above the limit means that there are more."""
    found = [
        FoundDecision(Position(time_ms, number), decode_record(record), LABEL_VALUES[label])
        for number, time_ms, label, record in rows
    ]
    more = len(found) > query.limit
    kept = found[: query.limit]
    return Page(kept, kept[-1].position if more and kept else None)
