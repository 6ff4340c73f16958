"""The Bento: its APIs and its lifecycle.  It computes nothing itself, and imports nothing heavy before a worker starts.

`bentoml serve` imports this file twice: in its own process, to read the service, and in each worker.
"""

from __future__ import annotations

import asyncio
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import bentoml

from fraud.errors import FraudError
from fraud.models.served import Packed, Served, pack
from fraud.serving import scoring
from fraud.serving.app import FrontedService, declared
from fraud.serving.case_process import run_beside
from fraud.serving.connections import ConnectionLimits, install
from fraud.serving.contract import ExplainAnswer, PredictAnswer, ScoreBody
from fraud.serving.descriptors import descriptor
from fraud.serving.security import AccessControl
from fraud.serving.startup import end_unless_a_worker_starts, signal_failed, signal_ready
from fraud.settings import Settings

if TYPE_CHECKING:
    from fraud.serving.worker import Worker

settings = Settings.read()
Question, Predicted, Explained = descriptor(ScoreBody), descriptor(PredictAnswer), descriptor(ExplainAnswer)
install(ConnectionLimits.of(settings.http))


@bentoml.service(
    name="fraud_bento",
    service_class=FrontedService,
    workers=settings.process.workers,
    http={"port": settings.process.port},
)
class FraudBento:
    """Calibrated fraud probabilities, decisions and their exact reasons."""

    settings = settings

    @staticmethod
    @cache
    def worker() -> Worker:
        """Return the worker of this process, made on first use."""
        from fraud.serving.worker import Worker

        return Worker(settings, Packed.of(FraudBento))

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Fail before a worker starts if there is no model, no usable store, no key where one is required, or a
        contract that cannot be answered.
        """
        from fraud.stores.opening import StoreOptions, check_store

        try:
            AccessControl.of(settings)
            declared(settings)
            asyncio.run(check_store(settings.store.url, StoreOptions.of(settings)))
            served = Served(settings.models, Packed.of(FraudBento))
            for tag in [*served.champions().values(), *served.anomaly().values()]:
                served.folders(tag)
        except FraudError as error:
            sys.exit(f"error: {error}")
        served.hand_down()
        end_unless_a_worker_starts()
        run_beside(settings)

    @bentoml.on_startup
    async def start(self) -> None:
        """Load, verify and warm; the worker takes no connection before this is done."""
        try:
            await self.worker().start()
        except BaseException as error:
            signal_failed(error)
            raise
        signal_ready()

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await self.worker().stop()

    @bentoml.api(route="/predict", input_spec=Question, output_spec=Predicted)
    async def predict(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions: probability, risk level and decision of each."""
        return Predicted.model_validate(
            await scoring.predictions(self.worker().engine, instances, model, explain=False)
        )

    @bentoml.api(route="/explain", input_spec=Question, output_spec=Explained)
    async def explain(self, instances: list[dict[str, Any]], model: str | None = None) -> Any:
        """Score transactions and say why: every feature's contribution, and the strongest in words."""
        return Explained.model_validate(await scoring.predictions(self.worker().engine, instances, model, explain=True))


pack(FraudBento, settings.models)
