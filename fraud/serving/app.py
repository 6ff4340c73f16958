"""The Bento service with its front door before it."""

from __future__ import annotations

from typing import Any

import attrs
import bentoml
import orjson
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from fraud.schema import MAX_ID_LENGTH
from fraud.serving.contract import ErrorAnswer, LabelsAnswer, LabelsRequest, ProfileAnswer, Readiness, ResetAnswer
from fraud.serving.engine import Engine
from fraud.serving.http import Answer, ASGIApp, Call, FrontDoor, Routes
from fraud.serving.labels import LABELS, label_routes
from fraud.serving.profiles import PROFILES, profile_routes
from fraud.settings import Settings

REF = "#/components/schemas/{model}"


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=REF, mode="serialization")
    return {**schema.pop("$defs", {}), model.__name__: schema}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}}


ERRORS = {
    str(status): {"description": description, **_json(ErrorAnswer)}
    for status, description in {
        400: "The body is no JSON.",
        401: "No API key arrived where one is required, or one that is not known.",
        403: "The API key lacks the scope of this path.",
        404: "The model named is not served here.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The body is not declared as JSON.",
        422: "The body breaks the contract, or every one of its rows does.",
        429: "Too many requests of this caller; try again after Retry-After seconds.",
        500: "The service failed; the cause is in its log under the request id.",
        503: "Overloaded or not ready; try again after Retry-After seconds.",
    }.items()
}


SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
KEYS: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
TELL_LABELS = {
    "tags": ["History"],
    "description": "Tell which scored transactions turned out to be fraud; customers and merchants are known by it.",
    "requestBody": {"required": True, **_json(LabelsRequest)},
    "responses": {"200": {"description": "One element per label, in order.", **_json(LabelsAnswer)}}
    | {status: error for status, error in ERRORS.items() if status != "404"},
    "security": [{}, *KEYS],
}
OF_A_CUSTOMER = {
    "tags": ["History"],
    "parameters": [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "description": "The customer's id, percent-encoded as a path asks for.",
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID_LENGTH},
        }
    ],
    "security": [{}, *KEYS],
}
NO_CUSTOMER = {status: ERRORS[status] for status in ("401", "403", "429", "500", "503")} | {
    "404": {"description": "Nothing is known of this customer.", **_json(ErrorAnswer)},
    "422": {"description": "The path holds no id.", **_json(ErrorAnswer)},
}
READ_PROFILE = OF_A_CUSTOMER | {
    "description": "What is kept of a customer, readable.",
    "responses": {"200": {"description": "The profile.", **_json(ProfileAnswer)}} | NO_CUSTOMER,
}
RESET_PROFILE = OF_A_CUSTOMER | {
    "description": "Forget a customer's history; decisions stay on record.",
    "responses": {"200": {"description": "It is forgotten.", **_json(ResetAnswer)}} | NO_CUSTOMER,
    "security": KEYS,
}
ADMINISTRATION = (
    ("get", "/admin/models", "What this worker serves, and what it should serve and cannot."),
    ("post", "/admin/models/refresh", "Look for other versions at once, on W&B too, in the worker that answers."),
)


class FrontedService(bentoml.Service):  # type: ignore[misc]
    """A Bento service whose scoring routes are answered before BentoML's middlewares.

    `bentoml.service(service_class=...)` makes it; the class it decorates has `settings`, an `engine`, `limits`,
    `guards` and `observers`.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        bento, app = self.inner, super().to_asgi(is_main=is_main)
        max_ahead_ms = round(bento.settings.max_clock_ahead_s * 1000)
        labels = label_routes(lambda: bento.engine.dataplane, max_ahead_ms)
        routes = {**scoring_routes(bento.engine), **labels, **admin_routes(bento.engine)}
        around = profile_routes(lambda: bento.engine.dataplane.store)
        door = FrontDoor(app, routes, bento.limits, bento.guards, bento.observers, around)
        return for_browsers(door, bento.settings)

    @property
    def openapi_spec(self) -> Any:
        """BentoML's document, with what is really read and answered, errors included."""
        spec = super().openapi_spec
        schemas: dict[str, Any] = _schemas(ErrorAnswer) | _schemas(Readiness)
        paths = dict(spec.paths)
        for api in self.apis.values():
            question, answer = api.input_spec, api.output_spec
            schemas |= _schemas(question) | _schemas(answer)
            operation = {
                **paths[api.route].post,
                "requestBody": {"required": True, **_json(question)},
                "responses": {"200": {"description": "One element per instance, in order.", **_json(answer)}} | ERRORS,
                "security": [{}, *KEYS],
            }
            paths[api.route] = attrs.evolve(paths[api.route], post=operation)
        readyz = {
            "tags": ["Infrastructure"],
            "description": "Ready once the model is loaded, verified and warm.",
            "responses": {"200": {"description": "Ready.", **_json(Readiness)}, "503": ERRORS["503"]},
        }
        paths["/readyz"] = attrs.evolve(paths["/readyz"], get=readyz)
        for method, path, description in ADMINISTRATION:
            operation = {
                "tags": ["Administration"],
                "description": description,
                "responses": {"200": {"description": "What this worker serves.", **_json(Readiness)}}
                | {status: ERRORS[status] for status in ("401", "403", "429", "500", "503")},
                "security": KEYS,
            }
            paths[path] = attrs.evolve(paths["/readyz"], **{"get": None, method: operation})
        schemas |= _schemas(LabelsRequest) | _schemas(LabelsAnswer) | _schemas(ProfileAnswer) | _schemas(ResetAnswer)
        paths[LABELS] = attrs.evolve(paths["/readyz"], get=None, post=TELL_LABELS)
        profile = "{id}".join(PROFILES)
        paths[profile] = attrs.evolve(paths["/readyz"], get=READ_PROFILE, delete=RESET_PROFILE)
        components = {"schemas": schemas, "securitySchemes": SECURITY_SCHEMES}
        return attrs.evolve(spec, openapi="3.1.0", paths=paths, components=components)


def scoring_routes(engine: Engine) -> Routes:
    """`/predict` and `/explain`, and `/readyz` with its detail."""

    async def predict(call: Call) -> Answer:
        return Answer(await engine.answer(await call.json_body(), explain=False, request_id=call.request_id))

    async def explain(call: Call) -> Answer:
        return Answer(await engine.answer(await call.json_body(), explain=True, request_id=call.request_id))

    async def readyz(_: Call) -> Answer:
        return Answer(orjson.dumps(engine.readiness()))

    return {"/predict": {"POST": predict}, "/explain": {"POST": explain}, "/readyz": {"GET": readyz}}


def admin_routes(engine: Engine) -> Routes:
    """What an operator asks of a worker; the gate asks for the scope admin."""

    async def show(_: Call) -> Answer:
        return Answer(orjson.dumps(engine.readiness()))

    async def refresh(_: Call) -> Answer:
        return Answer(orjson.dumps(await engine.refresh()))

    return {"/admin/models": {"GET": show}, "/admin/models/refresh": {"POST": refresh}}


def for_browsers(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Put CORS and compression before an application, where they are set."""
    if settings.gzip_min_bytes:
        app = GZipMiddleware(app, minimum_size=settings.gzip_min_bytes, compresslevel=5)
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-api-key", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
