"""How a stream process is doing, and the pages that say so: `/livez`, `/readyz` and `/metrics`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import msgspec
from prometheus_client import REGISTRY, make_wsgi_app

from fraud.stream_settings import StreamSettings

Phase = Literal["starting", "reading", "stopping"]
WAITS = ("broker", "store")
"""What a stream may have to wait for."""


@dataclass
class Progress:
    """What is known of a stream process; written by its threads, read by the pages.

    `waiting` has the reason by what is waited for. `moved_at` is when records were last committed, or none waited,
    in seconds of the monotonic clock.
    """

    phase: Phase = "starting"
    partitions: int = 0
    lag: int = 0
    in_hand: int = 0
    waiting: dict[str, str] = field(default_factory=dict)
    moved_at: float = field(default_factory=time.monotonic)

    def wait(self, what: str, reason: str) -> bool:
        """Note that something is waited for; returns whether that is new."""
        is_new = what not in self.waiting
        self.waiting[what] = reason
        return is_new

    def goes_on(self, what: str) -> bool:
        """Note that it is waited for no more; returns whether it was."""
        return self.waiting.pop(what, None) is not None

    def moved(self) -> None:
        self.moved_at = time.monotonic()


class StreamHealth(msgspec.Struct):
    """The answer of `/readyz` and `/livez`."""

    status: Literal["ready", "starting", "waiting", "behind", "stopping", "stalled"]
    partitions: int
    lag: int
    waiting: dict[str, str]
    committed_s_ago: float


def health_of(progress: Progress, stream: StreamSettings) -> StreamHealth:
    """Return how a process is doing: ``stalled`` is worst, ``behind`` still decides."""
    since = time.monotonic() - progress.moved_at
    status: Literal["ready", "starting", "waiting", "behind", "stopping", "stalled"] = "ready"
    if progress.phase == "stopping":
        status = "stopping"
    elif progress.waiting:
        status = "waiting"
    elif progress.phase == "starting":
        status = "starting"
    elif since > stream.stalled_after_s and (progress.lag or progress.in_hand):
        status = "stalled"
    elif progress.lag > stream.max_lag:
        status = "behind"
    return StreamHealth(status, progress.partitions, progress.lag, dict(progress.waiting), round(since, 3))


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Log no line for each request."""


class HealthPages:
    """The pages, answered in a thread of their own, so that a process that waits still says what for."""

    def __init__(self, progress: Progress, stream: StreamSettings) -> None:
        self._progress = progress
        self._stream = stream
        self._metrics = make_wsgi_app(REGISTRY)
        self._server: WSGIServer = make_server(stream.host, stream.port, self._answer, handler_class=_Quiet)
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="health", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            found: Iterable[bytes] = self._metrics(environ, start)
            return found
        health = health_of(self._progress, self._stream)
        good: Mapping[str, bool] = {
            "/livez": health.status != "stalled",
            "/readyz": health.status in ("ready", "behind"),
        }
        if path not in good:
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/livez, /readyz and /metrics are here\n"]
        status = HTTPStatus.OK if good[path] else HTTPStatus.SERVICE_UNAVAILABLE
        start(f"{status.value} {status.phrase}", [("Content-Type", "application/json")])
        return [msgspec.json.encode(health)]
