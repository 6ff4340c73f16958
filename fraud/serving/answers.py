"""The JSON of a scoring answer: one element a row, a prediction or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from fraud.errors import FraudError, RequestError
from fraud.pipeline.decide import INLINE_ROWS
from fraud.pipeline.rows import Outcome, Rejection
from fraud.serving.contract import Explanation, PredictAnswer, Prediction, Problem, Refused


class RowsRefused(RequestError):
    """Every row of a request is bad: the first row's error, and all of them in `errors`."""

    def __init__(self, problems: Sequence[FraudError]) -> None:
        first = problems[0]
        super().__init__(first.message, first.path)
        self.code = first.code
        self.http_status = first.http_status if len({p.http_status for p in problems}) == 1 else 422
        self.errors = [problem_of(problem) for problem in problems]


def problem_of(error: FraudError) -> Problem:
    return Problem(error.code, error.message, error.path)


_encode = msgspec.json.Encoder().encode


async def encode_answer(outcomes: Sequence[Outcome]) -> bytes:
    """Return the JSON of an answer; that of many rows is written in a thread.

    Raises
    ------
    RowsRefused
        No row could be scored.
    FraudError
        A row failed for another reason than its contents: the caller should send the whole request again.
    """
    if len(outcomes) > INLINE_ROWS:
        return await asyncio.to_thread(lambda: _encode(answer_of(outcomes)))
    return _encode(answer_of(outcomes))


def answer_of(outcomes: Sequence[Outcome]) -> PredictAnswer:
    """Return the answer to the rows of one request; raises as `encode_answer` does."""
    elements: list[Prediction | Refused] = []
    errors: list[FraudError] = []
    for outcome in outcomes:
        if isinstance(outcome, Rejection):
            errors.append(outcome.error)
            elements.append(Refused(outcome.transaction_id, problem_of(outcome.error)))
            continue
        shared = (
            outcome.transaction_id,
            outcome.fraud_probability,
            *outcome.verdict,
            outcome.model,
            outcome.degraded,
            outcome.decided_by,
            outcome.rules_hit,
        )
        anomaly = UNSET if outcome.anomaly is None else outcome.anomaly
        by = UNSET if outcome.anomaly_model is None else outcome.anomaly_model
        if outcome.explanation is None:
            elements.append(Prediction(*shared, anomaly=anomaly, anomaly_model=by, reading=outcome.reading))
        else:
            explained = (outcome.raw_margin, *outcome.explanation)
            elements.append(
                Explanation(*shared, *explained, anomaly=anomaly, anomaly_model=by, reading=outcome.reading)
            )
    for error in errors:
        if not isinstance(error, RequestError):
            raise error
    if len(errors) == len(elements):
        raise RowsRefused(errors)
    return PredictAnswer(elements)
