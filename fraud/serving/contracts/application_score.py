"""The contract of an application-scoring service on FastAPI: a flat map of ready features, scored with its reasons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fraud.errors import BundleError, InvalidRequest, MalformedJson, RegistryError, RequestError
from fraud.forms import readable_time
from fraud.models.scorer import Scorer
from fraud.pipeline.rows import Decision, PendingRow, Rejection
from fraud.schema import MAX_ID_LENGTH
from fraud.serving.bodies import decode_body
from fraud.serving.contract import JsonObject
from fraud.serving.contracts.application_features import BadFeatures, FeatureReader, refuse_non_finite
from fraud.serving.contracts.fastapi import NotADictionary, fastapi_errors
from fraud.serving.contracts.protocol import (
    Contract,
    ContractModel,
    decided_headers,
    decision_of,
    field_of,
    needs_probability,
    probability_of,
)
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters
from fraud.settings import Settings

TOP_FEATURES = 5
LOW_BELOW, MEDIUM_BELOW = 0.3, 0.7

Features = Annotated[
    msgspec.Raw,
    Meta(
        description="Every feature of the model by its name: a number, a numeric string, true or false; a category, "
        "such as email_domain_category, by its name. Others are ignored.",
        extra_json_schema={
            "type": "object",
            "minProperties": 1,
            "additionalProperties": {"type": ["number", "string", "boolean", "null"]},
        },
    ),
]


class ApplicationBody(msgspec.Struct):
    """One application."""

    features: Features
    request_id: Annotated[str | None, Meta(description="Traces the request, and never makes it a repeat.")] = None


class TopFeature(msgspec.Struct):
    """One of the features that moved the score most."""

    feature: str
    importance: Annotated[float, Meta(description="what it added to the raw score, log-odds")]
    direction: Literal["increases_risk", "decreases_risk"]


class ApplicationScore(msgspec.Struct):
    """The score of an application."""

    confidence_score: Annotated[float, Meta(ge=0, le=1, description="calibrated fraud probability")]
    confidence_band: Literal["low", "medium", "high"]
    top_features: list[TopFeature]
    model_version: str
    calibration_version: str
    inference_time_ms: int


class ApplicationModel(msgspec.Struct):
    """The model in service."""

    model_version: str
    loaded_at: str
    feature_names: list[str]
    metadata: JsonObject


class Reload(msgspec.Struct):
    """Which version to serve."""

    version: Annotated[
        str | None,
        Meta(description="As answers have it, or as `fraud models` lists it; none: the one that the registry names."),
    ] = None


class Reloaded(msgspec.Struct):
    """The version that is served now."""

    status: Literal["success"]
    version: str


class ReloadFailed(RequestError):
    """Another version cannot be served; the old one stays. The contract answers 500."""

    http_status = 500
    code = "reload_failed"


class ApplicationHealth(msgspec.Struct):
    """That the service can score."""

    status: Literal["healthy"]
    model_version: str
    model_loaded_at: str
    features_count: int


ERRORS = fastapi_errors("Inference failed")
RELOAD_ERRORS = fastapi_errors("Failed to reload model", where="query")
EXAMPLE = '{"features": {"name": value}, "request_id": "..."}'
_decoder = msgspec.json.Decoder(ApplicationBody)
_encode = msgspec.json.Encoder().encode


def application_routes(model: ContractModel, _: Settings) -> list[Route]:
    """`/api/v1/score`, `/api/v1/model/info`, `/api/v1/model/reload` and `/health`."""
    reader = FeatureReader()

    async def score(call: Call) -> Answer:
        started = time.perf_counter()
        said = read_body(await call.json_body())
        request_id = (said.request_id or "")[:MAX_ID_LENGTH]
        request = model.read(call, [said.features], reasons=True, request_id=request_id)
        if not is_plain(said.features, request.rows[0]):
            row, extra = reader.row(said.features, request.scorer.spec)
            model.engine.pipeline.counts["extra_fields"] += extra
            request = model.read(call, [row], reasons=True, request_id=request_id)
        (outcome,) = await model.engine.decide(request)
        if isinstance(outcome, Rejection) and isinstance(outcome.error, InvalidRequest):
            raise in_features(outcome.error)
        decision = decision_of(outcome)
        answer = answer_of(decision, request.scorer.spec.names, started)
        return Answer(_encode(answer), headers=decided_headers([decision]))

    async def info(_: Call) -> Answer:
        scorer = model.scorer()
        return Answer(_encode(model_of(scorer)))

    async def reload(call: Call) -> Answer:
        wanted, name = parameters(call, Reload).version, model.scorer().name.name
        try:
            if wanted is None:
                await model.engine.refresh()
            else:
                await model.engine.switch(name, wanted, why=f"{call.route.path}, request {call.request_id}")
        except (RegistryError, BundleError) as error:
            raise ReloadFailed(f"Failed to reload model: {error.message}") from None
        return Answer(_encode(Reloaded("success", model.scorer().name.version)))

    async def health(_: Call) -> Answer:
        scorer = model.scorer()
        version, loaded_at = scorer.name.version, readable_time(scorer.loaded_at_ms)
        return Answer(_encode(ApplicationHealth("healthy", version, loaded_at, len(scorer.spec.features))))

    return [
        Route(
            "POST",
            "/api/v1/score",
            "score",
            score,
            "Score an application, with the features that moved its score most.",
            request=ApplicationBody,
            answer=ApplicationScore,
            fails={
                400: "A feature is missing, or its value is none that is allowed.",
                409: "The idempotency key came before with other features.",
            },
        ),
        Route(
            "GET",
            "/api/v1/model/info",
            "score",
            info,
            "The model in service: its version, features and metadata.",
            answer=ApplicationModel,
        ),
        Route(
            "POST",
            "/api/v1/model/reload",
            "admin",
            reload,
            "Promote a version and serve it, or look which one the registry names.",
            parameters=Reload,
            answer=Reloaded,
            fails={500: "The version is unknown, or cannot be served; the old one stays."},
            errors=RELOAD_ERRORS,
        ),
        Route("GET", "/health", None, health, "That applications can be scored.", answer=ApplicationHealth),
    ]


APPLICATION_SCORE = Contract(
    "application-score", ERRORS, application_routes, needs_probability("features"), prefixes=("/api/v1",)
)


def read_body(body: bytes) -> ApplicationBody:
    """Return the body of a score.

    Raises
    ------
    MalformedJson, InvalidRequest
        It is no JSON, or has no features.
    BadFeatures
        It would be JSON without NaN or Infinity among its features.
    """
    try:
        said = decode_body(_decoder, body, EXAMPLE)
    except MalformedJson:
        refuse_non_finite(body)
        raise
    features = bytes(said.features)
    if features[:1] != b"{":
        raise NotADictionary("$.features")
    if not features[1:-1].strip():
        raise InvalidRequest("Value error, Features cannot be empty", "$.features")
    return said


def is_plain(features: msgspec.Raw, row: PendingRow | Rejection) -> bool:
    """Return whether a row was read as `/predict` reads it and holds every feature, and nothing else."""
    if isinstance(row, Rejection) or row.row.n_extra:
        return False
    total, said = sum(row.row.values), row.row.raw
    return total == total and b'"transaction_id"' not in said and b"\\" not in said


def in_features(error: InvalidRequest) -> BadFeatures:
    """Return the refusal of a row as one of its features."""
    name = field_of(error)
    return BadFeatures.value(name, error.message) if name else BadFeatures(error.message)


def answer_of(decision: Decision, names: Sequence[str], started: float) -> ApplicationScore:
    """Return the answer to a decision made since `started`, of `time.perf_counter`, by a model of these features."""
    probability, version = probability_of(decision), decision.model.version
    return ApplicationScore(
        probability,
        "low" if probability < LOW_BELOW else "medium" if probability < MEDIUM_BELOW else "high",
        [
            TopFeature(name, value, "increases_risk" if value > 0 else "decreases_risk")
            for name, value in strongest(decision, names)
        ],
        version,
        f"{version}_isotonic",
        int((time.perf_counter() - started) * 1000),
    )


def strongest(decision: Decision, names: Sequence[str]) -> list[tuple[str, float]]:
    """Return the features with the largest contributions; if fewer moved the score, others follow with 0."""
    found = list(decision.reasons)
    if not found and decision.explanation is not None:  # recorded without its reasons
        found = [(reason.feature, reason.contribution) for reason in decision.explanation.reasons]
    if len(found) < TOP_FEATURES:
        moved = {name for name, _ in found}
        found += [(name, 0.0) for name in names if name not in moved]
    return found[:TOP_FEATURES]


def model_of(scorer: Scorer) -> ApplicationModel:
    """Return what the contract says of a model."""
    manifest, version = scorer.bundle.manifest, scorer.name.version
    metadata = {
        "name": manifest.name,
        "version": version,
        "digest": scorer.name.digest,
        "model_type": manifest.detector.algorithm,
        "calibration_method": "isotonic",
        "calibration_version": f"{version}_isotonic",
        "feature_count": len(scorer.spec.features),
        "metrics": scorer.bundle.metrics,
        "libraries": manifest.libraries,
        "git_commit": manifest.git_commit,
    }
    return ApplicationModel(version, readable_time(scorer.loaded_at_ms), list(scorer.spec.names), metadata)
