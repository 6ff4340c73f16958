"""Labels in the SQLite store: kept one by one in a chain of their own, and followed by the states."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np

from fraud.decisions.chain import Anchor, extend
from fraud.decisions.labels import Label, LabelOutcome, value_in_effect
from fraud.decisions.marks import is_marked, place_mark
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.stores.labelling import Effect, Fraud, effect_of, labelled
from fraud.stores.protocol import KnownFraud
from fraud.stores.rows import LABEL_VALUES, decode_label, encode_label, row_key


def apply_label(db: sqlite3.Connection, label: Label, record: DecisionRecord, audit_key: bytes) -> LabelOutcome:
    """Add a label to those of a decision, in the transaction that is open; the states follow the one in effect."""
    before = labels_of(db, label.key)
    row = db.execute("SELECT known_ms, customer, merchant FROM known_frauds WHERE key = ?", (label.key,)).fetchone()
    known_ms, *contained_by = row or (None, None, None)
    effect = effect_of(label, record, before, known_ms)
    if not effect.is_new:
        return effect.outcome
    _append(db, label, audit_key)
    db.execute(
        "UPDATE search SET label = ? WHERE seq = (SELECT seq FROM decisions WHERE key = ?)",
        (LABEL_VALUES.index(value_in_effect([*before, label])), label.key),
    )
    if effect.changes:
        owners = (("customer", record.customer_id, CUSTOMER), ("merchant", record.merchant_id, MERCHANT))
        for (kind, name, dtype), contained in zip(owners, contained_by, strict=True):
            if name is not None:
                _follow(db, kind, name, dtype, label.key, effect, contains=contained is not None)
        if effect.before != effect.after:
            db.execute("DELETE FROM known_frauds WHERE key = ?", (label.key,))
            if effect.after is not None:
                keep_frauds(db, [KnownFraud(*effect.after, record.customer_id, record.merchant_id)], label.key)
    return effect.outcome


def labels_of(db: sqlite3.Connection, key: str) -> list[Label]:
    """Return the labels of a decision, in the order in which they arrived."""
    return [decode_label(blob) for (blob,) in db.execute("SELECT label FROM labels WHERE key = ? ORDER BY seq", (key,))]


def keep_frauds(db: sqlite3.Connection, frauds: Iterable[KnownFraud], key: str | None = None) -> None:
    """Keep the frauds that states contain, so that they can be withdrawn; `key` is that of a decision."""
    db.executemany(
        "INSERT INTO known_frauds (key, customer, merchant, event_time_ms, amount, known_ms) VALUES (?, ?, ?, ?, ?, ?)",
        (
            (
                key,
                row_key(fraud.customer_id),
                None if fraud.merchant_id is None else row_key(fraud.merchant_id),
                fraud.event_time_ms,
                fraud.amount,
                fraud.known_ms,
            )
            for fraud in frauds
        ),
    )


def _append(db: sqlite3.Connection, label: Label, audit_key: bytes) -> None:
    sequence, link, mark = db.execute("SELECT seq, link, mark FROM chain WHERE place = 'labels'").fetchone()
    end = Anchor(sequence, bytes(link))
    if not is_marked("labels", end, mark, audit_key):
        raise StoreError(f"the labels were changed at their end, row {sequence}, or FRAUD_AUDIT_KEY is another one")
    (row,) = extend(end, [encode_label(label)], audit_key)
    db.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", (row.sequence, label.key, row.record, row.link))
    end = Anchor(row.sequence, row.link)
    mark = place_mark("labels", end, audit_key)
    db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'labels'", (*end, mark))


def _follow(
    db: sqlite3.Connection, kind: str, name: str, dtype: np.dtype[np.void], key: str, effect: Effect, *, contains: bool
) -> None:
    """Tell a state what a label changed."""
    number = row_key(name)

    def others() -> Sequence[Fraud]:
        query = f"SELECT event_time_ms, amount, known_ms FROM known_frauds WHERE {kind} = ? AND key IS NOT ?"
        return db.execute(query, (number, key)).fetchall()

    found = db.execute(f"SELECT state FROM {kind}s WHERE key = ?", (number,)).fetchone()
    state = labelled(None if found is None else found[0], dtype, effect, contains, others)
    db.execute(
        f"INSERT INTO {kind}s VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET state = excluded.state",
        (number, name, state),
    )
