"""`fraud verify stream`: stream workers, the broker and the stores are killed under load, and no verdict is lost,
doubled, or another than HTTP's and the replay's."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from confluent_kafka import Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from rich.console import Console

from fraud.checks.sandbox import Sandbox, answered_score, connected, sandbox
from fraud.checks.servers import ROOT, Killable, StreamWorker, kafka_server, postgres_server, redis_server
from fraud.environment import child_environment
from fraud.errors import NotReady
from fraud.models.find import IN_PRODUCTION
from fraud.stream_settings import StreamSettings
from fraud.streams.cluster import topics_of

PARTITIONS = 4
CUSTOMERS = 200
REST_S = 180.0
"""How long the last verdicts may take after the last fault."""

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass
class Streamed:
    """The figures of one run."""

    sent: int = 0
    records: int = 0
    lost: int = 0
    doubled: int = 0
    out_of_order: int = 0
    unlike_http: int = 0
    compared: int = 0
    degraded: int = 0
    replay: str = ""
    replays: bool = False
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        wrong = (self.lost, self.doubled, self.out_of_order, self.unlike_http, self.sent - self.compared)
        return self.replays and not any(wrong) and self.sent > 0


@app.command()
def stream(
    kills: Annotated[int, typer.Option(min=1, help="How often a stream worker is killed.")] = 50,
    broker_restarts: Annotated[int, typer.Option(min=0, help="How often the broker is killed and started.")] = 10,
    model: Annotated[
        str, typer.Option(help="A bundle folder, or NAME[:REF]; what is in production if none.")
    ] = IN_PRODUCTION,
    rate: Annotated[float, typer.Option(min=1, help="Transactions a second that are sent.")] = 200.0,
    jars: Annotated[Path, typer.Option(help="Folder with the jars of Apache Kafka.")] = Path(sys.prefix) / "kafka",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Kill stream workers, the broker and the stores under load; every transaction gets exactly one verdict.

    Starts a Kafka, a Redis, a PostgreSQL and two workers of its own. PostgreSQL and Redis are killed in turn, once for
    every five workers. What a reader of committed records sees is compared with what was sent, with what the service
    answers over HTTP, and with the replay of the decision log.
    """
    with sandbox(model, 1) as box, tempfile.TemporaryDirectory(prefix="fraud-stream-") as folder:
        result = measure(box, Path(folder), kills, broker_restarts, rate, jars, random.Random(seed))
    faults = ", ".join(f"{n} of {name}" for name, n in sorted(result.faults.items()))
    out.print(f"killed: {faults}; {result.sent:,} transactions in {result.seconds:.0f} s")
    out.print(
        f"verdicts read committed: {result.records:,}; lost {result.lost}, doubled {result.doubled}, out of their "
        f"customer's order {result.out_of_order}; {result.degraded:,} decided without something"
    )
    out.print(f"compared with HTTP: {result.compared:,}, different {result.unlike_http}; replay: {result.replay}")
    if not result.holds:
        raise typer.Exit(1)


def measure(
    box: Sandbox, folder: Path, kills: int, broker_restarts: int, rate: float, jars: Path, rng: random.Random
) -> Streamed:
    """Run two workers under load and faults, and compare what came out."""
    result = Streamed()
    cold, hot, broker = postgres_server(folder), redis_server(folder), kafka_server(folder, jars)
    environment = {
        "BENTOML_HOME": str(box.folder),
        "FRAUD_MODEL": box.name,
        "FRAUD_MODEL_VERSION": "",
        "FRAUD_STATE_DIR": str(folder / "state"),
        "FRAUD_STORE": hot[1],
        "FRAUD_COLD_STORE": cold[1],
        "FRAUD_KAFKA_BOOTSTRAP_SERVERS": broker[1],
        "FRAUD_STREAM_SESSION_TIMEOUT_S": "3",
        "FRAUD_STREAM_TRANSACTION_TIMEOUT_S": "5",
    }
    workers = [StreamWorker(f"worker-{i}", folder, environment) for i in range(2)]
    servers = [cold[0], hot[0], broker[0]]
    try:
        for server in servers:
            server.start()
        create_topics(broker[1])
        for worker in workers:
            worker.begin()
        for worker in workers:
            worker.wait()
        started = time.monotonic()
        with offered(broker[1], box.instances, rate) as sent:
            break_all(workers, servers, kills, broker_restarts, rng, result.faults)
        result.sent = len(sent)
        records = committed(broker[1], len(sent))
        result.seconds = time.monotonic() - started
        judge(result, sent, records)
        for worker in workers:
            worker.kill()
        box.environment = environment
        asyncio.run(compare(box, sent, records, result))
        result.replays, result.replay = replayed(environment)
    finally:
        for killable in (*workers, *servers):
            killable.kill()
    return result


def create_topics(address: str) -> None:
    """Create the topics of the stream."""
    admin = AdminClient({"bootstrap.servers": address})
    names = topics_of(StreamSettings())
    for future in admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names]).values():
        future.result(30)


def transaction(instances: Sequence[Mapping[str, Any]], n: int) -> dict[str, Any]:
    """Return the n-th transaction: a golden one under an id, a customer and a time of its own."""
    made = {**instances[n % len(instances)], "transaction_id": f"verify-{n:08d}"}
    if "customer_id" in made:
        made["customer_id"] = f"customer-{n * 7919 % CUSTOMERS}"
        made["event_time"] = (datetime.fromisoformat(made["event_time"]) + timedelta(seconds=n)).isoformat()
    return made


@contextmanager
def offered(address: str, instances: Sequence[Mapping[str, Any]], rate: float) -> Iterator[list[dict[str, Any]]]:
    """Send transactions at a rate until the end of the block; gives the list of those sent, which grows.

    The producer is idempotent and waits for the broker, so that what is sent is in the topic once.
    """
    options = {"enable.idempotence": True, "delivery.timeout.ms": 300_000, "linger.ms": 5, "log_level": 0}
    producer = Producer({"bootstrap.servers": address, "partitioner": "murmur2_random", **options})
    sent: list[dict[str, Any]] = []
    failed: list[object] = []
    done = threading.Event()

    def delivered(error: object, _: object) -> None:
        if error is not None:
            failed.append(error)

    def send() -> None:
        began = time.monotonic()
        while not done.is_set():
            while len(sent) < (time.monotonic() - began) * rate:
                made = transaction(instances, len(sent))
                key = made.get("customer_id")
                producer.produce(
                    StreamSettings().transactions, value=msgspec.json.encode(made), key=key, on_delivery=delivered
                )
                sent.append(made)
            producer.poll(0.005)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        done.set()
        thread.join()
        waiting = producer.flush(120)
    if waiting or failed:
        raise NotReady(f"the check could not send its transactions: {waiting} wait, {failed[:3]} failed")


def break_all(
    workers: Sequence[StreamWorker],
    servers: Sequence[Killable],
    kills: int,
    broker_restarts: int,
    rng: random.Random,
    faults: Counter[str],
) -> None:
    """Kill a worker so often, and between these kills the stores in turn and the broker.

    A worker is killed at a random moment after it has partitions again; the other one goes on.
    """
    postgres, hot, broker = servers
    for i in range(kills):
        worker = workers[rng.randrange(2)]
        worker.wait()
        time.sleep(rng.uniform(0.0, 1.0))
        worker.kill()
        faults["stream workers"] += 1
        worker.begin()
        if i % 5 == 4:
            store = (postgres, hot)[i // 5 % 2]
            restart(store, rng, faults)
        if (i + 1) * broker_restarts // kills > i * broker_restarts // kills:
            restart(broker, rng, faults)
    for worker in workers:
        worker.wait()


def restart(server: Killable, rng: random.Random, faults: Counter[str]) -> None:
    """Kill a server, and start it a moment later."""
    server.kill()
    faults[server.name] += 1
    time.sleep(rng.uniform(0.2, 2.0))
    server.start()


def committed(address: str, expected: int) -> list[Message]:
    """Return what a reader of committed records sees in the topic of decisions, once it has been quiet."""
    options = {"isolation.level": "read_committed", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
    consumer = Consumer({"bootstrap.servers": address, "group.id": "fraud-verify", "log_level": 0, **options})
    topic = StreamSettings().decisions
    consumer.assign([TopicPartition(topic, partition, 0) for partition in range(PARTITIONS)])
    found: list[Message] = []
    deadline = time.monotonic() + REST_S
    quiet = 0
    while time.monotonic() < deadline and quiet < 5:
        some = [message for message in consumer.consume(1000, 1.0) if message.error() is None]
        found += some
        quiet = quiet + 1 if len(found) >= expected and not some else 0
    consumer.close()
    return found


def judge(result: Streamed, sent: Sequence[Mapping[str, Any]], records: Sequence[Message]) -> None:
    """Count what is lost, doubled, and out of the order of its key."""
    ids = Counter(verdict_of(record)["transaction_id"] for record in records)
    result.records = len(records)
    result.lost = sum(made["transaction_id"] not in ids for made in sent)
    result.doubled = sum(ids.values()) - len(ids)
    last: dict[bytes | str | None, str] = defaultdict(str)
    for record in records:
        verdict, key = verdict_of(record), record.key()
        result.degraded += bool(verdict["degraded"])
        if key is not None and verdict["transaction_id"] <= last[key]:
            result.out_of_order += 1
        last[key] = verdict["transaction_id"]


async def compare(
    box: Sandbox, sent: Sequence[Mapping[str, Any]], records: Sequence[Message], result: Streamed
) -> None:
    """Ask the service for the same transactions: its answers must be the verdicts."""
    verdicts = {v["transaction_id"]: v for v in map(verdict_of, records)}
    await box.start()
    async with connected(box.port) as client:
        for start in range(0, len(sent), 500):
            some = [made for made in sent[start : start + 500] if made["transaction_id"] in verdicts]
            status, body = await client.ask("POST", "/predict", msgspec.json.encode({"instances": some}))
            if status != 200:
                raise NotReady(f"the service answered {status}: {body[:500]!r}")
            for answer in msgspec.json.decode(body)["predictions"]:
                result.compared += 1
                result.unlike_http += unlike(verdicts[answer["transaction_id"]], answer)
    box.kill()


def unlike(verdict: Mapping[str, Any], answer: Mapping[str, Any]) -> bool:
    """Return whether a verdict differs from HTTP's answer."""
    if "error" in answer:
        return True
    names = ("fraud_probability", "decision", "prediction", "risk_level", "model", "degraded", "decided_by")
    score = verdict["anomaly_score"] if verdict["fraud_probability"] is None else verdict["fraud_probability"]
    return score != answered_score(answer) or any(verdict[name] != answer[name] for name in names)


def replayed(environment: Mapping[str, str]) -> tuple[bool, str]:
    """Replay the whole decision log; returns whether every bit is the same, and the last line."""
    command = [sys.executable, "-c", "from fraud.cli.main import main; main()", "replay", "--all"]
    done = subprocess.run(
        command, env=child_environment(environment), cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit {done.returncode}"


def verdict_of(record: Message) -> dict[str, Any]:
    """Return a record's verdict."""
    verdict: dict[str, Any] = msgspec.json.decode(record.value() or b"")
    return verdict
