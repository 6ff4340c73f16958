"""The contract of a form service on FastAPI: amount, hour, day and category of a payment, and a verdict in a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fraud.errors import InvalidRequest, RequestError
from fraud.models.scorer import Scorer
from fraud.pipeline.rows import Decision
from fraud.schema import MAX_INSTANCES
from fraud.serving.answers import RowsRefused
from fraud.serving.bodies import decode_body
from fraud.serving.contracts.fastapi import fastapi_errors
from fraud.serving.contracts.protocol import (
    Contract,
    ContractModel,
    decided_headers,
    decision_of,
    needs_probability,
    probability_of,
)
from fraud.serving.http import Answer, Call, Route
from fraud.settings import Settings

EXAMPLE = '{"amt": 107.23, "hour": 14, "day_of_week": 2, "category": "shopping_net"}'


class MerchantForm(msgspec.Struct):
    """One payment."""

    amt: Annotated[float, Meta(gt=0)]
    hour: Annotated[int, Meta(ge=0, le=23)]
    day_of_week: Annotated[int, Meta(ge=0, le=6)]
    category: str


class MerchantVerdict(msgspec.Struct):
    """The verdict on one payment."""

    prediction: Literal["fraudulent", "non-fraudulent"]
    fraud_probability: float


Forms = Annotated[list[MerchantForm], Meta(min_length=1, max_length=MAX_INSTANCES)]
Verdicts = list[MerchantVerdict]
ERRORS = fastapi_errors()
_decode_form = msgspec.json.Decoder(MerchantForm, strict=False)  # as FastAPI takes "14" for 14
_decode_list = msgspec.json.Decoder(Annotated[list[msgspec.Raw], Meta(min_length=1, max_length=MAX_INSTANCES)])
_encode = msgspec.json.Encoder().encode


def merchant_routes(model: ContractModel, _: Settings) -> list[Route]:
    """`/predict/` and `/predict/batch`."""

    async def predict(call: Call) -> Answer:
        form = decode_body(_decode_form, await call.json_body(), EXAMPLE)
        decision = await model.decide_one(call, _encode(form))
        return Answer(_encode(verdict_of(decision)), headers=decided_headers([decision]))

    async def batch(call: Call) -> Answer:
        forms = read_forms(await call.json_body())
        outcomes = await model.decide(call, [_encode(form) for form in forms])
        decisions = [decision_of(outcome) for outcome in outcomes]
        return Answer(_encode([verdict_of(decision) for decision in decisions]), headers=decided_headers(decisions))

    fails = {409: "The idempotency key came before with another payment."}
    return [
        Route(
            "POST",
            "/predict/",
            "score",
            predict,
            "Whether a payment is fraudulent.",
            request=MerchantForm,
            answer=MerchantVerdict,
            fails=fails,
        ),
        Route(
            "POST",
            "/predict/batch",
            "score",
            batch,
            "Whether each of several payments is fraudulent.",
            request=Forms,
            answer=Verdicts,
            fails=fails,
        ),
    ]


def takes_the_form(scorer: Scorer) -> str | None:
    """Say why a model cannot score payments of the form; None if it can."""
    if (problem := needs_probability("features")(scorer)) is not None:
        return problem
    wanted = {feature.name for feature in scorer.spec.requested if not feature.missing}
    others = sorted(wanted - {*MerchantForm.__struct_fields__})
    return f"it needs {', '.join(others)}, which the form has not" if others else None


MERCHANT_FORM = Contract("merchant-form", ERRORS, merchant_routes, takes_the_form, prefixes=("/predict",))


def read_forms(body: bytes) -> Sequence[MerchantForm]:
    """Return the payments of a list; names every one that is invalid.

    Raises
    ------
    RequestError
        The body is no list, or one or several of its payments are invalid.
    """
    forms: list[MerchantForm] = []
    problems: list[RequestError] = []
    for i, raw in enumerate(decode_body(_decode_list, body, f"[{EXAMPLE}, ...]")):
        try:
            forms.append(decode_body(_decode_form, bytes(raw), EXAMPLE))
        except InvalidRequest as error:
            error.path = f"$[{i}]{(error.path or '$')[1:]}"
            problems.append(error)
    if problems:
        raise RowsRefused(problems)
    return forms


def verdict_of(decision: Decision) -> MerchantVerdict:
    """Return the verdict of the contract: fraudulent where the policy acts."""
    word: Literal["fraudulent", "non-fraudulent"] = "fraudulent" if decision.verdict.prediction else "non-fraudulent"
    return MerchantVerdict(word, probability_of(decision))
