"""What is read: the records of the topics, for the partitions that the group gives to this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, Message, TopicPartition

from fraud.streams.cluster import Options, logger, said

Partition = tuple[str, int]
SEEK_TRIES = 50
COMMITTED_S = 10.0


class _PartitionStatistics(msgspec.Struct):
    ls_offset: int = -1
    next_offset: int = -1
    fetchq_cnt: int = 0


class _TopicStatistics(msgspec.Struct):
    partitions: dict[str, _PartitionStatistics] = {}


class _BrokerStatistics(msgspec.Struct):
    state: str = ""


class _Statistics(msgspec.Struct):
    brokers: dict[str, _BrokerStatistics] = {}
    topics: dict[str, _TopicStatistics] = {}


_decode_statistics = msgspec.json.Decoder(_Statistics).decode


def partition_of(message: Message) -> Partition:
    """Return the topic and the partition of a record."""
    return message.topic() or "", message.partition() or 0


def next_offsets(messages: Iterable[Message]) -> list[TopicPartition]:
    """Return for each partition the offset after the last of some records."""
    last: dict[Partition, int] = {}
    for message in messages:
        last[partition_of(message)] = (message.offset() or 0) + 1
    return [TopicPartition(topic, partition, offset) for (topic, partition), offset in last.items()]


class Source:
    """A member of the consumer group. Its methods block, and are called from one thread at a time.

    Partitions come and go within `take` and `keep_alive` only. So a caller that commits between two of these calls owns
    the partitions whose offsets it commits, as long as the group has not given it up.

    Parameters
    ----------
    options : dict
        Those of the consumer.
    topics : sequence of str
    on_rebalance : callable
        Called with ``assigned``, ``revoked`` or ``lost``.
    on_lag : callable
        Called about once a second with the records that wait in each partition, and whether a broker is connected.
    """

    def __init__(
        self,
        options: Options,
        topics: Sequence[str],
        on_rebalance: Callable[[str], None],
        on_lag: Callable[[Mapping[Partition, int], bool], None],
    ) -> None:
        self._on_rebalance = on_rebalance
        self._on_lag = on_lag
        self.owned: set[Partition] = set()
        self._gone: set[Partition] = set()
        self._is_held = False
        self._kept: list[Message] = []
        self._consumer = Consumer({**options, "stats_cb": self._statistics})
        self._consumer.subscribe(list(topics), on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def take(self, max_records: int, wait_s: float) -> list[Message]:
        """Return the records that are there, in the order of each partition; wait for the first of them."""
        messages, self._kept = self._kept, []
        if not messages:
            first = self._consumer.poll(wait_s)
            messages = [] if first is None else [first]
        if messages or not wait_s:
            messages += self._consumer.consume(max_records, 0.0)
        if self._gone & self.owned:  # went and came back: read again what was read before
            back = self._gone & self.owned
            messages = [message for message in messages if partition_of(message) not in back]
            self.rewind(back)
        return [message for message in messages if self._is_record(message) and partition_of(message) in self.owned]

    def keep_alive(self) -> None:
        """Stay a member of the group while nothing is read."""
        if not self._is_held:
            self._is_held = True
            self._pause()
        message = self._consumer.poll(0.0)
        if message is not None:
            self._kept.append(message)

    def go_on(self) -> None:
        """Read again after `keep_alive`."""
        if self._is_held:
            self._is_held = False
            self._consumer.resume(self._consumer.assignment())

    def gone(self) -> set[Partition]:
        """Return the partitions taken away since the last call: records read from them belong to others now."""
        gone, self._gone = self._gone, set()
        return gone

    def group(self) -> object:
        """Return the member's metadata, with which a transaction commits offsets."""
        return self._consumer.consumer_group_metadata()

    def rewind(self, partitions: set[Partition] | None = None) -> None:
        """Go back to what is committed in some partitions, or all; where nothing is, to the beginning.

        Raises
        ------
        KafkaException
            The cluster does not say what is committed.
        """
        some = self.owned if partitions is None else partitions
        if not some:
            return
        asked = [TopicPartition(topic, partition) for topic, partition in some]
        for place in self._consumer.committed(asked, timeout=COMMITTED_S):
            if place.offset < 0:
                place.offset = OFFSET_BEGINNING
            self._seek(TopicPartition(place.topic, place.partition, place.offset))
        self._kept = [message for message in self._kept if partition_of(message) not in some]

    def close(self) -> None:
        """Leave the group, which gives the partitions to others at once."""
        self._consumer.close()

    def _seek(self, place: TopicPartition) -> None:
        """Seek; a partition that was assigned a moment ago is not ready for it at once."""
        for i in range(SEEK_TRIES):
            try:
                self._consumer.seek(place)
                return
            except KafkaException:
                if i == SEEK_TRIES - 1:
                    raise
                message = self._consumer.poll(0.05)
                if message is not None and partition_of(message) != (place.topic, place.partition):
                    self._kept.append(message)

    def _is_record(self, message: Message) -> bool:
        error = message.error()
        if error is not None:
            logger.warning("reading: %s", said(error))
        return error is None

    def _pause(self) -> None:
        self._consumer.pause(self._consumer.assignment())

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.incremental_assign(partitions)
        self.owned |= {(p.topic, p.partition) for p in partitions}
        if self._is_held:
            self._pause()
        self._on_rebalance("assigned")
        logger.info("assigned: %s", _shown(partitions))

    def _revoked(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(partitions, "revoked")
        consumer.incremental_unassign(partitions)

    def _lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._give_up(partitions, "lost")
        consumer.incremental_unassign(partitions)

    def _give_up(self, partitions: list[TopicPartition], change: str) -> None:
        some = {(p.topic, p.partition) for p in partitions}
        self.owned -= some
        self._gone |= some
        self._kept = [message for message in self._kept if partition_of(message) not in some]
        self._on_rebalance(change)
        logger.info("%s: %s", change, _shown(partitions))

    def _statistics(self, text: str) -> None:
        said_now = _decode_statistics(text)
        lags: dict[Partition, int] = {}
        for topic, partition in self.owned:
            known = said_now.topics.get(topic, _TopicStatistics()).partitions.get(str(partition))
            if known is not None and known.ls_offset >= 0 and known.next_offset >= 0:
                lags[topic, partition] = max(0, known.ls_offset - known.next_offset) + known.fetchq_cnt
        self._on_lag(lags, any(broker.state == "UP" for broker in said_now.brokers.values()))


def _shown(partitions: Sequence[TopicPartition]) -> str:
    return ", ".join(f"{p.topic}-{p.partition}" for p in partitions) or "nothing"
