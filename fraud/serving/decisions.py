"""`GET /v1/decisions`: recorded decisions, one by its transaction id or those that match a query, page by page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.decisions.anomaly import Anomaly
from fraud.decisions.labels import Label, LabelValue, value_in_effect
from fraud.decisions.policy import Action
from fraud.decisions.queries import DecisionQuery, Position
from fraud.decisions.record import DecisionRecord, decision_key_of
from fraud.decisions.rules.sets import MODEL
from fraud.errors import UnknownTransaction
from fraud.forms import checked_id, readable_time, time_ms
from fraud.schema import Id, Moment
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters
from fraud.stores.protocol import Store

DECISIONS = "/v1/decisions"
MAX_DECISIONS = 200


class DecisionParameters(msgspec.Struct):
    """The transaction whose decision is wanted."""

    transaction_id: Annotated[Id, Meta(description="As it was scored, percent-encoded.")]
    model: Annotated[
        Id | None, Meta(description="The features model that decided; none for transactions with a history.")
    ] = None


class QueryParameters(msgspec.Struct):
    """Conditions on the decisions wanted; all hold together. The latest decision comes first."""

    customer_id: Annotated[Id | None, Meta(description="Of this customer.")] = None
    merchant_id: Annotated[Id | None, Meta(description="At this merchant.")] = None
    decision: Annotated[Action | None, Meta(description="This decision.")] = None
    label: Annotated[LabelValue | None, Meta(description="The label in effect; none: without one.")] = None
    model: Annotated[Id | None, Meta(description="By this model.")] = None
    version: Annotated[
        Annotated[str, Meta(pattern=r"^(sha256:)?[0-9a-f]{1,64}$")] | None,
        Meta(description="By the version whose digest begins with this."),
    ] = None
    since: Annotated[Moment | None, Meta(description="Made at this time or later, RFC 3339 with a zone.")] = None
    until: Annotated[Moment | None, Meta(description="Made before this time.")] = None
    cursor: Annotated[str | None, Meta(description="The value of next in an earlier answer to the same query.")] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_DECISIONS, description="How many at most.")] = 50


class RecordedLabel(msgspec.Struct):
    """One label as it arrived."""

    label: LabelValue
    label_time: str
    arrived: str
    source: str
    actor: str


class RecordedReason(msgspec.Struct):
    """A feature that changed the raw margin most."""

    feature: str
    contribution: Annotated[float, Meta(description="what it added to the raw margin, in the unit of the model")]


class RecordedDecision(msgspec.Struct):
    """A decision as it was recorded."""

    transaction_id: str | None
    model: str
    version: Annotated[str, Meta(description="the digest of the bundle that decided")]
    fraud_probability: Annotated[float | None, Meta(description="null from a model that is not calibrated")]
    raw_margin: float
    prediction: bool
    risk_level: str
    decision: str
    decided_by: Annotated[str, Meta(description="the id of the rule that decided, or model")]
    rules_hit: Annotated[Sequence[str], Meta(description="the rules that fired")]
    shadow_rules_hit: Annotated[Sequence[str], Meta(description="the shadow rules that fired and decided nothing")]
    rule_set: Annotated[str | None, Meta(description="the digest of the rule set in force; null for none")]
    degraded: Sequence[str]
    processing_time: str
    request_id: str
    contract: Annotated[str | None, Meta(description="by which it came; null for the product's own")]
    event_time: Annotated[str | None, Meta(description="null for decisions of a features model")]
    customer_id: str | None
    merchant_id: str | None
    amount: float | None
    label: Annotated[LabelValue, Meta(description="the label in effect")]
    reasons: Sequence[RecordedReason]
    transaction: Annotated[msgspec.Raw, Meta(extra_json_schema={"description": "as it was sent; null if not kept"})]
    anomaly: Annotated[Anomaly | None, Meta(description="null where no model measured it")]
    anomaly_model: Annotated[str | None, Meta(description="digest of the model beside, if it measured the anomaly")]


class DecisionAnswer(msgspec.Struct):
    """A decision and all its labels, in the order in which they arrived."""

    decision: RecordedDecision
    labels: Sequence[RecordedLabel]


class DecisionsAnswer(msgspec.Struct):
    """Decisions, the latest first."""

    decisions: Sequence[RecordedDecision]
    next: Annotated[str | None, Meta(description="the cursor of the next page; null at the end")]


_encode = msgspec.json.Encoder().encode


def decision_routes(store: Callable[[], Store]) -> list[Route]:
    """`GET /v1/decisions` and `GET /v1/decisions/{transaction_id}`."""

    async def show(call: Call) -> Answer:
        asked = parameters(call, DecisionParameters)
        key = decision_key_of(checked_id(asked.transaction_id, "$.transaction_id"), asked.model)
        record = (await store().recall([key], [], [])).decided.get(key)
        if record is None:
            raise UnknownTransaction
        labels = await store().labels(key)
        decision = recorded_decision(record, value_in_effect(labels))
        return Answer(_encode(DecisionAnswer(decision, [recorded_label(label) for label in labels])))

    async def find(call: Call) -> Answer:
        page = await store().find(query_of(parameters(call, QueryParameters)))
        found = [recorded_decision(record, label) for _, record, label in page.found]
        return Answer(_encode(DecisionsAnswer(found, None if page.next is None else page.next.cursor())))

    return [
        Route(
            "GET",
            DECISIONS,
            "read",
            find,
            "The recorded decisions that match a query, the latest first, page by page.",
            answer=DecisionsAnswer,
            parameters=QueryParameters,
            tag="History",
        ),
        Route(
            "GET",
            f"{DECISIONS}/{{transaction_id}}",
            "read",
            show,
            "One recorded decision with its reasons, the transaction as it was sent, and its labels.",
            answer=DecisionAnswer,
            parameters=DecisionParameters,
            fails={404: "No decision on this transaction is on record."},
            tag="History",
        ),
    ]


def query_of(wanted: QueryParameters) -> DecisionQuery:
    """Return the query of a store that parameters describe.

    Raises
    ------
    InvalidRequest
        A time is before 1970, or the cursor is not one of an earlier answer.
    """
    since, until = (
        None if moment is None else time_ms(moment, name, "$", None, 0)
        for name, moment in (("since", wanted.since), ("until", wanted.until))
    )
    return DecisionQuery(
        None if wanted.customer_id is None else checked_id(wanted.customer_id, "$.customer_id"),
        None if wanted.merchant_id is None else checked_id(wanted.merchant_id, "$.merchant_id"),
        wanted.decision,
        wanted.label,
        wanted.model,
        wanted.version,
        since,
        until,
        None if wanted.cursor is None else Position.of(wanted.cursor),
        wanted.limit,
    )


def recorded_decision(record: DecisionRecord, label: LabelValue) -> RecordedDecision:
    """Return a decision record as callers read it."""
    has_history = bool(record.customer_id)
    ruling = None if record.ruling is msgspec.UNSET else record.ruling
    return RecordedDecision(
        record.transaction_id,
        record.model_name,
        record.model_digest,
        record.fraud_probability,
        record.raw_margin,
        record.prediction,
        record.risk_level,
        record.decision,
        MODEL if ruling is None else ruling.decided_by,
        [] if ruling is None else ruling.hits,
        [] if ruling is None else ruling.shadow_hits,
        None if ruling is None else ruling.rules,
        record.degraded,
        readable_time(record.processing_time_ms),
        record.request_id,
        None if record.contract is msgspec.UNSET else record.contract,
        readable_time(record.event_time_ms) if has_history else None,
        record.customer_id or None,
        record.merchant_id,
        record.amount if has_history else None,
        label,
        [RecordedReason(feature, contribution) for feature, contribution in record.reasons],
        msgspec.Raw(record.transaction or b"null"),
        None if record.anomaly is msgspec.UNSET else record.anomaly,
        None if record.anomaly_model is msgspec.UNSET else record.anomaly_model[1],
    )


def recorded_label(label: Label) -> RecordedLabel:
    """Return a label as callers read it."""
    times = readable_time(label.label_time_ms), readable_time(label.arrived_ms)
    return RecordedLabel(label.value, *times, label.source, label.actor)
