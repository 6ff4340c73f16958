"""What history costs: enrichment for each store and size, memory of a customer, and the rate of a backfill.

    python -m bench.history --out bench/results/history.json

Each store is filled with N customers who have a history, then single transactions of random customers are
scored one after another through the service's own path. The ratio is to the same path without history.
Redis and PostgreSQL run on this machine, started for the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import redis

from bench.hardware import describe_hardware
from fraud.checks.history import scorer_for, simulated
from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Histories, Records
from fraud.history.profile import Profile
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision, Outcome
from fraud.schema import Row
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Recalled, Recorded, States, Store, StoreHealth, StoreStats
from tests.servers import Postgres, Redis, Server, running
from training.backfill import states_of
from training.data import Mapping
from training.replay import instances_of, transaction_spec

MAPPING = Path(__file__).parent.parent / "examples" / "simulated.yaml"
FUTURE_MS = 4_102_444_800_000
STORES = ("sqlite", "sqlite relaxed", "redis", "postgresql", "redis+postgresql")


class NoHistory:
    """Knows nothing and keeps nothing: the path without history."""

    async def open(self) -> None:
        pass

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        rows = [Row(None, (), b"", customer_id=c) for c in customer_ids]
        rows += [Row(None, (), b"", customer_id=customer_ids[0], roles={"merchant_id": m}) for m in merchant_ids]
        return Recalled({}, Histories.new(rows))

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        return Recorded(list(decided))

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return ["unknown"] * len(labels)

    async def labels(self, key: str) -> list[Label]:
        return []

    async def find(self, query: DecisionQuery) -> Page:
        return Page([], None)

    async def profile(self, customer_id: str) -> Profile | None:
        return None

    async def reset(self, customer_id: str) -> bool:
        return False

    async def backfill(self, states: States) -> None:
        pass

    async def expire(self, before_ms: int) -> int:
        return 0

    def stats(self) -> StoreStats:
        return StoreStats()

    def health(self) -> StoreHealth:
        return StoreHealth()

    async def close(self) -> None:
        pass


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/history.json"))
    parser.add_argument("--customers", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument("--rows", type=int, default=1_000, help="transactions scored for each figure")
    parser.add_argument("--stores", nargs="+", default=list(STORES), choices=STORES)
    options = parser.parse_args()
    table = simulated(20_000, 1)
    spec = transaction_spec(table, Mapping.from_yaml(MAPPING), slice(None))
    scorer = scorer_for(table, spec)
    instances = [json.loads(instance) for instance in instances_of(table[: options.rows], spec)]
    result: dict[str, Any] = {
        "bytes_a_customer": CUSTOMER.itemsize + 1,
        "bytes_a_merchant": MERCHANT.itemsize + 1,
        "backfill": measure_walk(),
        "stores": [],
        "hardware": describe_hardware(("numpy", "numba", "redis", "psycopg")),
    }
    result["without_history"] = asyncio.run(timed(NoHistory(), scorer, instances, 1_000))
    for name in options.stores:
        for n in options.customers:
            figures = measure_store(name, n, scorer, instances, table)
            figures["ratio"] = round(figures["median_us"] / result["without_history"]["median_us"], 2)
            figures["added_us"] = round(figures["median_us"] - result["without_history"]["median_us"])
            print(json.dumps(figures), flush=True)
            result["stores"].append(figures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure_walk(rows: int = 500_000) -> dict[str, Any]:
    """Return the rate of a backfill into SQLite: walking the table, writing the states."""
    table = simulated(rows, 2)
    states_of(table[:1000], FUTURE_MS)  # compiled
    cpu, started = time.process_time(), time.perf_counter()
    states = states_of(table, FUTURE_MS)
    walked = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        store = open_store("sqlite:", StoreOptions(Path(folder)))

        async def write() -> None:
            await store.backfill(states)
            await store.close()

        asyncio.run(write())
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return {
        "rows": rows,
        "customers": len(states.customer_ids),
        "walk_s": round(walked - started, 3),
        "total_s": round(seconds, 3),
        "rows_per_s": round(rows / seconds),
        "rows_per_cpu_s": round(rows / cpu_s),
    }


def measure_store(name: str, n: int, scorer: Scorer, instances: list[dict[str, Any]], table: Any) -> dict[str, Any]:
    """Return the figures of one store filled with n customers."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[str, Server] = {}
        if "redis" in name:
            servers["redis"] = stack.enter_context(running(Redis))
        if "postgresql" in name:
            servers["postgresql"] = stack.enter_context(running(Postgres))
        url = "sqlite:" if name.startswith("sqlite") else servers[name.partition("+")[0]].url
        cold = servers["postgresql"].url if "+" in name else None
        options = StoreOptions(
            folder, cold_store=cold, budget_ms=1_000, cold_budget_ms=5_000, durable=name != "sqlite relaxed"
        )
        store = open_store(url, options)

        async def run() -> dict[str, Any]:
            filled_s = await fill(store, n, table)
            memory = {place: round(size() / n) for place, size in sizes(servers, folder).items()}
            figures = await timed(store, scorer, instances, n)
            return {"store": name, "customers": n, "fill_s": round(filled_s, 2), "bytes_a_customer": memory, **figures}

        return asyncio.run(run())


async def fill(store: Store, n: int, table: Any) -> float:
    """Give n customers, named by number, the histories of simulated ones; return the seconds it took."""
    states = states_of(table, FUTURE_MS)
    started = time.perf_counter()
    for start in range(0, n, 200_000):
        some = np.arange(start, min(start + 200_000, n))
        records = states.customers[some % len(states.customers)]
        await store.backfill(States([f"c{i}" for i in some], [], records, states.merchants[:0]))
    await store.backfill(States([], states.merchant_ids, states.customers[:0], states.merchants))
    return time.perf_counter() - started


def sizes(servers: dict[str, Server], folder: Path) -> dict[str, Callable[[], int]]:
    """Return how to ask each place for the bytes it uses."""

    def of_redis() -> int:
        client = redis.Redis(port=servers["redis"].port)
        try:
            info: Any = client.info("memory")
            return int(info["used_memory_dataset"])
        finally:
            client.close()

    def of_postgres() -> int:
        with psycopg.connect(servers["postgresql"].url) as db:
            row = db.execute("SELECT pg_total_relation_size('fraud.customers')").fetchone()
        return int(row[0]) if row else 0

    found: dict[str, Callable[[], int]] = {"redis": of_redis, "postgresql": of_postgres}

    def of_sqlite() -> int:
        with closing(sqlite3.connect(folder / "history.db")) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return (folder / "history.db").stat().st_size

    if not servers:
        return {"sqlite": of_sqlite}
    return {name: found[name] for name in servers}


async def timed(store: Store, scorer: Scorer, instances: list[dict[str, Any]], n: int) -> dict[str, Any]:
    """Score transactions of random customers one after another; return the times, µs."""
    stages: dict[str, list[float]] = defaultdict(list)
    pipeline = Pipeline({"m": scorer}, store, lambda stage, seconds: stages[stage].append(seconds))
    rng = np.random.default_rng(7)
    taken = []
    for run, instance in enumerate([*instances[:100], *instances]):
        instance = {**instance, "transaction_id": f"bench-{run}", "customer_id": f"c{rng.integers(n)}"}
        raw = json.dumps(instance).encode()
        started = time.perf_counter()
        expect_whole(await pipeline.decide_requests([pipeline.read([raw], now_ms=FUTURE_MS)]))
        taken.append(time.perf_counter() - started)
    await pipeline.close()
    taken = taken[100:]  # the first ones open connections and files
    return {
        "median_us": round(float(np.median(taken)) * 1e6),
        "p99_us": round(float(np.quantile(taken, 0.99)) * 1e6),
        "stage_median_us": {stage: round(float(np.median(s[100:])) * 1e6) for stage, s in stages.items()},
    }


def expect_whole(answered: list[list[Outcome]]) -> None:
    ((outcome,),) = answered
    if not isinstance(outcome, Decision) or outcome.degraded:
        raise RuntimeError(f"not scored as it should be: {outcome!r}")


if __name__ == "__main__":
    main()
