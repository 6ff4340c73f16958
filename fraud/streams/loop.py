"""The loop of a stream: read a batch, decide on it while the one before is written, and again.

Partitions change hands within a read only, and no write is under way then. So what was read from a partition that is
gone is dropped before it is written, and its next owner decides on it: as before, since the decision is on record.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from confluent_kafka import KafkaException, Message

from fraud.streams.batches import Answered, Batches, NotDecided
from fraud.streams.cluster import logger, said
from fraud.streams.health import WAITS, Progress
from fraud.streams.sink import NotCommitted, Sink
from fraud.streams.source import Partition, Source, next_offsets, partition_of
from fraud.streams.values import time_of
from fraud.telemetry.recorder import Telemetry

P = ParamSpec("P")
T = TypeVar("T")
IDLE_S = 0.25
"""How long a read waits for a first record."""
AGAIN_S = 0.2
"""Between two tries while the store is away."""


class Loop:
    """Reads, decides and writes until it is told to stop.

    Parameters
    ----------
    source, sink, batches
        Where records come from, where verdicts go, and what is made of the ones.
    max_records : int
        Of one batch.
    stopping : threading.Event
        Set when the process is to stop.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        batches: Batches,
        telemetry: Telemetry,
        progress: Progress,
        max_records: int,
        stopping: threading.Event,
    ) -> None:
        self._source = source
        self._sink = sink
        self._batches = batches
        self._telemetry = telemetry
        self._progress = progress
        self._max_records = max_records
        self._stopping = stopping
        self._reader = ThreadPoolExecutor(1, "kafka-read")
        self._writer = ThreadPoolExecutor(1, "kafka-write")

    async def run(self) -> None:
        """Read, decide and write; what was read when the process is told to stop is committed first."""
        decided: list[Answered] = []
        while decided or not self._stopping.is_set():
            messages: list[Message] = []
            if not self._stopping.is_set():
                wait_s = 0.0 if decided else IDLE_S
                messages = await self._read(self._source.take, self._max_records, wait_s)
                self._has_read(messages)
                decided = self._still_own(decided)
            self._progress.in_hand = len(decided) + len(messages)
            writing = asyncio.ensure_future(self._write(decided))
            try:
                next_decided = await self._decide(messages, writing) if messages else []
            finally:
                written = await writing
            decided = next_decided
            if not written:
                await self._rewind()
                decided = []

    async def close(self) -> None:
        """Leave the group."""
        await self._read(self._source.close)
        self._sink.close()
        self._reader.shutdown()
        self._writer.shutdown()

    async def _decide(self, messages: list[Message], writing: asyncio.Future[bool]) -> list[Answered]:
        """Decide on records; while the store is away, the group is told that this process lives."""
        while True:
            try:
                decided = await self._batches.decide(messages)
            except NotDecided as error:
                self._wait("store", error.message)
                if not await writing or self._stopping.is_set():
                    return []  # nothing of it was written: whoever reads it next decides
                await asyncio.sleep(AGAIN_S)
                await self._read(self._source.keep_alive)
                gone = self._source.gone()
                messages = [message for message in messages if partition_of(message) not in gone]
                continue
            if self._progress.goes_on("store"):
                logger.info("the store is back")
                self._telemetry.show("fraud_stream_waiting", 0, "store")
                await self._read(self._source.go_on)
            return decided

    async def _write(self, decided: Sequence[Answered]) -> bool:
        """Write and commit; returns whether that was done."""
        if not decided:
            return True
        started = time.perf_counter()
        messages = [answered.message for answered in decided]
        records = [record for answered in decided for record in answered.written]
        try:
            await self._in(
                self._writer, lambda: self._sink.write(records, next_offsets(messages), self._source.group())
            )
        except NotCommitted as error:
            self._telemetry.count("fraud_stream_aborted_total")
            logger.warning("%s; reading again from what is committed", error)
            return False
        if self._progress.goes_on("broker"):
            logger.info("the broker is back")
            self._telemetry.show("fraud_stream_waiting", 0, "broker")
        self._count(decided, time.perf_counter() - started)
        return True

    def _count(self, decided: Sequence[Answered], seconds: float) -> None:
        self._progress.moved()
        now_ms = time.time_ns() // 1_000_000
        counted = self._telemetry
        counted.observe("fraud_stream_commit_seconds", [seconds])
        counted.observe("fraud_stream_batch_records", [len(decided)])
        for topic, n in Counter(answered.message.topic() or "" for answered in decided).items():
            counted.count("fraud_stream_records_total", topic, by=n)
        for code, n in Counter(answered.code for answered in decided if answered.code).items():
            counted.count("fraud_stream_dead_letters_total", code, by=n)
        late = [max(0, now_ms - time_of(a.message, now_ms)) / 1000 for a in decided if a.written and not a.code]
        counted.observe("fraud_stream_latency_seconds", late)

    async def _rewind(self) -> None:
        """Read again from what is committed, as soon as the cluster says what that is."""
        while not self._stopping.is_set():
            try:
                await self._read(self._source.rewind)
                await self._read(self._source.go_on)
                return
            except KafkaException as error:
                self._wait("broker", said(error))
                await asyncio.sleep(AGAIN_S)

    def _has_read(self, messages: Sequence[Message]) -> None:
        self._progress.phase = "reading"
        self._progress.partitions = len(self._source.owned)
        if messages and self._progress.goes_on("broker"):
            self._telemetry.show("fraud_stream_waiting", 0, "broker")
        if not messages and not self._progress.lag:
            self._progress.moved()

    def _still_own(self, decided: list[Answered]) -> list[Answered]:
        """Drop what was read from partitions that others have now."""
        gone = self._source.gone()
        return [answered for answered in decided if partition_of(answered.message) not in gone] if gone else decided

    def _wait(self, what: str, reason: str) -> None:
        """Say once that something is waited for."""
        if self._progress.wait(what, reason):
            logger.warning("waiting for the %s: %s", what, reason)
            self._telemetry.show("fraud_stream_waiting", 1, what)

    async def _read(self, job: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await self._in(self._reader, lambda: job(*arguments, **named))

    async def _in(self, threads: ThreadPoolExecutor, job: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, job)


class Watch:
    """What the clients tell of themselves, as metrics and as the process's progress; called in their threads."""

    def __init__(self, telemetry: Telemetry, progress: Progress) -> None:
        self._telemetry = telemetry
        self._progress = progress
        self._shown: set[Partition] = set()
        for what in WAITS:
            telemetry.show("fraud_stream_waiting", 0, what)

    def rebalanced(self, change: str) -> None:
        self._telemetry.count("fraud_stream_rebalances_total", change)

    def lags(self, lags: Mapping[Partition, int], connected: bool) -> None:
        for topic, partition in self._shown - lags.keys():
            self._telemetry.show("fraud_stream_lag_records", 0, topic, str(partition))
        for (topic, partition), lag in lags.items():
            self._telemetry.show("fraud_stream_lag_records", lag, topic, str(partition))
        self._shown = set(lags)
        self._progress.lag = sum(lags.values())
        if not connected:
            self.waits_for_broker("no broker is connected")
        elif self._progress.goes_on("broker"):
            logger.info("the broker is back")
            self._telemetry.show("fraud_stream_waiting", 0, "broker")

    def waits_for_broker(self, reason: str) -> None:
        if self._progress.wait("broker", reason):
            logger.warning("waiting for the broker: %s", reason)
            self._telemetry.show("fraud_stream_waiting", 1, "broker")
