"""Keeps a remote store that may be slow or unreachable within its time budget.

While it does not answer, scores use the local cache of recent customers, and records wait in memory, in order, until
the store is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreDown, StoreError
from fraud.features.featurizer import Histories, Records
from fraud.history.profile import Profile
from fraud.stores.protocol import (
    RECORD,
    Outage,
    Recalled,
    Recorded,
    States,
    Store,
    StoreHealth,
    StoreStats,
    Unread,
)
from fraud.stores.states import Change, histories_of

logger = logging.getLogger("fraud.stores")

CACHED_STATES = 10_000
PROBE_FIRST_S = 0.01
PROBE_LAST_S = 0.5
PATIENT_S = 5.0
"""The budget of calls outside of scoring: catching up, labels, profiles."""
DRAIN_ROWS = 200

T = TypeVar("T")


class Probed(Protocol):
    """What a circuit breaker needs of its store."""

    name: str

    async def open(self) -> None:
        """Make the connections that calls need."""

    async def ping(self) -> None:
        """Return if the store accepts writes; raise `StoreDown` if not."""


class Remote(Store, Probed, Protocol):
    """A store on another machine."""


class CircuitBreaker:
    """Holds calls to a store to a budget; one that exceeds it takes the store off until it answers again.

    Parameters
    ----------
    remote : Probed
    budget_s : float
        Longest wait for one call, seconds.
    catch_up : callable
        Is awaited when the store answers again, before calls reach it; raises `StoreDown` to try later.

    Attributes
    ----------
    counts : Counter
        ``calls``, ``calls_out_of_budget``, ``outages``.
    outage : Outage or None
        Since when the store is off, and why, as the latest probe saw it.
    """

    def __init__(self, remote: Probed, budget_s: float, catch_up: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.budget_s = budget_s
        self.counts: Counter[str] = Counter()
        self._remote = remote
        self._catch_up = catch_up
        self._probe: asyncio.Task[None] | None = None
        self._is_new = True
        self.outage: Outage | None = None

    @property
    def is_down(self) -> bool:
        return self._probe is not None

    async def open(self) -> None:
        """Connect with a long timeout, before the first call; a store that does not answer is taken off."""
        self._is_new = False
        try:
            await self.within(self._remote.open, PATIENT_S)
        except StoreDown as error:
            self._take_off(error)

    async def call(self, operation: Callable[[], Awaitable[T]], budget_s: float | None = None) -> T:
        """Return what an operation returns.

        Raises
        ------
        StoreDown
            At once while the store is off; within the budget otherwise.
        """
        if self._probe is not None:
            raise StoreDown(f"{self._remote.name} does not answer")
        self.counts["calls"] += 1
        try:
            if self._is_new:
                self._is_new = False
                await self.within(self._remote.open, PATIENT_S)
            return await self.within(operation, budget_s or self.budget_s)
        except StoreDown as error:
            self._take_off(error)
            raise

    async def within(self, operation: Callable[[], Awaitable[T]], budget_s: float) -> T:
        """Return what an operation returns, or raise `StoreDown` after `budget_s` without waiting for it to end."""
        answer = operation()
        task = answer if isinstance(answer, asyncio.Future) else asyncio.ensure_future(_awaited(answer))
        try:
            await asyncio.wait({task}, timeout=budget_s)
            for _ in range(8):  # an answer that came while the loop was busy is not late
                if task.done():
                    return task.result()
                await asyncio.sleep(0)
        finally:
            if not task.done():  # not awaited: cancelling may have to wait for the store as well
                task.cancel()
                task.add_done_callback(_forget)
        self.counts["calls_out_of_budget"] += 1
        raise StoreDown(f"{self._remote.name} did not answer within {budget_s * 1000:g} ms")

    def stats(self, waiting: int = 0) -> StoreStats:
        """Return how the store is doing, with the decisions that wait for it."""
        name = self._remote.name
        return StoreStats(
            waiting,
            {name: int(self.is_down)},
            {name: self.counts["outages"]},
            {name: self.counts["calls_out_of_budget"]},
        )

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])

    def keep_off(self, reason: str) -> None:
        """Take the store off, if it is not, until it has caught up: its backlog is written before any newer call."""
        self._take_off(StoreDown(f"{self._remote.name}: {reason}"))

    def _take_off(self, error: StoreDown) -> None:
        if self._probe is None:
            logger.warning("store %s is off: %s", self._remote.name, error.message)
            self.counts["outages"] += 1
            self.outage = self._outage(error, time.time_ns() // 1_000_000)
            self._probe = asyncio.ensure_future(self._until_back())

    async def _until_back(self) -> None:
        pause_s = PROBE_FIRST_S
        while True:
            try:
                await self.within(self._remote.open, PATIENT_S)  # which may well take longer than a call
                await self.within(self._remote.ping, self.budget_s)
                await self._catch_up()
                break
            except StoreDown as error:
                self._still_off(error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, PROBE_LAST_S)
            except Exception:
                logger.exception("store %s answers, but its backlog cannot be written", self._remote.name)
                await asyncio.sleep(PROBE_LAST_S)
        self._probe = self.outage = None  # no await since the backlog was seen empty
        logger.warning("store %s is back", self._remote.name)

    def _still_off(self, error: StoreDown) -> None:
        """Keep the latest reason; log once one that needs an operator."""
        assert self.outage is not None
        if error.is_permanent and not self.outage.is_permanent:
            logger.error("store %s stays off until an operator acts: %s", self._remote.name, error.message)
        self.outage = self._outage(error, self.outage.since_ms)

    def _outage(self, error: StoreDown, since_ms: int) -> Outage:
        return Outage(self._remote.name, since_ms, error.message, error.is_permanent)


async def _awaited(answer: Awaitable[T]) -> T:
    return await answer


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


class LocalCache:
    """The latest encoded states of customers and merchants that this process saw; an LRU cache."""

    def __init__(self, most: int = CACHED_STATES) -> None:
        self._most = most
        self._customers: OrderedDict[str, bytes] = OrderedDict()
        self._merchants: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, customers: dict[str, bytes], merchants: dict[str, bytes]) -> None:
        for kept, new in ((self._customers, customers), (self._merchants, merchants)):
            for name, blob in new.items():
                kept[name] = blob
                kept.move_to_end(name)
            while len(kept) > self._most:
                kept.popitem(last=False)

    def apply(self, change: Change) -> None:
        """Apply a change to the cached states, as a store would."""
        self.keep(*change.apply(self._customers, self._merchants))

    def forget(self, customer_id: str) -> None:
        self._customers.pop(customer_id, None)

    def histories(self, customer_ids: list[str], merchant_ids: list[str]) -> tuple[Histories, Unread]:
        return histories_of(customer_ids, merchant_ids, self._customers, self._merchants)


class Resilient:
    """A remote store held to a budget; see `fraud.stores.protocol.Store`.

    Parameters
    ----------
    remote : Remote
    budget_s : float
        Longest wait for one answer, seconds.
    queue : int
        Decisions that may wait while the store is off.
    on_late : callable, optional
        Is awaited with the results of late recording, and the decisions.
    on_back : callable, optional
        Is called when the queue is empty; calls reach the store again when it returns.
    """

    def __init__(
        self,
        remote: Remote,
        budget_s: float,
        queue: int = 20_000,
        on_late: Callable[[Recorded], Awaitable[None]] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> None:
        self.remote = remote
        self.breaker = CircuitBreaker(remote, budget_s, self._catch_up)
        self.cache = LocalCache()
        self.on_late = on_late
        self.on_back = on_back
        self._most = queue
        self._waiting: dict[str, tuple[DecisionRecord, Any]] = {}

    @property
    def waiting(self) -> int:
        """Decisions that wait for the store."""
        return len(self._waiting)

    async def open(self) -> None:
        await self.breaker.open()

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        try:
            recalled = await self.breaker.call(lambda: self.remote.recall(keys, customer_ids, merchant_ids))
        except StoreDown:
            degraded = "history" if customer_ids else "recall"
            histories, unread = self.cache.histories(customer_ids, merchant_ids)
            recalled = Recalled({}, histories, (degraded,), unread=unread)
        self.add_waiting(recalled, keys)
        return recalled

    def add_waiting(self, recalled: Recalled, keys: Sequence[str]) -> None:
        """Add the decisions waiting here to a recall."""
        if self._waiting:
            waiting = self.waiting_decisions(keys)
            recalled.decided |= waiting
            recalled.unrecorded = recalled.unrecorded.union(waiting)

    def waiting_decisions(self, keys: Sequence[str]) -> dict[str, DecisionRecord]:
        return {key: self._waiting[key][0] for key in keys if key in self._waiting}

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        try:
            return await self.record_now(decided, transactions, recalled)
        except StoreDown:
            self.expect_room(decided)
            self.wait(decided, transactions)
            return Recorded(list(decided), (RECORD,))

    async def record_now(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None
    ) -> Recorded:
        """Record without waiting for a store that is off; raises `StoreDown` then."""
        recorded = await self.breaker.call(lambda: self.remote.record(decided, transactions, recalled))
        self.cache.keep(*recorded.written)
        return recorded

    def stats(self) -> StoreStats:
        return self.breaker.stats(self.waiting)

    def health(self) -> StoreHealth:
        if self.breaker.outage is None:
            return StoreHealth()
        is_full = self.waiting >= self._most
        return StoreHealth(
            (self.breaker.outage,), f"{self.waiting} decisions wait for {self.remote.name}" if is_full else None
        )

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return await self.breaker.call(lambda: self.remote.apply_labels(labels), PATIENT_S)

    async def labels(self, key: str) -> list[Label]:
        return await self.breaker.call(lambda: self.remote.labels(key), PATIENT_S)

    async def find(self, query: DecisionQuery) -> Page:
        if self.breaker.is_down:
            raise StoreDown(f"{self.remote.name} does not answer")
        return await self.breaker.within(lambda: self.remote.find(query), PATIENT_S)  # late, it is no outage

    async def profile(self, customer_id: str) -> Profile | None:
        return await self.breaker.call(lambda: self.remote.profile(customer_id), PATIENT_S)

    async def reset(self, customer_id: str) -> bool:
        known = await self.breaker.call(lambda: self.remote.reset(customer_id), PATIENT_S)
        self.cache.forget(customer_id)
        return known

    async def backfill(self, states: States) -> None:
        await self.remote.backfill(states)

    async def expire(self, before_ms: int) -> int:
        return await self.remote.expire(before_ms)

    async def close(self) -> None:
        await self.breaker.close()
        if self._waiting:
            try:
                await self.breaker.within(self._catch_up, PATIENT_S)
            except StoreError:
                logger.error("%d decisions were not recorded: %s is off", self.waiting, self.remote.name)
        await self.remote.close()

    def expect_room(self, decided: Sequence[DecisionRecord]) -> None:
        """Raise `StoreError` if these decisions cannot wait."""
        n_new = sum(d.key not in self._waiting for d in decided)
        if n_new and self.waiting + n_new > self._most:
            raise StoreError(f"{self.waiting} decisions wait for {self.remote.name} already; try again later")

    def wait(self, decided: Sequence[DecisionRecord], transactions: Records | None) -> None:
        """Queue decisions until the store is back; those already queued are not applied again."""
        new = [i for i, d in enumerate(decided) if d.key not in self._waiting]
        for i in new:
            self._waiting[decided[i].key] = decided[i], None if transactions is None else transactions[i]
        if transactions is not None and new:
            self.cache.apply(Change.of([decided[i] for i in new], transactions[new]))
        if new:
            self.breaker.keep_off("decisions came to wait for it while it came back")

    async def _catch_up(self) -> None:
        """Record the queued decisions in order; the store records each transaction id once."""
        while self._waiting:
            keys = list(self._waiting)[:DRAIN_ROWS]
            has_history = self._waiting[keys[0]][1] is not None
            keys = [key for key in keys if (self._waiting[key][1] is not None) == has_history]
            decided = [self._waiting[key][0] for key in keys]
            transactions = np.array([self._waiting[key][1] for key in keys]) if has_history else None
            recorded = await self.breaker.within(lambda: self.remote.record(decided, transactions), PATIENT_S)  # noqa: B023
            self.cache.keep(*recorded.written)
            if self.on_late is not None:
                await self.on_late(recorded)
            for key in keys:
                del self._waiting[key]
        if self.on_back is not None:
            self.on_back()
