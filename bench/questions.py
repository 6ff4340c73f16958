"""What it costs to ask the record of a service that scores: a million decisions, questions beside 500 scores a second.

    python -m bench.questions                  writes bench/results/questions.json
    python -m bench.questions --rows 200000 --seconds 5

A SQLite store is filled with decisions as the service records them, of 50,000 customers over 90 days. The service on it
has one core, the client another. Scores come in an open loop, with history, alone and then beside questions; these come
at a rate too, over a few connections, half of them for a customer's decisions and half for those of an hour. Latency
counts from the moment a request was due.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import http.client
import json
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import numpy as np
from rich.table import Table

from bench.hardware import describe_hardware
from bench.model import write_model
from bench.servers import HERE, WORK, Running, console, running, servers
from bench.service import LIBRARIES, measure
from fraud.decisions.record import DecisionRecord
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision
from fraud.stores.sqlite import SqliteStore

ROWS = 1_000_000
CUSTOMERS = 50_000
DAYS = 90
DAY_MS = 86_400_000
HOUR_MS = 3_600_000
AT_ONCE = 5_000
GOAL_P99_MS = 20.0
SCORES_A_SECOND = 500.0
STATE = WORK / "questions"


async def examples(folder: Path) -> list[DecisionRecord]:
    """Decisions as the service records them: with features, reasons and the transaction that was sent."""
    store = SqliteStore(folder / "examples.db", durable=False)
    scorer = Scorer.load(WORK / "model" / "history")
    pipeline = Pipeline({"bench-history": scorer}, store)
    known = json.loads((WORK / "model" / "transactions.json").read_text())[:500]
    raw = [json.dumps(instance).encode() for instance in known]
    ((*outcomes,),) = await pipeline.decide_requests([pipeline.read(raw, now_ms=time.time_ns() // 1_000_000)])
    if not all(isinstance(outcome, Decision) for outcome in outcomes):
        raise RuntimeError(f"not scored as they should be: {outcomes[0]!r}")
    recalled = await store.recall([instance["transaction_id"] for instance in known], [], [])
    await pipeline.close()
    return list(recalled.decided.values())


def decisions(rows: int, like: list[DecisionRecord], end_ms: int) -> Iterator[DecisionRecord]:
    """Decisions of `DAYS` days up to a moment, in the order of time."""
    for i in range(rows):
        at = end_ms - DAYS * DAY_MS * (rows - i) // rows
        yield msgspec.structs.replace(
            like[i % len(like)],
            transaction_id=f"q{i}",
            customer_id=f"q{i * 7919 % CUSTOMERS}",
            event_time_ms=at,
            processing_time_ms=at,
        )


async def fill(path: Path, rows: int, end_ms: int) -> float:
    """Record decisions through the store, without the histories they would change; return the seconds it took."""
    like = await examples(path.parent)
    store = SqliteStore(path, durable=False)
    made = decisions(rows, like, end_ms)
    started = time.perf_counter()
    while some := list(islice(made, AT_ONCE)):
        await store.record(some, None)
    await store.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return time.perf_counter() - started


class Asking:
    """Asks at a rate, over connections that take turns; a question that waits for its turn is late already."""

    def __init__(self, port: int, rate: float, connections: int, end_ms: int, seed: int = 1) -> None:
        self._port = port
        self._gap_s = connections / rate
        self._connections = connections
        self._end_ms = end_ms
        self._seed = seed
        self._ended = threading.Event()
        self.taken_ms: dict[str, list[float]] = {"of a customer": [], "of an hour": []}
        self.failed: list[str] = []

    def __enter__(self) -> Asking:
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self._connections)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        due = time.perf_counter() + rng.random() * self._gap_s
        while not self._ended.wait(max(0.0, due - time.perf_counter())):
            if rng.random() < 0.5:
                kind, asked = "of a customer", {"customer_id": f"q{rng.randrange(CUSTOMERS)}"}
            else:
                since = self._end_ms - rng.randrange(HOUR_MS, DAYS * DAY_MS)
                kind, asked = "of an hour", {"since": _moment(since), "until": _moment(since + HOUR_MS)}
            connection.request("GET", f"/v1/decisions?{urlencode(asked)}")
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200 or not json.loads(body)["decisions"]:
                self.failed.append(f"{answer.status} {body[:200]!r}")
            self.taken_ms[kind].append((time.perf_counter() - due) * 1000)
            due += rng.expovariate(1 / self._gap_s)
        connection.close()


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def percentiles(taken_ms: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(taken_ms, [50, 99])
    return {"questions": len(taken_ms), "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    hardware = describe_hardware(LIBRARIES)
    write_model(WORK / "model")
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir(parents=True)
    end_ms = time.time_ns() // 1_000_000
    fill_s = asyncio.run(fill(STATE / "history.db", options.rows, end_ms))
    size_mb = (STATE / "history.db").stat().st_size / 2**20
    console.print(f"{options.rows:,} decisions in {fill_s:.0f} s, {size_mb:,.0f} MB")
    known = next(server for server in servers() if server.name == "fraud_bento_history")
    server = dataclasses.replace(known, environment={**known.environment, "FRAUD_STATE_DIR": str(STATE)})
    with running(server, cores[0]) as process:
        os.sched_setaffinity(0, {cores[-1]})
        alone = scores(process, server.endpoints["predict"], options.seconds, cores[-1])
        with Asking(process.port, options.questions, options.connections, end_ms) as asking:
            beside = scores(process, server.endpoints["predict"], options.seconds, cores[-1])
    shutil.rmtree(STATE)
    if asking.failed:
        raise RuntimeError(f"{len(asking.failed)} questions failed: {asking.failed[0]}")
    every = [ms for some in asking.taken_ms.values() for ms in some]
    return {
        "hardware": hardware,
        "rows": options.rows,
        "fill_s": round(fill_s, 1),
        "size_mb": round(size_mb),
        "scores": {"alone": alone, "beside questions": beside},
        "questions": {kind: percentiles(some) for kind, some in [*asking.taken_ms.items(), ("all", every)]},
    }


def scores(process: Running, endpoint: Any, seconds: float, core: int) -> dict[str, Any]:
    return measure(process, endpoint, {"connections": 64, "rate": SCORES_A_SECOND}, seconds, core)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.questions", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="decisions on record")
    parser.add_argument("--seconds", type=float, default=20.0, help="of scoring, alone and beside questions")
    parser.add_argument("--questions", type=float, default=20.0, help="questions a second")
    parser.add_argument("--connections", type=int, default=4, help="that ask")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "questions.json")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options)
    table = Table("", "answered", "p50 ms", "p99 ms")
    for name, phase in report["scores"].items():
        table.add_row(f"scores {name}", f"{phase['requests']:,}", f"{phase['p50_ms']:.1f}", f"{phase['p99_ms']:.1f}")
    for name, asked in report["questions"].items():
        table.add_row(
            f"questions {name}", f"{asked['questions']:,}", f"{asked['p50_ms']:.1f}", f"{asked['p99_ms']:.1f}"
        )
    console.print(table)
    p99 = report["questions"]["all"]["p99_ms"]
    console.print(f"{'met   ' if p99 < GOAL_P99_MS else 'MISSED'} p99 of questions {p99:.1f} ms (< {GOAL_P99_MS:.0f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
