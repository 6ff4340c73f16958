"""The contract of a service that predicts with the models of a registry, chosen by their aliases.

Its probes, metrics and pages are the product's own: ``/livez``, ``/readyz``, ``/metrics``, ``/docs`` and ``/redoc``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

import fraud
from fraud.models.scorer import ModelName
from fraud.serving import scoring
from fraud.serving.answers import encode_answer
from fraud.serving.contract import JsonObject, PredictAnswer, ScoreBody
from fraud.serving.contracts.protocol import Contract, ContractModel, decided_headers
from fraud.serving.http import ONE_SHAPE, Answer, Call, Route
from fraud.settings import Settings

ALGORITHM = "lightgbm"
"""The model that its clients name: what the contract scores with, unless a model of that name is served."""


class ServiceVersion(msgspec.Struct):
    """The release of the service, and the versions of the models that it has loaded."""

    service: Annotated[str, Meta(description="name of the service")]
    version: Annotated[str, Meta(description="its release")]
    models: list[ModelName]


class RefreshAnswer(msgspec.Struct):
    """What the worker that answers serves after it has looked for other versions."""

    status: str
    wandb_look: Annotated[str, Meta(description="asked, or why W&B was not")]
    models: list[ModelName]
    aliases: Annotated[dict[str, str], Meta(description="the alias in force of each model")]
    failed_swaps: list[JsonObject]


_encode = msgspec.json.Encoder().encode


def registry_routes(model: ContractModel, _: Settings) -> list[Route]:
    """`/v1/predict`, `/v1/version`, and both paths of the refresh."""
    engine = model.engine

    async def predict(call: Call) -> Answer:
        rows, named = scoring.decode_envelope(await call.json_body())
        other = named if named != ALGORITHM or named in engine.admit().scorers else None
        outcomes = await model.decide(call, rows, model=other)
        return Answer(await encode_answer(outcomes), headers=decided_headers(outcomes))

    async def version(_: Call) -> Answer:
        models = [scorer.name for scorer in engine.pipeline.scorers.values()] if engine.is_ready else []
        return Answer(_encode(ServiceVersion("fraud_bento", fraud.__version__, models)))

    async def refresh(_: Call) -> Answer:
        return Answer(_encode(msgspec.convert(await engine.refresh(), RefreshAnswer)))

    return [
        Route(
            "POST",
            "/v1/predict",
            "score",
            predict,
            "Score transactions as /predict does; the model lightgbm is the one that this contract scores with.",
            request=ScoreBody,
            answer=PredictAnswer,
            fails={
                404: "The model named is not served here.",
                409: "Every transaction was scored before with other contents.",
            },
        ),
        Route(
            "GET",
            "/v1/version",
            "read",
            version,
            "The release of the service, and the versions of its models.",
            answer=ServiceVersion,
        ),
        *[
            Route(
                "POST",
                path,
                "admin",
                refresh,
                "Look for other versions at once, on W&B too, in the worker that answers.",
                answer=RefreshAnswer,
            )
            for path in ("/v1/admin/refresh-models", "/admin/refresh-models")
        ],
    ]


REGISTRY_PREDICT = Contract("registry-predict", ONE_SHAPE, registry_routes, misfit=lambda scorer: None)
