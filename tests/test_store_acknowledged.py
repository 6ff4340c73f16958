"""A decision that was answered says what it lacks as long as it lacks it, and reaches the record."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import redis

from fraud.decisions.labels import Label
from fraud.errors import StoreError
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.postgres import PostgresStore
from fraud.stores.redis import UNRECORDED
from fraud.stores.resilient import Resilient
from fraud.stores.tiered import Tiered
from tests.servers import Server
from tests.test_store_faults import until_back
from tests.test_stores import alone, assert_same_states, of_run, score
from tests.tiny import START_MS, transactions

PATIENT_MS = 2_000.0


async def degraded(pipeline: Pipeline, instances: list[dict[str, Any]]) -> list[list[str]]:
    return [row["degraded"] for row in await score(pipeline, instances)]


async def on_record(url: str, instances: list[dict[str, Any]]) -> list[bool]:
    """Look whether transactions are on record in PostgreSQL, past everything that remembers them."""
    store = PostgresStore(url)
    known = (await store.recall([i["transaction_id"] for i in instances], [], [])).decided
    await store.close()
    return [i["transaction_id"] in known for i in instances]


async def until_on_record(url: str, instances: list[dict[str, Any]]) -> None:
    async with asyncio.timeout(20):
        while not all(await on_record(url, instances)):
            await asyncio.sleep(0.05)


def tiered(redis_server: Server, postgres_server: Server, **changes: Any) -> StoreOptions:
    return StoreOptions(cold_store=postgres_server.url, budget_ms=PATIENT_MS, cold_budget_ms=PATIENT_MS, **changes)


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
def test_a_retry_says_what_the_decision_lacks(
    kind: str, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    """Also twice in one request, and beside a row that is on record; each row says it of itself."""
    server = redis_server if kind == "redis" else postgres_server

    async def run() -> None:
        store = open_store(server.url, StoreOptions(budget_ms=PATIENT_MS, cold_budget_ms=PATIENT_MS))
        assert isinstance(store, Resilient)
        pipeline = Pipeline({"m": scorer}, store)
        o1, o2, o3 = of_run(f"o{kind}", transactions(3, 61, customers=1, merchants=1))
        assert await degraded(pipeline, [o1]) == [[]]
        await asyncio.to_thread(server.kill)
        first = await score(pipeline, [o2])
        assert first[0]["degraded"] == ["history", "record"]
        assert await score(pipeline, [o2]) == first
        assert await score(pipeline, [o2, o2]) == first * 2
        assert await degraded(pipeline, [o3, o2, o3]) == [["history", "record"]] * 3
        assert store.waiting == 2
        assert pipeline.counts["degraded_record"] == 7
        await asyncio.to_thread(server.start)
        await until_back(store)
        assert await degraded(pipeline, [o1, o2, o3]) == [[], ["history"], ["history"]]
        await assert_same_states(store, alone(scorer, [o1, o2, o3])[1])
        await pipeline.close()

    asyncio.run(run())


def test_rows_on_record_lack_nothing_beside_rows_that_are_not(
    scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    async def run() -> None:
        store = open_store(redis_server.url, tiered(redis_server, postgres_server))
        pipeline = Pipeline({"m": scorer}, store)
        old, new = of_run("beside", transactions(2, 62, customers=1, merchants=1))
        assert await degraded(pipeline, [old]) == [[]]
        await asyncio.to_thread(postgres_server.kill)
        assert await degraded(pipeline, [old, new, old]) == [[], ["record"], []]
        await asyncio.to_thread(postgres_server.start)
        await until_back(store)
        assert await degraded(pipeline, [old, new]) == [[], []]
        await pipeline.close()

    asyncio.run(run())


def test_a_decision_is_on_record_though_its_worker_was_killed(
    tiny_bundle: Path, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    """Answered by one worker while PostgreSQL is off, again by another, and recorded by a third."""
    options = tiered(redis_server, postgres_server)
    instances = of_run("killed", transactions(12, 63, customers=3, merchants=2))
    before, during = instances[:6], instances[6:]

    async def run() -> None:
        pipeline = Pipeline({"m": scorer}, open_store(redis_server.url, options))
        assert await degraded(pipeline, before) == [[]] * 6
        await asyncio.to_thread(postgres_server.kill)
        first = await asyncio.to_thread(answered_and_killed, redis_server.url, options, tiny_bundle, during)
        assert all("record" in row["degraded"] for row in first)
        assert await score(pipeline, during) == first  # this worker never made these decisions
        await asyncio.to_thread(postgres_server.start)
        await until_back(pipeline.store)
        await until_on_record(postgres_server.url, during)
        again = await score(pipeline, during)
        assert again == [{**row, "degraded": [x for x in row["degraded"] if x != "record"]} for row in first]
        await pipeline.close()
        of_record = open_store(postgres_server.url, options)
        await assert_same_states(of_record, alone(scorer, instances)[1])
        await of_record.close()

    asyncio.run(run())
    client = redis.Redis(port=redis_server.port)
    assert client.hlen(UNRECORDED) == 0
    client.close()


def test_a_retry_puts_on_record_what_only_redis_remembers(
    tiny_bundle: Path, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    """As after a worker that died between the two writes that it makes in Redis."""
    options = tiered(redis_server, postgres_server, personal_fields=("customer_id", "merchant_id"), personal_key="k")
    instances = of_run("between", transactions(8, 64, customers=2, merchants=1))
    for instance in instances:
        instance.setdefault("merchant_id", "between-m")

    async def run() -> None:
        before = Pipeline({"m": scorer}, open_store(redis_server.url, options))
        assert await degraded(before, instances[:4]) == [[]] * 4
        await before.close()
        await asyncio.to_thread(postgres_server.kill)
        first = await asyncio.to_thread(answered_and_killed, redis_server.url, options, tiny_bundle, instances[4:])
        client = redis.Redis(port=redis_server.port)
        assert client.hlen(UNRECORDED) == 4
        client.delete(UNRECORDED)
        client.close()
        await asyncio.to_thread(postgres_server.start)
        store = open_store(redis_server.url, options)
        await store.open()
        assert await on_record(postgres_server.url, instances[4:]) == [False] * 4
        pipeline = Pipeline({"m": scorer}, store)
        again = await score(pipeline, instances[4:])
        assert again == [{**row, "degraded": [x for x in row["degraded"] if x != "record"]} for row in first]
        assert await on_record(postgres_server.url, instances[4:]) == [True] * 4
        profile = await store.profile(instances[0]["customer_id"])
        assert profile is not None
        ours = [i for i in instances if i["customer_id"] == instances[0]["customer_id"]]
        assert profile.state["count"].tolist() == [len(ours)]  # each once, under the one hash of the customer
        assert await degraded(pipeline, instances) == [[]] * 8
        await pipeline.close()

    asyncio.run(run())


def test_a_label_finds_a_decision_that_redis_still_holds(
    tiny_bundle: Path, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    options = tiered(redis_server, postgres_server)
    instances = of_run("labelled", transactions(3, 65, customers=1, merchants=1))

    async def run() -> None:
        store = open_store(redis_server.url, options)
        await store.open()
        await asyncio.to_thread(postgres_server.kill)
        await asyncio.to_thread(answered_and_killed, redis_server.url, options, tiny_bundle, instances)
        frauds = [Label(name, True, START_MS) for name in (instances[0]["transaction_id"], "labelled-never-scored")]
        with pytest.raises(StoreError):  # to be told again, not unknown
            await store.apply_labels(frauds)
        await asyncio.to_thread(postgres_server.start)
        await until_back(store)
        assert await store.apply_labels(frauds) == ["applied", "unknown"]
        await store.close()

    asyncio.run(run())


def test_what_is_refused_is_written_nowhere(scorer: Scorer, redis_server: Server, postgres_server: Server) -> None:
    async def run() -> None:
        store = open_store(redis_server.url, tiered(redis_server, postgres_server, queue=1))
        assert isinstance(store, Tiered)
        pipeline = Pipeline({"m": scorer}, store)
        first, waits, refused = of_run("refused", transactions(3, 66, customers=1, merchants=1))
        await score(pipeline, [first])
        await asyncio.to_thread(postgres_server.kill)
        assert await degraded(pipeline, [waits]) == [["record"]]
        with pytest.raises(StoreError, match="1 decisions wait for postgresql already"):
            await score(pipeline, [refused])
        assert await degraded(pipeline, [waits]) == [["record"]]  # what waits already has its place
        assert refused["transaction_id"] not in (await store.hot.recall([refused["transaction_id"]], [], [])).decided
        await asyncio.to_thread(postgres_server.start)
        await until_back(store)
        assert await on_record(postgres_server.url, [first, waits, refused]) == [True, True, False]
        await pipeline.close()

    asyncio.run(run())


@pytest.mark.parametrize("off", ["redis", "postgresql"])
def test_a_reset_that_is_refused_forgets_nothing(
    off: str, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    async def run() -> None:
        store = open_store(redis_server.url, tiered(redis_server, postgres_server))
        pipeline = Pipeline({"m": scorer}, store)
        instances = of_run(f"reset-{off}", transactions(3, 67, customers=1, merchants=1))
        await score(pipeline, instances)
        server = redis_server if off == "redis" else postgres_server
        await asyncio.to_thread(server.kill)
        with pytest.raises(StoreError):
            await store.reset(instances[0]["customer_id"])
        await asyncio.to_thread(server.start)
        await until_back(store)
        await assert_same_states(store, alone(scorer, instances)[1])
        assert await store.reset(instances[0]["customer_id"])
        assert await store.profile(instances[0]["customer_id"]) is None
        await pipeline.close()

    asyncio.run(run())


def answered_and_killed(
    url: str, options: StoreOptions, bundle: Path, instances: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the answers of a worker of its own, which is killed as soon as it has given them."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=answering, args=(url, options, bundle, instances, there))
    process.start()
    there.close()
    assert here.poll(60)
    rows: list[dict[str, Any]] = json.loads(here.recv())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    here.close()
    return rows


def answering(
    url: str, options: StoreOptions, bundle: Path, instances: list[dict[str, Any]], answers: Connection
) -> None:
    async def run(scores: Callable[[Pipeline, list[dict[str, Any]]], Any]) -> None:
        store = open_store(url, options)
        await store.open()
        answers.send(json.dumps(await scores(Pipeline({"m": Scorer.load(bundle)}, store), instances)))
        time.sleep(60)  # nothing more happens in this process: it is killed

    asyncio.run(run(score))
