"""Sends a stream of requests at their intended times and checks every answer."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any

import gevent
import msgspec
from gevent.pool import Pool
from geventhttpclient import HTTPClient

from load_tests.measure import Recorder
from load_tests.traffic import Request, Traffic

TRANSPORT_ERRORS = (OSError, HTTPException)
CLOCK_MONOTONIC = 1
ABSOLUTE = 1


class Model(msgspec.Struct):
    name: str
    digest: str


class Scored(msgspec.Struct):
    transaction_id: str
    fraud_probability: float
    decision: str
    model: Model
    degraded: list[str]


class Answer(msgspec.Struct):
    predictions: list[Scored]


class Problem(msgspec.Struct):
    code: str
    message: str
    request_id: str


class Refusal(msgspec.Struct):
    error: Problem


_answers = msgspec.json.Decoder(Answer)
_refusals = msgspec.json.Decoder(Refusal)


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


class _Timer(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("first", _Timespec))


class Alarm:
    """Sleeps until a time of `time.perf_counter`, to some 10 µs.

    gevent's own sleep is rounded up to whole milliseconds by epoll, as much as a score takes; a timer of the kernel
    is not. Where there is none (other systems than Linux), gevent's sleep has to do.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK) if os.uname().sysname == "Linux" else -1
        if self._fd >= 0:
            self._io = gevent.get_hub().loop.io(self._fd, 1)

    def wait_until(self, due: float) -> None:
        if due <= time.perf_counter():
            return
        if self._fd < 0:
            gevent.sleep(due - time.perf_counter())
            return
        s, ns = divmod(int(due * 1e9), 1_000_000_000)
        timer = _Timer(_Timespec(0, 0), _Timespec(s, ns))
        if self._libc.timerfd_settime(self._fd, ABSOLUTE, ctypes.byref(timer), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")
        gevent.get_hub().wait(self._io)
        os.read(self._fd, 8)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class Sender:
    """An open loop: requests leave when they are due, whether or not earlier ones are answered.

    Parameters
    ----------
    host : str
        Base URL of the service.
    traffic : Traffic
    recorder : Recorder
    report : callable
        Called with (path, latency in ms, length of the answer, error or None) of every request.
    connections : int
        The most requests under way; waiting for a free connection counts as latency.
    timeout_s : float
        After which a request has failed.
    """

    def __init__(
        self,
        host: str,
        traffic: Traffic,
        recorder: Recorder,
        report: Callable[[str, float, int, Exception | None], None],
        *,
        api_key: str = "",
        connections: int = 256,
        timeout_s: float = 10.0,
    ) -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._client = HTTPClient.from_url(
            host, headers=headers, concurrency=connections, connection_timeout=timeout_s, network_timeout=timeout_s
        )
        self._traffic, self._recorder, self._report = traffic, recorder, report
        self._pool = Pool(connections)
        self._timeout_s = timeout_s
        self._first: dict[tuple[str, ...], list[tuple[float, str]]] = {}

    def run(self, arrivals: Iterator[float], started: float) -> None:
        """Send at every arrival, s after `started` (`time.perf_counter`), and wait for the last answer."""
        alarm = Alarm()
        wall = time.time() - time.perf_counter()
        try:
            for at in arrivals:
                due = started + at
                alarm.wait_until(due)
                self._pool.spawn(self._send, self._traffic.next(wall + due), at, due)
            self._pool.join()
        finally:
            alarm.close()

    def stop(self) -> None:
        """Wait for the requests under way, after a run that ended early."""
        self._pool.join(timeout=self._timeout_s)
        self._pool.kill()
        self._client.close()

    def _send(self, request: Request, at: float, due: float) -> None:
        self._recorder.sent(at, time.perf_counter() - due, request.kind)
        size, status, body = 0, 0, b""
        try:
            response = self._client.post(request.path, request.body)
            body = bytes(response.read())
            status, size = response.status_code, len(body)
            outcome, said = self._check(request, status, body)
        except TRANSPORT_ERRORS as error:
            outcome, said = "failed", f"{request.path}: {error!r}"
        latency = time.perf_counter() - due
        self._recorder.answered(at, latency, outcome, said)
        self._report(request.path, latency * 1e3, size, AnswerError(said) if said else None)

    def _check(self, request: Request, status: int, body: bytes) -> tuple[str, str]:
        """The outcome of an answer, and its fault."""
        try:
            if status != request.expected_status or status >= 400:
                said = _refusals.decode(body).error
                if status == request.expected_status:
                    return "refused", ""
                return "shed" if status in (
                    429,
                    503,
                ) else "wrong", f"{request.kind}: {status} {said.code}: {said.message[:200]}"
            scored = _answers.decode(body).predictions
        except msgspec.DecodeError as error:
            return "wrong", f"{request.kind}: {status} with a body that is not of the contract: {error}"
        ids = tuple(row.transaction_id for row in scored)
        if ids != request.transaction_ids:
            return "wrong", f"{request.kind}: asked for {request.transaction_ids[:3]}, answered for {ids[:3]}"
        for row in scored:
            self._recorder.versions[f"{row.model.name} {row.model.digest}"] += 1
            self._recorder.degraded += bool(row.degraded)
        if len({row.model.digest for row in scored}) > 1:
            return "wrong", f"{request.kind}: one answer by several versions"
        if request.comes_again:
            decided = [(row.fraud_probability, row.decision) for row in scored]
            first = self._first.pop(ids, None)
            if first is None:
                self._first[ids] = decided
            elif first != decided:
                return "wrong", f"{request.kind}: first {first[:3]}, then {decided[:3]}"
        return "ok", ""


class AnswerError(Exception):
    """Why a request counts as failed."""


def unreachable(host: str, timeout_s: float = 5.0) -> str:
    """Why no server answers at a base URL; empty when one answers with any status."""
    try:
        client = HTTPClient.from_url(host, connection_timeout=timeout_s, network_timeout=timeout_s)
        client.get("/").read()
    except (*TRANSPORT_ERRORS, ValueError) as error:
        return str(error) or repr(error)
    client.close()
    return ""


def read_memory(host: str, api_key: str, names: tuple[str, ...], timeout_s: float = 5.0) -> float | None:
    """The service's resident memory, bytes over all its processes: the first of some metrics; None if it has none."""
    headers: dict[str, Any] = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = HTTPClient.from_url(host, headers=headers, connection_timeout=timeout_s, network_timeout=timeout_s)
    try:
        response = client.get("/metrics")
        lines = bytes(response.read()).decode().splitlines() if response.status_code == 200 else []
    except TRANSPORT_ERRORS:
        return None
    finally:
        client.close()
    for name in names:
        found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + " ", name + "{"))]
        if found:
            return sum(found)
    return None
