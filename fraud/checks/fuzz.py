"""`fraud verify fuzz`: nearly right calls of every route; none ends in a 500, none keeps the event loop for long."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fraud.checks.sandbox import Client, connected, sandbox
from fraud.serving.scopes import SCOPES
from fraud.serving.security import new_key

LOOP_LIMIT_S = 0.05
"""Processor time that one call may take of the thread of the event loop."""
MAX_BODY_BYTES = 3_000_000
SEGMENTS = ("c1", "%00", "%ff", "%ed%a0%80", "a" * 129, "a" * 4000, "%e2%82%ac", "..%2f..", "%1f", "%", "")
RARE = {"/admin/models/refresh"}
"""Starts a process that asks W&B, for seconds."""
METHODS = ("GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS", "PATCH")
HEADERS = (
    "",
    "",
    "",
    "x-request-id: \xe9\xff\r\n",
    f"x-request-id: {'r' * 500}\r\n",
    "accept-encoding: gzip;q=0, br\r\n",
    "content-encoding: br\r\n",
    "content-encoding: gzip\r\n",
    "x-forwarded-for: 1.2.3.4, nobody\r\n",
    "traceparent: 00-zz-zz-01\r\n",
    "".join(f"x-{i}: {i}\r\n" for i in range(100)),
)

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes = b""
    headers: str = ""


@dataclass
class Fuzzed:
    """The figures of one run."""

    calls: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Answers of 500 and above, and errors in another shape than the one."""
    slow: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    @property
    def holds(self) -> bool:
        return not (self.broken or self.slow)


class Mutator:
    """Makes nearly valid requests; the same seed makes the same requests.

    Parameters
    ----------
    seed : int
    routes : sequence of (str, str)
        Method and path of every route, a parameter in braces.
    instances : sequence of mapping
        Rows that are taken.
    model : str
        The name of the model that takes them.
    """

    def __init__(
        self, seed: int, routes: Sequence[tuple[str, str]], instances: Sequence[Mapping[str, Any]], model: str
    ) -> None:
        self._random = random.Random(seed)
        self._routes = routes
        self._instances = instances
        self._model = model

    def request(self) -> tuple[str, Request]:
        """Return the next request and the path of the route that it is for."""
        choose = self._random.choice
        method, route = choose(self._routes)
        while route in RARE and self._random.random() < 0.98:
            method, route = choose(self._routes)
        if self._random.random() < 0.1:
            method = choose(METHODS)
        path = "/".join(choose(SEGMENTS) if part.startswith("{") else part for part in route.split("/"))
        if self._random.random() < 0.1:
            path += choose(
                ("/", "?a=" + "b" * 3000, "?limit=nan&limit=%ff", "?" + "&".join(f"q{i}=1" for i in range(500)))
            )
        body = self._body(route) if method in ("POST", "PUT", "PATCH") or self._random.random() < 0.05 else b""
        headers = choose(HEADERS)
        if headers.startswith("content-encoding: gzip") and self._random.random() < 0.7:
            body = gzip.compress(body, 1, mtime=0)[: None if self._random.random() < 0.8 else -5]
        return route, Request(method, path, body, headers)

    def _body(self, route: str) -> bytes:
        name, rows = "instances", [self._fields(row) for row in self._some(self._instances)]
        if route.endswith("/labels"):
            name = "labels"
            rows = [{b'"transaction_id"': b'"t-1"', b'"is_fraud"': b"true"} for _ in rows]
        written = [self._written(row) for row in rows]
        envelope = b'{"%s": [%s], "model": %s}' % (
            name.encode(),
            b", ".join(written),
            self._value() if self._random.random() < 0.03 else json.dumps(self._model).encode(),
        )
        if self._random.random() < 0.05:
            envelope = self._random.choice(
                [b"\xef\xbb\xbf" + envelope, envelope[: len(envelope) // 2], b"[" + envelope + b"]", b"\xff\xfe", b""]
            )
        return envelope[:MAX_BODY_BYTES]

    def _some(self, instances: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        n = self._random.choice((1, 1, 1, 2, 5, 60, 0 if self._random.random() < 0.1 else 1))
        return [self._random.choice(instances) for _ in range(n)]

    def _fields(self, row: Mapping[str, Any]) -> dict[bytes, bytes]:
        fields = {json.dumps(key).encode(): json.dumps(value).encode() for key, value in row.items()}
        if "transaction_id" in row:
            fields[b'"transaction_id"'] = b'"f-%d"' % self._random.getrandbits(40)
        for _ in range(self._random.choice((0, 0, 1, 1, 2))):
            self._bend(fields)
        return fields

    def _bend(self, fields: dict[bytes, bytes]) -> None:
        keys = list(fields)
        key = self._random.choice(keys) if keys else b'"a"'
        match self._random.randrange(9):
            case 0 | 1 | 2:
                fields[key] = self._value()
            case 3:
                del fields[key]
            case 4:
                fields[self._key(key)] = fields.pop(key)
            case 5:
                fields[self._key(key)] = self._value()
            case 6:
                n = self._random.choice((20, 900, 1100, 60_000 if self._random.random() < 0.05 else 300))
                fields |= {b'%sx%d"' % (key[:-1], i): b"1" for i in range(n)}
            case 7:
                fields[key + b" "] = self._value()  # the same key again
            case 8:
                fields |= {self._key(key): self._value() for _ in range(5)}

    def _key(self, key: bytes) -> bytes:
        word = key[1:-1]
        ends = (
            word[::-1],
            word + b"_x",
            word.upper(),
            b"\xff" + word,
            word + b"\\ud800",
            b"k" * 30_000,
            b"",
            b"\\u0000",
        )
        return b'"%s"' % self._random.choice(ends)

    def _value(self) -> bytes:
        n = self._random.choice((3, 100, 900, 5000))
        return self._random.choice(
            (
                b"null",
                b"true",
                b"0",
                b"1",
                b"-0",
                b"-1",
                b"1e400",
                b"1e308",
                b"NaN",
                b"0.1e-400",
                b"7" * n,
                b"0." + b"3" * n,
                b'"' + b"x" * n * 10 + b'"',
                b'"' + "\u20ac".encode() * n + b'"',
                b'"caf\xe9"',
                b'"\xed\xa0\x80"',
                b'"\\ud800"',
                b'"\\u0000"',
                b'"\\q"',
                b'"2026-01-31T12:30Z"',
                b'"9999-12-31T23:59:59-23:59"',
                b'"0001-01-01T00:00:00+23:59"',
                b'"4.5E+15"',
                b"[" * n + b"]" * n,
                b'{"a":' * n + b"1" + b"}" * n,
                b"[" + b"1," * n + b"1]",
                b"[" * n,
            )
        )

    def _written(self, fields: Mapping[bytes, bytes]) -> bytes:
        return b"{" + b", ".join(key.strip() + b": " + value for key, value in fields.items()) + b"}"


def processor_s(pid: int) -> float:
    """Return the processor time used by a process's first thread, which runs its event loop, seconds."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


async def fuzz_server(port: int, pid: int, mutator: Mutator, calls: int, secret: str) -> Fuzzed:
    """Send a server one request after the other and record every violation.

    Parameters
    ----------
    port, pid : int
        Port and process id of the one worker.
    secret : str
        An API key with every scope.
    """
    result = Fuzzed()
    while result.calls < calls:
        async with connected(port) as client:
            while result.calls < calls and await _call(client, pid, mutator, secret, result):
                pass
    return result


async def _call(client: Client, pid: int, mutator: Mutator, secret: str, result: Fuzzed) -> bool:
    """Make one call; return whether the connection can be used again."""
    route, request = mutator.request()
    begin = request.body[:300]
    what = f"{request.method} {request.path[:80]} {request.headers[:60]!r}, {len(request.body)} bytes {begin!r}"
    before_s = processor_s(pid)
    try:
        headers = f"authorization: Bearer {secret}\r\n{request.headers}"
        status, answered = await asyncio.wait_for(client.ask(request.method, request.path, request.body, headers), 60)
    except OSError:
        status, answered = 0, b""  # closed after an answer that ends the connection
    took_s = processor_s(pid) - before_s
    result.calls += 1
    result.statuses[status] += 1
    result.routes[route] += 1
    result.longest_s = max(result.longest_s, took_s)
    if took_s > LOOP_LIMIT_S:
        result.slow.append(f"{1000 * took_s:.0f} ms: {what}")
    if status >= 500 or (status >= 400 and request.method != "HEAD" and not _has_the_shape(answered)):
        result.broken.append(f"{status} {answered[:300]!r}: {what}")
    return status not in (0, 400, 408, 413, 415, 431)


def _has_the_shape(answered: bytes) -> bool:
    try:
        error = json.loads(answered)["error"]
        return bool(error["code"] and error["message"] and error["request_id"] and len(error["message"]) < 3000)
    except (ValueError, KeyError, TypeError):
        return False


def routes_of(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return method and path of every route of an OpenAPI document; those with a body are repeated, to be drawn
    more."""
    return [
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        for _ in range(12 if "requestBody" in operation else 1)
    ]


@app.command()
def fuzz(
    calls: Annotated[int, typer.Option(min=1)] = 20_000,
    model: Annotated[str, typer.Option(help="A bundle folder, or NAME[:REF].")] = "fraud-transaction",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Start a server and send nearly valid requests to each of its routes.

    Unknown, broken, many, deep and long fields, headers, paths and queries: no answer may be a 500, no error may have
    another shape than the one, and no call may take more than 50 ms of the event loop's processor time.
    """
    secret, key = new_key(tuple(SCOPES), rate=1e6)
    with sandbox(model, 1, {"FRAUD_API_KEYS": key.line(), "FRAUD_DURABLE": "false"}) as box:

        async def run() -> Fuzzed:
            await box.start()
            async with connected(box.port) as client:
                _, document = await client.ask("GET", "/docs.json", headers=f"authorization: Bearer {secret}\r\n")
            (pid,) = box.worker_pids()
            mutator = Mutator(seed, routes_of(json.loads(document)), box.instances, box.name)
            return await fuzz_server(box.port, pid, mutator, calls, secret)

        result = asyncio.run(run())
    out.print(
        f"{result.calls} calls of {len(result.routes)} routes; statuses "
        + ", ".join(f"{status or 'closed'}: {n}" for status, n in sorted(result.statuses.items()))
        + f"\nbroken answers {len(result.broken)}, calls above {1000 * LOOP_LIMIT_S:.0f} ms {len(result.slow)}; "
        f"the longest took {1000 * result.longest_s:.1f} ms of the event loop"
    )
    for line in (result.broken + result.slow)[:10]:
        out.print(line, style="red", markup=False)
    if not result.holds:
        raise typer.Exit(1)
