"""`fraud verify cases`: many analysts, several workers; no case is worked twice, and labels equal resolutions."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

import numpy as np
import psutil
import typer
from rich.console import Console

from fraud.cases.case import IS_FRAUD, SOURCE, Resolution
from fraud.checks.sandbox import Sandbox, connected, quantile, sandbox
from fraud.decisions.labels import value_in_effect
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest
from fraud.history.state import TRANSACTION
from fraud.models.find import IN_PRODUCTION
from fraud.serving.security import new_key
from fraud.settings import Settings, StoreSettings
from fraud.stores.cases import open_cases
from fraud.stores.opening import StoreOptions, open_store

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)

RECORD_AT_ONCE = 100
LONGEST_S = 600.0
"""Longest wait for the process of cases, seconds."""


@dataclass
class Worked:
    """What the analysts did, and what differs from it afterwards."""

    resolved: dict[int, tuple[str, Resolution]] = field(default_factory=dict)
    twice: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    wrongly_taken: int = 0
    undone: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong_labels: int = 0
    wrong_trails: int = 0

    @property
    def holds(self) -> bool:
        return not (self.twice or self.wrongly_taken or self.wrong_labels or self.wrong_trails)


@app.command()
def cases(
    cases: Annotated[int, typer.Option(min=10, help="Cases to work.")] = 5000,
    clients: Annotated[int, typer.Option(min=2, help="Analysts who work at once, each with a key.")] = 20,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    store: Annotated[
        str, typer.Option(help="An empty postgresql:// database for the check; SQLite if none.", show_default=False)
    ] = "sqlite:",
    model: Annotated[str, typer.Option("--model", help="A bundle folder, or NAME[:REF].")] = IN_PRODUCTION,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Let analysts claim and resolve cases over HTTP at once, and kill the process of cases while it writes labels."""
    keys = [new_key(["analyst", "read"]) for _ in range(clients)]
    environment = {"FRAUD_STORE": store, "FRAUD_API_KEYS": ",".join(key.line() for _, key in keys)}
    with sandbox(model, workers, environment) as box:
        settings = replace(box.settings(), store=StoreSettings(FRAUD_STORE=store))
        if store != "sqlite:" and open_cases(settings).find(limit=1):
            raise InvalidRequest("the database of --store has cases already; give an empty one")
        worked = asyncio.run(_run(box, settings, cases, {secret: key.id for secret, key in keys}, seed))
    out.print(
        f"{len(worked.resolved)} of {cases} cases resolved by {clients} analysts over {workers} workers; worked twice "
        f"{worked.twice}, taken from another {worked.wrongly_taken}, refused with 409 {worked.refused[409]}, "
        f"undone {worked.undone}"
    )
    out.print(
        f"claim or resolve: p50 {1000 * quantile(worked.seconds, 0.5):.1f} ms, "
        f"p99 {1000 * quantile(worked.seconds, 0.99):.1f} ms"
    )
    out.print(f"labels other than resolutions {worked.wrong_labels}, trails incomplete {worked.wrong_trails}")
    if not worked.holds or len(worked.resolved) != cases:
        raise typer.Exit(1)


async def _run(box: Sandbox, settings: Settings, n: int, keys: Mapping[str, str], seed: int) -> Worked:
    await _record(settings, n)
    await box.start()
    store = open_cases(settings)
    began = time.monotonic()
    while len(await asyncio.to_thread(store.find, None, n + 1)) < n:
        _expect(began, "the process of cases derives too slowly")
        await asyncio.sleep(0.2)
    out.print(f"{n} cases derived in {time.monotonic() - began:.1f} s")
    worked = Worked()
    await asyncio.gather(
        *(
            _analyst(box, secret, actor, worked, random.Random(seed + i))
            for i, (secret, actor) in enumerate(keys.items())
        )
    )
    began = time.monotonic()
    killed = False
    while len(await asyncio.to_thread(store.find, "resolved", n + 1)) < n:
        _expect(began, "the labels are not written in time")
        settling = await asyncio.to_thread(store.find, "settling", 1)
        if settling and not killed:
            killed = _kill_process_of_cases(box)
        await asyncio.sleep(0.2)
    box.kill()
    await _compare(settings, worked)
    store.close()
    return worked


async def _record(settings: Settings, n: int) -> None:
    """Record decisions to review, one of each customer."""
    store = open_store(settings.store.url, StoreOptions.of(settings))
    await store.open()
    now_ms, run = time.time_ns() // 1_000_000, uuid.uuid4().hex[:8]
    for start in range(0, n, RECORD_AT_ONCE):
        some = [
            _decision(f"{run}-{i}", now_ms + i, 10.0 + i % 97) for i in range(start, min(start + RECORD_AT_ONCE, n))
        ]
        await store.record(some, np.zeros(len(some), TRANSACTION))
    await store.close()


def _decision(name: str, at_ms: int, amount: float) -> DecisionRecord:
    return DecisionRecord(
        *(f"t-{name}", b"", "verify", f"sha256:{'0' * 64}", b"", 0.0, 0.5, True),
        risk_level="high",
        decision="review",
        degraded=[],
        event_time_ms=at_ms,
        processing_time_ms=at_ms,
        request_id="",
        customer_id=f"c-{name}",
        amount=amount,
    )


async def _analyst(box: Sandbox, secret: str, actor: str, worked: Worked, rng: random.Random) -> None:
    """Claim, look at somebody else's case, resolve; sometimes undo and resolve again; until nothing is open."""
    headers = f"authorization: Bearer {secret}\r\n"
    async with connected(box.port) as client:

        async def ask(path: str, body: Any = None) -> tuple[int, Any]:
            began = time.perf_counter()
            status, content = await client.ask(
                "POST", path, b"" if body is None else json.dumps(body).encode(), headers
            )
            worked.seconds.append(time.perf_counter() - began)
            return status, json.loads(content)

        while True:
            status, answer = await ask("/v1/next-case")
            if status != 200:
                raise AssertionError(f"{status} {answer}")
            case = answer["case"]
            if case is None:
                return
            resolution: Resolution = rng.choice(get_args(Resolution))
            done = list(worked.resolved)
            if done and rng.random() < 0.1:
                other = rng.choice(done)
                status, _ = await ask(f"/v1/cases/{other}/resolve", {"resolution": resolution, "revision": 2})
                worked.refused[status] += 1
                worked.wrongly_taken += status != 409
            resolve = f"/v1/cases/{case['id']}/resolve"
            status, answer = await ask(resolve, {"resolution": resolution, "revision": case["revision"]})
            if status == 200 and rng.random() < 0.05:
                status, answer = await ask(f"/v1/cases/{case['id']}/undo")
                revision = answer["case"]["revision"]
                status, answer = await ask(resolve, {"resolution": resolution, "revision": revision})
                worked.undone += 1
            if status != 200:
                raise AssertionError(f"{status} {answer}")
            worked.twice += case["id"] in worked.resolved
            worked.resolved[case["id"]] = actor, resolution


def _kill_process_of_cases(box: Sandbox) -> bool:
    assert box.process is not None
    for child in psutil.Process(box.process.pid).children(recursive=True):
        if "fraud.serving.case_process" in child.cmdline():
            child.kill()
            return True
    return False


async def _compare(settings: Settings, worked: Worked) -> None:
    """Count cases whose labels or trail are other than what the analysts were told."""
    cases = open_cases(settings)
    store = open_store(settings.store.url, StoreOptions.of(settings))
    await store.open()
    said = {True: "fraud", False: "legitimate", None: "none"}
    for case_id, (actor, resolution) in worked.resolved.items():
        case, transactions, trail = cases.whole(case_id)
        steps = [entry.step for entry in trail]
        numbers = [entry.number for entry in trail]
        is_complete = numbers == list(range(1, case.revision + 1)) and steps.count("labelled") == 1
        once = steps.count("resolved") - steps.count("undone") == 1
        worked.wrong_trails += not (is_complete and once and trail[-1].actor == actor)
        for of in transactions:
            labels = await store.labels(of.transaction_id)
            written = resolution != "unsure"
            right = value_in_effect(labels) == said[IS_FRAUD[resolution]] and len(labels) == written
            worked.wrong_labels += not (right and all((x.source, x.actor) == (SOURCE, actor) for x in labels))
    await store.close()
    cases.close()


def _expect(began: float, what: str) -> None:
    if time.monotonic() - began > LONGEST_S:
        raise AssertionError(what)
