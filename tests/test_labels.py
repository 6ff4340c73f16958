"""Labels over HTTP: told once, refused by the row, counted, noted; what they change is what the offline replay has."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fraud.checks.history import recorded_features
from fraud.cli.history import read_labels
from fraud.cli.main import main
from fraud.features.featurizer import Featurizer, Matrix
from fraud.models.scorer import Scorer
from fraud.pipeline.labels import AT_ONCE
from fraud.schema import TRANSACTION_FIELDS
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store
from tests.conftest import PATIENT
from tests.servers import Server, bentoml_serve, needs_curl, wait_until
from tests.test_bento_service import Served
from tests.test_profiles import Service
from tests.test_store_faults import until_back
from tests.test_stores import alone, of_run
from tests.tiny import AMOUNT_QUANTILES, START_MS, TRANSACTION_SPEC, rfc3339, store_of_tiny_models, transactions
from training.data import Mapping, load_transactions
from training.replay import replay

ROOT = Path(__file__).parent.parent
DAY_MS = 86_400_000
FRAUD = {"transaction_id": "t44-0", "is_fraud": True}


@pytest.fixture
def service(scorer: Scorer, tmp_path: Path) -> Iterator[Service]:
    with Service(scorer, open_store("sqlite:", StoreOptions(tmp_path, durable=False))) as service:
        service.score(transactions(3, 44))
        yield service


def test_each_label_gets_its_outcome_in_order_and_a_bad_one_fails_alone(service: Service) -> None:
    labels: list[dict[str, Any]] = [
        FRAUD,
        {**FRAUD, "transaction_id": "t44-1", "is_fraud": False},
        {**FRAUD, "transaction_id": "never scored"},
        {**FRAUD, "transaction_id": "t44-2", "label_time": "2026-03-01T12:00:00"},
        FRAUD,
        {**FRAUD, "transaction_id": "t44-2", "label_time": "2026-03-01T12:00:00+01:00"},
        {"transaction": "t44-2"},
    ]
    status, answer = service.call("POST", "/v1/labels", {"labels": labels})
    assert status == 200
    assert [row.get("outcome") for row in answer["labels"]] == [
        "applied",
        "applied",
        "unknown",
        None,
        "known",
        "applied",
        None,
    ]
    assert [row["transaction_id"] for row in answer["labels"][:6]] == [label["transaction_id"] for label in labels[:6]]
    refused = {i: answer["labels"][i]["error"] for i in (3, 6)}
    assert refused[3] == {
        "code": "invalid_request",
        "message": "Expected `datetime` with a timezone component; send RFC 3339 with a zone, such as "
        '"2026-01-31T12:30:00Z"; "2026-03-01T12:00:00" arrived',
        "path": "$.labels[3].label_time",
    }
    assert refused[6]["message"] == "missing transaction_id, is_fraud; did you mean 'transaction_id' for 'transaction'"
    assert answer["labels"][6]["transaction_id"] is None
    assert service.pipeline.counts == service.pipeline.counts | {
        "labels_applied": 3,
        "labels_known": 1,
        "labels_unknown": 1,
        "labels_refused": 2,
    }


def test_a_label_may_come_in_the_forms_of_a_table(service: Service) -> None:
    scored = {**transactions(1, 44)[0], "transaction_id": 1001}
    service.score([scored])
    forms: list[dict[str, Any]] = [
        {"transaction_id": 1001.0, "is_fraud": 1, "label_time": "2026-03-01T12:30Z"},
        {"transaction_id": "1001", "is_fraud": True, "label_time": "2026-03-01T12:30:00Z"},
        {"transaction_id": "1001.0", "is_fraud": 0, "label_time": "2026-03-01T14:30+01:00"},
    ]
    assert service.outcomes(forms) == ["applied", "known", "applied"]
    _, answer = service.call("POST", "/v1/labels", {"labels": [{**forms[0], "is_fraud": 2}, {**forms[0], "x": 1}]})
    assert [error["message"] for error in answer["errors"]] == [
        "Expected `bool | null`, got `int`; 2 arrived",
        "Object contains unknown field `x`",
    ]


@pytest.mark.parametrize(
    ("body", "status", "code", "message", "path"),
    [
        (b'{"labels": [', 400, "malformed_json", "the body is not JSON", None),
        (b"{}", 422, "invalid_request", "0 labels arrived; 1 to 1000 a call are allowed", "$.labels"),
        (b'{"labels": 3}', 422, "invalid_request", "Expected `array`, got `int`; send {", "$.labels"),
        ({"labels": [FRAUD] * 1001}, 422, "invalid_request", "1001 labels arrived; 1 to 1000 a call", "$.labels"),
        ({"labels": [3]}, 422, "invalid_request", "a label must be a JSON object", "$.labels[0]"),
        (
            {"labels": [{**FRAUD, "labelTime": "2026-03-01T12:00:00Z"}]},
            *(422, "invalid_request", "Object contains unknown field `labelTime`", "$.labels[0]"),
        ),
        (
            {"labels": [{**FRAUD, "label_time": "2100-01-01T00:00:00Z"}]},
            *(422, "invalid_request", "label_time 2100-01-01T00:00:00+00:00 is more than 300 s ahead of the server's"),
            "$.labels[0].label_time",
        ),
        (
            {"labels": [{**FRAUD, "transaction_id": "tiny-features\x1ft1"}]},
            *(422, "invalid_request", "an id may not hold the characters", "$.labels[0].transaction_id"),
        ),
    ],
)
def test_what_is_refused_as_a_whole(
    service: Service, body: Any, status: int, code: str, message: str, path: str | None
) -> None:
    answered, answer = service.call("POST", "/v1/labels", body)
    error = answer["error"]
    assert (answered, error["code"], error["path"]) == (status, code, path)
    assert error["message"].startswith(message)


def test_every_label_bad_is_one_error_with_all_of_them(service: Service) -> None:
    status, answer = service.call("POST", "/v1/labels", {"labels": [{**FRAUD, "is_fraud": "no"}, {}]})
    assert status == 422
    assert [error["path"] for error in answer["errors"]] == ["$.labels[0].is_fraud", "$.labels[1]"]
    assert answer["error"]["message"] == answer["errors"][0]["message"]


def test_who_told_is_noted_and_nobody_is_named(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fraud.serving.labels"):
        service.call("POST", "/v1/labels", {"labels": [FRAUD]})
    assert re.search(r"labels applied: 1 of 1, transactions [0-9a-f]{16}, key none, request \S+", caplog.text)
    assert "t44-0" not in caplog.text


def test_a_label_time_before_the_event_counts_as_the_events(opened: Callable[[], Store], scorer: Scorer) -> None:
    with Service(scorer, opened()) as service:
        instances = of_run(f"early{id(service)}", transactions(2, 45, customers=1))
        service.score(instances)
        ids = [instance["transaction_id"] for instance in instances]
        early = {"is_fraud": True, "label_time": rfc3339(START_MS - 60 * DAY_MS)}
        labels = [{**early, "transaction_id": ids[1]}, {**early, "transaction_id": ids[1], "label_time": rfc3339(1)}]
        assert service.outcomes(labels) == ["applied", "known"]
        recalled = service.runner.run(service.pipeline.store.recall(ids, [instances[0]["customer_id"]], []))
        state = recalled.histories.customers
        assert state["last_label_time"].tolist() == [recalled.decided[ids[1]].event_time_ms]
        assert state["day_count"].sum() == 2  # no day was opened or lost for it


def test_a_thousand_labels_are_told_in_small_steps(opened: Callable[[], Store], scorer: Scorer) -> None:
    with Service(scorer, opened()) as service:
        instances = of_run(f"many{id(service)}", transactions(120, 46, customers=5, merchants=3))
        service.score(instances)
        calls = []
        apply_labels = service.pipeline.store.apply_labels

        async def counted(labels: Any) -> Any:
            calls.append(len(labels))
            return await apply_labels(labels)

        service.pipeline.store.apply_labels = counted  # type: ignore[method-assign]
        ids = [instance["transaction_id"] for instance in instances]
        ids += [f"nobody's{i}" for i in range(880)]
        labels = [{"transaction_id": name, "is_fraud": True} for name in ids]
        assert service.outcomes(labels) == ["applied"] * 120 + ["unknown"] * 880
        assert calls == [AT_ONCE] * (1000 // AT_ONCE)
        assert service.outcomes(labels) == ["known"] * 120 + ["unknown"] * 880


def test_a_label_finds_the_customer_whose_id_is_kept_as_a_hash(scorer: Scorer, tmp_path: Path) -> None:
    options = StoreOptions(tmp_path, durable=False, personal_fields=("customer_id", "merchant_id"), personal_key="k")
    with Service(scorer, open_store("sqlite:", options)) as service:
        instance = {**transactions(1, 47)[0], "customer_id": "dora", "merchant_id": "m1"}
        service.score([instance])
        assert service.outcomes([{"transaction_id": instance["transaction_id"], "is_fraud": True}]) == ["applied"]
        assert service.call("GET", "/v1/users/dora/profile")[1]["frauds"] == 1
        recalled = service.runner.run(service.pipeline.store.recall([], ["dora"], ["m1"]))
        assert recalled.histories.merchants["fraud_count"].tolist() == [1]
    assert b"dora" not in (tmp_path / "history.db").read_bytes()


@pytest.mark.parametrize(
    ("faulty", "fault"),
    [
        *(
            (faulty, "killed")
            for faulty in ("redis", "postgresql", "redis before postgresql", "postgresql behind redis")
        ),
        *((faulty, "frozen") for faulty in ("redis", "postgresql")),
    ],
)
def test_a_store_that_is_gone_takes_no_label_and_loses_none(
    faulty: str, fault: str, scorer: Scorer, redis_server: Server, postgres_server: Server
) -> None:
    server = redis_server if faulty.startswith("redis") else postgres_server
    both = " " in faulty
    options = StoreOptions(**PATIENT | {"durable": True})  # type: ignore[arg-type]
    url = redis_server.url if both else server.url
    store = open_store(url, replace(options, cold_store=postgres_server.url) if both else options)
    with Service(scorer, store) as service:
        instances = of_run(f"gone{faulty}{fault}", transactions(4, 48, customers=2, merchants=2))
        service.score(instances)
        labels = [{"transaction_id": instance["transaction_id"], "is_fraud": True} for instance in instances]
        assert service.outcomes(labels[:1]) == ["applied"]
        if fault == "killed":
            server.kill()
        else:
            server.freeze()
        status, answer = service.call("POST", "/v1/labels", {"labels": labels[:3]})
        if faulty == "redis before postgresql":  # which has the record
            assert (status, [row["outcome"] for row in answer["labels"]]) == (200, ["known", "applied", "applied"])
        else:
            assert (status, answer["error"]["code"]) == (503, "unavailable")
            assert int(service.headers["retry-after"]) >= 1
        if fault == "killed":
            server.start()
        else:
            server.thaw()
        service.runner.run(until_back(store))
        outcomes = service.outcomes(labels)
        assert outcomes[0] == "known"
        assert outcomes[3] == "applied"
        assert set(outcomes[1:3]) <= {"applied", "known"}  # a call given up may still have reached a frozen server
        assert service.outcomes(labels) == ["known"] * 4
        _, states = alone(scorer, instances)
        of_record: Store = getattr(store, "cold", store)
        for kept in (store, of_record):
            recalled = service.runner.run(kept.recall([], states.customer_ids, states.merchant_ids))
            assert recalled.degraded == ()
            assert recalled.histories.customers["fraud_count"].sum() == 4


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A real service, whose decisions are in a file that can be looked at."""
    home = tmp_path_factory.mktemp("labels")
    environment = {**store_of_tiny_models(home), "FRAUD_DURABLE": "false", "FRAUD_LOG_REQUESTS": "all"}
    with bentoml_serve(environment, home / "log") as url:
        yield Served(url, environment, home / "log")


def test_a_fraud_changes_the_merchants_risk_exactly_as_the_offline_replay(served: Served, tmp_path: Path) -> None:
    instances = [{**instance, "merchant_id": "the-shop"} for instance in transactions(8, 49, customers=4)]
    for later in instances[6:]:  # two days after the others
        moment = datetime.fromisoformat(later["event_time"]) + timedelta(days=2)
        later["event_time"] = moment.isoformat(timespec="milliseconds")
    label_time = rfc3339(START_MS + DAY_MS)
    fraud = instances[2]["transaction_id"]
    assert served.ask("/predict", {"instances": instances[:6]})[0] == 200
    status, told = served.ask(
        "/v1/labels", {"labels": [{"transaction_id": fraud, "is_fraud": True, "label_time": label_time}]}
    )
    assert (status, told) == (200, {"labels": [{"transaction_id": fraud, "outcome": "applied"}]})
    assert served.ask("/predict", {"instances": instances[6:7]})[0] == 200
    assert served.ask("/explain", {"instances": instances[7:]})[0] == 200

    online = features_recorded(Path(served.environment["FRAUD_STATE_DIR"]), instances)
    offline = features_replayed(instances, tmp_path, {fraud: label_time})
    assert online.tobytes() == offline.tobytes()
    without = features_replayed(instances, tmp_path, {})
    moved = {TRANSACTION_SPEC.names[j] for j in np.flatnonzero((offline[7] != without[7]) & ~np.isnan(offline[7]))}
    assert moved >= {"merchant_fraud_count_lifetime", "merchant_fraud_share_30d", "merchant_fraud_label_count_7d"}
    assert np.array_equal(offline[:6], without[:6], equal_nan=True)


def features_recorded(state: Path, instances: list[dict[str, Any]]) -> Matrix:
    """The features of transactions as the service scored them."""

    async def read() -> Matrix:
        store = open_store("sqlite:", StoreOptions(state))
        try:
            ids = [instance["transaction_id"] for instance in instances]
            return await recorded_features(store, ids, len(TRANSACTION_SPEC.features))
        finally:
            await store.close()

    return asyncio.run(read())


def features_replayed(instances: list[dict[str, Any]], folder: Path, frauds: dict[str, str]) -> Matrix:
    """The features of the same transactions as a table for training, with the frauds known from their times on."""
    table = pd.DataFrame(instances)
    table["is_fraud"] = table["transaction_id"].isin(frauds.keys()).astype(int)
    table["label_time"] = table["transaction_id"].map(frauds)
    table.to_csv(folder / "table.csv", index=False)
    mapping = Mapping.model_validate(
        {
            "kind": "transaction",
            **{name: name for name in TABLE_ROLES},
            "label": "is_fraud",
            "label_delay": "7d",
            "numeric": {"basket_size": {"missing": "allowed"}},
        }
    )
    loaded = load_transactions(folder / "table.csv", mapping, labelled=False)
    return replay(loaded, Featurizer(TRANSACTION_SPEC, AMOUNT_QUANTILES), slice(None))


TABLE_ROLES = (*(name for name in TRANSACTION_FIELDS if name != "channel"), "label_time")


def test_labels_and_profiles_are_counted_under_their_own_names(served: Served) -> None:
    instance = {**transactions(1, 50)[0], "customer_id": "nobody-else"}
    assert served.ask("/predict", {"instances": [instance]})[0] == 200
    labels = [{"transaction_id": name, "is_fraud": True} for name in (instance["transaction_id"], "unheard-of")]
    assert served.ask("/v1/labels", {"labels": labels})[0] == 200
    assert served.ask("/v1/users/nobody-else/profile")[1]["frauds"] == 1
    assert served.ask("/v1/users/some%2Fbody%2Felse/profile")[0] == 404

    def metrics() -> dict[str, float]:
        lines = [line for line in served.ask("/metrics")[1].splitlines() if line and not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    expected = {
        'fraud_requests_total{route="/v1/labels",status="200"}',
        'fraud_requests_total{route="/v1/users/{id}/profile",status="200"}',
        'fraud_requests_total{route="/v1/users/{id}/profile",status="404"}',
        'fraud_labels_total{outcome="applied"}',
        'fraud_labels_total{outcome="unknown"}',
    }
    wait_until(lambda: expected <= {name for name, value in metrics().items() if value})
    assert not [name for name in metrics() if "body" in name]
    log = (Path(served.environment["BENTOML_HOME"]) / "log").read_text()
    assert "labels applied: 1 of 2" in log
    assert "/v1/users/{id}/profile" in log
    assert "body" not in log


@pytest.fixture
def blocks() -> dict[str, list[str]]:
    """The blocks of docs/history.md by their language."""
    found: dict[str, list[str]] = {}
    text = (ROOT / "docs" / "history.md").read_text()
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        found.setdefault(language, []).append(block)
    return found


@needs_curl
def test_the_example_of_the_docs(
    served: Served, blocks: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for transaction in ("t-1", "t-2", "t-3"):
        instance = {**transactions(1, 51)[0], "transaction_id": transaction, "customer_id": "c-7"}
        if transaction != "t-3":
            assert served.ask("/predict", {"instances": [instance]})[0] == 200
    curl, label = blocks["sh"]
    (answer,) = blocks["json"]
    done = subprocess.run(["sh", "-c", at(curl, served.url)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(answer)
    (python,) = blocks["python"]
    exec(at(python, served.url), {"instance": instance})
    assert capsys.readouterr().out == "applied 2\n"

    (tmp_path / "frauds.csv").write_text(blocks["csv"][0])
    command = [str(Path(sys.executable).parent / "fraud"), *shlex.split(label)[1:]]
    for shown in ("1 applied, 1 known before, 0 unknown", "0 applied, 2 known before, 0 unknown"):
        done = subprocess.run(command, cwd=tmp_path, env=served.environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"2 of 2 frauds: {shown}"
    assert served.ask("/v1/users/c-7/profile")[1]["frauds"] == 3


def at(block: str, url: str) -> str:
    assert "http://localhost:3000" in block
    return block.replace("http://localhost:3000", url)


@pytest.mark.parametrize("name", ["nowhere.csv", "."])
def test_labels_from_what_is_no_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["history", "label", "--data", str(tmp_path / name)])
    assert ended.value.code == 1
    assert f"error: {tmp_path / name}: no such file" in capsys.readouterr().err


def test_a_file_of_labels_is_read_as_one_of_transactions(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv.gz"
    text = "transaction_id;is_fraud;label_time\r\n1001.0;1.0;2026-03-01T12:30Z\r\n1002;False;\r\n1003;;\r\n"
    file.write_bytes(gzip.compress(text.encode("utf-16")))
    assert [(label.transaction_id, label.is_fraud) for label in read_labels(file)] == [
        ("1001", True),
        ("1002", False),
        ("1003", True),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "transaction_id,fraud\nt-1,0\n",
            "frauds.csv: columns transaction_id, fraud; give transaction_id and, where they are known, label_time",
        ),
        ("label_time\n\n", "frauds.csv: columns label_time; give transaction_id and, where"),
        ("transaction_id\n", "frauds.csv: the file has no rows"),
        (
            "transaction_id,label_time\nt-1,\nt-2,yesterday\n,\n",
            "frauds.csv: 2 of 3 rows cannot be applied, so none was\n"
            "row 2.label_time: Invalid RFC3339 encoded datetime; send RFC 3339 with a zone, such as "
            '"2026-01-31T12:30:00Z"; "yesterday" arrived\n'
            'row 3.transaction_id: Expected `str` of length >= 1; "" arrived',
        ),
        (
            "transaction_id,label_time\nt-1,2026-02-01T00:00:00Z,x\n",
            "frauds.csv: each row must have 2 fields, as the header has; 1 breaks this: row 1 has 3",
        ),
        ("transaction_id,transaction_id\na,b\n", "frauds.csv: columns transaction_id, transaction_id; give"),
        ("transaction_id,is_fraud\nt-1,NULL\n", 'row 1.is_fraud: Expected `bool | null`, got `str`; "NULL" arrived'),
        ("transaction_id\n4.53202E+15\n", "row 1.transaction_id: '4.53202E+15' is in scientific notation"),
        (
            "transaction_id,model\nt-1,café\n",
            "frauds.csv: column 'model' is not UTF-8; 1 of 1 rows breaks this: row 1 (b'caf\\xe9')",
        ),
    ],
)
def test_a_file_that_cannot_be_told(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "frauds.csv").write_text(content, encoding="cp1252")
    with pytest.raises(SystemExit) as ended:
        main(["history", "label", "--data", str(tmp_path / "frauds.csv")])
    assert ended.value.code == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
