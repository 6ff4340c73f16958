"""What tests run in processes of their own. Each imports this module, in a fifth of the time that a test module takes.

`python -m tests.processes PATH NAME` writes decisions to a SQLite store from its first line of input on, and prints the
transaction ids that are acknowledged, until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fraud.decisions.chain import audit_key_of
from fraud.decisions.record import DecisionRecord
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.sqlite import SqliteStore
from tests.asking import ask

KEY = audit_key_of("a secret")


def score_one_by_one(
    url: str, options: StoreOptions, bundle: Path, instances: list[dict[str, Any]], barrier: Any
) -> None:
    """Score transactions once all processes are there."""

    async def run() -> None:
        pipeline = Pipeline({"m": Scorer.load(bundle)}, open_store(url, options))
        barrier.wait(120)
        for instance in instances:
            (row,) = await ask(pipeline, [instance], explain=True)
            assert row["degraded"] == []
        await pipeline.close()

    asyncio.run(run())


def decided(n: int, made_ms: int = 1_000, transaction_id: str | None = None) -> DecisionRecord:
    return DecisionRecord(
        transaction_id or f"t{n}",
        bytes(16),
        "m",
        "sha256:00",
        np.array([1.0, np.nan]).tobytes(),
        -1.5,
        0.25,
        False,
        "low",
        "approve",
        [],
        0,
        made_ms,
        f"r{n}",
    )


async def write_until_killed(path: Path, name: str) -> None:
    store = SqliteStore(path, audit_key=KEY)
    n = 0
    while True:
        some = [decided(n + i, transaction_id=f"{name}-{n + i}") for i in range(1 + n % 5)]
        await store.record(some, None)
        n += len(some)
        print(*(d.transaction_id for d in some), flush=True)


if __name__ == "__main__":
    sys.stdin.readline()
    asyncio.run(write_until_killed(Path(sys.argv[1]), sys.argv[2]))
