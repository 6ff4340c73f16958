"""How decisions and labels stand in the rows of the SQL stores."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import msgspec

from fraud.decisions.labels import Label, LabelValue
from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import ACTIONS

LABEL_VALUES: tuple[LabelValue, ...] = ("none", "fraud", "legitimate")
"""A search row holds the index of the label in effect here, and that of its decision in `ACTIONS`."""

decode_record = msgspec.msgpack.Decoder(DecisionRecord).decode
encode_record = msgspec.msgpack.Encoder().encode
decode_label = msgspec.msgpack.Decoder(Label).decode
encode_label = msgspec.msgpack.Encoder().encode


@lru_cache(maxsize=1 << 12)
def row_key(name: str) -> int:
    """Return the 64-bit row number that stands for an id in a table: a short one keeps its tree flat."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def search_row(record: DecisionRecord, model: int, label: int = 0) -> tuple[int, int | None, int | None, int, int, int]:
    """Return by what a decision is found: time, customer, merchant, decision, model version and label, as numbers."""
    return (
        record.processing_time_ms,
        row_key(record.customer_id) if record.customer_id else None,
        row_key(record.merchant_id) if record.merchant_id else None,
        ACTIONS.index(record.decision),
        model,
        label,
    )
