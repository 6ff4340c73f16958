"""One process of `fraud stream`: where its parts are made, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import uuid
from contextlib import AsyncExitStack

from fraud.composition import Composition
from fraud.models.served import Packed
from fraud.settings import Settings
from fraud.streams.batches import Batches
from fraud.streams.cluster import consumer_options, logger, producer_options, topics_of, wait_for_topics
from fraud.streams.health import HealthPages, Progress
from fraud.streams.loop import Loop, Watch
from fraud.streams.sink import Sink
from fraud.streams.source import Source


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
        self._parts = Composition(settings, packed)
        self._watch = Watch(self._parts.telemetry, self.progress)
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
            await self._parts.start(running, self._parts.telemetry.stage)
            self._parts.show(running, lambda: 0)
            await self._topics()
            if self._stopping.is_set():
                return
            stream_loop = self._loop()
            running.push_async_callback(stream_loop.close)
            await stream_loop.run()
            logger.info("stopped; what was decided is committed")

    def _stop(self) -> None:
        self.progress.phase = "stopping"
        self._stopping.set()

    async def _topics(self) -> None:
        topics = topics_of(self._settings.stream)
        wait = self._watch.waits_for_broker
        await asyncio.to_thread(wait_for_topics, self._settings.kafka, topics, *self._new, self._stopping, wait)
        self.progress.goes_on("broker")
        self._parts.telemetry.show("fraud_stream_waiting", 0, "broker")

    def _loop(self) -> Loop:
        settings, stream, parts = self._settings, self._settings.stream, self._parts
        batches = Batches(
            parts.pipeline,
            parts.models.load_past,
            stream,
            threshold=settings.contracts.anomaly_threshold,
            max_ahead_ms=round(settings.scoring.max_clock_ahead_s * 1000),
        )
        read = [stream.transactions, *filter(None, [stream.labels])]
        source = Source(consumer_options(settings.kafka, stream), read, self._watch.rebalanced, self._watch.lags)
        name = stream.instance or f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
        options = producer_options(settings.kafka, stream, f"{stream.group}-{name}")
        sink = Sink(options, self._stopping, self._watch.waits_for_broker)
        return Loop(source, sink, batches, parts.telemetry, self.progress, stream.max_records, self._stopping)


def run_stream(settings: Settings, packed: Packed, *, new_partitions: int = 0, replicas: int = 1) -> None:
    """Run a stream process until a signal; raises as `StreamProcess.run`."""
    import uvloop

    process = StreamProcess(settings, packed, new_partitions=new_partitions, replicas=replicas)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(process.run())
