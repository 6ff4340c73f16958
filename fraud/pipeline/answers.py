"""The JSON of an answer, one element a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import verdict_of
from fraud.detectors.explain import Explained, Reason
from fraud.errors import FraudError, RequestError
from fraud.models.bundle import short
from fraud.models.scorer import ModelName, Scorer


class Problem(msgspec.Struct, frozen=True):
    code: str
    message: str
    path: str | None


class Refused(msgspec.Struct, frozen=True):
    """Stands in the place of a row that could not be scored."""

    transaction_id: str | None
    error: Problem


class Prediction(msgspec.Struct):
    transaction_id: str | None
    fraud_probability: float
    prediction: bool
    risk_level: str
    decision: str
    model: msgspec.Raw
    degraded: Sequence[str]


class Explanation(Prediction):
    raw_margin: float
    base_value: float
    contributions: dict[str, float]
    reasons: list[Reason]


class _Answer(msgspec.Struct):
    predictions: Sequence[Any]


class RowsRefused(RequestError):
    """Every row of a request is bad: the first row's error, and all of them in `errors`."""

    def __init__(self, problems: Sequence[FraudError]) -> None:
        first = problems[0]
        super().__init__(first.message, first.path)
        self.code = first.code
        self.http_status = first.http_status if len({p.http_status for p in problems}) == 1 else 422
        self.errors = [msgspec.to_builtins(problem_of(problem)) for problem in problems]


def problem_of(error: FraudError) -> Problem:
    return Problem(error.code, error.message, error.path)


_encode = msgspec.json.Encoder().encode
_models: dict[str, msgspec.Raw] = {}


def predict_answer(decided: DecisionRecord) -> Prediction:
    return Prediction(
        decided.transaction_id,
        decided.fraud_probability,
        decided.prediction,
        decided.risk_level,
        decided.decision,
        _model(decided.model_name, decided.model_digest),
        decided.degraded,
    )


def plain_answer(scorer: Scorer, probability: float) -> Prediction:
    """Answer a row that has no id and so is not recorded."""
    is_fraud, risk_level, decision = verdict_of(scorer.policy, probability)
    return Prediction(
        None, probability, is_fraud, risk_level, decision, _model(scorer.name.name, scorer.name.digest), ()
    )


def explain_answer(decided: DecisionRecord, explained: Explained) -> Explanation:
    prediction: tuple[Any, ...] = msgspec.structs.astuple(predict_answer(decided))
    return Explanation(*(*prediction, decided.raw_margin, *explained))


def encode_answer(rows: Sequence[Prediction | Refused | None]) -> bytes:
    return _encode(_Answer(rows))


def _model(name: str, digest: str) -> msgspec.Raw:
    encoded = _models.get(digest)
    if encoded is None:
        encoded = _models[digest] = msgspec.Raw(_encode(ModelName(name, short(digest), digest)))
    return encoded
