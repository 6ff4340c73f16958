"""KServe's protocol V1 and SageMaker's: `/predict` under the paths that these platforms call."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.errors import UnknownModel
from fraud.schema import MAX_INSTANCES
from fraud.serving.answers import encode_answer
from fraud.serving.contract import Instance, PredictAnswer, ScoreBody
from fraud.serving.contracts.open_inference import ERRORS, ModelPath, ModelReady
from fraud.serving.contracts.protocol import Contract, ContractModel, decided_headers
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import idempotency_key, parameters
from fraud.serving.scoring import decode_envelope
from fraud.settings import Settings


class Models(msgspec.Struct):
    """The names of the models in service."""

    models: list[str]


class InstancesBody(msgspec.Struct):
    """Rows to score independently, in order."""

    instances: Annotated[list[Instance], Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_INSTANCES})]


_encode = msgspec.json.Encoder().encode
NOT_SERVED = {404: "No such model is served.", 409: "Every transaction was scored before with other contents."}


async def predict(model: ContractModel, call: Call, name: str | None) -> Answer:
    """Answer the instances of a body as `/predict` does, by the model of a name, or the one that the body names."""
    engine = model.engine
    raws, named = decode_envelope(await call.json_body())
    request = engine.admit().read(
        raws,
        model=name or named or model.scorer().name.name,
        request_id=call.request_id,
        contract=model.contract.name,
        transaction_id=idempotency_key(call),
    )
    outcomes = await engine.decide(request)
    return Answer(await encode_answer(outcomes), headers=decided_headers(outcomes))


def kserve_routes(model: ContractModel, _: Settings) -> list[Route]:
    """The routes under `/v1/models`."""

    async def score(call: Call) -> Answer:
        return await predict(model, call, parameters(call, ModelPath).name)

    async def models(_: Call) -> Answer:
        return Answer(_encode(Models([*model.engine.pipeline.scorers])))

    async def ready(call: Call) -> Answer:
        name, scorers = parameters(call, ModelPath).name, model.engine.pipeline.scorers
        if name not in scorers:
            raise UnknownModel(name, [*scorers])
        model.engine.expect_ready()
        return Answer(_encode(ModelReady(True, name)))

    return [
        Route(
            "POST",
            "/v1/models/{name}:predict",
            "score",
            score,
            "Score rows with a model.",
            request=InstancesBody,
            answer=PredictAnswer,
            parameters=ModelPath,
            fails=NOT_SERVED,
        ),
        Route(
            "GET",
            "/v1/models/{name}",
            None,
            ready,
            "A model is served.",
            answer=ModelReady,
            parameters=ModelPath,
            fails={404: "No such model is served."},
        ),
        Route("GET", "/v1/models", "read", models, "Which models are served.", answer=Models),
    ]


def sagemaker_routes(model: ContractModel, _: Settings) -> list[Route]:
    """`/ping` and `/invocations`."""

    async def ping(_: Call) -> Answer:
        model.scorer()
        model.engine.expect_ready()
        return Answer(b"")

    async def invoke(call: Call) -> Answer:
        return await predict(model, call, None)

    return [
        Route("GET", "/ping", None, ping, "Requests are answered."),
        Route(
            "POST",
            "/invocations",
            "score",
            invoke,
            "Score rows.",
            request=ScoreBody,
            answer=PredictAnswer,
            fails=NOT_SERVED,
        ),
    ]


KSERVE_V1 = Contract("kserve-v1", ERRORS, kserve_routes, lambda _: None, prefixes=("/v1/models",))
SAGEMAKER = Contract("sagemaker", ERRORS, sagemaker_routes, lambda _: None)
