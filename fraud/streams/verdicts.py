"""The verdict on a transaction as it is written to Kafka: JSON of a published schema, `docs/schemas/verdict-1.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fraud.decisions.anomaly import Severity
from fraud.decisions.policy import Action, RiskLevel
from fraud.forms import readable_time
from fraud.models.scorer import ModelName
from fraud.pipeline.rows import Decision, PendingRow

VERSION: Literal[1] = 1
"""Fields may be added to a version; one that is removed, renamed or changes its meaning makes the next version."""

Time = Annotated[str, Meta(description="RFC 3339, UTC, to the millisecond")]


class Times(msgspec.Struct):
    """When a transaction happened, came and was decided."""

    event_time: Annotated[Time | None, Meta(description="as the transaction says; null for ready features")]
    record_time: Annotated[Time, Meta(description="the timestamp of its record in Kafka")]
    decided_time: Annotated[Time, Meta(description="when this verdict was written")]


class StreamVerdict(msgspec.Struct):
    """The verdict on one transaction."""

    schema_version: Annotated[Literal[1], Meta(description="of this form")]
    transaction_id: str
    decision: Action
    prediction: Annotated[bool, Meta(description="whether the policy acts on the transaction")]
    risk_level: RiskLevel
    fraud_probability: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="calibrated; null from a model without labels")
    ]
    is_anomaly: Annotated[bool, Meta(description="whether the anomaly score is above FRAUD_ANOMALY_THRESHOLD")]
    anomaly_score: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="null where no model measures it")
    ]
    severity: Annotated[Severity | None, Meta(description="how rare such a score is; null where that is not known")]
    explanation: Annotated[
        str | None,
        Meta(description="what is unusual for this customer, in a sentence; null if the version that decided is gone"),
    ]
    model: ModelName
    anomaly_model: Annotated[
        ModelName | None, Meta(description="which model measured the anomaly, where it is not `model`")
    ]
    degraded: Annotated[Sequence[str], Meta(description="what the score had to do without")]
    decided_by: Annotated[str, Meta(description="the id of the rule that decided, or model")]
    rules_hit: Annotated[Sequence[str], Meta(description="the rules that fired, in their order of precedence")]
    request_id: str
    times: Times


_encode = msgspec.json.Encoder().encode


def verdict_on(decision: Decision, row: PendingRow, record_ms: int, now_ms: int, threshold: float) -> StreamVerdict:
    """Return the verdict on a row that came in a record.

    Parameters
    ----------
    record_ms, now_ms : int
        The record's timestamp, and now, ms since the epoch.
    threshold : float
        The anomaly score above which a transaction is an anomaly.
    """
    anomaly, explained = decision.anomaly, decision.explanation
    event_time = readable_time(row.row.event_time_ms) if row.row.customer_id else None
    assert decision.transaction_id is not None
    return StreamVerdict(
        VERSION,
        decision.transaction_id,
        decision.verdict.decision,
        decision.verdict.prediction,
        decision.verdict.risk_level,
        decision.fraud_probability,
        anomaly is not None and anomaly.score > threshold,
        None if anomaly is None else anomaly.score,
        None if anomaly is None else anomaly.severity,
        None if explained is None else explained.text,
        decision.model,
        decision.anomaly_model,
        decision.degraded,
        decision.decided_by,
        decision.rules_hit,
        row.request_id,
        Times(event_time, readable_time(record_ms), readable_time(now_ms)),
    )


def needs_a_look(verdict: StreamVerdict) -> bool:
    """Return whether a verdict is one for the topic of anomalies."""
    return verdict.is_anomaly or verdict.decision != "approve"


def encoded(verdict: StreamVerdict) -> bytes:
    """Return a verdict as JSON."""
    return _encode(verdict)


def verdict_schema() -> dict[str, object]:
    """Return the JSON Schema of verdicts; further fields are allowed, since later releases may add some."""
    _, components = msgspec.json.schema_components([StreamVerdict], ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Fraud Bento: the verdict on a transaction, version {VERSION}",
        **components.pop(StreamVerdict.__name__),
        "$defs": components,
    }
