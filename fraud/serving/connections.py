"""Limits on a connection before its request is understood: time and bytes of the headers, and their number.

uvicorn waits for headers as long as they take, and BentoML hands no option for it through; but uvicorn finds
its protocols by name, and `install` puts this one, which differs in nothing else, under the name it uses.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fraud.errors import FraudError, HeadersTooLarge, HeaderTimeout, MalformedHttp
from fraud.serving.http import error_answer, request_id


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may ask for before its headers are complete."""

    header_timeout_s: float = 10.0
    """Seconds from the connection, or from a request's first byte, to the end of its headers."""
    max_header_bytes: int = 32_768
    max_connections: int = 4096
    """In each worker; beyond it the one that has waited longest for headers gives way."""


def install(limits: ConnectionLimits) -> None:
    """Let the servers that this process starts from now on keep to limits, and open as many files as it may."""
    BoundedProtocol.limits = limits
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, whose connections do not wait for headers for ever."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    waiting: ClassVar[dict[BoundedProtocol, float]] = {}
    """Connections without complete headers and since when, by the loop's clock, the oldest first."""
    timer: ClassVar[asyncio.TimerHandle | None] = None
    head_bytes = 0
    error: FraudError = MalformedHttp()

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.max_connections:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_bytes > self.limits.max_header_bytes and self in self.waiting:
            self.refuse(HeadersTooLarge(self.limits.max_header_bytes))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self not in self.waiting:
            self._wait()

    def on_headers_complete(self) -> None:
        self.waiting.pop(self, None)
        limit = self.limits.max_header_bytes
        if self.head_bytes > limit and sum(len(name) + len(value) for name, value in self.headers) > limit:
            self.error = HeadersTooLarge(limit)
            raise self.error  # the parser stops, and has a 400 sent
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self.refuse(self.error)

    def refuse(self, error: FraudError) -> None:
        """Answer in the one error shape and close."""
        self.waiting.pop(self, None)
        identity = request_id({})
        answer = error_answer(error, identity)
        phrase = HTTPStatus(answer.status).phrase.encode()
        head = [b"HTTP/1.1 %d %s" % (answer.status, phrase), b"connection: close"]
        head += [name + b": " + value for name, value in answer.headers if name != b"connection"]
        head += [b"content-length: %d" % len(answer.body), b"x-request-id: " + identity.encode()]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + answer.body)
        self.transport.close()

    def _wait(self) -> None:
        self.head_bytes = 0
        self.waiting[self] = self.loop.time()
        if self.timer is None:
            type(self).timer = self.loop.call_later(self._step_s(), self._sweep, self.loop)

    @classmethod
    def _step_s(cls) -> float:
        return min(1.0, cls.limits.header_timeout_s)

    @classmethod
    def _sweep(cls, loop: asyncio.AbstractEventLoop) -> None:
        latest = loop.time() - cls.limits.header_timeout_s
        while cls.waiting:
            protocol, since = next(iter(cls.waiting.items()))
            if since > latest:
                break
            protocol.refuse(HeaderTimeout(cls.limits.header_timeout_s))
        cls.timer = loop.call_later(cls._step_s(), cls._sweep, loop) if cls.waiting else None
