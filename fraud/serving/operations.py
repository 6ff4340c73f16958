"""What surrounds the scoring of one worker: its models, its gate, and what it shows of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fraud.models.active import ActiveModels
from fraud.models.served import Packed
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import Outcome
from fraud.pipeline.shadow import Shadow
from fraud.serving import logs
from fraud.serving.front_door import Guard, Observer
from fraud.serving.http import Call
from fraud.serving.security import Gate
from fraud.serving.telemetry import Telemetry
from fraud.settings import Settings


class Operations:
    """Made once a worker, before its models are loaded.

    Parameters
    ----------
    settings : Settings
    packed : Packed
        What the Bento that runs holds.

    Raises
    ------
    SettingsError
        An API key cannot be read, or keys are required and there is none.
    """

    def __init__(self, settings: Settings, packed: Packed) -> None:
        logs.configure_logging(settings.log.level, settings.log.format)
        self.telemetry = Telemetry()
        self.models = ActiveModels(settings, packed, self.telemetry.swapped)
        self.gate = Gate.of(settings)
        self.guards: list[Guard] = [_name_request]
        self.observers: list[Observer] = [self.telemetry.answered]
        self.shadow: Shadow | None = None
        if settings.models.shadow:
            path = settings.process.state_dir / "shadow.db"
            self.shadow = Shadow(path, self.telemetry.shadowed, self.telemetry.shadow_dropped)
        self.tracing: Any = None
        if settings.telemetry.otlp_endpoint:
            from fraud.serving.tracing import Tracing

            self.tracing = Tracing(settings.telemetry.otlp_endpoint, settings.telemetry.trace_share)
            self.guards.append(self.tracing.begin)
            self.observers.append(self.tracing.end)
        self.guards.append(self.gate)
        if settings.log.requests != "none":
            self.observers.append(logs.RequestLog(settings.log.requests, settings.log.format))

    def stage(self, name: str, seconds: float) -> None:
        """Tell what a batch spent in a stage; `Pipeline.on_stage`."""
        self.telemetry.stage(name, seconds)
        if self.tracing is not None:
            self.tracing.stage(name, seconds)

    def timed(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap what scores a batch."""
        return self.telemetry.timed(run if self.tracing is None else self.tracing.traced(run))

    def start(self, pipeline: Pipeline, batcher: MicroBatcher[ScoreRequest, list[Outcome]]) -> None:
        """Follow the registry and show what happens, from now on."""

        def install(champions: dict[str, Any], challengers: dict[str, Any]) -> None:
            pipeline.scorers, pipeline.challengers = champions, challengers
            self.telemetry.serving(champions, challengers)

        self.models.follow(install)
        self.telemetry.watch(
            lambda: batcher.queued_rows,
            lambda: dict(pipeline.counts),
            pipeline.store.stats,
            lambda: self.models.following.looks,
        )
        self.telemetry.start()

    async def stop(self) -> None:
        """Stop following and say the last that there is to say."""
        await self.models.close()
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.close)
        self.telemetry.stop()
        if self.tracing is not None:
            self.tracing.close()


def _name_request(call: Call) -> None:
    """Let every log record of this request carry its id."""
    logs.request_id.set(call.request_id)
