"""The Open Inference Protocol, version 2: health, models, and inference over tensors by name, binary ones too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.errors import InvalidRequest, NotReady, UnknownModel
from fraud.models.scorer import Scorer
from fraud.pipeline.rows import Decision, Outcome, Rejection
from fraud.schema import MAX_ID_LENGTH, Datatype
from fraud.serving.bodies import decode_body
from fraud.serving.contracts.protocol import (
    Contract,
    ContractModel,
    decided_headers,
    decision_of,
    field_of,
    probability_of,
)
from fraud.serving.contracts.tensors import InputTensor, OutputTensor, WantedOutput, outputs_of, rows_of
from fraud.serving.http import JSON, JSON_TYPE, Answer, Call, ErrorShape, Failure, Headers, Route
from fraud.serving.parameters import idempotency_key, parameters
from fraud.settings import Settings

HEADER_LENGTH = b"inference-header-content-length"
BINARY = b"application/octet-stream"
EXAMPLE = '{"inputs": [{"name": "amount", "shape": [1], "datatype": "FP64", "data": [12.5]}, ...]}'
OUTPUTS: dict[str, Datatype] = {
    "fraud_probability": "FP64",
    "prediction": "BOOL",
    "risk_level": "BYTES",
    "decision": "BYTES",
    "transaction_id": "BYTES",
}


class ModelPath(msgspec.Struct):
    """A model by its name."""

    name: Annotated[str, Meta(description="the name of a served model")]


class VersionPath(ModelPath):
    """A version of a model."""

    version: Annotated[str, Meta(description="the version in service, as the model's metadata has it")]


class InferParameters(msgspec.Struct):
    """Parameters of an inference."""

    binary_data_output: bool = False


class InferBody(msgspec.Struct):
    """Rows as tensors: one for each field, each with an element a row."""

    inputs: list[InputTensor]
    id: str | None = None
    outputs: list[WantedOutput] | None = None
    parameters: InferParameters = msgspec.field(default_factory=InferParameters)


class InferAnswer(msgspec.Struct, omit_defaults=True):
    """The results as tensors, each with an element a row."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | None = None


class TensorMetadata(msgspec.Struct):
    """A tensor that a model takes or gives; -1 stands for the number of rows."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(msgspec.Struct):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class Live(msgspec.Struct):
    """That the process is alive."""

    live: bool


class Ready(msgspec.Struct):
    """That requests are answered."""

    ready: bool


class ModelReady(Ready):
    """That a model is served."""

    name: str


class InferenceError(msgspec.Struct):
    """What is wrong."""

    error: str


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(InferBody)


def inference_error(failure: Failure) -> Answer:
    """Encode an error as the protocol has it: a text, with the place that it is about."""
    problem = failure.problem
    place = "" if problem.path in (None, "$") else f"{problem.path}: "
    return Answer(_encode(InferenceError(place + problem.message)), failure.status)


ERRORS = ErrorShape(inference_error, InferenceError)


def inference_routes(model: ContractModel, _: Settings) -> list[Route]:
    """The routes under `/v2`."""
    engine = model.engine

    async def live(_: Call) -> Answer:
        return Answer(_encode(Live(True)))

    async def ready(_: Call) -> Answer:
        engine.expect_ready()
        return Answer(_encode(Ready(True)))

    async def server(_: Call) -> Answer:
        return Answer(_encode(ServerMetadata("fraud_bento", "1", ["binary_tensor_data"])))

    async def metadata(call: Call) -> Answer:
        return Answer(_encode(metadata_of(model_of(call, model))))

    async def model_ready(call: Call) -> Answer:
        scorer = model_of(call, model)
        engine.expect_ready()
        return Answer(_encode(ModelReady(True, scorer.name.name)))

    async def infer(call: Call) -> Answer:
        scorer = model_of(call, model)
        said, tail = read_body(call, await call.body(JSON_TYPE, BINARY))
        rows = rows_of(said.inputs, tail)
        request = engine.admit().read(
            rows,
            model=scorer.name.name,
            request_id=(said.id or call.request_id)[:MAX_ID_LENGTH],
            contract=model.contract.name,
            transaction_id=idempotency_key(call),
        )
        return answer_of(said, scorer, await engine.decide(request))

    routes = [
        Route("GET", "/v2/health/live", None, live, "The process is alive.", answer=Live),
        Route("GET", "/v2/health/ready", None, ready, "Requests are answered.", answer=Ready),
        Route("GET", "/v2", "read", server, "What the server is.", answer=ServerMetadata),
    ]
    for base, kind in (("/v2/models/{name}", ModelPath), ("/v2/models/{name}/versions/{version}", VersionPath)):
        fails = {404: "No such model is served."}
        routes += [
            Route(
                "GET",
                base,
                "read",
                metadata,
                "What a model takes and gives.",
                answer=ModelMetadata,
                parameters=kind,
                fails=fails,
            ),
            Route(
                "GET",
                f"{base}/ready",
                None,
                model_ready,
                "A model is served.",
                answer=ModelReady,
                parameters=kind,
                fails=fails,
            ),
            Route(
                "POST",
                f"{base}/infer",
                "score",
                infer,
                "Score rows, one tensor a field.",
                request=InferBody,
                answer=InferAnswer,
                parameters=kind,
                fails=fails | {409: "A transaction was scored before with other contents."},
            ),
        ]
    return routes


def uncalibrated(scorer: Scorer) -> str | None:
    """Say that a model gives no probability; None if it does."""
    return None if scorer.detector.is_calibrated else "it gives no calibrated probability"


OPEN_INFERENCE = Contract("open-inference", ERRORS, inference_routes, uncalibrated, ("/v2",))


def model_of(call: Call, model: ContractModel) -> Scorer:
    """Return the model that the path names.

    Raises
    ------
    UnknownModel
        It is not served, or not in this version.
    NotReady
        It gives no probability, or none is loaded.
    """
    path: ModelPath = parameters(call, VersionPath) if "version" in call.names else parameters(call, ModelPath)
    scorers = model.engine.pipeline.scorers
    scorer = scorers.get(path.name)
    if scorer is None:
        raise UnknownModel(path.name, [*scorers])
    if isinstance(path, VersionPath) and path.version != scorer.name.version:
        raise UnknownModel(f"{path.name}:{path.version}", [f"{s.name.name}:{s.name.version}" for s in scorers.values()])
    if (problem := uncalibrated(scorer)) is not None:
        raise NotReady(f"{path.name}: {problem}")
    return scorer


def metadata_of(scorer: Scorer) -> ModelMetadata:
    """Return what a model takes, by its own specification, and gives."""
    inputs = [TensorMetadata(name, datatype, [-1]) for name, datatype in scorer.decoder.datatypes.items()]
    outputs = [TensorMetadata(name, datatype, [-1]) for name, datatype in OUTPUTS.items()]
    platform = f"fraud_bento_{scorer.bundle.manifest.detector.algorithm}"
    return ModelMetadata(scorer.name.name, [scorer.name.version], platform, inputs, outputs)


def read_body(call: Call, body: bytes) -> tuple[InferBody, bytes]:
    """Return the JSON of a body, and the binary tensors that follow it."""
    given = call.headers.get(HEADER_LENGTH)
    if given is None:
        return decode_body(_decoder, body, EXAMPLE), b""
    if not given.isdigit() or not 0 < int(given[:20]) <= len(body):
        raise InvalidRequest(
            f"the header Inference-Header-Content-Length is {given.decode('latin-1')[:20]!r}; "
            f"it is how many of the body's {len(body)} bytes are JSON"
        )
    return decode_body(_decoder, body[: int(given)], EXAMPLE), body[int(given) :]


def answer_of(said: InferBody, scorer: Scorer, outcomes: Sequence[Outcome]) -> Answer:
    """Return the outputs of an inference; raises the error of the first row that was rejected."""
    decisions: list[Decision] = []
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, Rejection):
            name = field_of(outcome.error)
            outcome.error.path = f"$.inputs.{name}[{i}]" if name else f"$.inputs[{i}]"
        decisions.append(decision_of(outcome))
    tensors, tail = outputs_of(results_of(decisions), said.outputs, said.parameters.binary_data_output)
    model = decisions[0].model
    head = _encode(InferAnswer(model.name, model.version, tensors, said.id))
    headers = decided_headers(outcomes)
    if tail:
        length: Headers = ((b"inference-header-content-length", b"%d" % len(head)),)
        headers = ((b"content-type", BINARY), *length, *headers[len(JSON) :])
    return Answer(head + tail, headers=headers)


def results_of(decisions: Sequence[Decision]) -> dict[str, tuple[str, Sequence[str | float | bool]]]:
    """Return every output of some decisions."""
    values: dict[str, Sequence[str | float | bool]] = {
        "fraud_probability": [probability_of(decision) for decision in decisions],
        "prediction": [decision.verdict.prediction for decision in decisions],
        "risk_level": [decision.verdict.risk_level for decision in decisions],
        "decision": [decision.verdict.decision for decision in decisions],
        "transaction_id": [decision.transaction_id or "" for decision in decisions],
    }
    return {name: (OUTPUTS[name], given) for name, given in values.items()}
