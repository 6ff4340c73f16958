"""What is recorded of a scored transaction, and told again when it comes a second time."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from fraud.decisions.policy import Action, RiskLevel
from fraud.schema import Row


class DecisionRecord(msgspec.Struct):
    """One decision: enough to repeat the answer, to replay the score and to tell the history.

    `reasons` are the features that moved the score most, each with its contribution in log-odds.
    `features` is the row of `X` as it was scored, float64 little-endian; `fingerprint` tells whether the
    same transaction id came with the same contents. `transaction` is the JSON that was sent, with hashes in
    the place of what is personal; empty in records of the first release.
    """

    transaction_id: str | None
    fingerprint: bytes
    model_name: str
    model_digest: str
    features: bytes
    raw_margin: float
    fraud_probability: float
    prediction: bool
    risk_level: RiskLevel
    decision: Action
    degraded: list[str]
    event_time_ms: int
    processing_time_ms: int
    request_id: str
    customer_id: str = ""
    merchant_id: str | None = None
    amount: float = 0.0
    reasons: list[tuple[str, float]] = []
    scaled_amount: float | msgspec.UnsetType = msgspec.UNSET
    """The amount on its currency's scale, as histories count it; unset where that is the amount."""
    transaction: bytes = b""

    @property
    def history_amount(self) -> float:
        """The amount as histories count it."""
        return self.amount if self.scaled_amount is msgspec.UNSET else self.scaled_amount

    @property
    def key(self) -> str:
        """Under what this decision is kept; only one with a transaction id is."""
        if self.transaction_id is None:
            raise ValueError("a decision without a transaction id is not kept")
        return decision_key_of(self.transaction_id, None if self.customer_id else self.model_name)

    def said_the_same(self, fingerprint: bytes, model_digest: str) -> bool:
        """Tell whether a row is this transaction again.

        What another model version reads of a transaction may differ; time, customer and amount may not,
        nor may ready features.
        """
        whole = model_digest == self.model_digest
        return fingerprint == self.fingerprint if whole else fingerprint[:8] == self.fingerprint[:8]


def decision_key_of(transaction_id: str, model_name: str | None) -> str:
    """Return under what a decision is kept: its transaction id, among those of one features model."""
    return transaction_id if model_name is None else f"{model_name}\x1f{transaction_id}"


def fingerprint(row: Row) -> bytes:
    """Return 16 bytes that stand for what a row says, however its JSON was written."""
    core = (row.event_time_ms, row.customer_id, row.amount) if row.customer_id else row.values
    rest = (list(row.roles.values()), row.values)
    return b"".join(blake2b(msgspec.msgpack.encode(said), digest_size=8).digest() for said in (core, rest))
