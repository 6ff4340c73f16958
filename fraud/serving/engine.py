"""The serving engine: the pipeline behind a micro-batcher, with past model versions to explain their decisions."""

from __future__ import annotations

import gc
from typing import Protocol

import msgspec

from fraud.errors import NotReady, Overloaded, PastVersion, StoreError
from fraud.models.turns import set_usual_turns
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import Outcome, PendingRow, Rejection
from fraud.stores.cases import NO_CASES, CaseStore
from fraud.stores.followed_lists import FollowedLists
from fraud.stores.protocol import described


class Follows(Protocol):
    """What the engine needs of the active models."""

    def describe(self) -> dict[str, object]:
        """Swaps that failed, for ``/readyz``."""

    async def refresh(self) -> str:
        """Look for other versions now, on W&B too; returns the outcome of the W&B poll."""

    async def switch(self, name: str, reference: str, *, why: str) -> None:
        """Promote another version of a model, and serve it."""

    async def load_past(self, name: str, digest: str) -> None:
        """Load a version that is no longer served, if it is still stored."""


class Engine:
    """A pipeline behind a micro-batcher; until `start` and after `stop` it is not ready."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._batcher: MicroBatcher[ScoreRequest, list[Outcome]] | None = None
        self._models: Follows | None = None
        self._lists: FollowedLists | None = None
        self._cases: CaseStore | None = None

    def start(
        self,
        pipeline: Pipeline,
        batcher: MicroBatcher[ScoreRequest, list[Outcome]],
        models: Follows | None = None,
        lists: FollowedLists | None = None,
        cases: CaseStore | None = None,
    ) -> None:
        """Start serving a loaded and warm pipeline on the running event loop.

        Objects alive now live as long as the process, so they are frozen: full garbage collections over them would stop
        the service for 50 ms and more. `Worker.start` disables the collector during start-up, where there is little
        garbage. The switch interval is 1 ms instead of 5, so that a large request scored in a thread delays the event
        loop less.
        """
        self._pipeline, self._batcher, self._models, self._lists = pipeline, batcher, models, lists
        self._cases = cases
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

    @property
    def is_ready(self) -> bool:
        """Whether a loaded pipeline is in service."""
        return self._pipeline is not None

    @property
    def lists(self) -> FollowedLists:
        """The lists of the rules; raises `NotReady` when there are none yet."""
        if self._lists is None:
            raise NotReady("no lists are read yet")
        return self._lists

    @property
    def cases(self) -> CaseStore:
        """The cases; raises `StoreError` where the store keeps none, and `NotReady` before the start."""
        if self._pipeline is None:
            raise NotReady("no model is loaded yet")
        if self._cases is None:
            raise StoreError(NO_CASES)
        return self._cases

    def stop(self) -> None:
        """Stop being ready; the owner of the batcher and the pipeline closes them."""
        self._pipeline = self._batcher = None

    def admit(self) -> Pipeline:
        """Return the pipeline for a request, before any work is done for it.

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
        """Decide on a request, batched with those of other callers; returns the outcomes of its rows, in order.

        Rows that need a past version for their explanation are decided again once it is loaded.

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

    def readiness(self) -> dict[str, object]:
        """Return what is served; `status` is ready, degraded or refusing. Raises `NotReady` if no model is loaded."""
        if self._pipeline is None or self._batcher is None:
            raise NotReady("no model is loaded yet")
        models = {} if self._models is None else self._models.describe()
        served = msgspec.to_builtins(self._pipeline.describe())
        stores = described(self._pipeline.store.health())
        lists = {} if self._lists is None else {"lists": self._lists.describe()}
        return {"queued_rows": self._batcher.queued_rows, "models": served, **stores, **lists, **models}

    def expect_ready(self) -> dict[str, object]:
        """Return `readiness` for load balancers; raises `NotReady` if requests would be refused."""
        readiness = self.readiness()
        health = self.pipeline.store.health()
        if health.refusal is not None:
            stores = "".join(f"; {o.store} is off since {o.since}: {o.reason}" for o in health.outages)
            raise NotReady(f"decisions are refused: {health.refusal}{stores}")
        return readiness

    async def switch(self, name: str, reference: str, *, why: str) -> None:
        """Promote another version of a model, and serve it.

        Raises
        ------
        RegistryError, BundleError
            It is unknown, pinned or damaged; what is served stays.
        """
        if self._models is None:
            raise NotReady("no model is loaded yet")
        await self._models.switch(name, reference, why=why)

    async def refresh(self) -> dict[str, object]:
        """Look for other versions now, in this worker; returns what is then served, and whether W&B was asked."""
        if self._models is None:
            raise NotReady("no model is loaded yet")
        return {"wandb_look": await self._models.refresh(), **self.readiness()}
