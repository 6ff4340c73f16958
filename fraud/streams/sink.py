"""What is written: verdicts and dead letters, in one Kafka transaction with the offsets of what was read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from fraud.errors import FraudError
from fraud.streams.cluster import Options, logger, said

Headers = list[tuple[str, str | bytes | None]]
CALL_S = 5.0
"""How long one call of the producer may wait; one that can be tried again is."""
LAST_TRIES = 2
"""Of one call, when the process is to stop."""


class Outgoing(NamedTuple):
    """One record to write."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers


class NotCommitted(FraudError):
    """A transaction was aborted, or it is not known whether it was committed: the group's offsets say which."""

    http_status = 503
    code = "stream"


class Sink:
    """A transactional producer. Its methods block, and are called from one thread at a time.

    Parameters
    ----------
    options : dict
        Those of the producer.
    stopping : threading.Event
        Set when the process is to stop: then a cluster that is away is waited for no longer.
    on_wait : callable
        Called with the reason while the cluster is waited for.
    """

    def __init__(self, options: Options, stopping: threading.Event, on_wait: Callable[[str], None]) -> None:
        self._options = options
        self._stopping = stopping
        self._on_wait = on_wait
        self._producer: Producer | None = None
        self._refused: list[KafkaError] = []

    def open(self) -> None:
        """Make the producer, and end what an earlier one of the same name left unfinished.

        Raises
        ------
        NotCommitted
            The cluster cannot be reached and this process is to stop, or refuses.
        """
        self._producer = None
        producer = Producer(self._options)
        self._again(lambda: producer.init_transactions(CALL_S))
        self._producer = producer

    def write(self, records: Sequence[Outgoing], offsets: Sequence[TopicPartition], group: object) -> None:
        """Write records and commit offsets in one transaction.

        Raises
        ------
        NotCommitted
            Nothing of it is committed, or that is not known.
        """
        if self._producer is None:
            self.open()
        producer = self._producer
        assert producer is not None
        self._refused.clear()
        try:
            producer.begin_transaction()
            for record in records:
                self._produce(producer, record)
            self._again(lambda: producer.send_offsets_to_transaction(list(offsets), group, CALL_S))
            self._again(lambda: producer.commit_transaction(CALL_S))
        except KafkaException as error:
            reason = said(error)
            if self._refused:
                reason = f"{reason}; a record was refused: {said(self._refused[0])}"
            self._give_up(producer, error)
            raise NotCommitted(f"a Kafka transaction was not committed: {reason}") from None
        except NotCommitted:
            self._producer = None
            raise

    def close(self) -> None:
        """Drop the producer."""
        self._producer = None

    def _produce(self, producer: Producer, record: Outgoing) -> None:
        while True:
            try:
                producer.produce(
                    record.topic,
                    value=record.value,
                    key=record.key,
                    headers=record.headers,
                    on_delivery=self._delivered,
                )
                return
            except BufferError:
                producer.poll(0.1)

    def _delivered(self, error: KafkaError | None, _: object) -> None:
        if error is not None and error.code() != KafkaError._PURGE_QUEUE:
            self._refused.append(error)

    def _give_up(self, producer: Producer, error: KafkaException) -> None:
        """Abort; a producer that cannot is dropped, and the next one ends what it left."""
        reason = error.args[0]
        if isinstance(reason, KafkaError) and reason.txn_requires_abort():
            try:
                self._again(lambda: producer.abort_transaction(CALL_S))
                return
            except (KafkaException, NotCommitted) as refused:
                logger.warning("aborting a Kafka transaction: %s", refused)
        self._producer = None

    def _again(self, call: Callable[[], None]) -> None:
        """Call until it is done; an error that cannot be mended by calling again is raised."""
        tries_left = LAST_TRIES
        while True:
            try:
                call()
                return
            except KafkaException as error:
                reason = error.args[0]
                if not isinstance(reason, KafkaError) or not reason.retriable():
                    raise
                self._on_wait(said(error))
                if self._stopping.is_set():
                    tries_left -= 1
                    if not tries_left:
                        raise NotCommitted(f"stopped while the cluster was away: {said(error)}") from None
                time.sleep(0.1)
