"""The front door: an ASGI application that answers the project's own routes and passes the rest on.

It stands outside the middlewares of BentoML, whose spans, timers and metrics cost more than a score (see
docs/performance.md), and does for its routes what they would: limits, request ids, one error shape.
Guards (keys, rates) run before a body is read; observers (metrics, logs) see every answer of a route.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Any, NamedTuple

import orjson

from fraud.errors import (
    AccessError,
    BodyTimeout,
    FraudError,
    MethodNotAllowed,
    PayloadTooLarge,
    RequestError,
    Unavailable,
    UnsupportedMediaType,
)

logger = logging.getLogger("fraud.serving.http")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
Headers = tuple[tuple[bytes, bytes], ...]

OTHER = "other"
"""The route of every path that is not answered here."""
JSON: Headers = ((b"content-type", b"application/json"),)
CLOSE: Headers = ((b"connection", b"close"),)


class Answer(NamedTuple):
    body: bytes
    status: int = 200
    headers: Headers = JSON


@dataclass(frozen=True)
class HttpLimits:
    """What one request may ask of the service before it is understood."""

    max_body_bytes: int = 4 * 1024 * 1024
    """Bytes of a body; a longer one is refused with 413, without reading it to its end."""
    body_timeout_s: float = 10.0
    """Seconds from the headers to the last byte of the body, else 408; counted in steps of about a second."""


class Call:
    """One request of a route: its headers, its id and, on demand, its body."""

    __slots__ = ("_door", "_receive", "headers", "request_id", "scope")

    def __init__(self, door: FrontDoor, scope: MutableMapping[str, Any], receive: Receive) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.headers)
        self._door = door
        self._receive = receive

    async def json_body(self) -> bytes:
        """The whole body.

        Raises
        ------
        UnsupportedMediaType, PayloadTooLarge, BodyTimeout
            Each before the body is read any further.
        """
        limit = self._door.limits.max_body_bytes
        media_type = self.headers.get(b"content-type", b"application/json")
        if media_type != b"application/json" and media_type.split(b";")[0].strip().lower() != b"application/json":
            raise UnsupportedMediaType(media_type.decode("latin-1")[:100])
        if int(self.headers.get(b"content-length", b"0")) > limit:
            raise PayloadTooLarge(limit)
        with self._door.slow_bodies:
            message = await self._receive()
            if message.get("more_body"):
                return await self._rest(message, limit)
        if message["type"] == "http.disconnect":
            raise CallerLeft
        body: bytes = message["body"]
        if len(body) > limit:
            raise PayloadTooLarge(limit)
        return body

    async def _rest(self, message: Message, limit: int) -> bytes:
        parts = [message["body"]]
        size = len(parts[0])
        while message.get("more_body"):
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise CallerLeft
            parts.append(message["body"])
            size += len(parts[-1])
            if size > limit:
                raise PayloadTooLarge(limit)
        return b"".join(parts)


Handler = Callable[[Call], Awaitable[Answer]]
Routes = Mapping[str, Mapping[str, Handler]]
Guard = Callable[[Call], None]
Observer = Callable[[Call, Answer, float], None]


class FrontDoor:
    """Answer `routes` (path, then method, to handler); give everything else to `app`.

    Parameters
    ----------
    guards : sequence of callable
        Each is called with every request, those for `app` included, before its body is read, and refuses it by
        raising a `FraudError`. The sequence may be filled until the first request.
    observers : sequence of callable
        Each is called with a request, its answer and the seconds it took, when an answer given here goes out;
        ``scope["fraud.route"]`` says of which route, one of as many as there are.
    around : mapping of (str, str), optional
        Routes whose path names something in its middle, by what stands before and after the name.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Routes,
        limits: HttpLimits | None = None,
        guards: Sequence[Guard] = (),
        observers: Sequence[Observer] = (),
        around: Mapping[tuple[str, str], Mapping[str, Handler]] | None = None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.slow_bodies = SlowBodies(self.limits.body_timeout_s)
        self._app = app
        self._routes = routes
        self._around = around or {}
        self._guards = guards
        self._observers = observers

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        call = Call(self, scope, receive)
        scope["fraud.route"], methods = self._route_of(scope["path"])
        try:
            answer = await self._answer(call, methods)
        except CallerLeft:
            return None
        if answer is None:
            return await self._app(scope, receive, _OneErrorShape(call, send))
        for observe in self._observers:
            observe(call, answer, time.perf_counter() - started)
        return await respond(send, answer, call.request_id)

    def _route_of(self, path: str) -> tuple[str, Mapping[str, Handler] | None]:
        """Return a path's route and its handlers; what the path names in its middle is not in the route."""
        methods = self._routes.get(path)
        if methods is not None:
            return path, methods
        for (begin, end), methods in self._around.items():
            if path.startswith(begin) and path.endswith(end):
                return f"{begin}{{id}}{end}", methods
        return OTHER, None

    async def _answer(self, call: Call, methods: Mapping[str, Handler] | None) -> Answer | None:
        """The answer of a route or the refusal of a guard; None when `app` is to answer."""
        try:
            for guard in self._guards:
                guard(call)
            if methods is None:
                return None
            handler = methods.get(call.scope["method"])
            if handler is None:
                raise MethodNotAllowed(call.scope["method"], ", ".join(methods))
            return await handler(call)
        except FraudError as error:
            return error_answer(error, call.request_id)
        except CallerLeft:
            raise
        except Exception:
            logger.exception("request %s failed", call.request_id)
            return error_answer(FraudError(INTERNAL), call.request_id)


class CallerLeft(Exception):
    """The caller closed the connection before the body was complete."""


class SlowBodies:
    """Cancels the reading of bodies that take too long, with one timer for all of them.

    ``with slow_bodies:`` around the reading turns the cancellation into `BodyTimeout`.  A timer of its own for each
    request costs five times as much as this, and a body almost always arrives together with its headers.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since: dict[asyncio.Task[Any], float] = {}
        self._overdue: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._since[task] = loop.time()
        if self._timer is None:
            self._timer = loop.call_later(min(1.0, self._limit_s), self._sweep, loop)

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._since.pop(task, None)
        if task in self._overdue:
            self._overdue.discard(task)
            if exception_type is asyncio.CancelledError and task.uncancel() == 0:
                raise BodyTimeout(self._limit_s)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        latest = loop.time() - self._limit_s
        for task in [task for task, since in self._since.items() if since <= latest]:
            del self._since[task]
            self._overdue.add(task)
            task.cancel()
        if self._since:
            self._timer = loop.call_later(min(1.0, self._limit_s), self._sweep, loop)


INTERNAL = "the service failed on this request; its operator finds the cause in the log under this request id"
_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch
_boot = os.urandom(8).hex()
_calls = count(1)


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The caller's X-Request-ID where it is short and plain, else a new one, unique over workers and restarts."""
    given = headers.get(b"x-request-id")
    if given is not None and _SAFE_REQUEST_ID(given):
        return given.decode("ascii")
    return f"{_boot}-{next(_calls):x}"


def error_answer(error: FraudError, request_id: str) -> Answer:
    """The one shape of an error; the message of one that is not the caller's business stays in the log."""
    status, code, message = error.http_status, error.code, error.message
    if not isinstance(error, RequestError | AccessError | Unavailable):
        if message != INTERNAL:
            logger.error("request %s failed: %s", request_id, message, exc_info=error)
        status, code, message = (503, "unavailable", INTERNAL) if status == 503 else (500, "internal", INTERNAL)
    body: dict[str, Any] = {"error": {"code": code, "message": message, "path": error.path, "request_id": request_id}}
    errors = getattr(error, "errors", None)
    if errors is not None:  # one of each row
        body["errors"] = errors
    headers = JSON
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers += ((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))),)
    if isinstance(error, MethodNotAllowed):
        headers += ((b"allow", error.allowed.encode("ascii")),)
    if status in (408, 413, 415):  # the rest of the body will not be read
        headers += CLOSE
    return Answer(orjson.dumps(body), status, headers)


async def respond(send: Send, answer: Answer, request_id: str) -> None:
    headers = [
        *answer.headers,
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", request_id.encode("ascii")),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class _OneErrorShape:
    """A `send` that gives the errors of the application behind the front door the shape of ours."""

    def __init__(self, call: Call, send: Send) -> None:
        self._path = call.scope["path"]
        self._request_id = call.request_id
        self._send = send
        self._error_status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._error_status = message["status"]
                return
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self._request_id.encode("ascii")),
            ]
        elif self._error_status:
            if not message.get("more_body"):
                await respond(self._send, self._reshaped(), self._request_id)
            return
        await self._send(message)

    def _reshaped(self) -> Answer:
        status = HTTPStatus(self._error_status)
        error = {
            "code": "internal" if status == 500 else status.name.lower(),
            "message": INTERNAL if status >= 500 else f"{status.phrase.lower()}: {self._path[:200]}",
            "path": None,
            "request_id": self._request_id,
        }
        return Answer(orjson.dumps({"error": error}), status.value)
