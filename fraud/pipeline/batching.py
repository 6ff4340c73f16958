"""The micro-batcher: requests that arrive together are scored in one call.

A request that finds the scorer idle is scored on the next turn of the event loop, together with whatever else
arrived in the same turn.  While a batch is scored, the next one gathers, so batches grow with the load and there is no
waiting time to tune. Requests of many rows have their own queue, so they do not delay small ones.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from fraud.errors import Overloaded, SettingsError

logger = logging.getLogger("fraud.pipeline.batching")

BACKLOG_ROWS = 64
"""Fewer rows than these are no backlog: too few to estimate the time per row, and not refused for waiting."""


class HasRows(Protocol):
    @property
    def n_rows(self) -> int: ...


RequestT = TypeVar("RequestT", bound=HasRows)
OutcomeT = TypeVar("OutcomeT")
_Waiting = tuple[RequestT, asyncio.Future[OutcomeT]]
Run = Callable[[list[RequestT]], Awaitable[Sequence[OutcomeT | Exception]]]


class MicroBatcher(Generic[RequestT, OutcomeT]):
    """Score concurrent requests together; each caller gets its own outcome or its own error.

    Parameters
    ----------
    run : callable
        ``async run(requests) -> outcomes``, one outcome per request in the same order; an outcome that is an exception
        is raised to its caller alone. For a request of many rows it should yield to the event loop regularly.
    max_batch_rows : int
        Rows scored in one call of `run`; the rest waits for the next call.
    bulk_rows : int
        A request of more rows than this is scored by itself in the bulk queue, beside the small ones.
    max_queued_rows : int
        Rows that may wait in each queue; a request beyond it is refused at once.
    max_wait_s : float
        A small request is refused at once when more rows are queued before it than were lately scored in this time, or
        when the oldest request has waited longer than this.
    clock : callable
        Seconds, monotonic.

    Raises
    ------
    SettingsError
        When a limit is not positive.

    Notes
    -----
    Must be made and used on one running event loop.
    """

    def __init__(
        self,
        run: Run[RequestT, OutcomeT],
        *,
        max_batch_rows: int = 1024,
        bulk_rows: int = 64,
        max_queued_rows: int = 4096,
        max_wait_s: float = 0.06,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_batch_rows, bulk_rows, max_queued_rows) < 1:
            raise SettingsError("the batcher's limits are counted in rows and must be 1 or more")
        self._bulk_rows = bulk_rows
        self._small = _BatchQueue(run, max_batch_rows, max_queued_rows, clock, max_wait_s)
        self._bulk = _BatchQueue(run, 1, max_queued_rows, clock)  # 1: a batch is never more than one such request

    @property
    def queued_rows(self) -> int:
        """Rows that wait, in both queues."""
        return self._small.rows + self._bulk.rows

    @property
    def full(self) -> bool:
        """Whether even a request of one row would be refused now."""
        return self._small.refuses(1)

    def submit(self, request: RequestT) -> asyncio.Future[OutcomeT]:
        """Queue a request; the future returns its outcome or raises its error.

        Cancelling the future withdraws the request if it is still queued, and affects no other request.

        Raises
        ------
        Overloaded
            At once, when the queue is full.
        """
        queue = self._small if request.n_rows <= self._bulk_rows else self._bulk
        return queue.put(request)

    async def close(self) -> None:
        """Stop scoring; waiting callers get `Overloaded` and may try another worker."""
        await self._small.close()
        await self._bulk.close()


class _BatchQueue(Generic[RequestT, OutcomeT]):
    """One queue and the one task that scores from it."""

    def __init__(
        self,
        run: Run[RequestT, OutcomeT],
        max_batch_rows: int,
        max_queued_rows: int,
        clock: Callable[[], float],
        max_wait_s: float = math.inf,
    ) -> None:
        self.rows = 0
        self._run = run
        self._clock = clock
        self._max_batch_rows = max_batch_rows
        self._max_queued_rows = max_queued_rows
        self._max_wait_s = max_wait_s
        self._under_way = 0
        self._row_s = 0.0  # seconds that a row of a larger batch took lately, reading the next ones included
        self._queue: deque[tuple[RequestT, asyncio.Future[OutcomeT], float]] = deque()
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._task = self._loop.create_task(self._work())

    def refuses(self, n_rows: int) -> bool:
        if not self._queue:
            return self._task.done()
        rows = self.rows + n_rows
        if rows <= BACKLOG_ROWS:  # a stall of the machine is no overload
            return rows > self._max_queued_rows
        waits_s = max((rows + self._under_way) * self._row_s, self._clock() - self._queue[0][2])
        return waits_s > self._max_wait_s or rows > self._max_queued_rows

    def put(self, request: RequestT) -> asyncio.Future[OutcomeT]:
        if self.refuses(request.n_rows):
            raise Overloaded(f"{self.rows} rows are waiting already; try again shortly")
        outcome: asyncio.Future[OutcomeT] = self._loop.create_future()
        self._queue.append((request, outcome, self._clock()))
        self.rows += request.n_rows
        if self._wake is not None:
            self._wake.set_result(None)
            self._wake = None
        return outcome

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        for _, caller in self._take(self.rows + 1):
            caller.set_exception(Overloaded("this worker is stopping; try again"))

    async def _work(self) -> None:
        while True:
            since = self._clock()
            if self._queue:
                await asyncio.sleep(0)  # the answers of the last batch go out before the next is scored
            else:
                self._wake = self._loop.create_future()
                await self._wake
                since = self._clock()
            waiting = self.rows
            batch = self._take(self._max_batch_rows)
            self._under_way = waiting - self.rows
            if batch:
                await self._score(batch)
                self._note((self._clock() - since) / self._under_way)
            self._under_way = 0

    def _note(self, row_s: float) -> None:
        """Update the time per row; a small batch spends more on each row, so it only gives an upper bound."""
        if self._under_way > BACKLOG_ROWS:
            self._row_s += 0.3 * (row_s - self._row_s) if self._row_s else row_s
        else:
            self._row_s = min(self._row_s, row_s)

    def _take(self, max_rows: int) -> list[_Waiting[RequestT, OutcomeT]]:
        """Requests in order of arrival, at least one, up to `max_rows`; withdrawn ones are dropped."""
        batch: list[_Waiting[RequestT, OutcomeT]] = []
        taken_rows = 0
        while self._queue:
            request, caller, _ = self._queue[0]
            if batch and taken_rows + request.n_rows > max_rows:
                break
            self._queue.popleft()
            self.rows -= request.n_rows
            if not caller.done():
                batch.append((request, caller))
                taken_rows += request.n_rows
        return batch

    async def _score(self, batch: list[_Waiting[RequestT, OutcomeT]]) -> None:
        try:
            outcomes = await self._run([request for request, _ in batch])
            if len(outcomes) != len(batch):
                raise RuntimeError(f"{len(batch)} requests were scored, {len(outcomes)} outcomes came back")
        except asyncio.CancelledError:
            for _, caller in batch:
                if not caller.done():
                    caller.set_exception(Overloaded("this worker is stopping; try again"))
            raise
        except Exception as error:
            await self._isolate(batch, error)
            return
        for (_, caller), outcome in zip(batch, outcomes, strict=True):
            if caller.done():
                continue
            if isinstance(outcome, Exception):
                caller.set_exception(outcome)
            else:
                caller.set_result(outcome)

    async def _isolate(self, batch: list[_Waiting[RequestT, OutcomeT]], error: Exception) -> None:
        """Run a batch that failed as a whole one request at a time, so that only the faulty request fails."""
        if len(batch) == 1:
            caller = batch[0][1]
            if not caller.done():
                caller.set_exception(error)
            return
        logger.error("a batch of %d requests failed; scoring them one by one", len(batch), exc_info=error)
        for item in batch:
            await self._score([item])
