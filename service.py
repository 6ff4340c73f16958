"""The Bento: its APIs and its lifecycle.  No maths here, and nothing heavy before a worker starts.

`bentoml serve` imports this file twice: in its own process, to read the service, and in each worker.
"""

from __future__ import annotations

from typing import Any

import bentoml
import orjson

from fraud.settings import Settings
from serving.active import active_tags, bundle_paths, pack, packed_versions
from serving.app import FrontedService
from serving.contract import ExplainAnswer, PredictAnswer, ScoreRequest
from serving.engine import Engine
from serving.http import HttpLimits

settings = Settings.read()


@bentoml.service(name="fraud_bento", service_class=FrontedService, workers=1)
class FraudBento:
    """Calibrated fraud probabilities, decisions and their exact reasons."""

    engine = Engine()
    limits = HttpLimits(settings.max_body_bytes, settings.body_timeout_s)

    @bentoml.on_deployment
    @staticmethod
    def check() -> None:
        """Fail before a worker starts when there is no model to serve."""
        for tag in active_tags(settings, packed_versions(FraudBento)).values():
            bundle_paths(tag)

    @bentoml.on_startup
    async def start(self) -> None:
        """Load, verify and warm; the worker takes no connection before this is done."""
        from fraud.scorer import Scorer
        from fraud.stores import StoreOptions, open_store
        from serving.batching import MicroBatcher
        from serving.dataplane import DataPlane

        max_ahead_ms = round(settings.max_clock_ahead_s * 1000)
        scorers = {
            name: Scorer.load(*bundle_paths(tag), max_ahead_ms=max_ahead_ms)
            for name, tag in active_tags(settings, packed_versions(FraudBento)).items()
        }
        dataplane = DataPlane(scorers, open_store("sqlite:", StoreOptions(settings.state_dir)))
        batcher = MicroBatcher(
            dataplane.run,
            max_batch_rows=settings.max_batch_rows,
            bulk_rows=settings.bulk_rows,
            max_queued_rows=settings.max_queued_rows,
        )
        self.engine.start(dataplane, batcher)

    @bentoml.on_shutdown
    async def stop(self) -> None:
        await self.engine.stop()

    @bentoml.api(route="/predict", input_spec=ScoreRequest, output_spec=PredictAnswer)
    async def predict(self, instances: list[dict[str, Any]], model: str | None = None) -> PredictAnswer:
        """Score transactions: probability, risk level and decision of each."""
        body = orjson.dumps({"instances": instances, "model": model})
        answer: PredictAnswer = PredictAnswer.model_validate_json(await self.engine.answer(body, explain=False))
        return answer

    @bentoml.api(route="/explain", input_spec=ScoreRequest, output_spec=ExplainAnswer)
    async def explain(self, instances: list[dict[str, Any]], model: str | None = None) -> ExplainAnswer:
        """Score transactions and say why: every feature's contribution in log-odds, and the strongest in words."""
        body = orjson.dumps({"instances": instances, "model": model})
        answer: ExplainAnswer = ExplainAnswer.model_validate_json(await self.engine.answer(body, explain=True))
        return answer


pack(FraudBento, settings)
