"""`fraud stream` against a real broker: the broker and the store away, workers killed, joining and leaving."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fraud.cli.commands import app
from tests.kafka import JARS, Cluster, Record, Stream, needs_kafka, stream
from tests.servers import Server, wait_until
from tests.tiny import transactions

pytestmark = needs_kafka
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
needs_kcat = pytest.mark.skipif(not shutil.which("kcat"), reason="runs kcat; on Debian: apt-get install kcat")


@pytest.fixture
def environment(stream_environment: dict[str, str]) -> dict[str, str]:
    return {
        **stream_environment,
        "FRAUD_STREAM_SESSION_TIMEOUT_S": "3",
        "FRAUD_STREAM_TRANSACTION_TIMEOUT_S": "4",
    }


def ids_of(records: list[Record]) -> list[str]:
    return [record.json["transaction_id"] for record in records]


def in_order(records: list[Record], sent: list[dict[str, Any]]) -> bool:
    """Whether the verdicts of each customer come in the order in which the transactions were sent."""
    place = {instance["transaction_id"]: i for i, instance in enumerate(sent)}
    by_key: dict[bytes | None, list[int]] = defaultdict(list)
    for record in records:
        by_key[record.key].append(place[record.json["transaction_id"]])
    return all(places == sorted(places) for places in by_key.values())


def test_a_store_that_is_away_is_waited_for(
    kafka: Cluster, environment: dict[str, str], postgres_server: Server, tmp_path: Path
) -> None:
    names = kafka.create("store-away")
    sent = transactions(50, 11)
    with stream({**environment, **names, "FRAUD_STORE": postgres_server.url}, tmp_path / "log") as process:
        kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent[:10])
        kafka.committed(names["FRAUD_STREAM_DECISIONS"], 10)
        postgres_server.kill()
        kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent[10:])
        process.wait("waiting")
        status, body = process.ask("/readyz")
        assert status == 503
        assert "store" in json.loads(body)["waiting"]
        assert process.ask("/livez")[0] == 200
        assert process.figure("fraud_stream_waiting") == 1
        postgres_server.start()
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 50)
        process.wait("ready")
        assert process.figure("fraud_stream_waiting") == 0
        assert process.figure("fraud_stream_dead_letters_total") == 0
    assert sorted(ids_of(records)) == sorted(i["transaction_id"] for i in sent)


def test_a_broker_that_is_away_is_waited_for(kafka: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    names = kafka.create("broker-away")
    sent = transactions(40, 12)
    assert kafka.server is not None
    with stream({**environment, **names}, tmp_path / "log") as process:
        kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent[:20])
        kafka.committed(names["FRAUD_STREAM_DECISIONS"], 20)
        kafka.server.kill()
        process.wait("waiting")
        assert "broker" in json.loads(process.ask("/readyz")[1])["waiting"]
        kafka.server.start()
        kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent[20:])
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 40)
        process.wait("ready")
        wait_until(lambda: process.figure("fraud_stream_lag_records") == 0)
    assert sorted(ids_of(records)) == sorted(i["transaction_id"] for i in sent)
    assert "the broker is back" in (tmp_path / "log").read_text()


def test_a_broker_that_is_not_there_yet_is_waited_for(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    names = kafka.create("broker-later")
    assert kafka.server is not None
    kafka.server.kill()
    process = Stream({**environment, **names}, tmp_path / "log").start()
    try:
        process.wait("waiting")
        kafka.server.start()
        process.wait("ready")
    finally:
        assert process.stop() == 0


def test_missing_topics_are_named_or_made(kafka: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    names = {**kafka.create("made"), "FRAUD_STREAM_DEAD": "made.elsewhere"}
    process = Stream({**environment, **names}, tmp_path / "log").start()
    assert process.process is not None
    assert process.process.wait(60) == 1
    assert (
        "the cluster has no topic made.elsewhere; create it, or start with --create-topics" in process.log.read_text()
    )
    with stream({**environment, **names}, tmp_path / "again", "--create-topics", "3"):
        kafka.send(names["FRAUD_STREAM_TRANSACTIONS"], [b"{"])
        assert len(kafka.committed("made.elsewhere", 1)) == 1


def test_workers_join_leave_and_die_and_each_key_keeps_its_order(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    """One worker, then two, then one of them is killed and the other goes on, while transactions arrive."""
    names = kafka.create("rebalance", 4)
    shared = {**environment, **names}
    sent = transactions(1200, 13)
    source = names["FRAUD_STREAM_TRANSACTIONS"]
    with stream(shared, tmp_path / "first") as first:
        kafka.send_transactions(source, sent[:300])
        second = Stream(shared, tmp_path / "second").start()
        kafka.send_transactions(source, sent[300:600])
        second.wait()
        kafka.send_transactions(source, sent[600:800])
        kafka.committed(names["FRAUD_STREAM_DECISIONS"], 800)
        kafka.send_transactions(source, sent[800:1000])
        second.kill()
        kafka.send_transactions(source, sent[1000:])
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 1200)
        assert first.figure("fraud_stream_rebalances_total") >= 3
    assert sorted(ids_of(records)) == sorted(i["transaction_id"] for i in sent)
    assert in_order(records, sent)


def test_sigterm_commits_what_was_read_and_leaves_at_once(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    names = kafka.create("leave")
    sent = transactions(2000, 14)
    process = Stream({**environment, **names}, tmp_path / "log").start()
    process.wait()
    kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent)
    wait_until(lambda: process.figure("fraud_stream_records_total") > 0)
    started = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - started < 10
    assert "what was decided is committed" in process.log.read_text()
    with stream({**environment, **names}, tmp_path / "next"):
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 2000)
    assert sorted(ids_of(records)) == sorted(i["transaction_id"] for i in sent)


def test_a_worker_that_stood_still_too_long_writes_nothing_twice(
    kafka: Cluster, environment: dict[str, str], postgres_server: Server, tmp_path: Path
) -> None:
    """A frozen worker loses its partitions to another; thawed, its unfinished write is fenced."""
    names = kafka.create("frozen")
    shared = {**environment, **names, "FRAUD_STORE": postgres_server.url}
    sent = transactions(900, 15)
    source = names["FRAUD_STREAM_TRANSACTIONS"]
    first = Stream(shared, tmp_path / "first").start().wait()
    assert first.process is not None
    try:
        kafka.send_transactions(source, sent[:600])
        wait_until(lambda: first.figure("fraud_stream_records_total") > 0)
        first.process.send_signal(signal.SIGSTOP)
        with stream(shared, tmp_path / "second"):
            kafka.send_transactions(source, sent[600:])
            kafka.committed(names["FRAUD_STREAM_DECISIONS"], 900)
            first.process.send_signal(signal.SIGCONT)
            first.wait()  # a member again
            records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 900)
    finally:
        first.process.send_signal(signal.SIGCONT)
        assert first.stop() == 0, first.log.read_text()[-3000:]
    assert sorted(ids_of(records)) == sorted(i["transaction_id"] for i in sent)
    assert in_order(records, sent)


@needs_kcat
def test_kcat_produces_consumes_and_reads_headers(kafka: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    """A client that no one here wrote."""
    names = kafka.create("kcat")
    (instance,) = transactions(1, 16)
    kcat = ["kcat", "-b", kafka.servers]
    with stream({**environment, **names}, tmp_path / "log"):
        produce = [*kcat, "-P", "-t", names["FRAUD_STREAM_TRANSACTIONS"], "-k", instance["customer_id"]]
        headers = [
            "-H",
            "traceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "-H",
            "X-Request-ID=k-1",
        ]
        subprocess.run([*produce, *headers], input=json.dumps(instance).encode(), check=True)
        consume = [*kcat, "-C", "-t", names["FRAUD_STREAM_DECISIONS"], "-c", "1", "-q", "-f", "%k|%h|%s\n"]
        done = subprocess.run(consume, capture_output=True, text=True, timeout=60, check=True)
    key, headers_read, value = done.stdout.strip().split("|", 2)
    assert key == instance["customer_id"]
    assert headers_read == f"traceparent={TRACEPARENT},X-Request-ID=k-1"
    verdict = json.loads(value)
    assert (verdict["transaction_id"], verdict["request_id"]) == (instance["transaction_id"], "k-1")


def test_fraud_verify_stream(tiny_bundle: Path) -> None:
    """A small run of the check: workers, the broker and PostgreSQL are killed."""
    arguments = ["--kills", "5", "--broker-restarts", "1", "--model", str(tiny_bundle), "--rate", "100"]
    done = CliRunner().invoke(app, ["verify", "stream", *arguments, "--jars", str(JARS)])
    assert done.exit_code == 0, done.output
    assert "1 of kafka, 1 of postgres, 5 of stream workers" in done.output
    assert "lost 0, doubled 0, out of their customer's order 0" in done.output
    assert "different 0; replay: 0 differences" in done.output
