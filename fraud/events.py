"""What is recorded of a scored transaction, and told again when it comes a second time."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from fraud.schema import Row


class Decided(msgspec.Struct):
    """One decision: enough to repeat the answer, to replay the score and to tell the history.

    `features` is the row of `X` as it was scored, float64 little-endian; `fingerprint` tells whether the
    same transaction id came with the same contents.
    """

    transaction_id: str
    fingerprint: bytes
    model_name: str
    model_digest: str
    features: bytes
    raw_margin: float
    fraud_probability: float
    prediction: bool
    risk_level: str
    decision: str
    degraded: list[str]
    event_time_ms: int
    processing_time_ms: int
    request_id: str
    customer_id: str = ""
    merchant_id: str | None = None


def fingerprint(row: Row) -> bytes:
    """Return 16 bytes that stand for what a row says, however its JSON was written."""
    said = (row.event_time_ms, row.customer_id, row.amount, list(row.roles.values()), row.values)
    return blake2b(msgspec.msgpack.encode(said), digest_size=16).digest()
