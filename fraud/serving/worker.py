"""One worker of the service: the composition root, where all its parts are made, started and stopped."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack

from fraud.composition import Composition
from fraud.environment import remarks
from fraud.models.served import Packed
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import DecideRequests, ScoreRequest
from fraud.pipeline.rows import Outcome
from fraud.serving.engine import Engine
from fraud.serving.front_door import Observer, RequestCheck
from fraud.serving.http import Call
from fraud.serving.security import AccessControl
from fraud.settings import Settings
from fraud.stores.cases import NO_CASES, CaseStore, keeps_cases, open_cases
from fraud.stores.opening import StoreOptions
from fraud.telemetry import logs

logger = logging.getLogger("fraud.serving.worker")


class Worker:
    """Made once per worker process, before its front door.

    Parameters
    ----------
    settings : Settings
    packed : Packed
        The models packed in the running Bento.

    Attributes
    ----------
    engine : Engine
        Serves the routes; ready between `start` and `stop`.
    checks, observers : list of callable
        Those of the front door, in the order in which they are called.

    Raises
    ------
    SettingsError
        An API key cannot be read, or keys are required and there is none.
    """

    def __init__(self, settings: Settings, packed: Packed) -> None:
        logs.configure_logging(settings.log.level, settings.log.format)
        for remark in remarks():
            logger.warning("%s", remark)
        self.engine = Engine()
        self._parts = Composition(settings, packed)
        telemetry = self._parts.telemetry
        self.checks: list[RequestCheck] = [_name_request]
        self.observers: list[Observer] = [telemetry.answered]
        self._settings = settings
        self._running = AsyncExitStack()
        self._on_stage: list[Callable[[str, float], None]] = [telemetry.stage]
        self._around_batch: list[Callable[[DecideRequests], DecideRequests]] = []
        if settings.telemetry.otlp_endpoint:
            self._trace()
        self._around_batch.append(telemetry.timed)
        self.checks.append(AccessControl.of(settings))
        if settings.log.requests != "none":
            self.observers.append(logs.RequestLog(settings.log.requests, settings.log.format))

    async def start(self) -> None:
        """Start every part after its dependencies; if one fails, those already started are stopped in reverse order.

        Raises
        ------
        FraudError
            A model or the store is not available.
        """
        gc.disable()  # until the engine starts
        async with self._running as starting:
            parts = self._parts
            await parts.start(starting, self._stage)
            batcher = self._batcher(parts.pipeline)
            starting.push_async_callback(batcher.close)
            cases = self._cases()
            if cases is not None:
                starting.callback(cases.close)
            parts.show(starting, lambda: batcher.queued_rows)
            self.engine.start(parts.pipeline, batcher, parts.models, parts.lists, cases)
            starting.callback(self.engine.stop)
            self._running = starting.pop_all()

    async def stop(self) -> None:
        """Stop every part, the last started first."""
        await self._running.aclose()

    def _cases(self) -> CaseStore | None:
        if keeps_cases(self._settings.store.url, StoreOptions.of(self._settings)):
            return open_cases(self._settings)
        logger.warning("%s", NO_CASES)
        return None

    def _batcher(self, pipeline: Pipeline) -> MicroBatcher[ScoreRequest, list[Outcome]]:
        decide: DecideRequests = pipeline.decide_requests
        for around in self._around_batch:
            decide = around(decide)
        scoring = self._settings.scoring
        return MicroBatcher(
            decide,
            max_batch_rows=scoring.max_batch_rows,
            bulk_rows=scoring.bulk_rows,
            max_queued_rows=scoring.max_queued_rows,
            max_wait_s=scoring.max_wait_s,
        )

    def _trace(self) -> None:
        from fraud.serving.tracing import Tracing  # its libraries are loaded only where it is wanted

        tracing = Tracing(self._settings.telemetry.otlp_endpoint, self._settings.telemetry.trace_share)
        self.checks.append(tracing.begin)
        self.observers.append(tracing.end)
        self._on_stage.append(tracing.stage)
        self._around_batch.append(tracing.traced)
        self._running.callback(tracing.close)

    def _stage(self, name: str, seconds: float) -> None:
        for report in self._on_stage:
            report(name, seconds)


def _name_request(call: Call) -> None:
    """Let every log record of this request carry its id."""
    logs.request_id.set(call.request_id)
