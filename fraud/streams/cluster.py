"""Clients of a Kafka cluster: their options, from the settings, and topics that have to be there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from fraud.errors import SettingsError
from fraud.stream_settings import KafkaSettings, StreamSettings

logger = logging.getLogger("fraud.streams")

Values = dict[str, str | int | float | bool]
Options = dict[str, str | int | float | bool | Callable[..., None] | logging.Logger]
METADATA_S = 5.0


def client_options(kafka: KafkaSettings) -> Values:
    """Return the options of every client: where the brokers are, TLS, SASL."""
    options: Values = {
        "bootstrap.servers": kafka.bootstrap_servers,
        "security.protocol": kafka.security_protocol,
        "client.id": "fraud",
        "reconnect.backoff.max.ms": 1000,
    }
    pem = {
        "ssl.ca.pem": kafka.ca,
        "ssl.certificate.pem": kafka.cert,
        "ssl.key.pem": kafka.key.get_secret_value(),
    }
    options |= {name: text for name, text in pem.items() if text}
    if password := kafka.key_password.get_secret_value():
        options["ssl.key.password"] = password
    if kafka.security_protocol.startswith("SASL"):
        if not kafka.sasl_username:
            raise SettingsError(f"FRAUD_KAFKA_SECURITY_PROTOCOL={kafka.security_protocol} needs a user and a password")
        options["sasl.mechanism"] = kafka.sasl_mechanism
        options["sasl.username"] = kafka.sasl_username
        options["sasl.password"] = kafka.sasl_password.get_secret_value()
    return options


def consumer_options(kafka: KafkaSettings, stream: StreamSettings) -> Options:
    """Return the options of a consumer that commits nothing by itself and reads what is committed."""
    return {
        **client_options(kafka),
        "logger": logger,
        "group.id": stream.group,
        "partition.assignment.strategy": "cooperative-sticky",
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "session.timeout.ms": round(stream.session_timeout_s * 1000),
        "heartbeat.interval.ms": max(100, min(1000, round(stream.session_timeout_s * 100))),
        "fetch.wait.max.ms": 100,
        "fetch.error.backoff.ms": 50,
        "queued.min.messages": 10 * stream.max_records,
        "statistics.interval.ms": 1000,
    }


def producer_options(kafka: KafkaSettings, stream: StreamSettings, transactional_id: str) -> Options:
    """Return the options of a transactional producer that gives equal keys the partitions that Java's clients do."""
    return {
        **client_options(kafka),
        "logger": logger,
        "transactional.id": transactional_id,
        # By default a client forgets all brokers when none answers, and librdkafka then waits for ever for a group
        # coordinator that it forgot, whatever the timeout (its issues 5456 and 5511).
        "metadata.recovery.strategy": "none",
        "transaction.timeout.ms": round(stream.transaction_timeout_s * 1000),
        "partitioner": "murmur2_random",
        "message.max.bytes": stream.max_message_bytes + 65_536,
        "linger.ms": 1,
        "compression.type": "lz4",
    }


def topics_of(stream: StreamSettings) -> list[str]:
    """Return the topics that are read, then those that are written."""
    read = [stream.transactions, *filter(None, [stream.labels])]
    return list(dict.fromkeys([*read, stream.decisions, stream.anomalies, stream.dead]))


def expect_topics(kafka: KafkaSettings, topics: Sequence[str], partitions: int, replicas: int) -> None:
    """Make sure that topics are there; those that are not are made with some partitions, unless that is 0.

    Raises
    ------
    SettingsError
        A topic is missing, and is not to be made.
    KafkaException
        No broker can be reached.
    """
    admin = AdminClient(client_options(kafka))
    known: Mapping[str, object] = admin.list_topics(timeout=METADATA_S).topics
    missing = [name for name in topics if name not in known]
    if not missing:
        return
    if not partitions:
        raise SettingsError(
            f"the cluster has no topic {', '.join(missing)}; create it, or start with --create-topics PARTITIONS"
        )
    for name, future in admin.create_topics([NewTopic(name, partitions, replicas) for name in missing]).items():
        try:
            future.result(METADATA_S * 2)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
        logger.info("topic %s is there, with %d partitions", name, partitions)


def wait_for_topics(
    kafka: KafkaSettings,
    topics: Sequence[str],
    partitions: int,
    replicas: int,
    stopping: threading.Event,
    on_wait: Callable[[str], None],
) -> None:
    """Call `expect_topics` until a broker answers, or until this process is to stop."""
    while not stopping.is_set():
        try:
            return expect_topics(kafka, topics, partitions, replicas)
        except KafkaException as error:
            on_wait(said(error))
            stopping.wait(1.0)
    return None


def said(error: KafkaException | KafkaError) -> str:
    """Return an error of a client as a sentence."""
    reason = error.args[0] if isinstance(error, KafkaException) and error.args else error
    return f"{reason.str()} ({reason.name()})" if isinstance(reason, KafkaError) else str(reason)
