"""Redis and PostgreSQL killed, frozen and slowed under load: every request is answered, and nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fraud.decisions.labels import Label
from fraud.errors import StoreError
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.postgres import PostgresStore
from fraud.stores.protocol import Store
from fraud.stores.redis import RedisStore
from fraud.stores.resilient import CircuitBreaker, Resilient
from fraud.stores.tiered import Tiered
from tests.asking import ask
from tests.servers import Server, SlowPath, wait_until
from tests.test_stores import alone, assert_same_states, of_run
from tests.tiny import START_MS, transactions

BUDGET_S = 0.08
DELAY_S = 0.05
"""Each way, so that an answer takes more than the budget."""


@dataclass
class Load:
    """Transactions sent one after another, each answer with the seconds it took."""

    pipeline: Pipeline
    waiting: list[dict[str, Any]]
    sent: list[dict[str, Any]] = field(default_factory=list)

    async def send(self, n: int) -> tuple[list[dict[str, Any]], float]:
        """Send n more; return the rows answered and the longest time one took."""
        rows, longest = [], 0.0
        for instance in self.waiting[:n]:
            started = time.perf_counter()
            rows += await ask(self.pipeline, [instance])
            longest = max(longest, time.perf_counter() - started)
            await asyncio.sleep(0.002)
        self.sent += self.waiting[:n]
        del self.waiting[:n]
        return rows, longest


def guards(store: Store) -> list[CircuitBreaker]:
    if isinstance(store, Tiered):
        return [store.breaker, store.cold.breaker]
    assert isinstance(store, Resilient)
    return [store.breaker]


async def until_back(store: Store) -> None:
    async with asyncio.timeout(30):
        while any(guard.is_down for guard in guards(store)):
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("fault", ["killed", "frozen", "slow"])
@pytest.mark.parametrize("faulty", ["redis", "postgresql", "redis before postgresql", "postgresql behind redis"])
def test_a_fault_costs_no_answer_and_no_update(
    faulty: str, fault: str, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    server = redis_server if faulty.startswith("redis") else postgres_server

    async def run() -> None:
        async with SlowPath(server.port) as path:
            through = server.url_at(path.port)
            options = StoreOptions(budget_ms=BUDGET_S * 1000, cold_budget_ms=BUDGET_S * 1000)
            if faulty == "redis before postgresql":
                store = open_store(through, replaced(options, cold_store=postgres_server.url))
            elif faulty == "postgresql behind redis":
                store = open_store(redis_server.url, replaced(options, cold_store=through))
            else:
                store = open_store(through, options)
            pipeline = Pipeline({"m": scorer}, store)
            name = f"{faulty[:5]}{len(faulty)}{fault}"
            load = Load(pipeline, of_run(name, transactions(190, 31, customers=12, merchants=6)))
            await load.send(3)  # connections are made, and may take longer than an answer
            await until_back(store)
            await healthy(load, 60)

            if fault == "killed":
                await asyncio.to_thread(server.kill)
            elif fault == "frozen":
                server.freeze()
            else:
                path.delay_s = DELAY_S
            rows, longest = await load.send(60)
            assert longest < 4 * BUDGET_S + 0.5, longest  # each of two stores read and written, on a busy machine
            degraded = [row["degraded"] for row in rows]
            if faulty == "redis before postgresql":  # which has all that Redis had
                assert degraded == [[]] * 60 or store.stats().outages["postgresql"]
            elif faulty == "postgresql behind redis":
                assert all("record" in of_row for of_row in degraded)
            else:
                assert all("record" in of_row and "history" in of_row for of_row in degraded[1:])

            if fault == "killed":
                await asyncio.to_thread(server.start)
            elif fault == "frozen":
                server.thaw()
            else:
                path.delay_s = 0.0
            await load.send(7)  # while it comes back, nothing is promised of degraded
            await until_back(store)
            await healthy(load, 60)
            await until_back(store)

            states = alone(scorer, load.sent)[1]
            await assert_same_states(store, states)
            of_record: Store = getattr(store, "cold", store)
            await assert_same_states(of_record, states)
            decided = (await of_record.recall([i["transaction_id"] for i in load.sent], [], [])).decided
            assert len(decided) == 190
            figures = store.stats()
            assert figures.waiting == 0
            name = "postgresql" if faulty.startswith("postgresql") else "redis"
            assert figures.outages[name] >= 1
            if fault != "killed":
                assert figures.late_calls[name] >= 1
            await pipeline.close()

    asyncio.run(run())


async def healthy(load: Load, n: int) -> None:
    """Send n transactions to stores that answer: nothing is degraded, unless this machine was too busy to answer."""
    before = sum(guard.counts["outages"] for guard in guards(load.pipeline.store))
    rows, _ = await load.send(n)
    if sum(guard.counts["outages"] for guard in guards(load.pipeline.store)) == before:
        assert [row["degraded"] for row in rows] == [[]] * n


def replaced(options: StoreOptions, **changes: Any) -> StoreOptions:
    return StoreOptions(**{**vars(options), **changes})


def test_a_retry_during_an_outage_gets_the_decision_that_waits(scorer: Scorer, redis_server: Server) -> None:
    async def run() -> None:
        store = Resilient(RedisStore(redis_server.url), 0.5)
        load = Load(Pipeline({"m": scorer}, store), of_run("retry", transactions(30, 32, customers=2, merchants=2)))
        await load.send(20)
        redis_server.freeze()
        first, _ = await load.send(10)
        load.waiting = load.sent[-10:]
        again, _ = await load.send(10)
        assert [{**row, "degraded": []} for row in again] == [{**row, "degraded": []} for row in first]
        assert store.stats().waiting == 10
        redis_server.thaw()
        await until_back(store)
        assert store.waiting == 0
        load.sent = load.sent[:30]
        await assert_same_states(store, alone(scorer, load.sent)[1])
        await load.pipeline.close()

    asyncio.run(run())


def test_a_score_during_an_outage_is_made_on_what_was_seen_last(scorer: Scorer, redis_server: Server) -> None:
    """One process that saw all of its customers' transactions scores them as if nothing had happened."""

    async def run() -> None:
        store = Resilient(RedisStore(redis_server.url), 0.5)
        load = Load(Pipeline({"m": scorer}, store), of_run("near", transactions(60, 33, customers=2, merchants=2)))
        await load.send(40)
        redis_server.freeze()
        await load.send(20)
        expected, _ = alone(scorer, load.sent)
        waiting = store.waiting_decisions([i["transaction_id"] for i in load.sent])
        margins = [waiting[i["transaction_id"]].raw_margin for i in load.sent[40:]]
        assert margins == expected[40:]
        redis_server.thaw()
        await until_back(store)
        await load.pipeline.close()

    asyncio.run(run())


def test_a_worker_that_starts_while_its_store_is_off_serves_without(scorer: Scorer, redis_server: Server) -> None:
    async def run() -> None:
        redis_server.kill()
        store = open_store(redis_server.url, StoreOptions(budget_ms=500))
        await store.open()
        load = Load(Pipeline({"m": scorer}, store), of_run("start", transactions(20, 37, customers=3)))
        rows, longest = await load.send(10)
        assert longest < 0.4  # nobody waits for a store that is known to be off
        assert [row["degraded"] for row in rows] == [["history", "record"]] * 10
        await asyncio.to_thread(redis_server.start)
        await until_back(store)
        await healthy(load, 10)
        await until_back(store)
        await assert_same_states(store, alone(scorer, load.sent)[1])
        await load.pipeline.close()

    asyncio.run(run())


def test_no_connection_is_left_open_whenever_the_store_is_given_up(postgres_server: Server) -> None:
    """A budget that ends, or a worker that stops, at any point of making the connections."""

    def connections() -> int:
        gc.collect()
        with psycopg.connect(postgres_server.url) as db:
            row = db.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'fraud-bento'").fetchone()
            assert row is not None
            return int(row[0])

    async def given_up(after_s: float, *, by_closing: bool) -> None:
        async with SlowPath(postgres_server.port) as path:
            path.delay_s = 0.01
            store = PostgresStore(postgres_server.url_at(path.port))
            guard = CircuitBreaker(store, BUDGET_S, store.ping)
            opening = asyncio.ensure_future(guard.within(store.open, 5.0 if by_closing else after_s))
            await asyncio.wait([opening], timeout=after_s)
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            del opening  # psycopg closes a connection that was never made when its last traceback is gone
            await store.close()
            await asyncio.to_thread(wait_until, lambda: connections() == 0, 5.0)

    for after_ms in range(20, 400, 40):
        for by_closing in (False, True):
            asyncio.run(given_up(after_ms / 1000, by_closing=by_closing))


def test_a_decision_kept_in_redis_while_postgresql_comes_back_is_recorded_before_the_next(
    scorer: Scorer, redis_server: Server, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        store = open_store(redis_server.url, StoreOptions(cold_store=postgres_server.url, budget_ms=5000))
        assert isinstance(store, Tiered)
        load = Load(Pipeline({"m": scorer}, store), of_run("meanwhile", transactions(16, 81, customers=2, merchants=1)))
        await healthy(load, 4)
        keep = store.hot.record

        async def keep_until_postgresql_is_back(*args: Any) -> Any:
            kept = await keep(*args)
            postgres_server.thaw()
            await until_back(store)
            return kept

        postgres_server.freeze()
        await load.send(3)
        with monkeypatch.context() as patch:
            patch.setattr(store.hot, "record", keep_until_postgresql_is_back)
            (row,), _ = await load.send(1)
        assert row["degraded"] == ["record"]
        await until_back(store)
        assert store.waiting == 0
        await healthy(load, 8)
        for of_store in (store, store.cold):
            await assert_same_states(of_store, alone(scorer, load.sent)[1])
        await load.pipeline.close()

    asyncio.run(run())


def test_a_state_that_changes_while_its_copy_is_renewed_is_renewed_again(
    scorer: Scorer, redis_server: Server, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        options = StoreOptions(cold_store=postgres_server.url, budget_ms=500, cold_budget_ms=5000)
        store = open_store(redis_server.url, options)
        assert isinstance(store, Tiered)
        load = Load(Pipeline({"m": scorer}, store), of_run("renewed", transactions(16, 82, customers=2, merchants=1)))
        await healthy(load, 4)
        refresh = store.hot.refresh

        async def refresh_after_further_decisions(*args: Any) -> Any:
            if len(load.sent) < 12:
                await load.send(4)
            return await refresh(*args)

        await asyncio.to_thread(redis_server.kill)
        await load.send(4)
        monkeypatch.setattr(store.hot, "refresh", refresh_after_further_decisions)
        await asyncio.to_thread(redis_server.start)
        await until_back(store)
        assert len(load.sent) == 12
        await assert_same_states(store, alone(scorer, load.sent)[1])
        await healthy(load, 4)
        await load.pipeline.close()

    asyncio.run(run())


def test_the_queue_is_bounded(scorer: Scorer, redis_server: Server) -> None:
    async def run() -> None:
        store = Resilient(RedisStore(redis_server.url), 0.5, queue=5)
        load = Load(Pipeline({"m": scorer}, store), of_run("bounded", transactions(12, 34)))
        await load.send(2)
        redis_server.freeze()
        await load.send(5)
        with pytest.raises(StoreError, match="5 decisions wait for redis already"):
            await load.send(1)
        with pytest.raises(StoreError, match="redis does not answer"):
            await store.apply_labels([Label(load.sent[0]["transaction_id"], True, START_MS)])
        redis_server.thaw()
        await until_back(store)
        rows, _ = await load.send(5)
        assert [row["degraded"] for row in rows] == [[]] * 5
        await load.pipeline.close()

    asyncio.run(run())


def test_closing_records_what_waits(scorer: Scorer, redis_server: Server) -> None:
    async def run() -> None:
        store = Resilient(RedisStore(redis_server.url), 0.2)
        load = Load(Pipeline({"m": scorer}, store), of_run("closing", transactions(10, 35)))
        await load.send(2)
        redis_server.freeze()
        await load.send(8)
        asyncio.get_running_loop().call_later(0.5, redis_server.thaw)
        await load.pipeline.close()
        after = RedisStore(redis_server.url)
        await assert_same_states(after, alone(scorer, load.sent)[1])
        await after.close()

    asyncio.run(run())


def test_the_event_loop_is_free_while_a_store_is_frozen(scorer: Scorer, redis_server: Server, tmp_path: Path) -> None:
    async def run() -> None:
        store = Resilient(RedisStore(redis_server.url), 0.3)
        load = Load(Pipeline({"m": scorer}, store), of_run("free", transactions(8, 36)))
        await load.send(4)
        redis_server.freeze()
        ticks = []

        async def tick() -> None:
            while True:
                ticks.append(time.perf_counter())
                await asyncio.sleep(0.005)

        ticking = asyncio.ensure_future(tick())
        await load.send(4)
        ticking.cancel()
        redis_server.thaw()
        await until_back(store)
        await load.pipeline.close()
        assert ticks[-1] - ticks[0] > 0.25  # the first one waited for its budget
        assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < 0.15

    asyncio.run(run())
