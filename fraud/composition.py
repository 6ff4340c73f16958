"""What decides, in one process: models, stores, lists, rules and the pipeline, whatever brings the transactions.

Every transport makes this first and adds what is its own: decoding, batching or offsets, answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from fraud.decisions.rules.in_force import RulesInForce
from fraud.models.active import ActiveModels
from fraud.models.beside import Beside
from fraud.models.scorer import Scorer
from fraud.models.served import Packed
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.shadow import Shadow
from fraud.settings import Settings
from fraud.stores.followed_lists import FollowedLists
from fraud.stores.lists import open_lists
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.personal import hash_of
from fraud.telemetry.recorder import Telemetry


class Composition:
    """The parts that every transport needs, and their metrics.

    Parameters
    ----------
    settings : Settings
    packed : Packed
        The models packed in the running Bento.

    Attributes
    ----------
    models : ActiveModels
    telemetry : Telemetry
    pipeline : Pipeline
        From `start` on.
    lists : FollowedLists
        From `start` on.
    """

    pipeline: Pipeline
    lists: FollowedLists

    def __init__(self, settings: Settings, packed: Packed) -> None:
        options = StoreOptions.of(settings)
        self.telemetry = Telemetry()
        self.models = ActiveModels(
            settings,
            packed,
            self.telemetry.swapped,
            self.telemetry.rule_stopped,
            hash_of(options.personal_fields, options.personal_key),
        )
        self._settings = settings

    async def start(self, running: AsyncExitStack, on_stage: Callable[[str, float], None]) -> None:
        """Start every part after its dependencies; closing `running` stops them, the last one first.

        Parameters
        ----------
        on_stage : callable
            Takes the name of a stage of the pipeline and the seconds that a batch spent in it.

        Raises
        ------
        FraudError
            A model or the store is not available.
        """
        settings, models = self._settings, self.models
        await models.load()
        running.push_async_callback(models.close)
        options = StoreOptions.of(settings)
        self.pipeline = Pipeline(
            models.champions,
            open_store(settings.store.url, options),
            on_stage,
            self.telemetry.decided,
            canary_share=settings.models.canary_share,
            shadow=self._shadow(running),
            record_reasons=settings.scoring.record_reasons,
            record_unnamed=settings.scoring.record_unnamed,
            past=models.past,
        )
        running.push_async_callback(self.pipeline.close)
        await self.pipeline.store.open()
        models.follow(self._serve)
        self.lists = FollowedLists(open_lists(settings.store.url, options), models.rules.lists)
        await self.lists.start()
        running.push_async_callback(self.lists.close)

    def show(self, running: AsyncExitStack, queued_rows: Callable[[], int]) -> None:
        """Show what the parts count, and how many rows wait, as metrics until `running` is closed."""
        self.telemetry.watch(
            queued_rows,
            lambda: dict(self.pipeline.counts),
            self.pipeline.store.stats,
            lambda: self.models.following.looks,
        )
        self.telemetry.start()
        running.callback(self.telemetry.stop)

    def _shadow(self, running: AsyncExitStack) -> Shadow | None:
        if not self._settings.models.shadow:
            return None
        path = self._settings.process.state_dir / "shadow.db"
        shadow = Shadow(path, self.telemetry.shadowed, self.telemetry.shadow_dropped)
        running.push_async_callback(asyncio.to_thread, shadow.close)
        return shadow

    def _serve(
        self,
        champions: dict[str, Scorer],
        challengers: dict[str, Scorer],
        beside: Beside | None,
        rules: Mapping[str, RulesInForce],
    ) -> None:
        pipeline = self.pipeline
        pipeline.scorers, pipeline.challengers = champions, challengers
        pipeline.beside, pipeline.rules = beside, rules
        anomaly = {} if beside is None else {beside.scorer.name.name: beside.scorer}
        self.telemetry.serving(champions, challengers, anomaly)
