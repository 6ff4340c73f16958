"""`fraud stream` beside a broker: verdicts, dead letters, labels, headers, health; and what its parts promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from fraud.streams.verdicts import verdict_schema
from tests.kafka import Cluster, stream
from tests.servers import bentoml_serve, wait_until
from tests.tiny import transactions

SCHEMA = Path(__file__).parent.parent / "docs" / "schemas" / "verdict-1.json"


@pytest.fixture
def environment(stream_environment: dict[str, str]) -> dict[str, str]:
    return {**stream_environment, "FRAUD_ANOMALY_MODEL": "tiny-anomaly"}


def test_each_transaction_gets_one_verdict(kafka: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    names = kafka.create("once")
    sent = transactions(300, 5)
    kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent, headers=[("traceparent", b"00-1-2-01")])
    with stream({**environment, **names}, tmp_path / "log"):
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 300)
        flagged = kafka.committed(names["FRAUD_STREAM_ANOMALIES"], 1)
    by_id: dict[str, dict[str, Any]] = {record.json["transaction_id"]: record.json for record in records}
    assert len(records) == len(by_id) == 300
    assert {i["transaction_id"]: i["customer_id"].encode() for i in sent} == {
        record.json["transaction_id"]: record.key for record in records
    }
    assert {record.headers["traceparent"] for record in records} == {b"00-1-2-01"}
    wanted = [v["transaction_id"] for v in by_id.values() if v["is_anomaly"] or v["decision"] != "approve"]
    assert sorted(record.json["transaction_id"] for record in flagged) == sorted(wanted)
    assert 0 < len(wanted) < 300
    assert json.dumps(by_id)  # finite throughout


def test_verdicts_keep_to_the_published_schema(kafka: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
    names = kafka.create("schema")
    sent = transactions(40, 6)
    kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent)
    with stream({**environment, **names}, tmp_path / "log"):
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 40)
    published = json.loads(SCHEMA.read_text())
    validator = jsonschema_rs.validator_for(published)
    for record in records:
        validator.validate(record.json)
        assert record.json.keys() == published["properties"].keys()
    assert any(record.json["severity"] for record in records)
    assert all(record.json["explanation"] for record in records)
    assert json.loads(json.dumps(verdict_schema())) == published, "a published schema only grows: see docs/streams.md"


def test_the_schema_of_verdicts_only_grows() -> None:
    """What the first release of version 1 said is required, readers may rely on for ever."""
    published = json.loads(SCHEMA.read_text())
    first = {
        *("schema_version", "transaction_id", "decision", "prediction", "risk_level", "fraud_probability"),
        *("is_anomaly", "anomaly_score", "severity", "explanation", "model", "anomaly_model", "degraded"),
        *("decided_by", "rules_hit", "request_id", "times"),
    }
    assert first <= set(published["required"])
    assert published["properties"]["schema_version"]["enum"] == [1]
    assert {"event_time", "record_time", "decided_time"} <= set(published["$defs"]["Times"]["required"])
    assert published.get("additionalProperties", True) is True


BAD: dict[str, tuple[bytes | None, str, str]] = {
    "malformed": (b'{"transaction_id": "x-1", ', "invalid_request", "$"),
    "not an object": (b"[1, 2]", "invalid_request", "$"),
    "no JSON at all": (bytes(range(256)), "invalid_request", "$"),
    "a tombstone": (None, "invalid_request", "$"),
    "drifted": (
        b'{"transaction_id": "x-2", "event_time": "2026-01-02T00:00:00Z", "customer": "c"}',
        "invalid_request",
        "$",
    ),
    "a wrong amount": (
        b'{"transaction_id": "x-3", "event_time": "2026-01-02T00:00:00Z", "customer_id": "c", "amount": -1}',
        "invalid_request",
        "$.amount",
    ),
    "oversized": (b'{"transaction_id": "' + b"y" * 200_000 + b'"}', "invalid_request", "$"),
    "an envelope without an id": (
        b'{"user_id": "u", "transaction": {"amount": 1}}',
        "invalid_request",
        "$.transaction",
    ),
    "an envelope of a wrong amount": (
        b'{"user_id": "u", "transaction": {"tx_id": "x-4", "amount": "many"}}',
        "invalid_request",
        "$.transaction.amount",
    ),
    "deep": (b'{"transaction_id": ' + b"[" * 50_000, "invalid_request", "$"),
}


def test_records_that_cannot_be_decided_become_dead_letters(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    names = kafka.create("dead")
    source = names["FRAUD_STREAM_TRANSACTIONS"]
    (good, other) = transactions(2, 7)
    body = json.dumps(good).encode()
    for name, (value, _, _) in BAD.items():
        kafka.send(source, [value], key=name, headers=[("bad", name), ("traceparent", "00-9")])
    kafka.send(source, [body], key="unknown model", headers=[("model", "nobody")])
    kafka.send(source, [body], key="heavy", headers=[("weight", b"x" * 40_000)])
    kafka.send_transactions(source, [good, good, {**good, "amount": 999.5}, other])
    with stream({**environment, **names}, tmp_path / "log") as process:
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 3)
        letters = kafka.committed(names["FRAUD_STREAM_DEAD"], len(BAD) + 3)
        assert process.figure("fraud_stream_dead_letters_total") == len(letters) == len(BAD) + 3
    assert [r.json["transaction_id"] for r in records].count(
        good["transaction_id"]
    ) == 2  # one record each, one verdict
    assert (
        len({json.dumps(_decided(r.json)) for r in records if r.json["transaction_id"] == good["transaction_id"]}) == 1
    )
    by_key = {letter.key: letter for letter in letters}
    for name, (value, code, path) in BAD.items():
        letter = by_key[name.encode()]
        found = {key: content.decode() for key, content in letter.headers.items()}
        assert letter.value == value, name
        assert (found["fraud-error-code"], found["fraud-error-path"]) == (code, path), (name, found)
        assert (found["bad"], found["traceparent"], found["fraud-source-topic"]) == (name, "00-9", source)
        assert int(found["fraud-source-offset"]) >= 0
        assert found["fraud-error-message"]
    assert by_key[b"unknown model"].headers["fraud-error-code"] == b"unknown_model"
    heavy = by_key[None]  # its key and headers are too long to be carried on
    assert heavy.value == body
    assert b"40005" in heavy.headers["fraud-error-message"] or b"400" in heavy.headers["fraud-error-message"]
    assert by_key[good["customer_id"].encode()].headers["fraud-error-code"] == b"idempotency_conflict"


def _decided(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict without what says how it came: its request and its times."""
    return {name: value for name, value in verdict.items() if name not in ("request_id", "times")}


def test_a_value_that_no_dead_letter_can_hold_is_cut_off(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    names = kafka.create("cut")
    value = b'{"transaction_id": "' + b"y" * 300_000 + b'"}'
    kafka.send(names["FRAUD_STREAM_TRANSACTIONS"], [value])
    with stream({**environment, **names, "FRAUD_STREAM_MAX_MESSAGE_BYTES": "100000"}, tmp_path / "log"):
        (letter,) = kafka.committed(names["FRAUD_STREAM_DEAD"], 1)
    assert letter.headers["fraud-truncated-from-bytes"] == str(len(value)).encode()
    assert letter.value is not None
    assert value.startswith(letter.value)
    assert 30_000 < len(letter.value) < 100_000


@pytest.mark.parametrize("timestamp", [-(10**15), 10**17])
def test_a_timestamp_that_is_no_time_is_a_dead_letter_and_the_stream_goes_on(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path, timestamp: int
) -> None:
    """A producer writes the timestamp; the broker takes any that the topic's settings allow."""
    names = kafka.create(f"clock{timestamp}", config={"message.timestamp.after.max.ms": str(2**63 - 1)})
    source = names["FRAUD_STREAM_TRANSACTIONS"]
    bad, good = transactions(2, 9)
    kafka.send_transactions(source, [bad], timestamp=timestamp)
    label = {"transaction_id": good["transaction_id"], "is_fraud": True}
    kafka.send(names["FRAUD_STREAM_LABELS"], [json.dumps(label).encode()], timestamp=timestamp)
    with stream({**environment, **names}, tmp_path / "log"):
        letters = kafka.committed(names["FRAUD_STREAM_DEAD"], 2)
        kafka.send_transactions(source, [good])
        (verdict,) = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 1)
    assert verdict.json["transaction_id"] == good["transaction_id"]
    for letter in letters:
        assert letter.headers["fraud-error-code"] == b"invalid_request"
        assert str(timestamp).encode() in letter.headers["fraud-error-message"]


def test_labels_are_applied_and_verdicts_are_those_of_http(
    kafka: Cluster, environment: dict[str, str], tmp_path: Path
) -> None:
    """The same transactions by HTTP afterwards: the decisions on record; and a label that the stream applied counts."""
    names = kafka.create("http")
    sent = transactions(60, 8)
    enveloped = {"tx_id": "env-1", "amount": 12.5, "merchant": "m1", "currency": "EUR"}
    kafka.send_transactions(names["FRAUD_STREAM_TRANSACTIONS"], sent, headers=[("X-Request-ID", "asked-1")])
    kafka.send(
        names["FRAUD_STREAM_TRANSACTIONS"], [json.dumps({"user_id": "c1", "transaction": enveloped}).encode()], key="c1"
    )
    with stream({**environment, **names}, tmp_path / "log") as process:
        records = kafka.committed(names["FRAUD_STREAM_DECISIONS"], 61)
        labels = [
            {"transaction_id": sent[0]["transaction_id"], "is_fraud": True},
            {"transaction_id": "nobody", "is_fraud": True},
            {"transaction_id": sent[1]["transaction_id"], "is_fraud": "perhaps"},
        ]
        kafka.send(names["FRAUD_STREAM_LABELS"], [json.dumps(label).encode() for label in labels])
        letters = kafka.committed(names["FRAUD_STREAM_DEAD"], 2)
        wait_until(lambda: process.figure("fraud_stream_records_total") == 64)
    assert sorted(letter.headers["fraud-error-code"] for letter in letters) == [
        b"invalid_request",
        b"unknown_transaction",
    ]
    verdicts = {record.json["transaction_id"]: record.json for record in records}
    assert verdicts["env-1"]["request_id"].startswith("http.transactions-")
    with bentoml_serve(environment, tmp_path / "service.log") as url:
        for instance in sent:
            (answer,) = _post(url, "/explain", {"instances": [instance]})["predictions"]
            verdict = verdicts[instance["transaction_id"]]
            assert verdict["request_id"] == "asked-1"
            shared = ("fraud_probability", "decision", "prediction", "risk_level", "model", "degraded", "explanation")
            assert {name: verdict[name] for name in shared} == {name: answer[name] for name in shared}
            assert verdict["anomaly_score"] == answer["anomaly"]["score"]
        inferred = _post(url, "/v1/inference", {"user_id": "c1", "transaction": enveloped})
        assert inferred["anomaly_score"] == verdicts["env-1"]["anomaly_score"]
        assert inferred["is_anomaly"] == verdicts["env-1"]["is_anomaly"]
        told = _post(url, "/v1/labels", {"labels": [labels[0]]})["labels"][0]["outcome"]
        assert told in ("known", "applied")


def _post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    import httpx

    answer = httpx.post(f"{url}{path}", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    decoded: dict[str, Any] = answer.json()
    return decoded
