"""The Bento: its APIs and its lifecycle.  No maths here, and nothing heavy before a worker starts.

`bentoml serve` imports this file twice: in its own process, to read the service, and in each worker.
"""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import bentoml
import orjson

from fraud.models.active import active_tags, bundle_paths, pack, packed_versions
from fraud.serving.app import FrontedService
from fraud.serving.connections import ConnectionLimits, install
from fraud.serving.contract import ExplainAnswer, PredictAnswer, ScoreRequest
from fraud.serving.descriptors import descriptor
from fraud.serving.engine import Engine
from fraud.serving.front_door import Guard, Observer
from fraud.serving.http import HttpLimits
from fraud.serving.security import Gate
from fraud.settings import Settings

settings = Settings.read()
Question, Predicted, Explained = descriptor(ScoreRequest), descriptor(PredictAnswer), descriptor(ExplainAnswer)
install(ConnectionLimits(settings.header_timeout_s, settings.max_header_bytes, settings.max_connections))


@bentoml.service(name="fraud_bento", service_class=FrontedService, workers=settings.workers)
class FraudBento:
    """Calibrated fraud probabilities, decisions and their exact reasons."""

    settings = settings
    engine = Engine()
    limits = HttpLimits(settings.max_body_bytes, settings.body_timeout_s)
    guards: ClassVar[list[Guard]] = []
    observers: ClassVar[list[Observer]] = []

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Fail before a worker starts when there is no model to serve, or no key to serve it to."""
        Gate.of(settings)
        for tag in active_tags(settings, packed_versions(FraudBento)).values():
            bundle_paths(tag)

    @bentoml.on_startup
    async def start(self) -> None:
        """Load, verify and warm; the worker takes no connection before this is done."""
        gc.disable()  # until the engine starts
        from fraud.pipeline.batching import MicroBatcher
        from fraud.pipeline.dataplane import DataPlane
        from fraud.serving.operations import Operations
        from fraud.stores.opening import StoreOptions, open_store

        self.operations = Operations(settings, packed_versions(FraudBento))
        models = self.operations.models
        await models.load()
        dataplane = DataPlane(
            models.champions,
            open_store(settings.store, StoreOptions.of(settings)),
            self.operations.stage,
            self.operations.telemetry.scored,
            canary_share=settings.canary_share,
            shadow=self.operations.shadow,
            record_reasons=settings.record_reasons,
            record_unnamed=settings.record_unnamed,
            past=models.past,
        )
        await dataplane.store.open()
        batcher = MicroBatcher(
            self.operations.timed(dataplane.run),
            max_batch_rows=settings.max_batch_rows,
            bulk_rows=settings.bulk_rows,
            max_queued_rows=settings.max_queued_rows,
            max_wait_s=settings.max_wait_s,
        )
        self.guards[:], self.observers[:] = self.operations.guards, self.operations.observers
        self.operations.start(dataplane, batcher)
        self.engine.start(dataplane, batcher, models)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await self.operations.stop()
        await self.engine.stop()

    @bentoml.api(route="/predict", input_spec=Question, output_spec=Predicted)
    async def predict(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions: probability, risk level and decision of each."""
        body = orjson.dumps({"instances": instances, "model": model})
        return Predicted.model_validate_json(await self.engine.answer(body, explain=False))

    @bentoml.api(route="/explain", input_spec=Question, output_spec=Explained)
    async def explain(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions and say why: every feature's contribution in log-odds, and the strongest in words."""
        body = orjson.dumps({"instances": instances, "model": model})
        return Explained.model_validate_json(await self.engine.answer(body, explain=True))


pack(FraudBento, settings)
