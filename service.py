"""The Bento: its APIs and its lifecycle.  No maths here, and nothing heavy before a worker starts.

`bentoml serve` imports this file twice: in its own process, to read the service, and in each worker.
"""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import bentoml

from fraud.models.served import Packed, Served, pack
from fraud.serving import scoring
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
install(ConnectionLimits(settings.http.header_timeout_s, settings.http.max_header_bytes, settings.http.max_connections))


@bentoml.service(name="fraud_bento", service_class=FrontedService, workers=settings.process.workers)
class FraudBento:
    """Calibrated fraud probabilities, decisions and their exact reasons."""

    settings = settings
    engine = Engine()
    limits = HttpLimits(settings.http.max_body_bytes, settings.http.body_timeout_s)
    guards: ClassVar[list[Guard]] = []
    observers: ClassVar[list[Observer]] = []

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Fail before a worker starts when there is no model to serve, or no key to serve it to."""
        Gate.of(settings)
        served = Served(settings.models, Packed.of(FraudBento))
        for tag in served.champions().values():
            served.folders(tag)
        served.hand_down()

    @bentoml.on_startup
    async def start(self) -> None:
        """Load, verify and warm; the worker takes no connection before this is done."""
        gc.disable()  # until the engine starts
        from fraud.pipeline.batching import MicroBatcher
        from fraud.pipeline.decide import Pipeline
        from fraud.serving.operations import Operations
        from fraud.stores.opening import StoreOptions, open_store

        self.operations = Operations(settings, Packed.of(FraudBento))
        models = self.operations.models
        await models.load()
        pipeline = Pipeline(
            models.champions,
            open_store(settings.store.url, StoreOptions.of(settings)),
            self.operations.stage,
            self.operations.telemetry.decided,
            canary_share=settings.models.canary_share,
            shadow=self.operations.shadow,
            record_reasons=settings.scoring.record_reasons,
            record_unnamed=settings.scoring.record_unnamed,
            past=models.past,
        )
        await pipeline.store.open()
        batcher = MicroBatcher(
            self.operations.timed(pipeline.decide_requests),
            max_batch_rows=settings.scoring.max_batch_rows,
            bulk_rows=settings.scoring.bulk_rows,
            max_queued_rows=settings.scoring.max_queued_rows,
            max_wait_s=settings.scoring.max_wait_s,
        )
        self.guards[:], self.observers[:] = self.operations.guards, self.operations.observers
        self.operations.start(pipeline, batcher)
        self.engine.start(pipeline, batcher, models)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await self.operations.stop()
        await self.engine.stop()

    @bentoml.api(route="/predict", input_spec=Question, output_spec=Predicted)
    async def predict(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions: probability, risk level and decision of each."""
        return Predicted.model_validate(await scoring.predictions(self.engine, instances, model, explain=False))

    @bentoml.api(route="/explain", input_spec=Question, output_spec=Explained)
    async def explain(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions and say why: every feature's contribution in log-odds, and the strongest in words."""
        return Explained.model_validate(await scoring.predictions(self.engine, instances, model, explain=True))


pack(FraudBento, settings.models)
