"""Labels and search rows in the PostgreSQL store: see `fraud.stores.sqlite_labels`, which does the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psycopg

from fraud.decisions.chain import Anchor, extend
from fraud.decisions.labels import Label, LabelOutcome, value_in_effect
from fraud.decisions.marks import is_marked, place_mark
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.stores.labelling import Effect, Fraud, effect_of, labelled, needs_others
from fraud.stores.protocol import KnownFraud
from fraud.stores.rows import LABEL_VALUES, decode_label, encode_label, row_key, search_row
from fraud.stores.states import Written

Connection = psycopg.AsyncConnection[Any]

LABEL_CHAIN_LOCK = 0x4C434841
KEEP = """
INSERT INTO fraud.known_frauds (key, customer, merchant, event_time_ms, amount, known_ms)
SELECT * FROM unnest(%b::text[], %b::bigint[], %b::bigint[], %b::bigint[], %b::float8[], %b::bigint[])
"""
SEARCH = """
WITH rows AS (
    SELECT * FROM unnest(
        %b::bigint[], %b::bigint[], %b::bigint[], %b::bigint[], %b::smallint[], %b::text[], %b::text[], %b::smallint[]
    ) AS r (id, time_ms, customer, merchant, decision, name, digest, label)
), added AS (
    INSERT INTO fraud.models (name, digest)
    SELECT DISTINCT name, digest FROM rows WHERE NOT EXISTS (
        SELECT FROM fraud.models AS m WHERE m.name = rows.name AND m.digest = rows.digest
    )
    ON CONFLICT (name, digest) DO UPDATE SET name = excluded.name RETURNING id, name, digest
)
INSERT INTO fraud.search (id, time_ms, customer, merchant, decision, model, label)
SELECT r.id, r.time_ms, r.customer, r.merchant, r.decision, coalesce(m.id, a.id), r.label
FROM rows AS r
LEFT JOIN fraud.models AS m ON m.name = r.name AND m.digest = r.digest
LEFT JOIN added AS a ON a.name = r.name AND a.digest = r.digest
"""


async def apply_label(
    db: Connection, label: Label, record: DecisionRecord, audit_key: bytes
) -> tuple[LabelOutcome, tuple[Written, Written]]:
    """Add a label to those of a decision; return the states that changed as well.

    The caller holds the locks of the decision, its customer and its merchant, in a transaction.
    """
    written: tuple[Written, Written] = ({}, {})
    before = await labels_of(db, label.key)
    cursor = await db.execute("SELECT known_ms, customer, merchant FROM fraud.known_frauds WHERE key = %b", [label.key])
    known_ms, *contained_by = await cursor.fetchone() or (None, None, None)
    effect = effect_of(label, record, before, known_ms)
    if not effect.is_new:
        return effect.outcome, written
    await append_labels(db, [label], audit_key)
    await db.execute(
        "UPDATE fraud.search SET label = %b WHERE id = (SELECT id FROM fraud.decisions WHERE key = %b)",
        [LABEL_VALUES.index(value_in_effect([*before, label])), label.key],
    )
    if effect.changes:
        owners = (("customer", record.customer_id, CUSTOMER), ("merchant", record.merchant_id, MERCHANT))
        for kept, (kind, name, dtype), contained in zip(written, owners, contained_by, strict=True):
            if name is not None:
                kept[name] = await _follow(db, kind, name, dtype, label.key, effect, contains=contained is not None)
        if effect.before != effect.after:
            await db.execute("DELETE FROM fraud.known_frauds WHERE key = %b", [label.key])
            if effect.after is not None:
                await keep_frauds(db, [KnownFraud(*effect.after, record.customer_id, record.merchant_id)], label.key)
    return effect.outcome, written


async def labels_of(db: Connection, key: str) -> list[Label]:
    """Return the labels of a decision, in the order in which they arrived."""
    cursor = await db.execute("SELECT label FROM fraud.labels WHERE key = %b ORDER BY seq", [key], binary=True)
    return [decode_label(blob) for (blob,) in await cursor.fetchall()]


async def append_labels(db: Connection, labels: Sequence[Label], audit_key: bytes) -> None:
    """Add labels to their chain, in the transaction that is open: one writer at a time."""
    await db.execute("SELECT pg_advisory_xact_lock(%b)", [LABEL_CHAIN_LOCK])
    cursor = await db.execute("SELECT seq, link, mark FROM fraud.chain WHERE place = 'labels'", binary=True)
    sequence, link, mark = await cursor.fetchone() or (0, b"", None)
    end = Anchor(sequence, link)
    if not is_marked("labels", end, mark, audit_key):
        raise StoreError(f"the labels were changed at their end, row {sequence}, or FRAUD_AUDIT_KEY is another one")
    rows = list(extend(end, map(encode_label, labels), audit_key))
    if not rows:
        return
    await db.execute(
        "INSERT INTO fraud.labels SELECT * FROM unnest(%b::bigint[], %b::text[], %b::bytea[], %b::bytea[])",
        [
            [row.sequence for row in rows],
            [label.key for label in labels],
            [row.record for row in rows],
            [row.link for row in rows],
        ],
    )
    end = Anchor(rows[-1].sequence, rows[-1].link)
    await db.execute(
        "UPDATE fraud.chain SET seq = %b, link = %b, mark = %b WHERE place = 'labels'",
        [*end, place_mark("labels", end, audit_key)],
    )


async def keep_frauds(db: Connection, frauds: Sequence[KnownFraud], key: str | None = None) -> None:
    """Keep the frauds that states contain, so that they can be withdrawn; `key` is that of a decision."""
    if not frauds:
        return
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
    for fraud in frauds:
        merchant = None if fraud.merchant_id is None else row_key(fraud.merchant_id)
        values = (key, row_key(fraud.customer_id), merchant, fraud.event_time_ms, float(fraud.amount), fraud.known_ms)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    await db.execute(KEEP, columns)


async def forget_frauds_of(db: Connection, kind: str, numbers: Sequence[int]) -> None:
    """Note that the states of some customers, or merchants, contain no fraud any more."""
    if numbers:
        await db.execute(
            f"UPDATE fraud.known_frauds SET {kind} = NULL WHERE {kind} = ANY (%b::bigint[])".encode(), [list(numbers)]
        )


async def add_search_rows(db: Connection, rows: Sequence[tuple[int, DecisionRecord, int]]) -> None:
    """Make decisions searchable: each with its id and the number of the label in effect."""
    if not rows:
        return
    columns: tuple[list[Any], ...] = ([], [], [], [], [], [], [], [])
    for number, record, label in rows:
        time_ms, customer, merchant, decision, _, _ = search_row(record, 0)
        version = record.model_name, record.model_digest
        for column, value in zip(
            columns, (number, time_ms, customer, merchant, decision, *version, label), strict=True
        ):
            column.append(value)
    await db.execute(SEARCH, columns)


async def _follow(
    db: Connection, kind: str, name: str, dtype: np.dtype[np.void], key: str, effect: Effect, *, contains: bool
) -> bytes:
    """Tell a state what a label changed; return it."""
    number = row_key(name)
    cursor = await db.execute(f"SELECT state FROM fraud.{kind}s WHERE key = %b".encode(), [number], binary=True)
    found = await cursor.fetchone()
    query = (
        f"SELECT event_time_ms, amount, known_ms FROM fraud.known_frauds WHERE {kind} = %b AND key IS DISTINCT FROM %b"
    )
    others: list[Fraud] = []
    if contains and needs_others(None if found is None else found[0], dtype, effect):
        cursor = await db.execute(query.encode(), [number, key], binary=True)
        others = [(event, amount, known) for event, amount, known in await cursor.fetchall()]
    state = labelled(None if found is None else found[0], dtype, effect, contains, lambda: others)
    await db.execute(
        f"""
        INSERT INTO fraud.{kind}s (key, id, state) VALUES (%b, %b, %b)
        ON CONFLICT (key) DO UPDATE SET state = excluded.state, changed_at = now()
        """.encode(),
        [number, name, state],
    )
    return state
