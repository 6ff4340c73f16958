"""The Bento service behind its front door, and the list of its routes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import bentoml
import msgspec
import orjson
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from fraud.models.rule_sets import RuleSets
from fraud.serving import scoring
from fraud.serving.api_pages import api_pages
from fraud.serving.bento_pages import bento_routes
from fraud.serving.bodies import takes_gzip
from fraud.serving.cases import case_routes
from fraud.serving.contract import ExplainAnswer, PredictAnswer, Readiness, ScoreBody
from fraud.serving.contracts.protocol import ContractModel
from fraud.serving.contracts.registered import closed_by, contract_routes, contracts_of, other_bodies, other_of
from fraud.serving.decisions import decision_routes
from fraud.serving.engine import Engine
from fraud.serving.front_door import FrontDoor
from fraud.serving.http import Answer, Call, HttpLimits, Route
from fraud.serving.labels import label_routes
from fraud.serving.lists import list_routes
from fraud.serving.openapi import document
from fraud.serving.parameters import idempotency_key
from fraud.serving.profiles import profile_routes
from fraud.serving.routes import Router
from fraud.serving.rules import rule_routes
from fraud.settings import Settings

if TYPE_CHECKING:
    from fraud.serving.worker import Worker


class FrontedService(bentoml.Service):  # type: ignore[misc]
    """A Bento service whose front door answers before BentoML's middlewares run.

    `bentoml.service(service_class=...)` makes it; the class it decorates has `settings` and a `worker`.
    """

    def to_asgi(self, is_main: bool = True) -> ASGIApp:
        worker: Worker = self.inner.worker()
        app, settings = super().to_asgi(is_main=is_main), self.inner.settings
        contracts = contracts_of(worker.engine, settings)
        routes = [*service_routes(worker.engine, settings, contracts), *api_pages(), *bento_routes(app)]
        version = str(self.bento.tag.version) if self.bento is not None else "from source"
        routes.append(document_route(routes, self.name, self.inner.__doc__, version, settings.http.root_path))
        limits = HttpLimits(settings.http.max_body_bytes, settings.http.body_timeout_s)
        router = Router(routes, closed=closed_by(contracts), root_path=settings.http.root_path)
        return for_browsers(FrontDoor(router, app, limits, worker.checks, worker.observers), settings)


def service_routes(engine: Engine, settings: Settings, contracts: Sequence[ContractModel]) -> list[Route]:
    """Return the service's own routes and those of its contracts, independent of BentoML."""
    return [
        *scoring_routes(engine, contracts, settings),
        *label_routes(lambda: engine.pipeline, round(settings.scoring.max_clock_ahead_s * 1000)),
        *profile_routes(lambda: engine.pipeline.store),
        *decision_routes(lambda: engine.pipeline.store),
        *list_routes(lambda: engine.lists),
        *case_routes(lambda: engine.cases),
        *rule_routes(RuleSets(settings.models.bentoml_home, settings.models.alias_order)),
        *admin_routes(engine, contracts),
        *[route for contract in contracts for route in contract_routes(contract, settings)],
    ]


def declared(settings: Settings) -> Router:
    """Return a router of all routes but BentoML's pages, which finds them and answers none.

    Raises
    ------
    SettingsError
        A contract cannot be answered, or a path begins with the root path.
    """
    engine = Engine()
    contracts = contracts_of(engine, settings)
    routes = [*service_routes(engine, settings, contracts), *api_pages()]
    return Router(routes, closed=closed_by(contracts), root_path=settings.http.root_path)


def readiness_of(engine: Engine, contracts: Sequence[ContractModel]) -> dict[str, object]:
    """Return what is served, and what each contract scores with; raises `NotReady` if no model is loaded."""
    return {**engine.readiness(), "contracts": [msgspec.to_builtins(contract.status()) for contract in contracts]}


def scoring_routes(
    engine: Engine, contracts: Sequence[ContractModel] = (), settings: Settings | None = None
) -> list[Route]:
    """`/predict` and `/explain`, and `/readyz` with its detail."""
    others = other_bodies(contracts, settings) if settings is not None else {}

    async def answer(call: Call, body: bytes, *, explain: bool) -> Answer:
        key = idempotency_key(call)
        return Answer(
            await scoring.answer(engine, body, explain=explain, request_id=call.request_id, transaction_id=key)
        )

    async def predict(call: Call) -> Answer:
        body = await call.json_body()
        try:
            return await answer(call, body, explain=False)
        except scoring.WithoutInstances as error:
            return await other_of(others, body, error).handler(call, body)

    async def explain(call: Call) -> Answer:
        return await answer(call, await call.json_body(), explain=True)

    async def readyz(_: Call) -> Answer:
        engine.expect_ready()
        return Answer(orjson.dumps(readiness_of(engine, contracts)))

    fails = {
        404: "The model named is not served here.",
        409: "Every transaction was scored before with other contents.",
    }
    return [
        Route(
            "POST",
            "/predict",
            "score",
            predict,
            "Score transactions: probability, risk level and decision of each.",
            request=(ScoreBody, *(other.request for other in others.values())),
            answer=(PredictAnswer, *(other.answer for other in others.values())),
            fails=fails,
            tag="Scoring",
        ),
        Route(
            "POST",
            "/explain",
            "score",
            explain,
            "Score transactions and say why: every feature's contribution, and the strongest in words.",
            request=ScoreBody,
            answer=ExplainAnswer,
            fails=fails,
            tag="Scoring",
        ),
        Route(
            "GET",
            "/readyz",
            None,
            readyz,
            "Ready once the model is loaded, verified and warm.",
            answer=Readiness,
            tag="Infrastructure",
        ),
    ]


def admin_routes(engine: Engine, contracts: Sequence[ContractModel]) -> list[Route]:
    """The routes for operators."""

    async def show(_: Call) -> Answer:
        return Answer(orjson.dumps(readiness_of(engine, contracts)))

    async def refresh(_: Call) -> Answer:
        looked = await engine.refresh()
        return Answer(orjson.dumps({**looked, **readiness_of(engine, contracts)}))

    return [
        Route(
            "GET",
            "/admin/models",
            "admin",
            show,
            "What this worker serves, and what it should serve and cannot.",
            answer=Readiness,
            tag="Administration",
        ),
        Route(
            "POST",
            "/admin/models/refresh",
            "admin",
            refresh,
            "Look for other versions at once, on W&B too, in the worker that answers.",
            answer=Readiness,
            tag="Administration",
        ),
    ]


def document_route(routes: list[Route], title: str, description: str, version: str, root_path: str = "") -> Route:
    """Return the route of the OpenAPI document; the document is made on first use."""

    @cache
    def encoded() -> bytes:
        return orjson.dumps(document(routes, title, description, version, root_path))

    async def show(_: Call) -> Answer:
        return Answer(encoded())

    return Route("GET", "/docs.json", "read", show, "This document.", tag="Infrastructure")


def for_browsers(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Wrap an application with CORS, compression and proxy headers, as far as the settings enable them."""
    if settings.http.gzip_min_bytes:
        app = compressed(app, settings.http.gzip_min_bytes)
    origins = [origin.strip() for origin in settings.http.cors_origins.split(",") if origin.strip()]
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "x-api-key", "x-request-id"],
            expose_headers=["x-fraud-decision", "x-request-id", "retry-after"],
        )
    if settings.http.trusted_proxies:
        app = ProxyHeadersMiddleware(app, trusted_hosts=settings.http.trusted_proxies)  # type: ignore[assignment, arg-type]
    return app


def compressed(app: ASGIApp, minimum_bytes: int) -> ASGIApp:
    """Compress the answers of an application for callers that accept gzip; Starlette's middleware ignores ``q=0``."""
    compressing: ASGIApp = GZipMiddleware(app, minimum_size=minimum_bytes, compresslevel=5)

    async def answer(scope: Connection, receive: Receive, send: Send) -> None:
        takes = scope["type"] == "http" and takes_gzip(Headers(scope=scope).get("accept-encoding", ""))
        await (compressing if takes else app)(scope, receive, send)

    return answer
