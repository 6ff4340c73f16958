"""The decision record: what is stored of a scored transaction and returned when it is sent again."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from fraud.decisions.anomaly import Anomaly, Severity, decision_score
from fraud.decisions.policy import Action, RiskLevel
from fraud.decisions.verdict import Ruling
from fraud.schema import Row

_encode = msgspec.msgpack.Encoder().encode


class DecisionRecord(msgspec.Struct):
    """One decision: enough to repeat the answer, replay the score and update the history.

    `fraud_probability` is None where the model is not calibrated: then `anomaly` has the score that decided.
    `reasons` are the features that moved the score most, each with its contribution in the unit of the raw margin.
    `features` is the row of `X` as it was scored, float64 little-endian; `fingerprint` detects a transaction id that
    comes again with other contents. `transaction` is the JSON that was sent, with hashes in place of personal fields;
    empty in records of the first release.
    """

    transaction_id: str | None
    fingerprint: bytes
    model_name: str
    model_digest: str
    features: bytes
    raw_margin: float
    fraud_probability: float | None
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
    anomaly: Anomaly | msgspec.UnsetType = msgspec.UNSET
    """How unusual the transaction was; unset where no model measured it."""
    contract: str | msgspec.UnsetType = msgspec.UNSET
    """The contract by which the transaction came; unset for the product's own."""
    ruling: Ruling | msgspec.UnsetType = msgspec.UNSET
    """What the rules said; unset where no rule set was in force."""
    anomaly_model: tuple[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Name and digest of the model beside, which measured the anomaly; unset where the model itself did, or none."""

    @property
    def decision_score(self) -> float:
        """The score that the verdict was made on."""
        return decision_score(self.fraud_probability, self.anomaly)

    @property
    def model_decision(self) -> Action:
        """What the policy alone decided."""
        return self.decision if self.ruling is msgspec.UNSET else self.ruling.model_decision

    @property
    def severity(self) -> Severity | None:
        """The severity that the verdict was made on."""
        return None if self.anomaly is msgspec.UNSET else self.anomaly.severity

    @property
    def severity_beside(self) -> Severity | None:
        """The severity by the model beside, which is the same whichever model decides."""
        return None if self.anomaly_model is msgspec.UNSET else self.severity

    @property
    def history_amount(self) -> float:
        """The amount as histories count it."""
        return self.amount if self.scaled_amount is msgspec.UNSET else self.scaled_amount

    @property
    def key(self) -> str:
        """The key of this decision; only a decision with a transaction id is recorded."""
        if self.transaction_id is None:
            raise ValueError("a decision without a transaction id is not kept")
        return decision_key_of(self.transaction_id, None if self.customer_id else self.model_name)

    def said_the_same(self, fingerprint: bytes, model_digest: str) -> bool:
        """Return whether a row is this transaction again.

        Another model version may read other fields of a transaction; time, customer, amount and ready features must be
        the same.
        """
        whole = model_digest == self.model_digest
        return fingerprint == self.fingerprint if whole else fingerprint[:8] == self.fingerprint[:8]


def decision_key_of(transaction_id: str, model_name: str | None) -> str:
    """Return the key of a decision: its transaction id, prefixed by the model's name for a features model."""
    return transaction_id if model_name is None else f"{model_name}\x1f{transaction_id}"


def fingerprint(row: Row) -> bytes:
    """Return a 16-byte digest of a row's values, whatever the formatting of its JSON."""
    core = (row.event_time_ms, row.customer_id, row.amount) if row.customer_id else row.values
    rest = (list(row.roles.values()), row.values)
    return blake2b(_encode(core), digest_size=8).digest() + blake2b(_encode(rest), digest_size=8).digest()
