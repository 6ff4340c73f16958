"""`fraud verify swap`: models change under load, and callers see no change but the version in the answer."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from fraud.checks.sandbox import Client, Sandbox, answered_score, connected, fresh, quantile, sandbox
from fraud.decisions.verdict import verdict_of
from fraud.models.bundle import read_manifest, short
from fraud.models.find import IN_PRODUCTION
from fraud.models.scorer import Scorer, scores_of

SWAP_LIMIT_S = 20.0
ROWS = 3
P99_RATIO = 1.2
LOOK_S = 0.05
"""Between looks at what a worker serves; each is a request beside the load."""

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass
class Load:
    """The results of the requests sent with swaps, or without."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    by_digest: dict[str, int] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)


@dataclass
class Swapped:
    """The figures of one run."""

    without: Load
    during: Load
    swaps: int
    slowest_swap_s: float
    refused_broken: bool

    @property
    def ratio(self) -> float:
        return quantile(self.during.latencies_s, 0.99) / quantile(self.without.latencies_s, 0.99)

    @property
    def holds(self) -> bool:
        whole = not any((*self.without.failed, *self.during.failed, *self.without.mixed, *self.during.mixed))
        return whole and self.refused_broken and self.ratio <= P99_RATIO


@app.command()
def swap(
    cycles: Annotated[int, typer.Option(min=2, help="How often the version in production changes.")] = 20,
    model: Annotated[
        str, typer.Option(help="A bundle folder, or NAME[:REF]; what is in production if none.")
    ] = IN_PRODUCTION,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    rate: Annotated[float, typer.Option(min=1, help="Requests a second, in an open loop.")] = 50.0,
    connections: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Swap the model in production back and forth under load, with a broken one in the middle.

    Starts a server of its own on a copy of the model and on another calibrator and policy. Every request must be
    answered, by one version alone, with a p99 of at most 1.2 times that without swaps.
    """
    with sandbox(model, workers) as box:
        result = asyncio.run(measure_swaps(box, cycles, rate, connections))
    for name, load in (("without swaps", result.without), ("during swaps", result.during)):
        p50_ms, p99_ms = (1000 * quantile(load.latencies_s, q) for q in (0.5, 0.99))
        versions = ", ".join(f"{short(digest)}: {n}" for digest, n in load.by_digest.items())
        out.print(
            f"{name}: {load.requests} requests, failed {len(load.failed)}, of mixed versions {len(load.mixed)}, "
            f"p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms, answers by version {versions}"
        )
    out.print(
        f"{result.swaps} swaps in all of {workers} workers, the slowest {result.slowest_swap_s:.2f} s after the alias "
        f"moved; broken bundle refused: {result.refused_broken}; p99 ratio {result.ratio:.2f}, allowed {P99_RATIO}"
    )
    for what in [*result.without.failed, *result.during.failed, *result.without.mixed, *result.during.mixed][:5]:
        out.print(what, style="red", markup=False)
    if not result.holds:
        raise typer.Exit(1)


async def measure_swaps(box: Sandbox, cycles: int, rate: float, connections: int) -> Swapped:
    """Run a sandbox's server under load, half of the time without swaps, half with."""
    scorers = {digest: Scorer.of(box.store.read(f"{box.name}:{short(digest)}", digest)) for digest in box.digests}
    broken = break_bundle(box)
    await box.start()
    await offered(box, scorers, rate, connections, asyncio.create_task(asyncio.sleep(2)))  # warm, not counted
    slowest, refused = 0.0, False
    began = time.monotonic()

    async def swaps() -> None:
        nonlocal slowest, refused
        for i in range(1, cycles + 1):
            await asyncio.to_thread(box.promote, box.digests[i % 2])
            slowest = max(slowest, await seen_by_all(box, box.digests[i % 2]))
            if i == cycles // 2:
                await asyncio.to_thread(box.promote, broken)
                refused = await refused_by_all(box)
                await asyncio.to_thread(box.promote, box.digests[i % 2])
            await asyncio.sleep(0.3)

    during = await offered(box, scorers, rate, connections, asyncio.create_task(swaps()))
    seconds = time.monotonic() - began
    without = await offered(box, scorers, rate, connections, asyncio.create_task(asyncio.sleep(seconds)))
    return Swapped(without, during, cycles, slowest, refused)


def break_bundle(box: Sandbox) -> str:
    """Register a version whose trees have one byte changed, and return its digest."""
    bundle = box.folder / "broken"
    shutil.copytree(box.folder / "bundle0", bundle)
    manifest = bundle / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"seed"', b'"seed" ', 1))  # another digest
    digest, facts = read_manifest(bundle)
    box.store.import_bundle(bundle, {})
    trees = box.folder / "models" / box.name / short(digest) / facts.detector.files[0]
    content = bytearray(trees.read_bytes())
    content[len(content) // 2] ^= 1
    trees.write_bytes(content)
    box.registry.register(box.name, digest, facts.preprocessor_digest, who="fraud verify")
    return digest


async def offered(
    box: Sandbox, scorers: dict[str, Scorer], rate: float, connections: int, until: asyncio.Task[None]
) -> Load:
    """Send requests at even intervals until a task is done; latency counts from when a request was due."""
    load = Load()
    due: asyncio.Queue[float | None] = asyncio.Queue()

    async def send() -> None:
        async with connected(box.port) as client:
            while (at := await due.get()) is not None:
                await one(client, box, scorers, load, at)

    users = [asyncio.create_task(send()) for _ in range(connections)]
    start, n = time.perf_counter(), 0
    while not until.done():
        n += 1
        await asyncio.sleep(max(0.0, start + n / rate - time.perf_counter()))
        due.put_nowait(start + n / rate)
    for _ in users:
        due.put_nowait(None)
    await asyncio.gather(*users)
    await until
    return load


async def one(client: Client, box: Sandbox, scorers: dict[str, Scorer], load: Load, due: float) -> None:
    rows = [fresh(box.instances[(load.requests + i) % len(box.instances)]) for i in range(ROWS)]
    load.requests += 1
    try:
        status, body = await client.ask("POST", "/explain", json.dumps({"instances": rows}).encode())
    except OSError as error:
        load.failed.append(f"connection failed: {error!r}")
        raise
    load.latencies_s.append(time.perf_counter() - due)
    if status != 200:
        load.failed.append(f"{status} {body[:300]!r}")
        return
    predictions = json.loads(body)["predictions"]
    digests = {row["model"]["digest"] for row in predictions}
    digest = digests.pop()
    load.by_digest[digest] = load.by_digest.get(digest, 0) + 1
    wrong = [row for row in predictions if digests or not made_by(scorers[digest], row)]
    if wrong:
        load.mixed.append(json.dumps(wrong[0])[:500])


def made_by(scorer: Scorer, row: dict[str, Any]) -> bool:
    """Return whether all parts of an explained answer come from one version: model, calibrator and policy."""
    base = scorer.contributions(np.full((1, len(scorer.spec.features)), np.nan))[0, -1]
    margin = row["raw_margin"]
    (score,) = scores_of(scorer.detector, np.array([margin])).rows()
    return (
        abs(row["base_value"] - base) <= 1e-9
        and abs(row["base_value"] + sum(row["contributions"].values()) - margin) <= 1e-9
        and row["fraud_probability"] == score.fraud_probability
        and (score.anomaly is None or row["anomaly"]["severity"] == score.anomaly.severity)
        and answered_score(row) == score.decision_score
        and (row["prediction"], row["risk_level"], row["decision"])
        == verdict_of(scorer.policy, score.decision_score, (row.get("anomaly") or {}).get("severity"))
    )


async def seen_by_all(box: Sandbox, digest: str) -> float:
    """Wait until every worker serves a version; return how long that took, seconds."""
    started = time.monotonic()
    waiting = set(await asyncio.to_thread(box.worker_pids))
    while waiting:
        state = await readiness(box)
        if state["models"][0]["digest"] == digest:
            waiting.discard(state["pid"])
        if time.monotonic() - started > SWAP_LIMIT_S:
            raise TimeoutError(f"workers {waiting} do not serve {digest} after {SWAP_LIMIT_S:g} s")
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - started


async def refused_by_all(box: Sandbox) -> bool:
    """Wait until every worker reports that it could not load the wanted version."""
    started = time.monotonic()
    waiting = set(await asyncio.to_thread(box.worker_pids))
    while waiting and time.monotonic() - started < SWAP_LIMIT_S:
        state = await readiness(box)
        if state["failed_swaps"]:
            waiting.discard(state["pid"])
        await asyncio.sleep(LOOK_S)
    return not waiting


async def readiness(box: Sandbox) -> Any:
    """Return the readiness of one worker; a new connection may reach another worker."""
    async with connected(box.port) as client:
        status, body = await client.ask("GET", "/readyz")
    assert status == 200, body
    return json.loads(body)
