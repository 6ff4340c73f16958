"""Logs: one JSON object a line, from the service, BentoML and uvicorn alike, with the request's id in it."""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson
import structlog

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that the running task answers; empty outside of one."""

REFUSED = (429, 503)
LOGGERS = ("bentoml", "uvicorn", "uvicorn.error", "circus")


def configure_logging(level: str = "INFO", style: Literal["json", "text"] = "json") -> None:
    """Write every log record of this process to standard error, in one form.

    Parameters
    ----------
    level : str
        For the project's own loggers; others write warnings only, BentoML also information.
    style : str
        ``json`` for machines, ``text`` for a person at a terminal.
    """
    render = _as_json if style == "json" else _as_text
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_stamp, structlog.stdlib.add_log_level, structlog.stdlib.add_logger_name, _add_context],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                lambda *event: render(*event).decode(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in LOGGERS:
        other = logging.getLogger(name)
        other.handlers, other.propagate = [], True
    logging.getLogger("uvicorn.access").propagate = False  # without a handler, it does not format a line per request
    logging.getLogger("bentoml").setLevel(logging.INFO)
    logging.getLogger("fraud").setLevel(level)


class RequestLog:
    """One line for each request, or for each that failed; an observer of the front door.

    Parameters
    ----------
    which : str
        ``all`` or ``failed``. Requests refused under overload or by a rate limit are not logged as failed: their lines
        would cost processor time when it is scarce, and the metrics count them.
    style : str
        As for `configure_logging`.
    """

    def __init__(self, which: Literal["all", "failed"], style: Literal["json", "text"] = "json") -> None:
        self._all = which == "all"
        self._log = structlog.wrap_logger(
            structlog.BytesLogger(sys.stderr.buffer),
            processors=[_stamp, _as_json if style == "json" else _as_text],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            cache_logger_on_first_use=True,
        ).bind(pid=os.getpid())

    def __call__(self, call: Any, answer: Any, seconds: float) -> None:
        """Log method, path, status and duration; never bodies or keys."""
        if not self._all and (answer.status < 400 or answer.status in REFUSED):
            return
        self._log.info(
            "request",
            request_id=call.request_id,
            method=call.scope["method"],
            path=call.route.path,
            status=answer.status,
            milliseconds=round(seconds * 1000, 3),
            bytes=len(answer.body),
            key=call.scope.get("fraud.key_id"),
        )


def _stamp(_logger: Any, method: str, event: Any) -> Any:
    event["level"] = method
    event["timestamp"] = datetime.now(UTC)
    return event


def _as_json(_logger: Any, _method: str, event: Any) -> bytes:
    return orjson.dumps(event, default=repr, option=orjson.OPT_UTC_Z)


def _as_text(_logger: Any, _method: str, event: Any) -> bytes:
    """Return a record as one line that begins with its time, and a traceback as indented lines below it.

    A caller's text cannot start a new line: control characters are escaped as in JSON.
    """
    name, error = event.pop("event"), event.pop("exception", "")
    stamp = event.pop("timestamp").isoformat(timespec="milliseconds")
    fields = " ".join(f"{key}={value}" for key, value in event.items() if value is not None)
    lines = [f"{stamp} {name} {fields}", *(f"    {line}" for line in error.splitlines())]
    return "\n".join(line.translate(_SHOWN) for line in lines).encode(errors="backslashreplace")


_SHOWN = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}


def _add_context(_logger: Any, _method: str, event: Any) -> Any:
    event["pid"] = os.getpid()
    if current := request_id.get():
        event["request_id"] = current
    return event
