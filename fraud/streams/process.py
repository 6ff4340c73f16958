"""One process of `fraud stream`: where its parts are made, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import uuid
from collections.abc import Mapping
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
from fraud.streams.batches import Batches
from fraud.streams.cluster import consumer_options, logger, producer_options, topics_of, wait_for_topics
from fraud.streams.health import HealthPages, Progress
from fraud.streams.loop import Loop, Watch
from fraud.streams.sink import Sink
from fraud.streams.source import Source
from fraud.telemetry.recorder import Telemetry


class StreamProcess:
    """Reads, decides and writes until it gets SIGTERM or SIGINT.

    Parameters
    ----------
    settings : Settings
    packed : Packed
        The models packed in a Bento, if that is where they come from.
    new_partitions, replicas : int
        Of topics that are missing; with no partitions, a missing topic is an error.
    """

    def __init__(self, settings: Settings, packed: Packed, *, new_partitions: int = 0, replicas: int = 1) -> None:
        self._settings = settings
        self._new = (new_partitions, replicas)
        self.progress = Progress()
        self.telemetry = Telemetry()
        options = StoreOptions.of(settings)
        self._models = ActiveModels(
            settings,
            packed,
            self.telemetry.swapped,
            self.telemetry.rule_stopped,
            hash_of(options.personal_fields, options.personal_key),
        )
        self._watch = Watch(self.telemetry, self.progress)
        self._stopping = threading.Event()

    async def run(self) -> None:
        """Run until a signal.

        Raises
        ------
        FraudError
            A model or the store is not available, or a topic is missing.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        async with AsyncExitStack() as running:
            pages = HealthPages(self.progress, self._settings.stream)
            running.callback(pages.close)
            logger.info("health and metrics: http://%s:%d", self._settings.stream.host, pages.port)
            pipeline = await self._pipeline(running)
            await self._topics()
            if self._stopping.is_set():
                return
            stream_loop = self._loop(pipeline)
            running.push_async_callback(stream_loop.close)
            await stream_loop.run()
            logger.info("stopped; what was decided is committed")

    def _stop(self) -> None:
        self.progress.phase = "stopping"
        self._stopping.set()

    async def _pipeline(self, running: AsyncExitStack) -> Pipeline:
        settings, models = self._settings, self._models
        await models.load()
        running.push_async_callback(models.close)
        shadow: Shadow | None = None
        if settings.models.shadow:
            path = settings.process.state_dir / "shadow.db"
            shadow = Shadow(path, self.telemetry.shadowed, self.telemetry.shadow_dropped)
            running.push_async_callback(asyncio.to_thread, shadow.close)
        options = StoreOptions.of(settings)
        pipeline = Pipeline(
            models.champions,
            open_store(settings.store.url, options),
            self.telemetry.stage,
            self.telemetry.decided,
            canary_share=settings.models.canary_share,
            shadow=shadow,
            record_reasons=settings.scoring.record_reasons,
            record_unnamed=settings.scoring.record_unnamed,
            past=models.past,
        )
        running.push_async_callback(pipeline.close)
        await pipeline.store.open()
        models.follow(lambda *served: self._serve(pipeline, *served))
        lists = FollowedLists(open_lists(settings.store.url, options), models.rules.lists)
        await lists.start()
        running.push_async_callback(lists.close)
        self.telemetry.watch(
            lambda: 0, lambda: dict(pipeline.counts), pipeline.store.stats, lambda: models.following.looks
        )
        self.telemetry.start()
        running.callback(self.telemetry.stop)
        return pipeline

    def _serve(
        self,
        pipeline: Pipeline,
        champions: dict[str, Scorer],
        challengers: dict[str, Scorer],
        beside: Beside | None,
        rules: Mapping[str, RulesInForce],
    ) -> None:
        pipeline.scorers, pipeline.challengers = champions, challengers
        pipeline.beside, pipeline.rules = beside, rules
        anomaly = {} if beside is None else {beside.scorer.name.name: beside.scorer}
        self.telemetry.serving(champions, challengers, anomaly)

    async def _topics(self) -> None:
        topics = topics_of(self._settings.stream)
        wait = self._watch.waits_for_broker
        await asyncio.to_thread(wait_for_topics, self._settings.kafka, topics, *self._new, self._stopping, wait)
        self.progress.goes_on("broker")
        self.telemetry.show("fraud_stream_waiting", 0, "broker")

    def _loop(self, pipeline: Pipeline) -> Loop:
        settings, stream = self._settings, self._settings.stream
        batches = Batches(
            pipeline,
            self._models.load_past,
            stream,
            threshold=settings.contracts.anomaly_threshold,
            max_ahead_ms=round(settings.scoring.max_clock_ahead_s * 1000),
        )
        read = [stream.transactions, *filter(None, [stream.labels])]
        source = Source(consumer_options(settings.kafka, stream), read, self._watch.rebalanced, self._watch.lags)
        name = stream.instance or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        options = producer_options(settings.kafka, stream, f"{stream.group}-{name}")
        sink = Sink(options, self._stopping, self._watch.waits_for_broker)
        return Loop(source, sink, batches, self.telemetry, self.progress, stream.max_records, self._stopping)


def run_stream(settings: Settings, packed: Packed, *, new_partitions: int = 0, replicas: int = 1) -> None:
    """Run a stream process until a signal; raises as `StreamProcess.run`."""
    import uvloop

    process = StreamProcess(settings, packed, new_partitions=new_partitions, replicas=replicas)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(process.run())
