"""The micro-batcher against scoring each request alone: same answers, own errors, bounded queue."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest

from fraud.errors import FraudError, InvalidRequest, Overloaded, SettingsError
from fraud.pipeline.batching import MicroBatcher

T = TypeVar("T")
WEIGHTS = np.random.default_rng(0).integers(-9, 10, size=15).astype(np.float64)


@dataclass(frozen=True)
class Rows:
    X: np.ndarray[Any, np.dtype[np.float64]]
    fault: str = ""

    @property
    def n_rows(self) -> int:
        return len(self.X)


def rows(rng: np.random.Generator, n: int = 1, fault: str = "") -> Rows:
    """Small whole numbers, so that every sum is exact in any order."""
    return Rows(rng.integers(-99, 100, size=(n, 15)).astype(np.float64), fault)


def score(X: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    scores: bytes = (X * WEIGHTS).sum(axis=1).tobytes()
    return scores


class LinearScorer:
    """A scorer of real arithmetic that records its batches; `pause` is how long one call lets the loop run."""

    def __init__(self, pause_turns: int = 0) -> None:
        self.batches: list[int] = []
        self.pause_turns = pause_turns

    async def __call__(self, requests: list[Rows]) -> list[bytes | FraudError]:
        self.batches.append(len(requests))
        if any(request.fault == "crash" for request in requests):
            raise ZeroDivisionError("a bug")
        X = np.concatenate([request.X for request in requests])
        for _ in range(self.pause_turns):
            await asyncio.sleep(0)
        scores = (X * WEIGHTS).sum(axis=1)
        outcomes: list[bytes | FraudError] = []
        start = 0
        for request in requests:
            own = scores[start : start + request.n_rows]
            start += request.n_rows
            outcomes.append(InvalidRequest("bad row") if request.fault == "bad" else own.tobytes())
        return outcomes


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 30))


class QuickLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to what is due next, so that a machine's speed is no part of a test."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def run_quickly(main: Callable[[QuickLoop], Coroutine[Any, Any, T]]) -> T:
    loop = QuickLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()


def test_every_answer_equals_its_single_answer_in_order_and_count() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(1), LinearScorer(pause_turns=2)
        batcher = MicroBatcher(scorer, max_batch_rows=32, bulk_rows=16, max_queued_rows=10_000)
        requests = [rows(rng, int(rng.integers(1, 40))) for _ in range(300)]

        async def call(request: Rows) -> bytes:
            for _ in range(random.Random(request.n_rows).randrange(20)):
                await asyncio.sleep(0)
            return await batcher.submit(request)

        answers = await asyncio.gather(*[call(request) for request in requests])
        assert answers == [score(request.X) for request in requests]
        assert sum(scorer.batches) == 300
        assert max(scorer.batches) > 1
        assert batcher.queued_rows == 0
        await batcher.close()

    run(main())


def test_one_turn_gathers_into_one_batch_and_a_lone_request_goes_at_once() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(2), LinearScorer()
        batcher = MicroBatcher(scorer)
        await asyncio.sleep(0)
        await asyncio.gather(*[batcher.submit(rows(rng)) for _ in range(20)])
        assert scorer.batches == [20]

        lone = batcher.submit(rows(rng))
        turns = 0
        while not lone.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns == 1
        await batcher.close()

    run(main())


def test_batches_grow_while_one_is_being_scored() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(3), LinearScorer(pause_turns=10)
        batcher = MicroBatcher(scorer)
        await asyncio.sleep(0)
        first = batcher.submit(rows(rng))
        await asyncio.sleep(0)
        others = []
        for _ in range(8):
            others.append(batcher.submit(rows(rng)))
            await asyncio.sleep(0)
        await asyncio.gather(first, *others)
        assert scorer.batches == [1, 8]
        await batcher.close()

    run(main())


def test_a_batch_is_bounded_in_rows() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(4), LinearScorer()
        batcher = MicroBatcher(scorer, max_batch_rows=10, bulk_rows=10)
        await asyncio.gather(*[batcher.submit(rows(rng, 4)) for _ in range(5)])
        assert scorer.batches == [2, 2, 1]
        await batcher.close()

    run(main())


@pytest.mark.parametrize("fault", ["bad", "crash"])
def test_only_the_faulty_caller_gets_the_error(fault: str) -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(5), LinearScorer()
        batcher = MicroBatcher(scorer)
        requests = [rows(rng, fault=fault if i % 7 == 3 else "") for i in range(50)]
        outcomes = await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)
        for request, outcome in zip(requests, outcomes, strict=True):
            if request.fault:
                assert isinstance(outcome, InvalidRequest if fault == "bad" else ZeroDivisionError)
            else:
                assert outcome == score(request.X)
        await batcher.close()

    run(main())


def test_outcomes_that_do_not_match_the_requests_are_nobodys_answer() -> None:
    async def main() -> None:
        async def loses_one(requests: list[Rows]) -> list[bytes | FraudError]:
            return [b"answer"] * (len(requests) - 1) if len(requests) > 1 else [b"own answer"]

        batcher = MicroBatcher(loses_one)
        rng = np.random.default_rng(6)
        assert await asyncio.gather(*[batcher.submit(rows(rng)) for _ in range(3)]) == [b"own answer"] * 3
        await batcher.close()

    run(main())


def test_a_cancelled_caller_changes_nothing_for_the_others() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(7), LinearScorer(pause_turns=5)
        batcher = MicroBatcher(scorer)
        await asyncio.sleep(0)
        requests = [rows(rng) for _ in range(6)]
        taken = [batcher.submit(request) for request in requests[:3]]
        await asyncio.sleep(0)
        queued = [batcher.submit(request) for request in requests[3:]]
        taken[1].cancel()
        queued[1].cancel()
        answers = await asyncio.gather(*taken, *queued, return_exceptions=True)
        for i, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            if i in (1, 4):
                assert isinstance(answer, asyncio.CancelledError)
            else:
                assert answer == score(request.X)
        assert scorer.batches == [3, 2]  # the one withdrawn in time was not scored
        assert batcher.queued_rows == 0
        await batcher.close()

    run(main())


def test_a_full_queue_refuses_at_once_and_recovers() -> None:
    async def main() -> None:
        rng, scorer = np.random.default_rng(8), LinearScorer(pause_turns=3)
        batcher = MicroBatcher(scorer, max_queued_rows=10)
        await asyncio.sleep(0)
        accepted = [batcher.submit(rows(rng)) for _ in range(10)]
        assert batcher.full is True
        with pytest.raises(Overloaded, match="10 rows are waiting already; try again shortly"):
            batcher.submit(rows(rng))
        await asyncio.gather(*accepted)
        assert batcher.queued_rows == 0
        await batcher.submit(rows(rng))
        await batcher.close()

    run(main())


def test_what_waits_too_long_refuses_the_next_at_once_and_recovers() -> None:
    async def main(loop: QuickLoop) -> None:
        rng = np.random.default_rng(12)
        released = asyncio.Event()

        async def stalled(requests: list[Rows]) -> list[bytes | FraudError]:
            await released.wait()
            return [score(request.X) for request in requests]

        batcher = MicroBatcher(stalled, max_wait_s=0.05, clock=loop.time)
        await asyncio.sleep(0)
        accepted = [batcher.submit(rows(rng))]
        await asyncio.sleep(0)
        accepted += [batcher.submit(rows(rng)) for _ in range(63)]
        await asyncio.sleep(0.06)
        full = [batcher.full]  # so few are no backlog, however long a stall makes them wait
        accepted.append(batcher.submit(rows(rng)))
        assert [*full, batcher.full] == [False, True]
        with pytest.raises(Overloaded, match="64 rows are waiting already"):
            batcher.submit(rows(rng))
        bulk = batcher.submit(rows(rng, 100))
        released.set()
        await asyncio.gather(*accepted, bulk)
        await batcher.submit(rows(rng))
        await batcher.close()

    run_quickly(main)


def test_a_backlog_longer_than_what_is_scored_in_time_refuses_at_once() -> None:
    async def main(loop: QuickLoop) -> None:
        rng = np.random.default_rng(13)

        async def slow(requests: list[Rows]) -> list[bytes | FraudError]:
            await asyncio.sleep(0.0005 * len(requests))
            return [score(request.X) for request in requests]

        batcher = MicroBatcher(slow, max_wait_s=0.1, clock=loop.time)
        accepted: list[asyncio.Future[bytes]] = []
        waits: list[float] = []
        refused = 0

        def note(submitted: float, _: asyncio.Future[bytes]) -> None:
            if submitted > settled:
                waits.append(loop.time() - submitted)

        settled = loop.time() + 0.7
        deadline = settled + 0.5
        while loop.time() < deadline:
            for _ in range(10):  # up to 10,000 a second arrive, 2,000 are scored
                try:
                    answer = batcher.submit(rows(rng))
                except Overloaded:
                    refused += 1
                    continue
                answer.add_done_callback(functools.partial(note, loop.time()))
                accepted.append(answer)
            await asyncio.sleep(0.001)
        await asyncio.gather(*accepted)
        assert refused > len(accepted)
        assert len(waits) > 100
        assert np.percentile(waits, 99) < 0.25
        await batcher.close()

    run_quickly(main)


def test_a_stall_is_forgotten_once_rows_are_quick_again() -> None:
    async def main(loop: QuickLoop) -> None:
        rng = np.random.default_rng(14)
        pause_s = 0.2

        async def pausing(requests: list[Rows]) -> list[bytes | FraudError]:
            await asyncio.sleep(pause_s)
            return [score(request.X) for request in requests]

        batcher = MicroBatcher(pausing, max_wait_s=0.1, clock=loop.time)
        await asyncio.sleep(0)
        await asyncio.gather(*[batcher.submit(rows(rng)) for _ in range(70)])
        pause_s = 0.0
        accepted = [batcher.submit(rows(rng)) for _ in range(64)]
        with pytest.raises(Overloaded):
            batcher.submit(rows(rng))
        await asyncio.gather(*accepted)
        await asyncio.gather(*[batcher.submit(rows(rng)) for _ in range(1000)])
        await batcher.close()

    run_quickly(main)


def test_a_request_larger_than_the_queue_is_scored_when_nothing_waits() -> None:
    async def main() -> None:
        rng = np.random.default_rng(9)
        batcher = MicroBatcher(LinearScorer(), max_queued_rows=10, bulk_rows=5)
        huge = rows(rng, 100)
        answer = batcher.submit(huge)
        with pytest.raises(Overloaded):
            batcher.submit(rows(rng, 6))
        assert await answer == score(huge.X)
        await batcher.close()

    run(main())


def test_huge_requests_hold_up_no_small_one() -> None:
    async def main(loop: QuickLoop) -> None:
        rng = np.random.default_rng(10)
        finished: list[str] = []

        async def row_by_row(requests: list[Rows]) -> list[bytes | FraudError]:
            for request in requests:
                for _ in range(request.n_rows // 64):
                    await asyncio.sleep(0)
            return [score(request.X) for request in requests]

        batcher = MicroBatcher(row_by_row, bulk_rows=64, max_queued_rows=8000, clock=loop.time)

        async def call(name: str, request: Rows) -> None:
            assert await batcher.submit(request) == score(request.X)
            finished.append(name)

        calls = [call("huge", rows(rng, 6400)), call("huge", rows(rng, 500))]
        calls += [call("small", rows(rng)) for _ in range(900)]
        await asyncio.gather(*calls)
        assert finished[:900] == ["small"] * 900
        await batcher.close()

    run_quickly(main)


def test_closing_answers_those_who_wait() -> None:
    async def main() -> None:
        rng = np.random.default_rng(11)
        batcher = MicroBatcher(LinearScorer(pause_turns=100))
        await asyncio.sleep(0)
        taken = batcher.submit(rows(rng))
        await asyncio.sleep(0)
        queued = batcher.submit(rows(rng))
        await batcher.close()
        for answer in (taken, queued):
            with pytest.raises(Overloaded, match="this worker is stopping"):
                await answer
        with pytest.raises(Overloaded):
            batcher.submit(rows(rng))

    run(main())


def test_limits_must_be_positive() -> None:
    async def main() -> None:
        with pytest.raises(SettingsError, match="1 or more"):
            MicroBatcher(LinearScorer(), max_batch_rows=0)

    run(main())
