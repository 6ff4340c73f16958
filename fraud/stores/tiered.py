"""Redis before PostgreSQL: states are read from Redis, decisions are recorded in PostgreSQL.

A state in Redis is a copy of PostgreSQL's, written after each commit if it has more updates than the copy; states
missing in Redis are read from PostgreSQL. While PostgreSQL is off, Redis is updated at once and PostgreSQL later, and
PostgreSQL's states then replace those in Redis. While Redis is off, PostgreSQL is read, and stale copies are renewed
when Redis is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreDown
from fraud.features.featurizer import Records
from fraud.history.profile import Profile
from fraud.history.state import TRANSACTION
from fraud.stores.postgres import PostgresStore
from fraud.stores.protocol import RECORD, Recalled, Recorded, States, StoreHealth, StoreStats, distinct
from fraud.stores.redis import RedisStore
from fraud.stores.resilient import PATIENT_S, CircuitBreaker, Resilient

MOST_STALE = 100_000


class Tiered:
    """A hot store (cache) before a cold one (record); see `fraud.stores.protocol.Store`.

    Parameters
    ----------
    hot : RedisStore
    cold : Resilient
        Around a `PostgresStore`.
    budget_s : float
        Longest wait for one answer of the hot store, seconds.
    """

    def __init__(self, hot: RedisStore, cold: Resilient, budget_s: float) -> None:
        assert isinstance(cold.remote, PostgresStore)
        self.hot = hot
        self.cold = cold
        self.breaker = CircuitBreaker(hot, budget_s, self._renew)
        self._postgres = cold.remote
        self._stale_customers: dict[str, None] = {}
        self._stale_merchants: dict[str, None] = {}
        self._sweeping: asyncio.Task[None] | None = None
        cold.on_late = self._copy_late
        cold.on_back = self._sweep_soon

    @property
    def waiting(self) -> int:
        """Decisions that wait for PostgreSQL."""
        return self.cold.waiting

    async def open(self) -> None:
        await self.breaker.open()
        await self.cold.open()
        self._sweep_soon()  # what a worker that died has left

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        try:
            recalled = await self.breaker.call(lambda: self.hot.recall(keys, customer_ids, merchant_ids))
        except StoreDown:
            return await self.cold.recall(keys, customer_ids, merchant_ids)
        marked = {key: _unmarked(d) for key, d in recalled.decided.items() if RECORD in d.degraded}
        if marked:
            recalled.decided |= marked
            recalled.unrecorded = frozenset(marked)
        self.cold.add_waiting(recalled, keys)
        await self._fill(recalled)
        return recalled

    async def _fill(self, recalled: Recalled) -> None:
        """Read the states missing in the hot store from the cold one."""
        assert recalled.base is not None
        customers = [name for name, blob in recalled.base[0].items() if blob is None]
        merchants = [name for name, blob in recalled.base[1].items() if blob is None]
        if not customers and not merchants:
            return
        cold = await self.cold.recall([], customers, merchants)
        histories = recalled.histories
        for ids, records, names, found in (
            (histories.customer_ids, histories.customers, customers, cold.histories.customers),
            (histories.merchant_ids, histories.merchants, merchants, cold.histories.merchants),
        ):
            at = {name: i for i, name in enumerate(ids)}
            for name, record in zip(names, found, strict=True):
                records[at[name]] = record
        recalled.degraded += cold.degraded

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        try:
            recorded = await self.cold.record_now(decided, transactions, recalled)
        except StoreDown:
            self.cold.expect_room(decided)  # before anything of them is written
            return Recorded(await self._record_hot_alone(decided, transactions, recalled), (RECORD,))
        await self._copy(recorded)
        return recorded

    async def _copy(self, recorded: Recorded) -> None:
        try:
            await self.breaker.call(lambda: self.hot.refresh(recorded.decided, *recorded.written))
        except StoreDown:
            self._mark_stale(recorded.written[0], recorded.written[1])

    async def _copy_late(self, recorded: Recorded) -> None:
        await self._copy(recorded)
        with suppress(StoreDown):  # held once more, they are recorded once more, which changes nothing
            await self.breaker.call(lambda: self.hot.let_go([d.key for d in recorded.decided]))

    async def _record_hot_alone(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None
    ) -> list[DecisionRecord]:
        """Hold decisions in the hot store while the cold one is off; any worker may record them later.

        Returns for each the valid decision: itself, or the one that another worker made first. States are updated too,
        but a state that the cold store may have is not created.
        """
        customers, merchants = (recalled and recalled.base) or ({}, {})
        told = [
            transactions is not None
            and bool(customers.get(d.customer_id) and (not d.merchant_id or merchants.get(d.merchant_id)))
            for d in decided
        ]
        stands = list(decided)
        for is_told in (True, False):
            some = [i for i in range(len(decided)) if told[i] is is_told]
            if some:
                states = transactions[some] if transactions is not None and is_told else None
                for i, d in zip(some, await self._keep_hot([decided[i] for i in some], states, recalled), strict=True):
                    stands[i] = d
        own = [i for i, d in enumerate(decided) if stands[i] is d]
        if own:
            mine = [decided[i] for i in own], None if transactions is None else transactions[own]
            with suppress(StoreDown):  # they wait in memory alone then
                await self.breaker.call(lambda: self.hot.hold(*mine))
            self.cold.wait(*mine)
        return stands

    async def _keep_hot(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None
    ) -> list[DecisionRecord]:
        marked = [_marked(d) for d in decided]
        try:
            kept = (await self.breaker.call(lambda: self.hot.record(marked, transactions, recalled))).decided
        except StoreDown:
            if transactions is not None:
                self._mark_stale(distinct(d.customer_id for d in decided), distinct(d.merchant_id for d in decided))
            return list(decided)
        return [d if k is m else _unmarked(k) for d, m, k in zip(decided, marked, kept, strict=True)]

    def _sweep_soon(self) -> None:
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.ensure_future(self._sweep_until_done())

    async def _sweep_until_done(self) -> None:
        with suppress(StoreDown):  # swept again when that store is back
            await self._sweep()

    async def _sweep(self) -> int:
        """Record the decisions held in the hot store, also those of dead workers; return how many."""
        swept = cursor = 0
        while True:
            cursor, held = await self.breaker.call(lambda: self.hot.held(cursor), PATIENT_S)  # noqa: B023
            for has_history in (True, False):
                some = [(d, told) for d, told in held if bool(told) is has_history]
                if some:
                    decided = [d for d, _ in some]
                    told = (
                        np.frombuffer(b"".join(told for _, told in some), TRANSACTION).copy() if has_history else None
                    )
                    recorded = await self.cold.breaker.call(lambda: self._postgres.record(decided, told), PATIENT_S)  # noqa: B023
                    await self._copy_late(recorded)
                    swept += len(some)
            if not cursor:
                return swept

    async def _swept(self) -> bool:
        """Sweep if both stores answer; return whether a decision was held."""
        try:
            return await self._sweep() > 0
        except StoreDown:
            return False

    def _mark_stale(
        self, customers: Sequence[str] | dict[str, bytes], merchants: Sequence[str] | dict[str, bytes]
    ) -> None:
        """Remember states to renew, up to a limit; beyond it, the customer's next commit renews its state."""
        for stale, names in ((self._stale_customers, customers), (self._stale_merchants, merchants)):
            for name in names:
                if len(stale) < MOST_STALE:
                    stale[name] = None

    async def _renew(self) -> None:
        """Copy from the cold store the states that became stale while the hot one was off."""
        while self._stale_customers or self._stale_merchants:
            customers, merchants = list(self._stale_customers)[:500], list(self._stale_merchants)[:500]
            for name in customers:
                del self._stale_customers[name]
            for name in merchants:  # before they are read: one that changes meanwhile is marked anew, and read again
                del self._stale_merchants[name]
            try:
                found = await self.cold.breaker.call(lambda: self._postgres.blobs(customers, merchants), PATIENT_S)  # noqa: B023
                blobs = [{name: blob for name, blob in some.items() if blob is not None} for some in found]
                await self.breaker.within(lambda: self.hot.refresh([], *blobs), PATIENT_S)  # noqa: B023
            except BaseException:
                self._mark_stale(customers, merchants)
                raise
        self._sweep_soon()

    def stats(self) -> StoreStats:
        cold, hot = self.cold.stats(), self.breaker.stats()
        return StoreStats(
            cold.waiting, cold.off | hot.off, cold.outages | hot.outages, cold.late_calls | hot.late_calls
        )

    def health(self) -> StoreHealth:
        cold = self.cold.health()
        hot = () if self.breaker.outage is None else (self.breaker.outage,)
        return StoreHealth(hot + cold.outages, cold.refusal)

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        outcomes, written = await self.cold.breaker.call(lambda: self._postgres.tell(labels), PATIENT_S)
        await self._copy(Recorded([], written=written))
        if "unknown" not in outcomes or not await self._swept():
            return outcomes
        return [
            later if outcome == "unknown" else outcome
            for outcome, later in zip(outcomes, await self.apply_labels(labels), strict=True)
        ]

    async def labels(self, key: str) -> list[Label]:
        return await self.cold.labels(key)

    async def find(self, query: DecisionQuery) -> Page:
        return await self.cold.find(query)

    async def profile(self, customer_id: str) -> Profile | None:
        return await self.cold.profile(customer_id)

    async def reset(self, customer_id: str) -> bool:
        """Delete the copy first; if that fails, nothing is reset. Afterwards delete a copy made meanwhile."""
        await self.breaker.call(lambda: self.hot.reset(customer_id), PATIENT_S)
        known = await self.cold.reset(customer_id)
        await self.breaker.call(lambda: self.hot.reset(customer_id), PATIENT_S)
        return known

    async def backfill(self, states: States) -> None:
        await self.cold.backfill(states)
        await self.hot.backfill(states)

    async def expire(self, before_ms: int) -> int:
        return await self.cold.expire(before_ms)

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait([self._sweeping])
        await self.breaker.close()
        await self.cold.close()
        await self.hot.close()


def _marked(decided: DecisionRecord) -> DecisionRecord:
    """Return a decision as the hot store holds it before it is on record: with ``record`` in `degraded`."""
    return msgspec.structs.replace(decided, degraded=[*decided.degraded, RECORD])


def _unmarked(decided: DecisionRecord) -> DecisionRecord:
    return msgspec.structs.replace(decided, degraded=[name for name in decided.degraded if name != RECORD])
