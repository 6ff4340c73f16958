"""The one way a body is scored, whether it came through the front door or through BentoML."""

from __future__ import annotations

import gc
import sys
from typing import Any, Protocol

from fraud.errors import FraudError, NotReady, Overloaded, PastVersion
from fraud.pipeline.batching import HasRows, MicroBatcher


class Scores(Protocol):
    """What the engine needs of the data plane."""

    def decode(self, body: bytes, *, explain: bool, request_id: str) -> Any:
        """Read one body; raises `RequestError` when the whole of it is bad."""

    async def run(self, requests: list[Any]) -> list[bytes | FraudError]:
        """Score one micro-batch; each caller's JSON answer, or the error that is its own."""

    def describe(self) -> dict[str, Any]:
        """The models served, for ``/readyz``."""

    async def close(self) -> None: ...


class Follows(Protocol):
    """What the engine shows of the models behind the data plane."""

    def describe(self) -> dict[str, Any]:
        """Swaps that failed, for ``/readyz``."""

    async def refresh(self) -> str:
        """Look for other versions at once, on W&B too; returns what came of asking it."""

    async def load_past(self, name: str, digest: str) -> None:
        """Have a version at hand that is served no more, if it is still there."""


class Engine:
    """A data plane behind a micro-batcher; until `start` and after `stop` it is not ready."""

    def __init__(self) -> None:
        self._dataplane: Scores | None = None
        self._batcher: MicroBatcher[HasRows, bytes] | None = None
        self._models: Follows | None = None

    def start(self, dataplane: Scores, batcher: MicroBatcher[Any, bytes], models: Follows | None = None) -> None:
        """Take a loaded and warm data plane into service; on the running event loop.

        What lives now lives as long as the process: it is taken out of the garbage collector's sight, whose full
        passes over the imported modules would otherwise stop the service for 50 ms and more. `service.start` kept the
        collector off while it was built, for it would have found next to nothing. Threads take turns each millisecond
        instead of each fifth, so that a large request that is scored in one delays the loop less.
        """
        self._dataplane, self._batcher, self._models = dataplane, batcher, models
        gc.freeze()
        gc.set_threshold(10_000, 20, 100)
        gc.enable()
        sys.setswitchinterval(0.001)

    @property
    def dataplane(self) -> Any:
        """The data plane in service; raises `NotReady` when there is none."""
        if self._dataplane is None:
            raise NotReady("no model is loaded yet")
        return self._dataplane

    async def stop(self) -> None:
        dataplane, batcher = self._dataplane, self._batcher
        self._dataplane = self._batcher = None
        if batcher is not None:
            await batcher.close()
        if dataplane is not None:
            await dataplane.close()

    async def answer(self, body: bytes, *, explain: bool, request_id: str = "") -> bytes:
        """Score the instances of a JSON body; returns the JSON answer.

        Raises
        ------
        RequestError
            The body as a whole cannot be scored.
        Overloaded
            Too many rows wait already.
        NotReady
            No model is loaded.
        """
        dataplane, batcher = self._dataplane, self._batcher
        if dataplane is None or batcher is None:
            raise NotReady("no model is loaded yet")
        if batcher.full:
            raise Overloaded(f"{batcher.queued_rows} rows are waiting already; try again shortly")
        request = dataplane.decode(body, explain=explain, request_id=request_id)
        try:
            return await batcher.submit(request)
        except PastVersion as error:
            if self._models is not None:
                await self._models.load_past(error.name, error.digest)
            request.is_second_try = True
            return await batcher.submit(request)

    def readiness(self) -> dict[str, Any]:
        """What is served; raises `NotReady` when nothing is."""
        if self._dataplane is None or self._batcher is None:
            raise NotReady("no model is loaded yet")
        models = {} if self._models is None else self._models.describe()
        return {"status": "ready", "queued_rows": self._batcher.queued_rows, **self._dataplane.describe(), **models}

    async def refresh(self) -> dict[str, Any]:
        """Look for other versions at once, in this worker; returns what is served then, and whether W&B was asked."""
        if self._models is None:
            raise NotReady("no model is loaded yet")
        return {"wandb_look": await self._models.refresh(), **self.readiness()}
