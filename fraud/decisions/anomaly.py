"""How unusual a transaction is, beside or in place of a probability of fraud."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

Severity = Literal["LOW", "MEDIUM", "HIGH", "CRITICAL"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From the most usual to the rarest."""


class Anomaly(msgspec.Struct, frozen=True):
    """How unusual a transaction is."""

    score: Annotated[float, Meta(ge=0, le=1, description="1 is the most unusual")]
    severity: Annotated[
        Severity | None,
        Meta(description="how rare such a score is; null from a model that was trained on too few customers to say"),
    ] = None
    explanation: Annotated[
        str | msgspec.UnsetType, Meta(description="what is unusual for this customer, in a sentence")
    ] = msgspec.UNSET


def decision_score(fraud_probability: float | None, anomaly: Anomaly | msgspec.UnsetType | None) -> float:
    """Return the score that decided: the calibrated probability, or without one the anomaly score.

    Raises
    ------
    ValueError
        There is neither.
    """
    if fraud_probability is not None:
        return fraud_probability
    if isinstance(anomaly, Anomaly):
        return anomaly.score
    raise ValueError("a decision has a probability, an anomaly score, or both")
