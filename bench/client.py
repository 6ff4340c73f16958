"""One HTTP load client for every server, closed and open loop, in a process of its own.

    echo '{"port": 3000, "path": "/predict", "bodies": ["…"], "connections": 32, "seconds": 3}' |
        python -m bench.client -

It writes requests that were serialised beforehand and reads no more of an answer than its status and length, on
one core; `python -m bench.client --ceiling` measures what it can drive at most, against a server that only echoes.
In the open loop a request has an intended time of its own (seeded exponential gaps) and its latency counts from it,
so that a server that stalls is charged for every request it kept waiting.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import uvloop

now = time.perf_counter
COUNTER = b"@@counter@@@"  # 12 bytes, replaced by a number that no other request has


@dataclass(frozen=True)
class Load:
    """What to send, how, for how long; `rate` 0 is a closed loop."""

    port: int
    path: str
    bodies: list[str]
    connections: int
    seconds: float
    rate: float = 0.0
    warmup_s: float = 0.5
    core: int | None = None
    seed: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Latencies in ms of the good answers; `rps` and `requests` count these alone.

    `refused` are the errors of status 429 or 503; `late` are requests of an open loop whose answer had not come when
    the drain was over.
    """

    rps: float
    requests: int
    sent: int
    errors: int
    refused: int
    refused_p99_ms: float
    late: int
    p50_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float


def serialised(load: Load) -> list[tuple[bytes, ...]]:
    """Whole requests; one with a counter in its body is split where the counter belongs."""
    requests = []
    for body in load.bodies:
        lines = [f"POST {load.path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in load.headers.items()]
        lines += [f"Content-Length: {len(body.encode())}", "", body]
        requests.append(tuple("\r\n".join(lines).encode().split(COUNTER)))
    return requests


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, answered: Callable[[Connection, bytes], None]) -> None:
        self._answered = answered
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._missing = 0
        self._chunked = False
        self._status = b""
        self.started = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]

    def send(self, request: bytes, started: float) -> None:
        assert self._transport is not None
        self.started = started
        self._transport.write(request)

    def connection_lost(self, error: Exception | None) -> None:
        if self.started:
            raise ConnectionError("the server closed a connection under way") from error

    def data_received(self, data: bytes) -> None:
        if not self._missing and not self._chunked:
            data = self._received + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._received = data
                return
            self._received = b""
            head = data[:end].lower()
            self._status = data[9:12]
            at = head.find(b"content-length: ")
            if at < 0:
                self._chunked = True
            else:
                stop = head.find(b"\r", at)
                self._missing = end + 4 + int(head[at + 16 : stop if stop > 0 else end])
        if self._chunked:
            self._received = (self._received + data)[-5:]
            if self._received != b"0\r\n\r\n":
                return
            self._received, self._chunked = b"", False
        else:
            self._missing -= len(data)
            if self._missing > 0:
                return
        self._answered(self, self._status)
        if self._missing < 0:
            raise ConnectionError("the server sent more than it declared")


class Driver:
    """Sends the requests of one load and keeps their latencies."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.requests = serialised(load)
        self.sent = 0
        self.first = int(time.time()) % 10**6 * 10**6  # no load repeats the numbers of another
        self.latencies: list[float] = []
        self.errors = 0
        self.refusals: list[float] = []
        self.counting_from = 0.0
        self.until = 0.0
        self.free: deque[Connection] = deque()
        self.waiting: deque[float] = deque()
        self.under_way = 0

    async def run(self) -> Measured:
        loop = asyncio.get_running_loop()
        address = ("127.0.0.1", self.load.port)
        connections = [
            (await loop.create_connection(lambda: Connection(self._answered), *address))[1]
            for _ in range(self.load.connections)
        ]
        gc.collect()
        gc.disable()
        start = now()
        self.counting_from = start + self.load.warmup_s
        self.until = self.counting_from + self.load.seconds
        if self.load.rate:
            await self._open_loop(connections, start)
        else:
            for connection in connections:
                self._send(connection, now())
            while self.under_way and now() < self.until + 10:
                await asyncio.sleep(0.01)
        return self._measured()

    async def _open_loop(self, connections: list[Connection], start: float) -> None:
        self.free.extend(connections)
        gaps = random.Random(self.load.seed)
        intended = start
        while intended < self.until:
            while now() < intended:  # timers count in milliseconds: on a core of its own, spinning is exact
                await asyncio.sleep(0)
            self.waiting.append(intended)
            self._send_waiting()
            intended += gaps.expovariate(self.load.rate)
        while (self.waiting or self.under_way) and now() < self.until + 2:
            await asyncio.sleep(0)

    def _send_waiting(self) -> None:
        while self.waiting and self.free:
            self._send(self.free.popleft(), self.waiting.popleft())

    def _send(self, connection: Connection, started: float) -> None:
        request = self.requests[self.sent % len(self.requests)]
        self.sent += 1
        self.under_way += 1
        connection.send(
            request[0] if len(request) == 1 else (b"%012d" % (self.first + self.sent)).join(request), started
        )

    def _answered(self, connection: Connection, status: bytes) -> None:
        done, started = now(), connection.started
        self.under_way -= 1
        connection.started = 0.0
        if started >= self.counting_from and (self.load.rate or done < self.until):
            if status == b"200":
                self.latencies.append(done - started)
            else:
                self.errors += 1
                if status in (b"429", b"503"):
                    self.refusals.append(done - started)
        if self.load.rate:
            self.free.append(connection)
            self._send_waiting()
        elif done < self.until:
            self._send(connection, done)

    def _measured(self) -> Measured:
        late = len(self.waiting) + self.under_way if self.load.rate else 0
        latencies = np.array(self.latencies + [now() - self.until] * late) * 1000
        if not len(latencies):
            raise ConnectionError("no request was answered in time")
        p50, p99, p999 = np.percentile(latencies, [50, 99, 99.9])
        return Measured(
            rps=round(len(self.latencies) / self.load.seconds, 1),
            requests=len(self.latencies),
            sent=self.sent,
            errors=self.errors,
            refused=len(self.refusals),
            refused_p99_ms=round(float(np.percentile(self.refusals, 99)) * 1000, 3) if self.refusals else 0.0,
            late=late,
            p50_ms=round(float(p50), 3),
            p99_ms=round(float(p99), 3),
            p999_ms=round(float(p999), 3),
            max_ms=round(float(latencies.max()), 3),
        )


def drive(load: Load) -> Measured:
    """Run one load in this process, on the core it names."""
    if load.core is not None:
        os.sched_setaffinity(0, {load.core})
    driver = Driver(load)
    failure: list[BaseException] = []

    async def run() -> Measured:
        loop = asyncio.get_running_loop()

        def failed(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
            failure.append(context["exception"])  # type: ignore[arg-type]

        loop.set_exception_handler(failed)
        return await driver.run()

    measured = uvloop.run(run())
    if failure:
        raise failure[0]
    return measured


ECHO = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(ECHO)  # type: ignore[attr-defined]


def _echo(listener: socket.socket, core: int) -> None:
    os.sched_setaffinity(0, {core})

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(_Echo, sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


def ceiling(server_core: int, client_core: int, connections: int = 32, seconds: float = 2.0) -> Measured:
    """What this client can drive: a server that answers without reading."""
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.get_context("fork").Process(target=_echo, args=(listener, server_core), daemon=True)
    process.start()
    try:
        port = listener.getsockname()[1]
        return drive(Load(port, "/", ["{}"], connections, seconds, core=client_core))
    finally:
        process.terminate()
        process.join()


if __name__ == "__main__":
    cores = sorted(os.sched_getaffinity(0))
    if sys.argv[1:] == ["--ceiling"]:
        print(json.dumps(asdict(ceiling(cores[0], cores[-1]))))
    else:
        print(json.dumps(asdict(drive(Load(**json.load(sys.stdin))))))
