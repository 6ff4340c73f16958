"""Redis before PostgreSQL: what is read comes from Redis, what is recorded is on record in PostgreSQL.

A state in Redis is a copy of PostgreSQL's, written after each commit if it was told more than the one
there; what Redis does not have is read from PostgreSQL. While PostgreSQL is off, Redis is told directly and
PostgreSQL later; it then is told all of it and its states replace those in Redis. While Redis is off,
PostgreSQL is read, and the copies that went stale are renewed when Redis is back.
"""

from __future__ import annotations

from collections.abc import Sequence

from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreDown
from fraud.features.featurizer import Records
from fraud.history.profile import Profile
from fraud.history.state import encode
from fraud.stores.postgres import PostgresStore
from fraud.stores.protocol import Fraud, LabelOutcome, Recalled, Recorded, States, StoreStats, distinct
from fraud.stores.redis import RedisStore
from fraud.stores.resilient import PATIENT_S, CircuitBreaker, Resilient

MOST_STALE = 100_000


class Tiered:
    """A hot store before a cold one; see `fraud.stores.protocol.Store`.

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
        cold.on_late = self._copy

    @property
    def waiting(self) -> int:
        """Decisions that wait for PostgreSQL."""
        return self.cold.waiting

    async def open(self) -> None:
        await self.breaker.open()
        await self.cold.open()

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        try:
            recalled = await self.breaker.call(lambda: self.hot.recall(keys, customer_ids, merchant_ids))
        except StoreDown:
            return await self.cold.recall(keys, customer_ids, merchant_ids)
        recalled.decided |= self.cold.waiting_decisions(keys)
        await self._fill(recalled)
        return recalled

    async def _fill(self, recalled: Recalled) -> None:
        """Read from the cold store the states that the hot one does not have."""
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
        recorded = await self.cold.record(decided, transactions, recalled)
        if recorded.degraded:
            await self._tell_hot_alone(decided, transactions, recalled)
        else:
            await self._copy(recorded)
        return recorded

    async def _copy(self, recorded: Recorded) -> None:
        try:
            await self.breaker.call(lambda: self.hot.refresh(recorded.decided, *recorded.written))
        except StoreDown:
            self._mark_stale(recorded.written[0], recorded.written[1])

    async def _tell_hot_alone(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None
    ) -> None:
        """Tell the hot states while the cold store is off, but begin none that the cold store may have."""
        customers, merchants = (recalled and recalled.base) or ({}, {})
        whole = [
            i
            for i, d in enumerate(decided)
            if transactions is None
            or (customers.get(d.customer_id) and (not d.merchant_id or merchants.get(d.merchant_id)))
        ]
        if not whole:
            return
        some = [decided[i] for i in whole]
        try:
            await self.breaker.call(
                lambda: self.hot.record(some, None if transactions is None else transactions[whole], recalled)
            )
        except StoreDown:
            self._mark_stale(distinct(d.customer_id for d in some), distinct(d.merchant_id for d in some))

    def _mark_stale(
        self, customers: Sequence[str] | dict[str, bytes], merchants: Sequence[str] | dict[str, bytes]
    ) -> None:
        """Remember what to renew; past the most, the next commit of a customer does it."""
        for stale, names in ((self._stale_customers, customers), (self._stale_merchants, merchants)):
            for name in names:
                if len(stale) < MOST_STALE:
                    stale[name] = None

    async def _renew(self) -> None:
        """Copy from the cold store what went stale while the hot one was off."""
        while self._stale_customers or self._stale_merchants:
            customers, merchants = list(self._stale_customers)[:500], list(self._stale_merchants)[:500]
            known = await self.cold.breaker.call(lambda: self._postgres.recall([], customers, merchants), PATIENT_S)  # noqa: B023
            blobs = [
                {name: encode(state) for name, state in zip(names, states, strict=True) if state["count"]}
                for names, states in (
                    (customers, known.histories.customers),
                    (merchants, known.histories.merchants),
                )
            ]
            await self.breaker.within(lambda: self.hot.refresh([], *blobs), PATIENT_S)  # noqa: B023
            for name in customers:
                del self._stale_customers[name]
            for name in merchants:
                del self._stale_merchants[name]

    def stats(self) -> StoreStats:
        cold = self.cold.stats()
        outages, late_calls = self.breaker.stats()
        return StoreStats(cold.waiting, cold.outages | outages, cold.late_calls | late_calls)

    async def apply_labels(self, frauds: Sequence[Fraud]) -> list[LabelOutcome]:
        outcomes, written = await self.cold.breaker.call(lambda: self._postgres.tell(frauds), PATIENT_S)
        await self._copy(Recorded([], written=written))
        return outcomes

    async def profile(self, customer_id: str) -> Profile | None:
        return await self.cold.profile(customer_id)

    async def reset(self, customer_id: str) -> bool:
        known = await self.cold.reset(customer_id)
        await self.breaker.call(lambda: self.hot.reset(customer_id), PATIENT_S)
        return known

    async def backfill(self, states: States) -> None:
        await self.cold.backfill(states)
        await self.hot.backfill(states)

    async def expire(self, before_ms: int) -> int:
        return await self.cold.expire(before_ms)

    async def close(self) -> None:
        await self.breaker.close()
        await self.cold.close()
        await self.hot.close()
