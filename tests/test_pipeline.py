"""The pipeline: rows fail alone, retries change nothing, and batches answer as single requests do."""

from __future__ import annotations

import asyncio
import gc
import json
import sqlite3
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import verdict_of
from fraud.detectors.registered import ALGORITHMS
from fraud.errors import FraudError, PastVersion, RegistryError, StoreError, UnknownModel
from fraud.features.featurizer import Histories, Records, transactions_of
from fraud.models.scorer import Scorer
from fraud.pipeline.batching import MicroBatcher
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision, PendingRow, Rejection
from fraud.serving import scoring
from fraud.serving.answers import RowsRefused
from fraud.serving.app import scoring_routes
from fraud.serving.engine import Engine
from fraud.serving.front_door import FrontDoor
from fraud.serving.http import HttpLimits
from fraud.serving.routes import Router
from fraud.serving.scoring import decode_request
from fraud.stores.protocol import Recalled, Recorded
from fraud.stores.sqlite import SqliteStore
from tests.asking import answers, ask
from tests.tiny import KINDS, ready_rows, rfc3339, transactions, write_tiny_bundle

FEATURES = "fraud-features"


@pytest.fixture(scope="module", params=list(ALGORITHMS.values()), ids=list(ALGORITHMS))
def scorers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    """A model of each kind, of one algorithm."""
    folder = tmp_path_factory.mktemp("bundles")
    loaded = [Scorer.load(write_tiny_bundle(folder / kind, kind, algorithm=request.param)) for kind in KINDS]
    return {scorer.name.name: scorer for scorer in loaded}


class Caller:
    """Sends bodies to a pipeline over a SQLite store, from outside the event loop."""

    def __init__(self, scorers: dict[str, Scorer], path: Path) -> None:
        self.runner = asyncio.Runner()
        self.pipeline = Pipeline(scorers, SqliteStore(path / "history.db", durable=False))

    def outcomes(self, *requests: list[dict[str, Any]], explain: bool = False, model: str | None = None) -> list[Any]:
        bodies = [json.dumps({"instances": instances, "model": model}).encode() for instances in requests]
        decoded = [decode_request(self.pipeline, body, explain=explain) for body in bodies]
        answered = self.runner.run(answers(self.pipeline, decoded))
        return [answer if isinstance(answer, FraudError) else json.loads(answer)["predictions"] for answer in answered]

    def __call__(self, *instances: dict[str, Any], explain: bool = False, model: str | None = None) -> Any:
        (outcome,) = self.outcomes(list(instances), explain=explain, model=model)
        if isinstance(outcome, FraudError):
            raise outcome
        return outcome

    def close(self) -> None:
        self.runner.run(self.pipeline.close())
        self.runner.close()


@pytest.fixture
def call(scorers: dict[str, Scorer], tmp_path: Path) -> Iterator[Caller]:
    caller = Caller(scorers, tmp_path)
    yield caller
    caller.close()


def pending(pipeline: Pipeline, instances: list[dict[str, Any]], **options: Any) -> list[PendingRow]:
    """Typed rows, as a transport other than HTTP hands them over."""
    request = pipeline.read([json.dumps(instance).encode() for instance in instances], **options)
    return [row for row in request.rows if isinstance(row, PendingRow)]


def offline(scorer: Scorer, instances: list[dict[str, Any]]) -> Any:
    """Raw margins of transactions walked at once, outside the service."""
    rows = [scorer.decoder.decode(json.dumps(instance).encode(), "$") for instance in instances]
    return scorer.score(scorer.featurizer.advance(rows, Histories.new(rows)))[0]


def test_one_at_a_time_equals_the_offline_walk(call: Caller, scorers: dict[str, Scorer]) -> None:
    instances = transactions(150, 7, customers=6, merchants=4)
    margins = [call(instance, explain=True)[0]["raw_margin"] for instance in instances]
    assert margins == offline(scorers["fraud-transaction"], instances).tolist()
    assert len(set(margins)) > 50


@pytest.mark.parametrize("rows_each", [1, 7, 150])
def test_a_batch_of_callers_equals_one_at_a_time(call: Caller, scorers: dict[str, Scorer], rows_each: int) -> None:
    instances = transactions(150, 7, customers=6, merchants=4)
    requests = [instances[i : i + rows_each] for i in range(0, 150, rows_each)]
    outcomes = call.outcomes(*requests, explain=True)
    margins = [row["raw_margin"] for outcome in outcomes for row in outcome]
    assert margins == offline(scorers["fraud-transaction"], instances).tolist()


def test_the_answer_has_the_fields_of_the_contract(call: Caller, scorers: dict[str, Scorer]) -> None:
    scorer = scorers["fraud-transaction"]
    name, measured = scorer.name, ["anomaly"] if scorer.measures_anomaly else []
    instance = transactions(1, 1)[0]
    row = call(instance)[0]
    assert list(row) == [
        "transaction_id",
        "fraud_probability",
        "prediction",
        "risk_level",
        "decision",
        "model",
        "degraded",
        "decided_by",
        "rules_hit",
        *measured,
    ]
    assert row["transaction_id"] == instance["transaction_id"]
    assert row["model"] == {"name": name.name, "version": name.version, "digest": name.digest}
    assert row["degraded"] == []
    assert (row["decided_by"], row["rules_hit"]) == ("model", [])
    assert (row["decision"] == "approve") is (row["prediction"] is False)


def test_an_explanation_adds_up_and_names_its_strongest_reasons(call: Caller, scorers: dict[str, Scorer]) -> None:
    for row in call(*transactions(50, 2), explain=True):
        assert row["base_value"] + sum(row["contributions"].values()) == pytest.approx(row["raw_margin"], abs=1e-9)
        assert list(row["contributions"]) == list(scorers["fraud-transaction"].spec.names)
        sizes = [abs(reason["contribution"]) for reason in row["reasons"]]
        assert 1 <= len(sizes) <= 5
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == max(map(abs, row["contributions"].values()))
        for reason in row["reasons"]:
            assert reason["direction"] == ("raises" if reason["contribution"] > 0 else "lowers")
            assert reason["contribution"] == row["contributions"][reason["feature"]]


def test_a_retry_gets_the_same_decision_and_tells_the_history_once(call: Caller) -> None:
    first, second = transactions(2, 3, customers=1, merchants=1)
    answer = call(first)
    later = call(second)
    reordered = dict(reversed(first.items()))
    assert call(reordered) == answer  # as it was scored then, before the second
    assert call(first, second) == answer + later
    profile = call.runner.run(call.pipeline.store.profile(first["customer_id"]))
    assert profile is not None
    assert profile.state["count"][0] == 2
    assert call.pipeline.counts["rows_recalled"] == 3


def test_an_id_twice_in_one_batch_is_one_decision(call: Caller) -> None:
    instance = transactions(1, 4)[0]
    changed = {**instance, "amount": instance["amount"] + 1}
    (one, two), (three, four) = call.outcomes([instance, instance], [instance, changed])
    assert one == two == three
    assert four["error"]["code"] == "idempotency_conflict"
    assert four["error"]["path"] == "$.instances[1].transaction_id"
    profile = call.runner.run(call.pipeline.store.profile(instance["customer_id"]))
    assert profile is not None
    assert profile.state["count"][0] == 1


def test_an_id_with_other_contents_is_refused_alone(call: Caller) -> None:
    instance, other = transactions(2, 5)
    call(instance)
    changed = {**instance, "amount": instance["amount"] + 0.01}
    refused, scored = call(changed, other)
    assert refused["transaction_id"] == instance["transaction_id"]
    assert "was scored before with other contents" in refused["error"]["message"]
    assert "fraud_probability" in scored
    with pytest.raises(RowsRefused) as caught:
        call(changed)
    assert (caught.value.http_status, caught.value.code) == (409, "idempotency_conflict")


def test_explain_of_a_scored_transaction_explains_it_as_scored(call: Caller) -> None:
    first, second = transactions(2, 6, customers=1, merchants=1)
    answer = call(first)[0]
    call(second)
    explained = call(first, explain=True)[0]
    assert {key: explained[key] for key in answer} == answer
    assert call(second, explain=True)[0]["raw_margin"] != explained["raw_margin"]


def test_explain_scores_and_records_what_is_new(call: Caller) -> None:
    instance = transactions(1, 8)[0]
    explained = call(instance, explain=True)[0]
    answer = call(instance)[0]
    assert answer == {key: explained[key] for key in answer}


def test_a_bad_row_fails_alone_with_its_path(call: Caller) -> None:
    good, bad, late = transactions(3, 9)
    bad["amount"] = 0
    late["event_time"] = rfc3339(4_102_444_800_000)  # 2100
    one, two, three = call(good, bad, late)
    assert one["transaction_id"] == good["transaction_id"]
    assert two["transaction_id"] == bad["transaction_id"]
    assert two["error"]["path"] == "$.instances[1].amount"
    assert "ahead of the server's clock" in three["error"]["message"]
    assert call.pipeline.counts["rows_refused"] == 2


def test_when_every_row_is_bad_the_request_is(call: Caller) -> None:
    bad = [{**instance, "amount": -1} for instance in transactions(2, 10)]
    with pytest.raises(RowsRefused) as caught:
        call(*bad)
    assert caught.value.http_status == 422
    assert caught.value.path == "$.instances[0].amount"
    assert [error.path for error in caught.value.errors] == ["$.instances[0].amount", "$.instances[1].amount"]


def test_a_clock_behind_is_counted_and_told_once(call: Caller, caplog: pytest.LogCaptureFixture) -> None:
    def ahead(n: int, seed: int) -> list[dict[str, Any]]:
        in_ten_minutes = rfc3339(time.time_ns() // 1_000_000 + 86_400_000 + 600_000)
        return [{**instance, "event_time": in_ten_minutes} for instance in transactions(n, seed)]

    for seed in (20, 21):
        with pytest.raises(RowsRefused, match="ahead of the server's clock, 20"):
            call(*ahead(70, seed))
    call(*transactions(1, 22), *ahead(2, 23))
    assert call.pipeline.counts["rows_ahead_of_clock"] == 142
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is the time of this machine right?" in caplog.text


def test_good_rows_beside_broken_bytes_are_decided(call: Caller) -> None:
    good = json.dumps(transactions(1, 24)[0]).encode()
    broken = (b'{"transaction_id": "t-x", "\xff": 1}', b'{"transaction_id": "\xff"}', b'{"amount": "\xff"}')
    body = b'{"instances": [%s, %s, %s, %s]}' % (broken[0], good, *broken[1:])
    request = decode_request(call.pipeline, body, explain=False)
    (answer,) = call.runner.run(answers(call.pipeline, [request]))
    assert isinstance(answer, bytes)
    rows = json.loads(answer)["predictions"]
    assert [row["transaction_id"] for row in rows] == ["t-x", json.loads(good)["transaction_id"], None, None]
    assert [("error" in row) for row in rows] == [True, False, True, True]
    assert rows[0]["error"]["message"] == "an instance must be JSON in UTF-8: byte 0xff at position 27 is not"


def test_every_row_of_a_long_request_has_its_place(call: Caller) -> None:
    instances = transactions(1000, 11)
    for i in range(0, 1000, 100):
        instances[i]["amount"] = -1.0
    rows = call(*instances)
    assert [row["transaction_id"] for row in rows] == [instance["transaction_id"] for instance in instances]
    assert [i for i, row in enumerate(rows) if "error" in row] == list(range(0, 1000, 100))
    with pytest.raises(RowsRefused):
        call(*[{**instance, "amount": -1.0} for instance in instances])


def test_unknown_fields_are_ignored_and_counted(call: Caller) -> None:
    instance = transactions(1, 12)[0]
    answer = call({**instance, "note": "vip", "tags": [1, 2]})
    assert call.pipeline.counts["extra_fields"] == 2
    assert call(instance) == answer


def test_a_request_is_answered_by_the_model_it_names(call: Caller) -> None:
    row = call(*ready_rows(1, 1), model="fraud-features")[0]
    assert row["model"]["name"] == "fraud-features"
    assert row["transaction_id"] is None
    with pytest.raises(UnknownModel, match="served: fraud-transaction, fraud-features"):
        call(*ready_rows(1, 1), model="other")


def test_ready_features_are_recorded_under_their_id_alone(call: Caller) -> None:
    with_id = {**ready_rows(1, 2)[0], "transaction_id": "a1"}
    answer = call(with_id, model="fraud-features")
    assert call(with_id, model="fraud-features") == answer
    with pytest.raises(RowsRefused) as caught:
        call({**with_id, "income": 1.0}, model="fraud-features")
    assert caught.value.code == "idempotency_conflict"
    transaction = {**transactions(1, 13)[0], "transaction_id": "a1"}
    assert call(transaction)[0]["model"]["name"] == "fraud-transaction"  # ids of another kind are others


def test_ready_features_plain_or_not_score_the_same(call: Caller) -> None:
    rows = ready_rows(20, 3)
    plain = call(*rows, model="fraud-features")
    explained = call(*rows, explain=True, model="fraud-features")
    recorded = call(*[{**r, "transaction_id": f"r{i}"} for i, r in enumerate(rows)], model="fraud-features")
    assert [r["fraud_probability"] for r in plain] == [r["fraud_probability"] for r in explained]
    assert [r["fraud_probability"] for r in plain] == [r["fraud_probability"] for r in recorded]


def test_models_of_both_kinds_share_a_batch(call: Caller) -> None:
    body = [json.dumps({"instances": transactions(3, 14)}).encode()]
    body += [json.dumps({"instances": ready_rows(2, 4), "model": "fraud-features"}).encode()]
    decoded = [decode_request(call.pipeline, b, explain=False) for b in body]
    answered = call.runner.run(answers(call.pipeline, decoded))
    names = [[r["model"]["name"] for r in json.loads(a)["predictions"]] for a in answered if isinstance(a, bytes)]
    assert names == [["fraud-transaction"] * 3, ["fraud-features"] * 2]


def test_a_swap_leaves_decoded_requests_with_their_version(
    call: Caller, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    other = Scorer.load(write_tiny_bundle(tmp_path / "other", "transaction", seed=1))
    assert other.name.digest != scorers["fraud-transaction"].name.digest
    first, second = transactions(2, 15)
    decoded = call.pipeline.read([json.dumps(first).encode()])
    call.pipeline.scorers = {"fraud-transaction": other}
    (answer,) = call.runner.run(answers(call.pipeline, [decoded]))
    assert isinstance(answer, bytes)
    row = json.loads(answer)["predictions"][0]
    assert row["model"]["digest"] == scorers["fraud-transaction"].name.digest
    assert call(second)[0]["model"]["digest"] == other.name.digest
    assert call(first) == [row]  # a retry after the swap
    with pytest.raises(RowsRefused, match="is not served here"):
        call(first, explain=True)
    (outcome,) = call.runner.run(call.pipeline.decide(pending(call.pipeline, [first], explain=True)))
    assert isinstance(outcome, Rejection)
    assert isinstance(outcome.error, PastVersion)  # for the engine to load the version that scored it, and ask again
    past = {s.name.digest: s for s in scorers.values()}
    call.pipeline.past = past
    assert call(first, explain=True)[0].items() >= row.items()


def test_a_version_that_is_gone_explains_nothing_and_fails_alone(
    call: Caller, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    first, second = transactions(2, 15)
    call(first)
    call.pipeline.scorers = {
        "fraud-transaction": Scorer.load(write_tiny_bundle(tmp_path / "other", "transaction", seed=1))
    }
    gone, explained = call(first, second, explain=True)
    assert gone["error"]["code"] == "unknown_model"
    assert explained["reasons"]


def test_reasons_are_given_where_they_are_asked_for_and_recorded_where_the_setting_says_so(call: Caller) -> None:
    """What an explanation says, without its words: for plain rows, recorded ones, and repeats of both kinds."""
    named = [{**row, "transaction_id": f"r-{i}"} for i, row in enumerate(ready_rows(3, 8))]
    unnamed = ready_rows(3, 8)
    expected = [[(r["feature"], r["contribution"]) for r in row["reasons"]] for row in explained_alone(call, unnamed)]

    def reasons(rows: list[dict[str, Any]], *, asks: bool) -> list[Any]:
        decided = call.runner.run(call.pipeline.decide(pending(call.pipeline, rows, model=FEATURES, reasons=asks)))
        return [told(decision) for decision in decided]

    def told(decision: Any) -> Any:
        in_words = decision.explanation and [(r.feature, r.contribution) for r in decision.explanation.reasons]
        return list(decision.reasons) or in_words

    assert reasons(unnamed, asks=True) == expected
    assert reasons(unnamed, asks=False) == [None] * 3
    assert reasons(named, asks=True) == expected
    assert reasons(named, asks=False) == [None] * 3, "they are not recorded"
    assert reasons(named, asks=True) == expected
    call.pipeline.record_reasons = True
    others = [{**row, "transaction_id": f"s-{i}"} for i, row in enumerate(unnamed)]
    assert reasons(others, asks=False) == expected
    assert reasons(others[:1] + unnamed[1:2] + named[2:], asks=True) == expected


def explained_alone(call: Caller, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [call(row, explain=True, model=FEATURES)[0] for row in rows]


def test_rows_without_an_id_are_recorded_under_one_that_the_answer_tells(call: Caller) -> None:
    named, *unnamed = ready_rows(4, 3)
    unnamed = [{k: v for k, v in row.items() if k != "transaction_id"} for row in unnamed]
    silent = call(*unnamed, model="fraud-features")
    assert [row["transaction_id"] for row in silent] == [None] * 3
    call.pipeline.record_unnamed = True
    rows = call({**named, "transaction_id": "mine"}, *unnamed, *unnamed, model="fraud-features")
    ids = [row["transaction_id"] for row in rows]
    assert ids[0] == "mine"
    assert len(set(ids)) == 7
    assert [row["fraud_probability"] for row in rows[1:4]] == [row["fraud_probability"] for row in silent]
    again = [{**row, "transaction_id": given} for row, given in zip(unnamed, ids[1:], strict=False)]
    explained = call(*again, explain=True, model="fraud-features")
    assert [row["transaction_id"] for row in explained] == ids[1:4]
    recorded = call.runner.run(call.pipeline.store.recall([f"fraud-features\x1f{given}" for given in ids], [], []))
    assert len(recorded.decided) == 7


def test_decisions_and_histories_survive_a_restart(scorers: dict[str, Scorer], tmp_path: Path) -> None:
    instances = transactions(20, 16, customers=2)
    before = Caller(scorers, tmp_path)
    answers = before(*instances[:10])
    before.close()
    after = Caller(scorers, tmp_path)
    assert after(*instances[:10]) == answers
    margins = [row["raw_margin"] for row in after(*instances[10:], explain=True)]
    assert margins == offline(scorers["fraud-transaction"], instances).tolist()[10:]
    after.close()


def test_two_workers_with_the_same_transactions_give_one_decision_each(
    scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    instances = transactions(40, 17, customers=3, merchants=2)

    async def worker(pipeline: Pipeline) -> list[Any]:
        answered: list[Any] = []
        for instance in instances:
            answered += await ask(pipeline, [instance])
        return answered

    async def both() -> tuple[list[Any], list[Any], Any]:
        pipelines = [Pipeline(scorers, SqliteStore(tmp_path / "history.db", durable=False)) for _ in range(2)]
        one, two = await asyncio.gather(*(worker(pipeline) for pipeline in pipelines))
        states = [await pipelines[0].store.profile(f"c{i}") for i in range(3)]
        for pipeline in pipelines:
            await pipeline.close()
        return one, two, states

    one, two, profiles = asyncio.run(both())
    assert one == two
    rows = [scorers["fraud-transaction"].decoder.decode(json.dumps(i).encode(), "$") for i in instances]
    alone = Histories.new(rows)
    scorers["fraud-transaction"].featurizer.advance(rows, alone)
    for profile in profiles:
        at = alone.customer_ids.index(profile.customer_id)
        assert profile.state[0].tobytes() == alone.customers[at].tobytes()


def test_a_store_that_fails_is_an_error_of_the_request_not_of_the_service(call: Caller, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "history.db")) as db, db:
        db.execute("ALTER TABLE decisions RENAME TO hidden")
    (outcome,) = call.outcomes(transactions(1, 18))
    assert isinstance(outcome, StoreError)
    with closing(sqlite3.connect(tmp_path / "history.db")) as db, db:
        db.execute("ALTER TABLE hidden RENAME TO decisions")

    async def until_back() -> None:  # the store is off until a probe finds it well
        async with asyncio.timeout(20):
            while call.pipeline.store.health().outages:
                await asyncio.sleep(0.01)

    call.runner.run(until_back())
    assert call(*transactions(1, 18))[0]["degraded"] == []


def test_stages_are_timed(call: Caller, scorers: dict[str, Scorer]) -> None:
    seconds: dict[str, float] = {}
    call.pipeline.on_stage = seconds.__setitem__
    call(*transactions(3, 19), explain=True)
    worded = {"anomaly"} if scorers["fraud-transaction"].measures_anomaly else set()
    assert set(seconds) == {"recall", "featurize", "score", "record", "explain", *worded}
    assert np.all(np.array(list(seconds.values())) > 0)


@pytest.fixture
def process_as_before() -> Iterator[None]:
    """An engine that starts sets the garbage collector and the switch interval for its whole process."""
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)
    gc.enable()
    sys.setswitchinterval(interval)


BAD_BODIES = {
    "one bad row": [{**transactions(1, 3)[0], "amount": "12,50"}],
    "a bad row among good ones": [*transactions(2, 4), {**transactions(1, 5)[0], "event_time": "yesterday"}],
    "many bad rows": [{}] * 200,
    "no JSON": b"{",
    "no rows": [],
    "not an object": ["x"],
    "too large": b" " * 20_000,
    "another model": b'{"instances": [{}], "model": "nobody"}',
    "the same id, other contents": [{**transactions(1, 6)[0], "amount": 1.0}, {**transactions(1, 6)[0], "amount": 2.0}],
}


@pytest.mark.parametrize("bad", BAD_BODIES)
def test_a_bad_request_is_freed_as_soon_as_it_is_answered(bad: str, call: Caller, process_as_before: None) -> None:
    """Were it part of a reference cycle, its body would be held until the garbage collector's next run."""
    said = BAD_BODIES[bad]
    body = said if isinstance(said, bytes) else json.dumps({"instances": said}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "query_string": b""}

    async def behind(*_: object) -> None:
        raise AssertionError("the front door answers /predict")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def run() -> int:
        engine = Engine()
        engine.start(call.pipeline, MicroBatcher(call.pipeline.decide_requests))
        gc.disable()
        door = FrontDoor(Router(scoring_routes(engine)), behind, HttpLimits(max_body_bytes=10_000))
        await door(scope, receive, send)
        gc.collect()
        for _ in range(20):
            await asyncio.ensure_future(door(scope, receive, send))
        return gc.collect()

    statuses: list[int] = []
    unreachable = call.runner.run(run())
    assert len(statuses) == 21
    assert all(status >= 400 or bad.startswith(("a bad row among", "the same id")) for status in statuses)
    assert unreachable < 20, unreachable


def test_an_engine_without_a_model_is_not_ready() -> None:
    engine = Engine()
    for use in (engine.readiness, engine.admit, lambda: engine.pipeline):
        with pytest.raises(FraudError, match="no model is loaded yet") as raised:
            use()
        assert (raised.value.http_status, raised.value.code) == (503, "not_ready")


class Versions:
    """Versions that are served no more, at hand when they are asked for."""

    def __init__(self, *scorers: Scorer) -> None:
        self.kept = {scorer.name.digest: scorer for scorer in scorers}
        self.past: dict[str, Scorer] = {}
        self.asked: list[tuple[str, str]] = []

    async def load_past(self, name: str, digest: str) -> None:
        self.asked.append((name, digest))
        self.past[digest] = self.kept[digest]

    async def refresh(self) -> str:
        return "asked"

    async def switch(self, name: str, reference: str, *, why: str) -> None:
        raise RegistryError(f"there is no registry of {name}")

    def describe(self) -> dict[str, Any]:
        return {"challengers": []}


def test_an_engine_serves_its_pipeline_until_it_stops(
    scorers: dict[str, Scorer], tmp_path: Path, process_as_before: None
) -> None:
    """Decisions of a version that is served no more are explained by it: it is loaded, and the other rows are kept."""
    old = scorers["fraud-transaction"]
    new = Scorer.load(write_tiny_bundle(tmp_path / "other", "transaction", seed=1))
    first, second = transactions(2, 15)

    async def run() -> None:
        versions = Versions(old)
        store = SqliteStore(tmp_path / "h.db", durable=False)
        pipeline = Pipeline({"fraud-transaction": old}, store, past=versions.past)
        engine = Engine()
        batcher = MicroBatcher(pipeline.decide_requests)
        engine.start(pipeline, batcher, versions)
        body = json.dumps({"instances": [first]}).encode()
        before = json.loads(await scoring.answer(engine, body, explain=False))["predictions"]
        pipeline.scorers = {"fraud-transaction": new}
        body = json.dumps({"instances": [second, first, {**second, "amount": 0}]}).encode()
        fresh, again, bad = json.loads(await scoring.answer(engine, body, explain=True))["predictions"]
        assert versions.asked == [(old.name.name, old.name.digest)]
        assert again.items() >= before[0].items()
        assert again["reasons"]
        assert fresh["model"]["digest"] == new.name.digest
        assert bad["error"]["path"] == "$.instances[2].amount"
        assert pipeline.counts["rows"] == 2
        name = {"name": new.name.name, "version": new.name.version, "digest": new.name.digest}
        served = {"queued_rows": 0, "models": [name], "challengers": []}
        assert engine.readiness() == {"status": "ready", "stores": [], **served}
        assert await engine.refresh() == {"wandb_look": "asked", **engine.readiness()}
        engine.stop()
        await batcher.close()
        await pipeline.close()
        with pytest.raises(FraudError, match="no model is loaded yet"):
            engine.admit()

    asyncio.run(run())


def test_typed_rows_of_several_models_and_callers_are_decided_in_one_call(
    call: Caller, scorers: dict[str, Scorer]
) -> None:
    """As a stream or an older contract calls it: each row by itself, with and without an explanation."""
    told: list[list[Decision]] = []
    call.pipeline.on_decided = lambda decisions: told.append(list(decisions))
    paid, other = transactions(2, 21)
    rows = [
        *pending(call.pipeline, [paid]),
        *pending(call.pipeline, ready_rows(2, 5), model="fraud-features"),
        *pending(call.pipeline, [{**paid, "amount": paid["amount"] + 1}]),
        *pending(call.pipeline, [other, paid], explain=True),
    ]
    outcomes = call.runner.run(call.pipeline.decide(rows))
    first, plain, plain_too, conflict, _, repeated = outcomes
    assert isinstance(conflict, Rejection)
    assert (conflict.transaction_id, conflict.error.code) == (paid["transaction_id"], "idempotency_conflict")
    decisions = [outcome for outcome in outcomes if isinstance(outcome, Decision)]
    kinds = [decision.model.name.removeprefix("fraud-") for decision in decisions]
    assert kinds == ["transaction", "features", "features", "transaction", "transaction"]
    assert [decision.is_repeat for decision in decisions] == [False, False, False, False, True]
    assert [decision.explanation is not None for decision in decisions] == [False, False, False, True, True]
    assert isinstance(first, Decision)
    assert isinstance(repeated, Decision)
    assert (repeated.raw_margin, repeated.verdict) == (first.raw_margin, first.verdict)
    for decision in decisions:
        policy = scorers[decision.model.name].policy
        assert decision.verdict == verdict_of(policy, decision.decision_score)
    assert [(d.transaction_id, d.raw_margin) for d in told[0]] == [
        (d.transaction_id, d.raw_margin) for d in decisions if not d.is_repeat
    ]
    alone = [call.runner.run(call.pipeline.decide([row]))[0] for row in rows[1:3]]
    assert alone == [plain, plain_too]


class ForgetfulStore(SqliteStore):
    """Holds every decision for unrecorded, as a store does that was off when they were made; notes what it records."""

    noted: list[tuple[list[str | None], Any]]

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        recalled = await super().recall(keys, customer_ids, merchant_ids)
        recalled.unrecorded = frozenset(recalled.decided)
        return recalled

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        self.noted.append(([record.transaction_id for record in decided], transactions))
        return await super().record(decided, transactions, recalled)


def test_decisions_are_recorded_with_their_own_transactions(scorers: dict[str, Scorer], tmp_path: Path) -> None:
    instances = transactions(6, 23)
    named = [{**row, "transaction_id": f"r{i}"} for i, row in enumerate(ready_rows(2, 5))]

    async def run() -> list[tuple[list[str | None], Any]]:
        store = ForgetfulStore(tmp_path / "history.db", durable=False)
        store.noted = []
        pipeline = Pipeline(scorers, store)
        await pipeline.decide(pending(pipeline, instances[:2]))
        rows = [
            *pending(pipeline, instances[1:4]),
            *pending(pipeline, named, model="fraud-features"),
            *pending(pipeline, [instances[0], *instances[4:]]),
        ]
        outcomes = await pipeline.decide(rows)
        assert all(isinstance(outcome, Decision) for outcome in outcomes)
        await pipeline.close()
        return store.noted

    decoder = scorers["fraud-transaction"].decoder
    said = {row["transaction_id"]: decoder.decode(json.dumps(row).encode(), "$") for row in instances}
    noted = asyncio.run(run())
    assert [sorted(map(str, ids)) for ids, _ in noted] == [
        sorted(row["transaction_id"] for row in instances[:2]),
        sorted(row["transaction_id"] for row in instances),
        ["r0", "r1"],
    ]
    for ids, told in noted[:2]:
        own = transactions_of([said[str(name)] for name in ids])
        assert repr(told.tolist()) == repr(own.tolist())  # as text, for NaN is not NaN
    assert noted[2][1] is None


def test_a_store_that_fails_rejects_only_the_rows_that_need_it(call: Caller, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "history.db")) as db, db:
        db.execute("ALTER TABLE decisions RENAME TO hidden")
    rows = [
        *pending(call.pipeline, ready_rows(1, 5), model="fraud-features"),
        *pending(call.pipeline, transactions(1, 22)),
    ]
    plain, rejected = call.runner.run(call.pipeline.decide(rows))
    assert isinstance(plain, Decision)
    assert isinstance(rejected, Rejection)
    assert isinstance(rejected.error, StoreError)


def test_rows_of_python_objects_are_answered_as_those_of_json(call: Caller, process_as_before: None) -> None:
    """BentoML's own way has read the JSON already."""
    instances = [*transactions(3, 23), {**transactions(1, 24)[0], "amount": -1.0}]

    async def run() -> tuple[Any, Any]:
        engine = Engine()
        engine.start(call.pipeline, MicroBatcher(call.pipeline.decide_requests))
        return (
            json.loads(await scoring.answer(engine, json.dumps({"instances": instances}).encode(), explain=True)),
            await scoring.predictions(engine, instances, None, explain=True),
        )

    by_json, by_objects = call.runner.run(run())
    assert json.loads(json.dumps(by_objects)) == by_json
