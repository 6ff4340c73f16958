"""`fraud verify fuzz`: nearly right calls of every route; none ends in a 500, none keeps the event loop for long."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import msgspec
import typer
from rich.console import Console

from fraud.checks.carriers import CARRIERS
from fraud.checks.mutator import Mutator, Request
from fraud.checks.sandbox import Client, connected, sandbox
from fraud.serving.app import declared
from fraud.serving.contracts.registered import heading
from fraud.serving.http import ErrorShape, Route
from fraud.serving.routes import Router
from fraud.serving.scopes import SCOPES
from fraud.serving.security import new_key
from fraud.settings import Settings

MAX_ERROR_BYTES = 250_000
LOOP_LIMIT_S = 0.05
"""Processor time that one call may take of the thread of the event loop."""
app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass
class Fuzzed:
    """The figures of one run."""

    calls: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Answers of 500 and above, and errors in another shape than that of the route."""
    slow: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    @property
    def holds(self) -> bool:
        return not (self.broken or self.slow)


def processor_s(pid: int) -> float:
    """Return the processor time used by a process's first thread, which runs its event loop, seconds."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@dataclass
class Target:
    """A server that is fuzzed.

    Attributes
    ----------
    port, pid : int
        Port and process id of the one worker.
    secret : str
        An API key with every scope.
    router : Router
        Finds the declared error shape of a request; BentoML's pages are not in it.
    unserved : set of str
        Contracts that no model fits: their routes may answer 503.
    """

    port: int
    pid: int
    secret: str
    router: Router
    unserved: set[str] = field(default_factory=set)

    @property
    def credentials(self) -> str:
        return f"authorization: Bearer {self.secret}\r\n"

    def is_broken(self, request: Request, status: int, answered: bytes) -> bool:
        """Return whether an answer breaks what is promised."""
        if status < 400:
            return False
        path = request.path.partition("?")[0]
        scope = {"method": request.method, "path": unquote(path), "raw_path": path.encode("latin-1")}
        route, _ = self.router.find(scope)
        if status >= 500 and not (status == 503 and self._may_be_unserved(route)):
            return True
        return request.method != "HEAD" and not has_shape(answered, route.errors)

    def _may_be_unserved(self, route: Route) -> bool:
        """Return whether a route is of a contract that no model fits, or carries the rows of one."""
        carried = {carrier.path for name in self.unserved for carrier in CARRIERS.get(name, ())}
        return route.path in carried or route.tag in {heading(name) for name in self.unserved}


async def fuzz_server(target: Target, mutator: Mutator, calls: int) -> Fuzzed:
    """Send a server one request after the other and record every violation."""
    result = Fuzzed()
    while result.calls < calls:
        async with connected(target.port) as client:
            while result.calls < calls and await _call(client, target, mutator, result):
                pass
    return result


async def _call(client: Client, target: Target, mutator: Mutator, result: Fuzzed) -> bool:
    """Make one call; return whether the connection can be used again."""
    route, request = mutator.request()
    begin = request.body[:300]
    what = f"{request.method} {request.path[:80]} {request.headers[:60]!r}, {len(request.body)} bytes {begin!r}"
    before_s = processor_s(target.pid)
    try:
        headers = target.credentials + request.headers
        status, answered = await asyncio.wait_for(client.ask(request.method, request.path, request.body, headers), 60)
    except OSError:
        status, answered = 0, b""  # closed after an answer that ends the connection
    took_s = processor_s(target.pid) - before_s
    result.calls += 1
    result.statuses[status] += 1
    result.routes[route] += 1
    result.longest_s = max(result.longest_s, took_s)
    if took_s > LOOP_LIMIT_S:
        result.slow.append(f"{1000 * took_s:.0f} ms: {what}")
    if target.is_broken(request, status, answered):
        result.broken.append(f"{status} {answered[:300]!r}: {what}")
    return status not in (0, 400, 408, 413, 415, 431)


def has_shape(answered: bytes, shape: ErrorShape) -> bool:
    """Return whether an error is encoded in a shape, with nothing besides, and short."""
    try:
        error = msgspec.json.decode(answered, type=shape.body)
    except msgspec.DecodeError:
        return False
    return len(answered) < MAX_ERROR_BYTES and msgspec.to_builtins(error) == json.loads(answered)


def routes_of(document: Mapping[str, Any], contract: str | None = None) -> list[tuple[str, str]]:
    """Return method and path of every route of an OpenAPI document, or of one contract; those with a body are repeated,
    to be drawn more.

    A contract that has no route of its own has those that carry its rows.
    """
    routes = [
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if contract is None or operation["tags"] == [heading(contract)]
        for _ in range(5 if "requestBody" in operation else 1)
    ]
    return routes or [("POST", carrier.path) for carrier in CARRIERS.get(contract or "", ())]


def unserved_of(readiness: Mapping[str, Any]) -> set[str]:
    """Return the contracts of `/readyz` that no model fits."""
    return {contract["name"] for contract in readiness["contracts"] if contract["problem"] is not None}


@app.command()
def fuzz(
    calls: Annotated[int, typer.Option(min=1)] = 20_000,
    model: Annotated[str, typer.Option(help="A bundle folder, or NAME[:REF].")] = "fraud-transaction",
    seed: Annotated[int, typer.Option()] = 1,
    contract: Annotated[str | None, typer.Option(help="Only the routes of this contract.")] = None,
) -> None:
    """Start a server and send nearly valid requests to each of its routes.

    Unknown, broken, many, deep and long fields, headers, paths and queries: no answer may be a 500, no error may have
    another shape than that of its contract, and no call may take more than 50 ms of the event loop's processor time.
    """
    secret, key = new_key(tuple(SCOPES), rate=1e6)
    with sandbox(model, 1, {"FRAUD_API_KEYS": key.line(), "FRAUD_DURABLE": "false"}) as box:

        async def run() -> Fuzzed:
            await box.start()
            (pid,) = box.worker_pids()
            target = Target(box.port, pid, secret, declared(Settings.read()))
            async with connected(box.port) as client:
                _, document = await client.ask("GET", "/docs.json", headers=target.credentials)
                _, ready = await client.ask("GET", "/readyz")
            target.unserved |= unserved_of(json.loads(ready))
            routes = routes_of(json.loads(document), contract)
            if not routes:
                raise typer.BadParameter(f"no route of a contract {contract!r} is declared", param_hint="--contract")
            return await fuzz_server(target, Mutator(seed, routes, box.instances, box.name), calls)

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
