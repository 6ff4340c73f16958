"""The HTTP types: a call, its answer, a route, and the shape of an error."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import msgspec
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from fraud.errors import (
    AccessError,
    BodyTimeout,
    FraudError,
    MethodNotAllowed,
    PayloadTooLarge,
    RequestError,
    Unavailable,
    UnsupportedEncoding,
    UnsupportedMediaType,
)
from fraud.serving.bodies import plain
from fraud.serving.contract import ErrorAnswer, Problem, RequestProblem
from fraud.serving.scopes import Scope

logger = logging.getLogger("fraud.serving.http")

Headers = tuple[tuple[bytes, bytes], ...]

JSON_TYPE = b"application/json"
JSON: Headers = ((b"content-type", JSON_TYPE),)
CLOSE: Headers = ((b"connection", b"close"),)


class Answer(NamedTuple):
    """A whole answer; `code` is its error code, for the metrics."""

    body: bytes
    status: int = 200
    headers: Headers = JSON
    code: str = ""


@dataclass(frozen=True)
class HttpLimits:
    """Limits of one request while its body is read."""

    max_body_bytes: int = 4 * 1024 * 1024
    """Bytes of a body; a longer one is refused with 413, without reading it to its end."""
    body_timeout_s: float = 10.0
    """Seconds from the headers to the last byte of the body, else 408; counted in steps of about a second."""


class Call:
    """One request: its route, its headers, its id and, on demand, its body.

    Attributes
    ----------
    names : mapping of str to str
        The path's values of the route's parameters, still percent-encoded; `fraud.serving.parameters` decodes them.
    """

    __slots__ = ("_bodies", "_receive", "headers", "names", "request_id", "route", "scope")

    def __init__(
        self,
        route: Route,
        names: Mapping[str, str],
        scope: Connection,
        receive: Receive,
        bodies: SlowBodies,
    ) -> None:
        self.route = route
        self.names = names
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.request_id = request_id(self.headers)
        self._receive = receive
        self._bodies = bodies

    async def json_body(self) -> bytes:
        """The whole body, of JSON; raises as `body` does."""
        return await self.body(JSON_TYPE)

    async def body(self, *media_types: bytes) -> bytes:
        """The whole body, of one of some media types; without a Content-Type it is taken for the first of them.

        Raises
        ------
        UnsupportedMediaType, PayloadTooLarge, BodyTimeout
            Raised before more of the body is read.
        UnsupportedEncoding, MalformedJson
            It has another compression than gzip, or is broken gzip.
        """
        limit = self._bodies.limits.max_body_bytes
        media_type = self.headers.get(b"content-type", media_types[0])
        if media_type not in media_types and media_type.split(b";")[0].strip().lower() not in media_types:
            raise UnsupportedMediaType(media_type.decode("latin-1")[:100])
        self.expect_length()
        with self._bodies:
            message = await self._receive()
            if message.get("more_body"):
                return await self._rest(message, limit)
        if message["type"] == "http.disconnect":
            raise CallerLeft
        body: bytes = message["body"]
        if len(body) > limit:
            raise PayloadTooLarge(limit)
        return plain(body, self.headers.get(b"content-encoding"), limit)

    def expect_length(self) -> None:
        """Raise `PayloadTooLarge` if Content-Length exceeds the limit."""
        limit = self._bodies.limits.max_body_bytes
        if int(self.headers.get(b"content-length", b"0")) > limit:
            raise PayloadTooLarge(limit)

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
        return plain(b"".join(parts), self.headers.get(b"content-encoding"), limit)


Handler = Callable[[Call], Awaitable[Answer | ASGIApp]]
"""Answers a call, or returns an ASGI application that does: a page, a stream, a file."""


class Failure(NamedTuple):
    """The public part of an error; `errors` has one problem a row when every row is bad."""

    problem: RequestProblem
    status: int
    headers: Headers = ()
    errors: list[Problem] | None = None


@dataclass(frozen=True)
class ErrorShape:
    """The error encoding of one contract: the encoder and the type of its body."""

    encode: Callable[[Failure], Answer]
    body: type[msgspec.Struct]


_encode = msgspec.json.Encoder().encode


def one_shape(failure: Failure) -> Answer:
    """Encode an error in the default shape: ``{"error": {...}}``."""
    return Answer(_encode(ErrorAnswer(failure.problem, failure.errors)), failure.status)


ONE_SHAPE = ErrorShape(one_shape, ErrorAnswer)


@dataclass(frozen=True, eq=False, slots=True)
class Route:
    """One declared route. Routing, the scope check, OpenAPI and the metrics' label are derived from it.

    Parameters
    ----------
    method, path : str
        A path may hold parameters, such as ``/v1/users/{id}/profile``; each matches one segment. HEAD is answered
        wherever GET is.
    scope : Scope or None
        The scope that a key needs; None for health routes, which need no key and have no rate limit.
    handler : callable
        ``async handler(call)``; raises a `FraudError` to refuse.
    summary : str
        One sentence for the OpenAPI document.
    request, answer : type or tuple of types, optional
        The msgspec types of the request and answer body, or several of which a body is one; without an `answer` the
        route is not JSON.
    parameters : type, optional
        A msgspec struct of the parameters in path and query.
    fails : mapping of int to str
        Further statuses beyond those derived from the declaration, and their meaning.
    errors : ErrorShape
        Encodes every error of the route, including those raised before its handler.
    tag : str, optional
        The heading in the OpenAPI document; without one the route is not in it.
    """

    method: str
    path: str
    scope: Scope | None
    handler: Handler
    summary: str
    request: object = None
    answer: object = None
    parameters: type[msgspec.Struct] | None = None
    fails: Mapping[int, str] = field(default_factory=dict)
    errors: ErrorShape = ONE_SHAPE
    tag: str | None = None


class CallerLeft(Exception):
    """The caller closed the connection before the body was complete."""


class SlowBodies:
    """Cancels the reading of bodies that take too long, with one timer for all of them.

    ``with slow_bodies:`` around the reading turns the cancellation into `BodyTimeout`.  One timer per request would
    cost five times as much, and a body almost always arrives together with its headers.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self._limit_s = limits.body_timeout_s
        self._since: dict[asyncio.Task[object], float] = {}
        self._overdue: set[asyncio.Task[object]] = set()
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


def error_answer(error: FraudError, request_id: str, shape: ErrorShape = ONE_SHAPE) -> Answer:
    """Answer with an error; internal messages are only logged."""
    status, code, message = error.http_status, error.code, error.message
    if not isinstance(error, RequestError | AccessError | Unavailable):
        if message != INTERNAL:
            logger.error("request %s failed: %s", request_id, message, exc_info=error)
        status, code, message = (503, "unavailable", INTERNAL) if status == 503 else (500, "internal", INTERNAL)
    headers: Headers = ()
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers += ((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))),)
    if isinstance(error, MethodNotAllowed):
        headers += ((b"allow", error.allowed.encode("ascii")),)
    if isinstance(error, UnsupportedEncoding):
        headers += ((b"accept-encoding", error.accepted.encode("ascii")),)
    if status in (408, 413, 415):  # the rest of the body will not be read
        headers += CLOSE
    problem = RequestProblem(code, encodable(message), error.path and encodable(error.path), request_id)
    answer = shape.encode(Failure(problem, status, headers, getattr(error, "errors", None)))
    return Answer(answer.body, answer.status, answer.headers + headers, code)


def encodable(text: str) -> str:
    """Return text that quotes a caller's JSON without its lone surrogates, which no answer can carry."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


async def respond(send: Send, answer: Answer, request_id: str) -> None:
    headers = [
        *answer.headers,
        (b"content-length", b"%d" % len(answer.body)),
        (b"x-request-id", request_id.encode("ascii")),
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
