"""The pages served by BentoML, declared as routes; all other BentoML paths are closed."""

from __future__ import annotations

from collections.abc import MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Send

from fraud.errors import FraudError, RequestError
from fraud.serving.http import INTERNAL, Call, Route

OWN_SOURCES = (
    b"content-security-policy",
    b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
)
"""BentoML's page would load Google Tag Manager; with this header a browser asks nobody but the service."""


def bento_routes(app: Starlette) -> list[Route]:
    """Return the routes of BentoML's application: health, metrics, the API's schema, and the page about it."""

    page = with_own_errors(app)

    async def show(_: Call) -> ASGIApp:
        return page

    health, pages = "Infrastructure", None
    return [
        Route("GET", "/livez", None, show, "The process is alive.", tag=health),
        Route("GET", "/healthz", None, show, "The process is alive, under another name.", tag=health),
        Route("GET", "/metrics", "read", show, "Metrics of all workers, for Prometheus.", tag=health),
        Route("GET", "/schema.json", "read", show, "The APIs, for BentoML's clients.", tag=pages),
        Route("GET", "/", "read", show, "The API's document as a page.", tag=pages),
        *[Route("GET", path, "read", show, "A part of that page.", tag=pages) for path in static_paths(app)],
    ]


def static_paths(app: Starlette) -> list[str]:
    """Return the path of every static file of the application."""
    return [
        f"{mount.path}/{file.name}"
        for mount in app.routes
        if isinstance(mount, Mount) and isinstance(mount.app, StaticFiles) and mount.app.directory is not None
        for file in sorted(Path(mount.app.directory).iterdir())
        if file.is_file()
    ]


def with_own_errors(app: ASGIApp) -> ASGIApp:
    """Return an application that raises the error answers of the given one."""

    async def answer(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        status = 0

        async def pass_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start" and message["status"] >= 400:
                status = message["status"]
            elif message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), OWN_SOURCES]
            if not status:
                await send(message)

        await app(scope, receive, pass_on)
        if status >= 500:
            raise FraudError(INTERNAL)
        if status:
            raise PageRefused(HTTPStatus(status), scope["path"])

    return answer


class PageRefused(RequestError):
    """BentoML's application answered a request with an error."""

    def __init__(self, status: HTTPStatus, path: str) -> None:
        super().__init__(f"{status.phrase.lower()}: {path[:200]}")
        self.http_status = status.value
        self.code = status.name.lower()
