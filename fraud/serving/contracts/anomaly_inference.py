"""The contract of an anomaly service: one transaction of a user, answered with how unusual it is for that user."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from fraud.decisions.anomaly import Severity
from fraud.errors import IdempotencyConflict, InvalidRequest, NotMeasured, NotReady
from fraud.forms import readable_time
from fraud.models.scorer import Scorer
from fraud.pipeline.envelope import InferenceBody, in_contract, row_of
from fraud.pipeline.requests import transaction_id_of
from fraud.pipeline.rows import Decision, Rejection
from fraud.serving.bodies import decode_body
from fraud.serving.contracts.fastapi import fastapi_errors
from fraud.serving.contracts.protocol import Contract, ContractModel, decided_headers, decision_of
from fraud.serving.http import Answer, Call, Route
from fraud.settings import Settings

SENT = {"merchant_id", "currency", "amount"}
"""What a client of the contract sends beside ids and time."""


class AnomalyFeatures(msgspec.Struct):
    """What the transaction is like, by the user's habits; null for what is not known."""

    log_amount: float | None
    amount_zscore: float | None
    amount_percentile: float | None
    velocity_ratio: float | None
    hour_deviation: float | None
    day_deviation: float | None
    time_since_last: Annotated[float | None, Meta(description="seconds")]
    merchant_familiarity: Annotated[float | None, Meta(description="earlier transactions at the merchant")]
    is_new_user: bool | None
    global_amount_flag: bool | None


FEATURES = {
    "log_amount": "amount_log",
    "amount_zscore": "customer_amount_zscore",
    "amount_percentile": "customer_amount_percentile",
    "velocity_ratio": "customer_velocity_ratio",
    "hour_deviation": "customer_hour_deviation",
    "day_deviation": "customer_weekday_deviation",
    "time_since_last": "customer_seconds_since_last",
    "merchant_familiarity": "customer_merchant_familiarity",
    "is_new_user": "customer_is_new",
    "global_amount_flag": "amount_is_globally_unusual",
}
"""The contract's features, and those of the history that they are."""
FLAGS = {"is_new_user", "global_amount_flag"}


class InferenceAnswer(msgspec.Struct):
    """How unusual a transaction is for its user."""

    is_anomaly: Annotated[bool, Meta(description="whether the score is above FRAUD_ANOMALY_THRESHOLD")]
    anomaly_score: Annotated[float, Meta(ge=0, le=1)]
    severity: Annotated[Severity | None, Meta(description="how rare such a score is; null if that was not calibrated")]
    explanation: str
    features: AnomalyFeatures
    model_version: str


class InferenceHealth(msgspec.Struct):
    """That transactions can be scored."""

    status: Literal["healthy"]
    model_version: str
    model_loaded_at: str


EXAMPLE = '{"user_id": "u1", "transaction": {"tx_id": "t1", "amount": 12.5, "currency": "EUR", "merchant": "m1"}}'
_decoder = msgspec.json.Decoder(InferenceBody)
_encode = msgspec.json.Encoder().encode


def inference_routes(model: ContractModel, settings: Settings) -> list[Route]:
    """`POST /v1/inference` and `GET /v1/health`."""
    threshold = settings.contracts.anomaly_threshold

    async def infer(call: Call) -> Answer:
        row = row_of(decode_body(_decoder, await call.json_body(), EXAMPLE))
        decision = await _decided(model, call, row)
        if decision.anomaly is None:
            raise NotMeasured(decision.transaction_id) if decision.is_repeat else NotReady("anomalies are not measured")
        answer = answer_of(decision, threshold, _known(model, decision))
        return Answer(_encode(answer), headers=decided_headers([decision]))

    async def health(_: Call) -> Answer:
        scorer = _measuring(model)
        loaded_at = readable_time(scorer.loaded_at_ms)
        return Answer(_encode(InferenceHealth("healthy", scorer.name.version, loaded_at)))

    return [
        Route(
            "POST",
            "/v1/inference",
            "score",
            infer,
            "How unusual a transaction is for its user.",
            request=InferenceBody,
            answer=InferenceAnswer,
            fails={409: "The transaction came before with other contents, or its anomaly was not measured then."},
        ),
        Route("GET", "/v1/health", None, health, "That transactions can be scored.", answer=InferenceHealth),
    ]


def misfit(scorer: Scorer) -> str | None:
    """Return why a model cannot serve the contract: it is none of transactions, or needs what clients do not send."""
    if scorer.spec.kind != "transaction":
        return f"it is a {scorer.spec.kind} model; a transaction model is needed"
    needed = {role.name for role in scorer.spec.roles if not role.missing}
    needed |= {feature.name for feature in scorer.spec.requested if not feature.missing}
    unsent = sorted(needed - SENT)
    return f"it needs {', '.join(unsent[:5])}, which clients of the contract do not send" if unsent else None


ANOMALY_INFERENCE = Contract(
    "anomaly-inference",
    fastapi_errors(),
    inference_routes,
    misfit,
    prefixes=("/v1/inference",),
    needs_anomaly=True,
)


async def _decided(model: ContractModel, call: Call, row: Mapping[str, msgspec.Raw]) -> Decision:
    """Decide on a row; one that was sent without a time is the same transaction when it is sent again."""
    if "event_time" in row:
        return await _decided_at(model, call, row)
    try:
        return await _decided_at(model, call, _at(row, time.time_ns() // 1_000_000))
    except IdempotencyConflict:
        key = transaction_id_of(_encode(row)) or ""
        known = (await model.engine.pipeline.store.recall([key], [], [])).decided.get(key)
        if known is None:
            raise
        return await _decided_at(model, call, _at(row, known.event_time_ms))


def _at(row: Mapping[str, msgspec.Raw], event_time_ms: int) -> dict[str, msgspec.Raw]:
    return {**row, "event_time": msgspec.Raw(_encode(readable_time(event_time_ms)))}


async def _decided_at(model: ContractModel, call: Call, row: Mapping[str, msgspec.Raw]) -> Decision:
    (outcome,) = await model.decide(call, [_encode(row)])
    if isinstance(outcome, Rejection) and isinstance(outcome.error, InvalidRequest):
        raise in_contract(outcome.error)
    return decision_of(outcome)


def _known(model: ContractModel, decision: Decision) -> dict[str, float]:
    """Return the features that a transaction was scored with, by name; none if the version is no longer loaded."""
    scorer = model.engine.pipeline.version(decision.model.digest)
    if scorer is None:
        return {}
    return dict(zip(scorer.spec.names, np.frombuffer(decision.features, "<f8").tolist(), strict=False))


def _measuring(model: ContractModel) -> Scorer:
    """Return the version that measures anomalies: the contract's, or the one beside it."""
    scorer, beside = model.scorer(), model.engine.pipeline.beside
    return scorer if scorer.measures_anomaly or beside is None else beside.scorer


def answer_of(decision: Decision, threshold: float, known: Mapping[str, float]) -> InferenceAnswer:
    """Return the answer to a decision with an anomaly, by the features that it was scored with."""
    anomaly = decision.anomaly
    assert anomaly is not None
    values: dict[str, float | bool | None] = {}
    for name, own in FEATURES.items():
        value = known.get(own, math.nan)
        values[name] = None if math.isnan(value) else bool(value) if name in FLAGS else value
    return InferenceAnswer(
        anomaly.score > threshold,
        anomaly.score,
        anomaly.severity,
        "" if anomaly.explanation is msgspec.UNSET else anomaly.explanation,
        msgspec.convert(values, AnomalyFeatures),
        (decision.anomaly_model or decision.model).version,
    )
