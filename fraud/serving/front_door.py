"""The front door: the ASGI application that takes every request to its route.

It runs outside BentoML's middlewares, whose spans, timers and metrics cost more than a score (see docs/performance.md),
and replaces them for its routes: limits, request ids, one shape of errors. Request checks (keys, rates) run before a
body is read; observers (metrics, logs) see every answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from fraud.errors import FraudError
from fraud.serving.http import INTERNAL, Answer, Call, CallerLeft, HttpLimits, SlowBodies, error_answer, respond
from fraud.serving.routes import Router

logger = logging.getLogger("fraud.serving.http")

RequestCheck = Callable[[Call], None]
Observer = Callable[[Call, Answer, float], None]


class FrontDoor:
    """Answers the requests of a router's routes; all other paths are closed.

    Parameters
    ----------
    router : Router
    lifespan : ASGI application
        Receives only the start and stop events.
    checks : sequence of callable
        Each is called with every request before its body is read, and refuses it by raising a `FraudError`.
    observers : sequence of callable
        Each is called with a request, its answer and the seconds it took, when the answer goes out. For a mounted
        application the answer holds a status and no body.
    """

    def __init__(
        self,
        router: Router,
        lifespan: ASGIApp,
        limits: HttpLimits | None = None,
        checks: Sequence[RequestCheck] = (),
        observers: Sequence[Observer] = (),
    ) -> None:
        self._find = router.find
        self._lifespan = lifespan
        self._bodies = SlowBodies(limits or HttpLimits())
        self._checks = checks
        self._observers = observers

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008, "reason": "there is no WebSocket here"})
        started = time.perf_counter()
        route, names = self._find(scope)
        call = Call(route, names, scope, receive, self._bodies)
        try:
            answer = await self._answer(call)
            if not isinstance(answer, Answer):
                passed = _Passed(send, call.request_id)
                answer = await self._let_answer(answer, call, receive, passed)
                if passed.status:  # it has gone out
                    send, answer = _nowhere, Answer(b"", passed.status)
        except CallerLeft:
            return None
        for observe in self._observers:
            observe(call, answer, time.perf_counter() - started)
        return await respond(send, answer, call.request_id)

    async def _answer(self, call: Call) -> Answer | ASGIApp:
        """Return the route's answer, or the error of a check or of the route in the route's error shape."""
        try:
            for check in self._checks:
                check(call)
            return await call.route.handler(call)
        except FraudError as error:
            return error_answer(error, call.request_id, call.route.errors)
        except CallerLeft:
            raise
        except Exception:
            logger.exception("request %s failed", call.request_id)
            return error_answer(FraudError(INTERNAL), call.request_id, call.route.errors)

    async def _let_answer(self, app: ASGIApp, call: Call, receive: Receive, send: _Passed) -> Answer:
        """Let a mounted application answer; the returned answer is sent only if the application has sent nothing."""
        error = FraudError(INTERNAL)
        try:
            await app(call.scope, receive, send)
        except Exception as raised:
            if send.status:  # the server closes the connection, so that the caller sees that the answer is incomplete
                raise
            if isinstance(raised, FraudError):
                error = raised
            else:
                logger.exception("request %s failed", call.request_id)
        return error_answer(error, call.request_id, call.route.errors)


async def _nowhere(_: Message) -> None:
    """Send nothing: the answer was already sent."""


class _Passed:
    """The `send` of a mounted application: passes its answer on with the request's id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 0
        self._send = send
        self._request_id = request_id

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ())]
            if all(name.lower() != b"x-request-id" for name, _ in headers):
                headers.append((b"x-request-id", self._request_id.encode("ascii")))
            message["headers"] = headers
        await self._send(message)
