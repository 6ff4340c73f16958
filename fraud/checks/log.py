"""`fraud verify audit`, `replay` and `chaos`: every answered decision is in the decision log, also after a kill."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fraud.checks import audit as auditing
from fraud.checks.sandbox import Sandbox, answered_score, connected, fresh, sandbox
from fraud.decisions.chain import audit_key_of
from fraud.models.bundle import short
from fraud.models.find import IN_PRODUCTION
from fraud.models.rule_sets import RuleSets
from fraud.models.scorer import Scorer
from fraud.stores.log import decode_record
from fraud.stores.sqlite_log import SqliteLog

AUDIT_KEY = "a key for fraud verify"

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)

ModelName = Annotated[str, typer.Option("--model", help="A bundle folder, or NAME[:REF]; by default what serves.")]
Workers = Annotated[int, typer.Option(min=1)]


@dataclass
class Kept:
    """The acknowledged decisions, compared with the log."""

    acknowledged: dict[str, float] = field(default_factory=dict)
    failed: int = 0
    missing: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    twice: int = 0
    logged: int = 0
    broken: str = ""

    @property
    def holds(self) -> bool:
        return not (self.missing or self.different or self.twice or self.broken)

    def compare(self, path: Path) -> None:
        """Look for every acknowledged decision in the log, and walk its chain."""
        log = SqliteLog(path)
        found: dict[str, float] = {}
        for logged, _ in log.rows():
            decided = decode_record(logged.record)
            self.logged += 1
            self.twice += decided.transaction_id in found
            found[decided.transaction_id or ""] = decided.decision_score
        self.missing = [name for name in self.acknowledged if name not in found]
        self.different = [name for name, p in self.acknowledged.items() if found.get(name, p) != p]
        verified = auditing.verify_chain(log, audit_key_of(AUDIT_KEY))
        self.broken = verified.broken.reason if verified.broken else ""

    def print_figures(self) -> None:
        """Print the figures."""
        out.print(
            f"{len(self.acknowledged)} decisions acknowledged, {self.logged} in the log: "
            f"missing {len(self.missing)}, other than answered {len(self.different)}, twice {self.twice}; "
            f"requests without an answer {self.failed}; chain {self.broken or 'whole'}"
        )


@app.command()
def audit(
    rows: Annotated[int, typer.Option(min=10, help="Decisions to make.")] = 2000,
    flips: Annotated[int, typer.Option(min=1, help="Bytes to change, one after another.")] = 100,
    model: ModelName = IN_PRODUCTION,
    workers: Workers = 2,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Make decisions, find each in the log once, then change bytes of it: each time the row must be named."""
    with sandbox(model, workers, {"FRAUD_AUDIT_KEY": AUDIT_KEY}) as box:
        kept = asyncio.run(filled(box, rows))
        box.kill()
        _judge(kept, box.log, flips, seed)


@app.command()
def replay(
    rows: Annotated[int, typer.Option(min=10, help="Decisions to make.")] = 10_000,
    model: ModelName = IN_PRODUCTION,
    workers: Workers = 2,
) -> None:
    """Make decisions with two versions, one after the other, and score all of them again from record and bundle."""
    with sandbox(model, workers, {"FRAUD_AUDIT_KEY": AUDIT_KEY}) as box:
        asyncio.run(filled(box, rows, swap_at=rows // 2))
        box.kill()
        result = auditing.replay(
            SqliteLog(box.log),
            lambda name, digest: Scorer.of(box.store.read(f"{name}:{short(digest)}", digest)),
            RuleSets(box.folder).read,
        )
    by_version = ", ".join(f"{short(digest)}: {n}" for digest, n in result.rows.items())
    out.print(f"{sum(result.rows.values())} decisions scored again, by version {by_version}")
    out.print(f"differences {len(result.differences)}, versions not found {len(result.failures)}")
    for difference in result.differences[:5]:
        out.print(difference, style="red", markup=False)
    if result.differences or result.failures or len(result.rows) < 2 or sum(result.rows.values()) < rows:
        raise typer.Exit(1)


@app.command()
def chaos(
    kills: Annotated[int, typer.Option(min=1, help="How often: a worker and the whole server in turn.")] = 20,
    model: ModelName = IN_PRODUCTION,
    workers: Workers = 2,
    users: Annotated[int, typer.Option(min=1, help="Callers that ask without a pause.")] = 8,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Kill a worker or the whole server at random moments under load; no acknowledged decision may be missing."""
    started = time.monotonic()
    with sandbox(model, workers, {"FRAUD_AUDIT_KEY": AUDIT_KEY}) as box:
        kept = asyncio.run(killed(box, kills, users, seed))
        out.print(f"{kills} kills in {time.monotonic() - started:.0f} s")
        _judge(kept, box.log, 5, seed)


def _judge(kept: Kept, log: Path, flips: int, seed: int) -> None:
    """Look up every acknowledged decision in the log, then change bytes of it; exit with 1 if either check fails."""
    kept.compare(log)
    named = flipped(log, flips, seed)
    kept.print_figures()
    out.print(f"{flips} bytes changed one after another, the row named {named} times")
    if not kept.holds or named != flips:
        raise typer.Exit(1)


async def filled(box: Sandbox, rows: int, *, swap_at: int | None = None, at_once: int = 50) -> Kept:
    """Start the server and let it make decisions, the later ones with the other version."""
    await box.start()
    kept = Kept()
    async with connected(box.port) as client:
        for begin in range(0, rows, at_once):
            if swap_at is not None and begin >= swap_at > begin - at_once:
                box.promote(box.digests[1])
                await asyncio.sleep(1.0)  # a worker follows within some 0.3 s; when it does changes no figure
            asked = [fresh(box.instances[i % len(box.instances)]) for i in range(begin, min(begin + at_once, rows))]
            status, body = await client.ask("POST", "/predict", json.dumps({"instances": asked}).encode())
            if status != 200:
                raise AssertionError(f"{status} {body[:300]!r}")
            for row in json.loads(body)["predictions"]:
                kept.acknowledged[row["transaction_id"]] = answered_score(row)
    return kept


async def killed(box: Sandbox, kills: int, users: int, seed: int) -> Kept:
    """Kill under load, worker and server in turn."""
    rng = random.Random(seed)
    kept = Kept()
    stopped = asyncio.Event()

    async def ask_without_pause() -> None:
        while not stopped.is_set():
            try:
                async with connected(box.port) as client:
                    while not stopped.is_set():
                        rows = [fresh(rng.choice(box.instances)) for _ in range(rng.choice((1, 1, 4)))]
                        status, body = await client.ask("POST", "/predict", json.dumps({"instances": rows}).encode())
                        if status == 200:
                            for row in json.loads(body)["predictions"]:
                                kept.acknowledged[row["transaction_id"]] = answered_score(row)
                        else:
                            kept.failed += 1
            except OSError:  # killed; what was not answered was not acknowledged
                kept.failed += 1
                await asyncio.sleep(0.05)

    await box.start()
    load = [asyncio.create_task(ask_without_pause()) for _ in range(users)]
    for i in range(kills):
        before = len(kept.acknowledged)
        while len(kept.acknowledged) < before + 20:
            await asyncio.sleep(0.01)
        await asyncio.sleep(rng.uniform(0.0, 0.5))
        if i % 2 == 0:
            os.kill(rng.choice(box.worker_pids()), signal.SIGKILL)
        else:
            box.kill()
            await box.start()
    stopped.set()
    await asyncio.gather(*load)
    box.kill()
    return kept


def flipped(path: Path, flips: int, seed: int) -> int:
    """Change one byte of one record after another in a copy of a log; return how often its row was named."""
    rng = random.Random(seed)
    copy = path.with_name("flipped.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    sequences = [logged.sequence for logged, _ in SqliteLog(copy).rows()]
    named = 0
    with closing(sqlite3.connect(copy, isolation_level=None)) as db:
        for _ in range(flips):
            sequence = rng.choice(sequences)
            (record,) = db.execute("SELECT record FROM decisions WHERE seq = ?", (sequence,)).fetchone()
            changed = bytearray(record)
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            db.execute("UPDATE decisions SET record = ? WHERE seq = ?", (bytes(changed), sequence))
            broken = auditing.verify_chain(SqliteLog(copy), audit_key_of(AUDIT_KEY)).broken
            named += broken is not None and broken.sequence == sequence
            db.execute("UPDATE decisions SET record = ? WHERE seq = ?", (record, sequence))
    return named
