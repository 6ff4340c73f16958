"""Limits on a connection before its request is parsed: header time, bytes and lines, and idle connections.

BentoML hands no option for these to uvicorn, and starts it itself. uvicorn finds its HTTP protocol by name in a table;
`install` puts `BoundedProtocol` there, under the name that it uses by default, and refuses a uvicorn that has no such
table or whose protocol lacks a method that is overridden here.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fraud.errors import FraudError, HeadersTooLarge, HeaderTimeout, MalformedHttp, SettingsError
from fraud.serving.http import error_answer, request_id
from fraud.settings import HttpSettings

MAX_HEADERS = 128
"""Headers of one request."""
DEFAULT_PROTOCOL = "auto"
OVERRIDDEN = (
    "__init__",
    "connection_made",
    "connection_lost",
    "data_received",
    "on_message_begin",
    "on_headers_complete",
    "on_response_complete",
    "send_400_response",
)
"""What is overridden of uvicorn's protocol."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a connection while its headers arrive, and between two requests."""

    header_timeout_s: float = 10.0
    """Seconds from the connection, or from a request's first byte, to the end of its headers."""
    max_header_bytes: int = 32_768
    max_connections: int = 4096
    """In each worker; beyond it the one that has been idle longest, or has waited longest for headers, gives way."""
    keep_alive_s: float = 75.0
    """Seconds for which a connection is kept after an answer without a further request."""

    @classmethod
    def of(cls, settings: HttpSettings) -> ConnectionLimits:
        return cls(
            settings.header_timeout_s, settings.max_header_bytes, settings.max_connections, settings.keep_alive_s
        )


def install(limits: ConnectionLimits) -> None:
    """Apply limits to the servers that this process starts, and raise its limit of open files.

    Raises
    ------
    SettingsError
        This version of uvicorn does not support the limits.
    """
    lacking = [name for name in OVERRIDDEN if name not in vars(HttpToolsProtocol)]
    if DEFAULT_PROTOCOL not in HTTP_PROTOCOLS or lacking:
        raise SettingsError(
            f"uvicorn {uvicorn.__version__} cannot be held to limits of connections: its table of protocols has no "
            f"{DEFAULT_PROTOCOL!r}, or its protocol has no {', '.join(lacking) or 'such name'}; install the version "
            "that requirements/serve.txt names"
        )
    BoundedProtocol.limits = limits
    HTTP_PROTOCOLS[DEFAULT_PROTOCOL] = f"{__name__}:{BoundedProtocol.__name__}"
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits on waiting for headers."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    waiting: ClassVar[dict[BoundedProtocol, float]] = {}
    """Connections without complete headers and since when, by the loop's clock, the oldest first."""
    idle: ClassVar[dict[BoundedProtocol, None]] = {}
    """Connections between two requests, the one that has been idle longest first."""
    timer: ClassVar[asyncio.TimerHandle | None] = None
    head_bytes = 0
    has_begun = False
    """Whether a byte of the next request has arrived."""
    error: FraudError = MalformedHttp()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if isinstance(self.app, ProxyHeadersMiddleware):  # it trusts every caller on this machine
            self.app = self.app.app
        self.timeout_keep_alive = self.limits.keep_alive_s  # type: ignore[assignment]  # given to loop.call_later

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limits.max_connections:
            oldest = next(iter(self.idle or self.waiting))
            self.idle.pop(oldest, None)
            self.waiting.pop(oldest, None)
            oldest.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self.idle.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_bytes > self.limits.max_header_bytes and self in self.waiting:
            self.refuse(HeadersTooLarge(self.limits.max_header_bytes))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.idle.pop(self, None)
        if self not in self.waiting:
            self._wait()
        self.has_begun = True

    def on_headers_complete(self) -> None:
        self.waiting.pop(self, None)
        self.has_begun = False
        limit = self.limits.max_header_bytes
        if len(self.headers) > MAX_HEADERS:
            self.error = HeadersTooLarge(MAX_HEADERS, "lines")
            raise self.error  # the parser stops, and has a 400 sent
        if self.head_bytes > limit:
            n_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if n_bytes > limit:
                self.error = HeadersTooLarge(limit)
                raise self.error
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None and self not in self.waiting:
            self.idle[self] = None

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
            if protocol.has_begun:
                protocol.refuse(HeaderTimeout(cls.limits.header_timeout_s))
            else:  # opened ahead of need, as pools do: an unasked answer would be taken for that of the next request
                del cls.waiting[protocol]
                protocol.transport.close()
        cls.timer = loop.call_later(cls._step_s(), cls._sweep, loop) if cls.waiting else None
