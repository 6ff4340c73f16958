"""Every store keeps the same histories: against the offline replay, among processes, through labels and resets."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fraud.checks.history import (
    measure_idempotency,
    measure_parity,
    scorer_for,
    shuffled_arrival,
    simulated,
    url_of,
    with_own_ids,
)
from fraud.decisions.labels import Label
from fraud.errors import SettingsError, StoreError
from fraud.features.featurizer import Histories
from fraud.history.encoding import encode, updates_of
from fraud.history.state import CUSTOMER
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import States, Store
from fraud.stores.sqlite import SqliteStore
from tests.asking import ask
from tests.conftest import EXAMPLES, PATIENT
from tests.processes import score_one_by_one
from tests.servers import Server
from tests.tiny import START_MS, transactions
from training.data import Mapping
from training.replay import transaction_spec


def of_run(name: str, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the ids a prefix of their own, for servers that several tests share."""
    ids = ("transaction_id", "customer_id", "merchant_id")
    return [{k: f"{name}-{v}" if k in ids else v for k, v in instance.items()} for instance in instances]


async def score(pipeline: Pipeline, instances: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return await ask(pipeline, instances, explain=True)


def alone(scorer: Scorer, instances: list[dict[str, Any]]) -> tuple[list[float], Histories]:
    """Raw margins and final states of transactions walked in one piece, without a store."""
    rows = [scorer.decoder.decode(json.dumps(instance).encode(), "$") for instance in instances]
    histories = Histories.new(rows)
    X = scorer.featurizer.advance(rows, histories)
    return scorer.score(X)[0].tolist(), histories


async def assert_same_states(store: Store, histories: Histories) -> None:
    recalled = await store.recall([], histories.customer_ids, histories.merchant_ids)
    assert recalled.degraded == ()
    assert recalled.histories.customers.tobytes() == histories.customers.tobytes()
    assert recalled.histories.merchants.tobytes() == histories.merchants.tobytes()


@pytest.fixture(scope="module")
def arriving() -> tuple[pd.DataFrame, Scorer]:
    table = simulated(600, 5)
    spec = transaction_spec(table, Mapping.from_yaml(EXAMPLES / "simulated.yaml"), slice(None))
    return table, scorer_for(table, spec)


def test_parity_with_the_offline_replay(opened: Callable[[], Store], arriving: tuple[pd.DataFrame, Scorer]) -> None:
    table = simulated(600, 5)  # ids of its own each time
    result = asyncio.run(measure_parity(shuffled_arrival(table, 5), arriving[1], opened(), 5, repeat_share=0.1))
    assert result.out_of_order > 0
    assert result.late > 0
    assert result.repeated > 30
    assert result.frauds_applied > 0
    assert result.holds, result


def test_parity_notices_a_difference(tmp_path: Path, arriving: tuple[pd.DataFrame, Scorer]) -> None:
    table, scorer = arriving

    class Forgetful(SqliteStore):
        async def recall(self, keys: Any, customer_ids: Any, merchant_ids: Any) -> Any:
            recalled = await super().recall(keys, customer_ids, merchant_ids)
            recalled.histories.customers["count"] //= 2
            return recalled

    result = asyncio.run(measure_parity(table[:200], scorer, Forgetful(tmp_path / "h.db", durable=False), 1))
    assert not result.holds
    assert result.differing_values > 0


def test_idempotency_of_two_workers(opened: Callable[[], Store], arriving: tuple[pd.DataFrame, Scorer]) -> None:

    result = asyncio.run(measure_idempotency(with_own_ids(arriving[0][:150]), arriving[1], [opened(), opened()], 6))
    assert result.sent > 2 * result.transactions
    assert result.holds, result


def test_a_fraud_is_told_once_and_only_of_what_was_scored(opened: Callable[[], Store], scorer: Scorer) -> None:
    async def run() -> None:
        store = opened()
        pipeline = Pipeline({"m": scorer}, store)
        instances = of_run(f"labels{id(store)}", transactions(3, 21, customers=1, merchants=1))
        instances[0].setdefault("merchant_id", f"m{id(store)}")
        await score(pipeline, instances)
        first = Label(instances[0]["transaction_id"], True, START_MS + 86_400_000)
        unknown = Label("never scored", True, START_MS)
        assert await store.apply_labels([first, unknown]) == ["applied", "unknown"]
        assert await store.apply_labels([first]) == ["known"]
        assert await store.apply_labels([unknown]) == ["unknown"]
        recalled = await store.recall([], [instances[0]["customer_id"]], [instances[0]["merchant_id"]])
        assert recalled.histories.customers["fraud_count"].tolist() == [1]
        assert recalled.histories.merchants["fraud_count"].tolist() == [1]
        assert recalled.histories.customers["last_label_time"].tolist() == [first.label_time_ms]
        await pipeline.close()

    asyncio.run(run())


def test_a_reset_forgets_the_history_and_keeps_the_decisions(opened: Callable[[], Store], scorer: Scorer) -> None:
    async def run() -> None:
        store = opened()
        pipeline = Pipeline({"m": scorer}, store)
        instances = of_run(f"reset{id(store)}", transactions(4, 22, customers=1))
        answers = await score(pipeline, instances[:3])
        customer = instances[0]["customer_id"]
        profile = await store.profile(customer)
        assert profile is not None
        assert profile.state["count"].tolist() == [3]
        assert await store.reset(customer)
        assert await store.profile(customer) is None
        assert not await store.reset(customer)
        assert await score(pipeline, instances[:3]) == answers
        await score(pipeline, instances[3:])
        profile = await store.profile(customer)
        assert profile is not None
        assert profile.state["count"].tolist() == [1]
        await pipeline.close()

    asyncio.run(run())


def test_a_backfill_is_the_history_of_what_follows(opened: Callable[[], Store], scorer: Scorer) -> None:
    async def run() -> None:
        store = opened()
        instances = of_run(f"backfill{id(store)}", transactions(120, 23, customers=4, merchants=3))
        _, past = alone(scorer, instances[:80])
        await store.backfill(States(past.customer_ids, past.merchant_ids, past.customers, past.merchants))
        pipeline = Pipeline({"m": scorer}, store)
        margins, states = alone(scorer, instances)
        assert [row["raw_margin"] for row in await score(pipeline, instances[80:])] == margins[80:]
        await assert_same_states(store, states)
        await pipeline.close()

    asyncio.run(run())


def test_the_silent_are_forgotten_and_no_one_else(opened: Callable[[], Store], scorer: Scorer) -> None:
    async def run() -> None:
        store = opened()
        pipeline = Pipeline({"m": scorer}, store)
        instances = of_run(f"expire{id(store)}", transactions(40, 28, customers=5, merchants=3))
        await score(pipeline, instances)
        _, states = alone(scorer, instances)
        assert await store.expire(START_MS) == 0  # all were heard of since
        await assert_same_states(store, states)
        latest = int(states.customers["last_time"].max())
        if isinstance(store, SqliteStore):  # the others go by the time of the news, which is now
            n_old = sum(int((s["last_time"] < latest).sum()) for s in (states.customers, states.merchants))
            assert await store.expire(latest) == n_old
            assert await store.expire(latest) == 0
            recalled = await store.recall([], states.customer_ids, states.merchant_ids)
            assert recalled.histories.customers["count"].astype(bool).sum() == 1
        await pipeline.close()

    asyncio.run(run())


@pytest.mark.parametrize(("kind", "processes"), [("sqlite", 2), ("redis", 8), ("redis+postgresql", 2)])
def test_processes_scoring_the_same_customers_lose_no_update(
    kind: str, processes: int, tiny_bundle: Path, scorer: Scorer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each transaction is sent by two of the processes; the states are those of a serial run."""
    url, cold = "sqlite:", None
    if kind != "sqlite":
        url = request.getfixturevalue("redis_server").url
    if kind == "redis+postgresql":
        cold = request.getfixturevalue("postgres_server").url
    options = StoreOptions(tmp_path, cold_store=cold, budget_ms=20_000.0, cold_budget_ms=20_000.0, durable=False)
    instances = of_run(f"{kind}{processes}", transactions(400, 24, customers=50, merchants=10))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    shares = [
        [t for i, t in enumerate(instances) if i % processes in (p, (p + 1) % processes)] for p in range(processes)
    ]
    running_ = [
        context.Process(target=score_one_by_one, args=(url, options, tiny_bundle, share, barrier)) for share in shares
    ]
    for process in running_:
        process.start()
    for process in running_:
        process.join(180)
    assert [process.exitcode for process in running_] == [0] * processes

    async def compare() -> None:
        store = open_store(url, options)
        await assert_same_states(store, alone(scorer, instances)[1])
        decided = (await store.recall([i["transaction_id"] for i in instances], [], [])).decided
        assert len(decided) == 400
        await store.close()

    asyncio.run(compare())


def test_what_redis_loses_is_rebuilt_from_postgresql(
    redis_server: Any, postgres_server: Server, scorer: Scorer
) -> None:
    async def run() -> None:
        options = StoreOptions(cold_store=postgres_server.url, **PATIENT)  # type: ignore[arg-type]
        pipeline = Pipeline({"m": scorer}, open_store(redis_server.url, options))
        instances = of_run("rebuilt", transactions(120, 25, customers=5, merchants=4))
        expected, states = alone(scorer, instances)
        answers = []
        for start in range(0, 120, 20):
            redis_server.forget_all()
            answers += await score(pipeline, instances[start : start + 20])
        assert [row["raw_margin"] for row in answers] == expected
        assert all(row["degraded"] == [] for row in answers)
        redis_server.forget_all()
        again = await score(pipeline, instances)  # decisions as well
        assert [row["raw_margin"] for row in again] == expected
        await assert_same_states(pipeline.store, states)
        await pipeline.close()

    asyncio.run(run())


def test_many_at_the_same_states_find_their_turn(redis_server: Server, scorer: Scorer) -> None:
    """Batches that share all their customers are recorded at once by several connections."""

    async def run() -> None:
        stores = [open_store(redis_server.url, StoreOptions(**PATIENT)) for _ in range(6)]  # type: ignore[arg-type]
        pipelines = [Pipeline({"m": scorer}, store) for store in stores]
        instances = of_run("crowd", transactions(600, 26, customers=3, merchants=2))
        parts = [instances[i::6] for i in range(6)]
        for start in range(0, 100, 20):
            pieces = zip(pipelines, parts, strict=True)
            await asyncio.gather(*(score(pipeline, part[start : start + 20]) for pipeline, part in pieces))
        await assert_same_states(stores[0], alone(scorer, instances)[1])
        for pipeline in pipelines:
            await pipeline.close()

    asyncio.run(run())


def test_a_state_takes_less_than_2_kb_a_customer(tmp_path: Path, scorer: Scorer) -> None:
    _, states = alone(scorer, transactions(50, 27, customers=1))
    blob = encode(states.customers[0])
    assert len(blob) == CUSTOMER.itemsize + 5 < 2000
    assert updates_of(blob) == 50


def test_a_store_of_another_release_is_refused(tmp_path: Path) -> None:
    asyncio.run(SqliteStore(tmp_path / "h.db").close())
    with closing(sqlite3.connect(tmp_path / "h.db")) as db, db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="has schema 99; this release reads schema"):
        SqliteStore(tmp_path / "h.db")


def test_an_unknown_store_is_refused_without_its_password() -> None:
    with pytest.raises(SettingsError, match=r"store mysql:…; allowed: sqlite:") as caught:
        open_store("mysql://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_a_store_may_be_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STORE", "redis://cache:6379/3")
    monkeypatch.delenv("FRAUD_COLD_STORE", raising=False)
    assert [url_of(kind) for kind in ("sqlite", "redis", "redis://other/1")] == [
        "sqlite:",
        "redis://cache:6379/3",
        "redis://other/1",
    ]
    with pytest.raises(SettingsError, match="--store postgresql needs a URL, here or in FRAUD_STORE"):
        url_of("postgresql")
