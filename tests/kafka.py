"""A Kafka for tests, and `fraud stream` processes beside it.

The broker is a real Apache Kafka from its published jars, which `make test` fetches where Maven and Java are there.
Elsewhere it is the mock cluster of librdkafka. That one speaks the protocol within the client's own library, so it
cannot prove what the broker does: that readers of what is committed see nothing of an aborted transaction, that a
producer or a member of the group of an earlier time is fenced, that anything survives a restart. Tests of these need
the real one, and are skipped without it, which CI does not allow.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from fraud.checks.servers import DIRECT, Killable, free_port, kafka_server
from tests.servers import wait_until

ROOT = Path(__file__).parent.parent
JARS = Path(sys.prefix) / "kafka"
IS_REAL = JARS.is_dir() and shutil.which("java") is not None
NO_JAVA = "needs a real Apache Kafka: Java 17 and Maven, then make .venv/kafka.done; on Debian: default-jre maven"
needs_kafka = pytest.mark.skipif(not IS_REAL, reason=NO_JAVA)
TOPICS = ("transactions", "labels", "decisions", "anomalies", "transactions.dead")
Headers = list[tuple[str, str | bytes | None]]


class Record(NamedTuple):
    """A record as a test reads it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]

    @property
    def json(self) -> dict[str, Any]:
        assert self.value is not None
        decoded: dict[str, Any] = json.loads(self.value)
        return decoded


class Cluster:
    """What tests do with a broker: topics, records in, committed records out."""

    def __init__(self, servers: str, server: Killable | None = None) -> None:
        self.servers = servers
        self.server = server
        self._producer = Producer({"bootstrap.servers": servers, "linger.ms": 1, "partitioner": "murmur2_random"})

    def create(self, prefix: str, partitions: int = 2, config: Mapping[str, str] | None = None) -> dict[str, str]:
        """Create the topics of one test, with some configuration; returns the settings that name them."""
        names = [f"{prefix}.{name}" for name in TOPICS]
        admin = AdminClient({"bootstrap.servers": self.servers})
        made = admin.create_topics([NewTopic(n, partitions, 1, config=dict(config or {})) for n in names])
        for future in made.values():
            future.result(20)
        variables = ("TRANSACTIONS", "LABELS", "DECISIONS", "ANOMALIES", "DEAD")
        named = {f"FRAUD_STREAM_{variable}": name for variable, name in zip(variables, names, strict=True)}
        return {"FRAUD_KAFKA_BOOTSTRAP_SERVERS": self.servers, "FRAUD_STREAM_GROUP": prefix, **named}

    def send(
        self,
        topic: str,
        values: Sequence[bytes | None],
        key: str | None = None,
        headers: Headers | None = None,
        **more: Any,
    ) -> None:
        for value in values:
            self._producer.produce(topic, value=value, key=key, headers=headers or [], **more)
        assert self._producer.flush(30) == 0

    def send_transactions(self, topic: str, instances: Sequence[dict[str, Any]], **more: Any) -> None:
        for instance in instances:
            self._producer.produce(topic, value=json.dumps(instance).encode(), key=instance["customer_id"], **more)
        assert self._producer.flush(30) == 0

    def committed(self, topic: str, at_least: int, within_s: float = 60.0) -> list[Record]:
        """Return all committed records of a topic, once there are so many of them."""
        consumer = Consumer(
            {
                "bootstrap.servers": self.servers,
                "group.id": f"test-{os.urandom(8).hex()}",
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 50,
            }
        )
        found: list[Record] = []
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
            deadline = time.monotonic() + within_s
            while len(found) < at_least and time.monotonic() < deadline:
                found += [_record(m) for m in consumer.consume(1000, 0.2) if m.error() is None]
            found += [_record(m) for m in consumer.consume(1000, 0.5) if m.error() is None]
        finally:
            consumer.close()
        assert len(found) >= at_least, f"{len(found)} of {at_least} records in {topic} after {within_s} s"
        return found


def _record(message: Any) -> Record:
    headers = dict(message.headers() or [])
    return Record(message.topic(), message.partition(), message.offset(), message.key(), message.value(), headers)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A broker for a module's tests: the real one, or where there is no Java, the mock."""
    if IS_REAL:
        with TemporaryDirectory(prefix="fraud-kafka-") as folder:
            server, address = kafka_server(Path(folder), JARS)
            try:
                server.start()
                yield Cluster(address, server)
            finally:
                server.kill()
        return
    assert not os.environ.get("NOTHING_IS_SKIPPED"), NO_JAVA
    owner = Producer({"test.mock.num.brokers": 1, "log_level": 0})
    brokers = owner.list_topics(timeout=10).brokers.values()
    yield Cluster(",".join(f"{broker.host}:{broker.port}" for broker in brokers))


class Stream:
    """A process of `fraud stream`."""

    def __init__(self, environment: Mapping[str, str], log: Path, *arguments: str) -> None:
        self.port = free_port()
        self.log = log
        self._environment = {**environment, "FRAUD_STREAM_PORT": str(self.port)}
        self._arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Stream:
        with self.log.open("ab") as log:
            command = [str(Path(sys.executable).parent / "fraud"), "stream", *self._arguments]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)
        return self

    def ask(self, path: str) -> tuple[int, str]:
        """Return status and body of a page; status 0 if nobody answers."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def wait(self, status: str = "ready", within_s: float = 60.0) -> Stream:
        """Wait until `/readyz` says a status, and for ``ready`` that the process has partitions."""

        def says() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            body = self.ask("/readyz")[1]
            health = json.loads(body) if body else {}
            return health.get("status") == status and (status != "ready" or health["partitions"] > 0)

        wait_until(says, within_s)
        return self

    def figure(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        lines = [line for line in self.ask("/metrics")[1].splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


@contextmanager
def stream(environment: Mapping[str, str], log: Path, *arguments: str) -> Iterator[Stream]:
    """Run one process, which is ready; ends it with SIGTERM, which must succeed."""
    process = Stream(environment, log, *arguments).start()
    try:
        yield process.wait()
    except BaseException:
        process.kill()
        raise
    assert process.stop() == 0, log.read_text()[-5000:]
