"""The pipeline in service: behind a micro-batcher, with earlier model versions at hand to explain what they decided."""

from __future__ import annotations

import gc
from typing import Any, Protocol

import msgspec

from fraud.errors import NotReady, Overloaded, PastVersion
from fraud.models.turns import set_usual_turns
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import Outcome, PendingRow, Rejection
from fraud.stores.protocol import described


class Follows(Protocol):
    """What the engine shows of the models behind the pipeline."""

    def describe(self) -> dict[str, Any]:
        """Swaps that failed, for ``/readyz``."""

    async def refresh(self) -> str:
        """Look for other versions at once, on W&B too; returns what came of asking it."""

    async def load_past(self, name: str, digest: str) -> None:
        """Have a version at hand that is served no more, if it is still there."""


class Engine:
    """A pipeline behind a micro-batcher; until `start` and after `stop` it is not ready."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._batcher: MicroBatcher[ScoreRequest, list[Outcome]] | None = None
        self._models: Follows | None = None

    def start(
        self,
        pipeline: Pipeline,
        batcher: MicroBatcher[ScoreRequest, list[Outcome]],
        models: Follows | None = None,
    ) -> None:
        """Take a loaded and warm pipeline into service; on the running event loop.

        What lives now lives as long as the process: it is taken out of the garbage collector's sight, whose full
        passes over the imported modules would otherwise stop the service for 50 ms and more. `Worker.start` kept the
        collector off while it was built, for it would have found next to nothing. Threads take turns each millisecond
        instead of each fifth, so that a large request that is scored in one delays the loop less.
        """
        self._pipeline, self._batcher, self._models = pipeline, batcher, models
        gc.freeze()
        gc.set_threshold(10_000, 20, 100)
        gc.enable()
        set_usual_turns(0.001)

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline in service; raises `NotReady` when there is none."""
        if self._pipeline is None:
            raise NotReady("no model is loaded yet")
        return self._pipeline

    def stop(self) -> None:
        """Be not ready from now on; who started the batcher and the pipeline closes them."""
        self._pipeline = self._batcher = None

    def admit(self) -> Pipeline:
        """Return the pipeline that is to read a request, before any work is done for it.

        Raises
        ------
        NotReady
            No model is loaded.
        Overloaded
            Too many rows wait already.
        """
        pipeline, batcher = self._pipeline, self._batcher
        if pipeline is None or batcher is None:
            raise NotReady("no model is loaded yet")
        if batcher.full:
            raise Overloaded(f"{batcher.queued_rows} rows are waiting already; try again shortly")
        return pipeline

    async def decide(self, request: ScoreRequest) -> list[Outcome]:
        """Decide on a request together with those of other callers; returns the outcomes of its rows, in order.

        Rows that only an earlier version can explain go through the pipeline again when it is loaded.

        Raises
        ------
        Overloaded
            Too many rows wait already.
        NotReady
            No model is loaded.
        """
        if request.is_rejected:
            return [row for row in request.rows if isinstance(row, Rejection)]
        batcher = self._batcher
        if batcher is None:
            raise NotReady("no model is loaded yet")
        outcomes = await batcher.submit(request)
        if request.explain and self._models is not None:
            past = {
                i: outcome.error
                for i, outcome in enumerate(outcomes)
                if isinstance(outcome, Rejection) and isinstance(outcome.error, PastVersion)
            }
            if past:
                for name, digest in {(error.name, error.digest): None for error in past.values()}:
                    await self._models.load_past(name, digest)
                again = request.only([row for i in past if isinstance(row := request.rows[i], PendingRow)])
                for i, outcome in zip(past, await batcher.submit(again), strict=True):
                    outcomes[i] = outcome
        return outcomes

    def readiness(self) -> dict[str, Any]:
        """What is served, and how well: `status` is ready, degraded or refusing; raises `NotReady` when nothing is."""
        if self._pipeline is None or self._batcher is None:
            raise NotReady("no model is loaded yet")
        models = {} if self._models is None else self._models.describe()
        served = msgspec.to_builtins(self._pipeline.describe())
        stores = described(self._pipeline.store.health())
        return {"queued_rows": self._batcher.queued_rows, "models": served, **stores, **models}

    def expect_ready(self) -> dict[str, Any]:
        """`readiness`, for those who would send callers here; raises `NotReady` where callers would be refused."""
        readiness = self.readiness()
        if readiness["status"] == "refusing":
            stores = "".join(f"; {s['store']} is off since {s['since']}: {s['reason']}" for s in readiness["stores"])
            raise NotReady(f"decisions are refused: {readiness['reason']}{stores}")
        return readiness

    async def refresh(self) -> dict[str, Any]:
        """Look for other versions at once, in this worker; returns what is served then, and whether W&B was asked."""
        if self._models is None:
            raise NotReady("no model is loaded yet")
        return {"wandb_look": await self._models.refresh(), **self.readiness()}
