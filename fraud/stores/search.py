"""Questions to the SQL stores as conditions on their search rows."""

from __future__ import annotations

from collections.abc import Iterable

from fraud.decisions.questions import Found, Page, Place, Question
from fraud.stores.rows import DECISIONS, VERDICTS, decode_record, row_key

SEARCH_S = 2.0
"""Longest work on one question, seconds."""
TOO_WIDE = (
    f"the question takes more than {SEARCH_S:g} s; ask for a customer or a merchant, or narrow it by since and until"
)


def conditions(question: Question, number: str, models: str, mark: str) -> tuple[str, list[object]]:
    """Return the condition on search rows, and its values.

    Parameters
    ----------
    number : str
        The column that numbers decisions.
    models : str
        The table of model versions.
    mark : str
        What stands for a value, such as ``?``.
    """
    clauses: list[str] = []
    values: list[object] = []

    def add(clause: str, *given: object) -> None:
        clauses.append(clause.replace("?", mark))
        values.extend(given)

    if question.customer_id is not None:
        add("s.customer = ?", row_key(question.customer_id))
    if question.merchant_id is not None:
        add("s.merchant = ?", row_key(question.merchant_id))
    if question.decision is not None:
        value = DECISIONS.index(question.decision)
        add("s.decision = ?" + (" AND s.decision > 0" if value else ""), value)
    if question.label is not None:
        value = VERDICTS.index(question.label)
        add("s.label = ?" + (" AND s.label > 0" if value else ""), value)
    if question.model is not None:
        add(f"s.model IN (SELECT id FROM {models} WHERE name = ?)", question.model)
    if question.version is not None:
        digest = f"sha256:{question.version.removeprefix('sha256:')}"
        add(f"s.model IN (SELECT id FROM {models} WHERE digest >= ? AND digest < ?)", digest, digest + "g")
    if question.since_ms is not None:
        add("s.time_ms >= ?", question.since_ms)
    if question.until_ms is not None:
        add("s.time_ms < ?", question.until_ms)
    if question.after is not None:
        add(f"(s.time_ms, s.{number}) < (?, ?)", *question.after)
    return " AND ".join(clauses) or "1 = 1", values


def page_of(rows: Iterable[tuple[int, int, int, bytes]], question: Question) -> Page:
    """Return rows of (number, time, label, record), one more than asked for if there are more, as a page."""
    found = [
        Found(Place(time_ms, number), decode_record(record), VERDICTS[label]) for number, time_ms, label, record in rows
    ]
    more = len(found) > question.limit
    kept = found[: question.limit]
    return Page(kept, kept[-1].place if more and kept else None)
