"""The traffic, the arrival times and the arithmetic of the load tests."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fraud.errors import RequestError
from fraud.schema import Feature, FeatureSpec, Role, RowDecoder
from fraud.serving.scoring import decode_envelope
from fraud.simulation.typologies import TYPOLOGIES
from fraud.simulation.world import CATEGORIES, CHANNELS
from load_tests.measure import RESOLUTION, Recorder, bucket, knee, measures, percentile, stage_measures
from load_tests.scenarios import SCENARIOS, Scenario, Stage, arrivals, evenly
from load_tests.traffic import MISTAKES, Mix, Request, Traffic
from load_tests.verdict import Finding, Level, LevelsError, judge, read_levels

NOW_S = 1_780_000_000.0
LEVELS = Path(__file__).parents[1] / "load_tests" / "service_levels.toml"
SPEC = FeatureSpec(
    "transaction",
    (Feature("card_type", "request", "categorical", ("debit", "credit")), Feature("age", "request", maximum=90.0)),
    tuple(Role(name) for name in ("merchant_id", "category", "channel", "device_id", "latitude", "longitude")),
)
READY = FeatureSpec("features", (Feature("income", "request", minimum=0.0), Feature("owner", "request", "boolean")))


def sent(n: int, mix: Mix | None = None, spec: FeatureSpec | None = SPEC, stream: int = 0) -> list[Request]:
    traffic = Traffic(mix or Mix(customers=500), seed=7, stream=stream, spec=spec)
    return [traffic.next(NOW_S + i / 100) for i in range(n)]


def test_same_seed_same_traffic() -> None:
    assert sent(300) == sent(300)
    assert sent(300)[0].body != sent(300, stream=1)[0].body


@pytest.mark.parametrize("spec", [SPEC, READY])
def test_every_good_request_is_valid_and_every_bad_one_is_refused_as_foretold(spec: FeatureSpec) -> None:
    decoder = RowDecoder(spec)
    statuses: Counter[int] = Counter()
    for request in sent(3000, Mix(customers=500, bad_share=0.1), spec):
        status = 200
        ids: tuple[str | None, ...] = request.transaction_ids
        try:
            instances, _ = decode_envelope(request.body)
            ids = tuple(decoder.decode(raw, "$", int(NOW_S * 1000) + 60_000).transaction_id for raw in instances)
        except RequestError as error:
            status = error.http_status
        assert (status, ids) == (request.expected_status, request.transaction_ids), request.kind
        statuses[status] += 1
    assert statuses[200] > 2500
    assert statuses[422] > 150
    assert statuses[400] > 10


def test_shares_are_as_asked() -> None:
    kinds = Counter(request.kind for request in sent(20_000, Mix(customers=2000, fraud_share=0.05)))
    assert {f"bad: {mistake}" for mistake in MISTAKES} < kinds.keys()
    assert set(TYPOLOGIES) < kinds.keys()
    fraud = sum(kinds[typology] for typology in TYPOLOGIES) / 20_000
    bad = sum(n for kind, n in kinds.items() if kind.startswith("bad")) / 20_000
    assert 0.03 < fraud < 0.07
    assert 0.007 < bad < 0.013
    assert 0.015 < kinds["retry"] / 20_000 < 0.025


def test_traffic_is_what_the_simulator_makes() -> None:
    """Whoever trains on simulated transactions is asked for the same categories and kinds of fraud."""
    requests = sent(10_000, Mix(customers=2000, fraud_share=0.05, bad_share=0), spec=None)
    instances = [(request.kind, json.loads(request.body)["instances"][0]) for request in requests]
    assert {instance["category"] for _, instance in instances} == set(CATEGORIES)
    assert {instance["channel"] for _, instance in instances} == set(CHANNELS)
    assert {kind for kind, _ in instances} - {"ordinary", "retry"} == set(TYPOLOGIES)
    amounts = {
        kind: np.median([i["amount"] for k, i in instances if k == kind])
        for kind in ("ordinary", "card_testing", "account_takeover")
    }
    assert amounts["card_testing"] < amounts["ordinary"] < amounts["account_takeover"]


def test_a_retry_is_the_request_again() -> None:
    requests = sent(2000)
    first = {request.transaction_ids: request for request in requests if request.kind != "retry"}
    retries = [request for request in requests if request.kind == "retry"]
    assert retries
    for retry in retries:
        assert retry.body == first[retry.transaction_ids].body
        assert retry.comes_again
        assert first[retry.transaction_ids].comes_again


def test_few_customers_make_most_transactions() -> None:
    bodies = [json.loads(r.body)["instances"][0] for r in sent(5000, Mix(customers=1000, bad_share=0))]
    often = Counter(body["customer_id"] for body in bodies).most_common()
    assert sum(n for _, n in often[: len(often) // 10]) > 0.4 * 5000
    amounts = [body["amount"] for body in bodies]
    assert min(amounts) > 0
    assert np.percentile(amounts, 99) > 5 * np.median(amounts)


def test_streams_add_up_to_the_rate() -> None:
    scenario = Scenario("two", "", (Stage(100, 50), Stage(100, 200)))
    times = [list(arrivals(scenario, stream, 4, seed=3)) for stream in range(4)]
    assert all(t == sorted(t) and t[-1] < 200 for t in times)
    whole = np.sort(np.concatenate(times))
    first, second = (whole < 100).sum(), (whole >= 100).sum()
    assert first == pytest.approx(5000, rel=0.06)
    assert second == pytest.approx(20_000, rel=0.06)
    assert 0.05 < np.mean(np.diff(whole) == 0) < 0.15  # bursts


def test_even_arrivals_interleave() -> None:
    streams = [list(itertools.islice(evenly(0.1, stream, 2), 3)) for stream in range(2)]
    assert streams == [[0.0, 0.2, 0.4], [0.1, pytest.approx(0.3), 0.5]]


def test_scaling_keeps_the_shape() -> None:
    spike = SCENARIOS["spike"].scaled(rate=10, seconds=13)
    assert [(s.seconds, s.rps) for s in spike.stages] == [(6, 10), (1, 100), (6, 10)]
    assert spike.expected_at(6.5) == 100
    assert spike.expected_at(13.5) == 0


def test_percentiles_are_within_a_bucket_of_numpys() -> None:
    draw = random.Random(5)
    seconds = [draw.lognormvariate(-6, 1) for _ in range(5000)]
    histogram = Counter(bucket(s) for s in seconds)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999, 1.0):
        exact = float(np.quantile(seconds, share, method="inverted_cdf")) * 1e3
        assert exact <= percentile(histogram, share) * (1 + 1e-12) <= exact * math.exp(RESOLUTION) * (1 + 1e-9)
    assert math.isnan(percentile(Counter(), 0.5))


def recorded(rates: list[tuple[int, float, int]]) -> Recorder:
    """Each second: n requests of a latency, s, and how many more are shed."""
    recorder = Recorder()
    for second, (n, latency, shed) in enumerate(rates):
        for i in range(n + shed):
            recorder.sent(second + i / (n + shed), 0.0001, "ordinary")
            recorder.answered(second, latency if i < n else 0.001, "ok" if i < n else "shed")
    return recorder


def test_counts_survive_the_way_to_the_master() -> None:
    whole, master = recorded([(10, 0.01, 2), (20, 0.02, 0)]), Recorder()
    expected = measures(whole, 0, 2)
    for _ in range(2):
        master.add(msgspec.msgpack.decode(msgspec.msgpack.encode(whole.take()), strict=False))
    assert measures(master, 0, 2) == expected
    assert expected["requests"] == 32
    assert expected["shed_share"] == 2 / 32
    assert expected["answered_rps"] == 15
    assert whole.under_way() == 0


def test_a_request_without_an_answer_is_an_error() -> None:
    recorder = recorded([(9, 0.01, 0)])
    recorder.sent(0.5, 0.0, "ordinary")
    assert recorder.under_way() == 1
    assert measures(recorder, 0, 1)["error_share"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("after", "why"),
    [((390, 0.01, 10), "load shed: 2.5%"), ((400, 0.3, 0), "p99: 302 ms"), ((400, 0.02, 0), "nothing")],
)
def test_the_knee_is_the_last_rate_that_held(after: tuple[int, float, int], why: str) -> None:
    scenario = Scenario("up", "", (Stage(2, 100), Stage(2, 200), Stage(2, 400)), finds_knee=True)
    recorder = recorded([(100, 0.01, 0)] * 2 + [(200, 0.02, 0)] * 2 + [after] * 2)
    rate, limit = knee(stage_measures(recorder, scenario), 100)
    assert rate == (400 if why == "nothing" else 200)
    assert limit.startswith(why)


def test_every_scenario_has_levels_and_nothing_else_has() -> None:
    for name in SCENARIOS:
        assert read_levels(LEVELS, name)
    with pytest.raises(LevelsError, match=r"has no \[storm\]; it has ramp, smoke, soak, spike, steady, swap"):
        read_levels(LEVELS, "storm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p98_ms = { max = 1 }", "p98_ms is not measured; there are p50_ms"),
        ("p99_ms = 10", r"takes \{ min = …, max = … \}; 10 arrived"),
        ("p99_ms = { most = 10 }", "takes"),
        ("p99_ms = {", "is no TOML"),
    ],
)
def test_a_wrong_level_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "levels.toml"
    path.write_text(f"[smoke]\n{text}\n")
    with pytest.raises(LevelsError, match=message):
        read_levels(path, "smoke")


def test_what_was_not_measured_is_missed() -> None:
    (finding,) = judge([Level("knee_rps", lowest=10)], {"knee_rps": math.nan})
    assert not finding.held
    assert str(Finding(Level("p99_ms", highest=10), 12.5)) == "MISSED p99_ms = 12.5 (at most 10)"


def test_every_option_scenario_and_measure_is_documented() -> None:
    root = LEVELS.parents[1]
    docs = (root / "docs" / "load.md").read_text()
    options = re.findall(r'    option\("([a-z-]+)"', (root / "load_tests" / "locustfile.py").read_text())
    assert len(options) > 15
    assert [name for name in options if f"`--{name}`" not in docs] == []
    assert [name for name in SCENARIOS if f"| `{name}` |" not in docs] == []
