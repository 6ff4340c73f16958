"""Measures against scikit-learn and naive loops, resamples against repeated rows, policies against all."""

from __future__ import annotations

import itertools
import time
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics

from fraud.decisions.anomaly import SEVERITIES
from fraud.decisions.costs import DEFAULT_COSTS, decision_costs
from fraud.decisions.policy import Policy
from fraud.decisions.verdict import POLICY_ACTIONS, verdict_of
from fraud.errors import DataError
from training.evaluate import Interval, measure, no_skill
from training.measures import (
    DAY_MS,
    FALSE_POSITIVE_RATES,
    TOP_CARDS,
    CardDays,
    Ranking,
    Sums,
    equal_mass_bins,
)
from training.policy import choose_policy, decisions

Window = dict[str, Any]

POLICY: dict[str, Any] = {"review_threshold": 0.3, "decline_threshold": 0.7, "costs": DEFAULT_COSTS}

windows = st.tuples(
    st.integers(2, 400),  # rows
    st.integers(1, 40),  # customers
    st.sampled_from([2, 5, 50, 10**6]),  # distinct margins: many ties to none
    st.sampled_from([0.02, 0.5]),  # fraud rate
    st.integers(0, 2**32 - 1),  # seed
)


def make_window(n: int, n_customers: int, n_levels: int, fraud_rate: float, seed: int, days: int = 3) -> Window:
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < fraud_rate).astype(np.int64)
    y[:2] = 0, 1
    margin = np.round(rng.normal(3.0 * y) * n_levels) / n_levels
    return {
        "y_true": y,
        "y_prob": 1 / (1 + np.exp(2 - margin)),
        "raw_margin": margin,
        "customer_codes": rng.integers(n_customers, size=n),
        "event_time_ms": DAY_MS * 20_000 + rng.integers(days * DAY_MS, size=n),
        "amount": rng.lognormal(3, 1, n),
    }


def naive_operating_point(y: NDArray[Any], score: NDArray[Any], rate: float) -> tuple[float, float]:
    best = (0.0, 0.0)
    for threshold in np.unique(score)[::-1]:
        alert = score >= threshold
        if (alert & (y == 0)).sum() / (y == 0).sum() > rate:
            break
        best = (alert & (y == 1)).sum() / y.sum(), (alert & (y == 1)).sum() / alert.sum()
    return best


def naive_card_precision(window: Window) -> float:
    """The handbook's own procedure: group by customer, take the highest of each column, keep the first k."""
    table = pd.DataFrame({name: window[name] for name in ("y_true", "raw_margin", "customer_codes")})
    precisions = []
    for _, day in table.groupby(window["event_time_ms"] // DAY_MS):
        cards = day.groupby("customer_codes").max().sort_values("raw_margin", ascending=False, kind="stable")
        precisions.append(cards["y_true"].head(TOP_CARDS).sum() / TOP_CARDS)
    return float(np.mean(precisions))


def naive_cost(window: Window, policy: dict[str, Any]) -> float:
    costs, total = policy["costs"], 0.0
    for fraud, p, amount in zip(window["y_true"], window["y_prob"], window["amount"], strict=True):
        paid_out = amount + costs["chargeback_fee"] if fraud else 0.0
        if p >= policy["decline_threshold"]:
            total += 0.0 if fraud else costs["false_decline_rate"] * amount
        elif p >= policy["review_threshold"]:
            total += costs["review"] + (1 - costs["review_recall"]) * paid_out
        else:
            total += paid_out
    return total


def expected_cost(window: Window, policy: dict[str, Any]) -> float:
    """Each transaction twice: as a fraud, with the weight of its probability, and as legitimate with the rest."""
    total = 0.0
    for i, p in enumerate(window["y_prob"]):
        row = {"y_prob": [p], "amount": [window["amount"][i]]}
        for fraud, weight in ((1, p), (0, 1 - p)):
            total += weight * naive_cost({**row, "y_true": [fraud]}, policy)
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows)
def test_measures_equal_sklearn_and_naive_loops(shape: tuple[int, int, int, float, int]) -> None:
    window = make_window(*shape)
    y, p, margin = window["y_true"], window["y_prob"], window["raw_margin"]
    found = {
        name: interval.value for name, interval in measure(**window, policy=POLICY, n_bootstrap=1).intervals().items()
    }

    alert = p >= POLICY["review_threshold"]
    expected = {
        "roc_auc": metrics.roc_auc_score(y, margin),
        "average_precision": metrics.average_precision_score(y, margin),
        "card_precision_at_100": naive_card_precision(window),
        "brier_score": metrics.brier_score_loss(y, p),
        "log_loss": metrics.log_loss(y, p),
        "expected_to_observed": p.sum() / y.sum(),
        "review_rate": np.mean(alert & (p < POLICY["decline_threshold"])),
        "decline_rate": np.mean(p >= POLICY["decline_threshold"]),
        "alert_recall": metrics.recall_score(y, alert),
        "alert_precision": metrics.precision_score(y, alert, zero_division=0.0),
        "alert_amount_recall": metrics.recall_score(y, alert, sample_weight=window["amount"]),
        "cost_per_1000": 1000 * naive_cost(window, POLICY) / len(y),
        "savings": 1 - naive_cost(window, POLICY) / (window["amount"] + DEFAULT_COSTS["chargeback_fee"])[y == 1].sum(),
    }
    for rate in FALSE_POSITIVE_RATES:
        recall, precision = naive_operating_point(y, margin, rate)
        expected |= {f"recall_at_fpr_{rate}": recall, f"precision_at_fpr_{rate}": precision}
    bins = equal_mass_bins(p, 15)
    expected["expected_calibration_error"] = sum(
        (bins == b).mean() * abs(p[bins == b].mean() - y[bins == b].mean()) for b in range(bins.max() + 1)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(windows)
def test_counting_a_customer_equals_repeating_its_rows(shape: tuple[int, int, int, float, int]) -> None:
    window = make_window(*shape)
    y, p, margin, amount = (window[name] for name in ("y_true", "y_prob", "raw_margin", "amount"))
    n_customers, code = shape[1], window["customer_codes"]
    counts = np.random.default_rng(shape[-1]).integers(4, size=n_customers)
    rows = np.repeat(np.arange(len(y)), counts[code])
    if y[rows].sum() in (0, len(rows)):
        return
    ranking = dict(zip(Ranking.names, Ranking(y, margin, code).measures(counts), strict=True))
    assert ranking["roc_auc"] == pytest.approx(metrics.roc_auc_score(y[rows], margin[rows]), rel=1e-12)
    assert ranking["average_precision"] == pytest.approx(
        metrics.average_precision_score(y[rows], margin[rows]), rel=1e-12
    )
    for rate in FALSE_POSITIVE_RATES:
        recall, precision = naive_operating_point(y[rows], margin[rows], rate)
        assert ranking[f"recall_at_fpr_{rate}"] == pytest.approx(recall, rel=1e-12)
        assert ranking[f"precision_at_fpr_{rate}"] == pytest.approx(precision, rel=1e-12)

    measured = Sums(y, p, amount, code, n_customers, POLICY, decisions(p, POLICY))
    sums = dict(zip(Sums.names, measured.measures(counts), strict=True))
    assert sums["brier_score"] == pytest.approx(metrics.brier_score_loss(y[rows], p[rows]), rel=1e-9)
    repeated = {name: column[rows] for name, column in window.items()}
    assert sums["cost_per_1000"] == pytest.approx(1000 * naive_cost(repeated, POLICY) / len(rows), rel=1e-9)


def test_a_customer_drawn_twice_is_two_cards() -> None:
    window = make_window(4_000, 300, 10**6, 0.05, seed=3)
    code = window["customer_codes"]
    counts = np.random.default_rng(0).integers(4, size=300)
    copies = [
        {name: column[counts[code] > copy] for name, column in window.items()}
        | {"customer_codes": code[counts[code] > copy] + 1_000 * copy}
        for copy in range(3)
    ]
    repeated = {name: np.concatenate([copy[name] for copy in copies]) for name in window}
    cards = CardDays(window["y_true"], window["raw_margin"], code, window["event_time_ms"])
    assert cards.measures(counts) == [pytest.approx(naive_card_precision(repeated), rel=1e-12)]


def test_card_precision_of_a_day_with_few_customers_is_still_over_100() -> None:
    window = make_window(10, 4, 10**6, 0.5, seed=1, days=1)
    found = measure(**window, policy=POLICY, n_bootstrap=1).intervals()["card_precision_at_100"].value
    assert found == len(np.unique(window["customer_codes"][window["y_true"] == 1])) / 100


def test_intervals_are_those_of_resampled_customers() -> None:
    window = make_window(3_000, 60, 10**6, 0.1, seed=5)
    samples = measure(**window, policy=POLICY, n_bootstrap=50, seed=9)
    rng = np.random.default_rng(9)
    code = window["customer_codes"]
    expected = []
    for _ in range(50):
        counts = np.bincount(rng.integers(60, size=60), minlength=60)
        rows = np.repeat(np.arange(len(code)), counts[code])
        expected.append(metrics.roc_auc_score(window["y_true"][rows], window["raw_margin"][rows]))
    low, high = np.percentile(expected, [2.5, 97.5])
    assert samples.intervals()["roc_auc"] == pytest.approx((samples.values[0], low, high), rel=1e-12)


def test_customers_that_repeat_themselves_widen_the_interval() -> None:
    window = make_window(50, 50, 10**6, 0.2, seed=2) | {"customer_codes": np.arange(50)}
    repeated: Window = {name: np.repeat(column, 20) for name, column in window.items()}
    alone: Window = {name: column for name, column in repeated.items() if name != "customer_codes"}

    def width(interval: Interval) -> float:
        return interval.high - interval.low

    by_customer = measure(**repeated, policy=POLICY).intervals()["average_precision"]
    by_row = measure(**alone, policy=POLICY).intervals()["average_precision"]
    assert by_customer.value == by_row.value
    assert width(by_customer) > 2 * width(by_row)


def test_same_seed_same_intervals_and_another_seed_others() -> None:
    window = make_window(500, 50, 10**6, 0.1, seed=4)
    first = measure(**window, policy=POLICY, n_bootstrap=20, seed=1).intervals()
    assert first == measure(**window, policy=POLICY, n_bootstrap=20, seed=1).intervals()
    assert first != measure(**window, policy=POLICY, n_bootstrap=20, seed=2).intervals()


def test_difference_of_two_models_is_paired() -> None:
    window = make_window(2_000, 100, 10**6, 0.1, seed=6)
    noise = np.random.default_rng(0).normal(scale=0.1, size=2_000)
    model = measure(**window, policy=POLICY, n_bootstrap=100)
    other = measure(**{**window, "raw_margin": window["raw_margin"] + noise}, policy=POLICY, n_bootstrap=100)
    gain, own = model.minus(other).intervals()["roc_auc"], model.intervals()["roc_auc"]
    assert gain.value == pytest.approx(own.value - other.intervals()["roc_auc"].value)
    assert gain.high - gain.low < (own.high - own.low) / 2
    assert set(model.minus(model).intervals().values()) == {Interval(0.0, 0.0, 0.0)}
    with pytest.raises(ValueError, match="not measured on the same resamples"):
        model.minus(measure(**window, policy=POLICY, n_bootstrap=3))


def test_no_skill_is_what_random_scores_get_on_average() -> None:
    window = make_window(20_000, 1_000, 10**6, 0.02, seed=7, days=10)
    rng = np.random.default_rng(0)
    window["y_prob"] = np.full(20_000, window["y_true"].mean())
    known = {name: window[name] for name in ("y_true", "customer_codes", "event_time_ms", "amount")}
    baseline = no_skill(**known, policy=POLICY)
    rounds = []
    for _ in range(100):
        window["raw_margin"] = rng.normal(size=20_000)
        by_row = measure(**window, policy=POLICY, n_bootstrap=1).intervals()
        window["raw_margin"] = rng.normal(size=1_000)[window["customer_codes"]]
        by_card = measure(**window, policy=POLICY, n_bootstrap=1).intervals()
        rounds.append(by_row | {"card_precision_at_100": by_card["card_precision_at_100"]})
    average = {name: np.mean([found[name].value for found in rounds]) for name in rounds[0]}
    assert average == pytest.approx(baseline, rel=0.02, abs=0.005)


def test_measures_without_customers_times_and_amounts() -> None:
    window = make_window(300, 30, 10**6, 0.1, seed=8)
    bare = {name: window[name] for name in ("y_true", "y_prob", "raw_margin")}
    found = measure(**bare, policy=POLICY, n_bootstrap=10).intervals()
    assert "card_precision_at_100" not in found
    assert found.keys() == no_skill(window["y_true"], policy=POLICY).keys()
    assert found["alert_amount_recall"] == found["alert_recall"]


def test_equal_mass_bins_keep_equal_values_together() -> None:
    assert equal_mass_bins([0.4, 0.1, 0.2, 0.3], 2).tolist() == [1, 0, 0, 1]
    assert equal_mass_bins([0.0] * 90 + [0.5] * 10, 10).tolist() == [0] * 90 + [1] * 10
    assert equal_mass_bins([0.1, 0.2, 0.7], 2, mass=[0.1, 0.2, 0.7]).tolist() == [0, 0, 1]
    values = np.random.default_rng(0).random(1_000)
    assert np.bincount(equal_mass_bins(values, 20)).tolist() == [50] * 20


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_true": [0, 0, 0]}, "3 transactions of which 0 are fraud"),
        ({"y_true": [1, 1, 1]}, "3 transactions of which 3 are fraud"),
        ({"y_true": [0, -1, 1]}, "leave unknown ones out"),
        ({"y_prob": [0.1, 1.2, 0.3]}, "not all within 0 and 1"),
        ({"y_prob": [0.1, float("nan"), 0.3]}, "not all within 0 and 1"),
        ({"raw_margin": [0.1, float("inf"), 0.3]}, "not all finite"),
        ({"policy": POLICY | {"costs": {"review": 3.0}}}, "costs are"),
        (
            {"policy": POLICY | {"costs": DEFAULT_COSTS | {"review_recall": 1.5}}},
            "'review_recall' is 1.5; allowed: 0 to 1",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(changed: dict[str, Any], message: str) -> None:
    window = {
        "y_true": [0, 1, 0],
        "y_prob": [0.1, 0.9, 0.2],
        "raw_margin": [-1.0, 1.0, -2.0],
        "policy": POLICY,
    }
    with pytest.raises(DataError, match=message):
        measure(**{**window, "policy": POLICY, **changed}).intervals()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.sampled_from([3, 10**6]), st.booleans(), st.integers(0, 2**32 - 1))
def test_chosen_policy_is_the_cheapest_of_all_pairs(n: int, n_levels: int, certain: bool, seed: int) -> None:
    window = make_window(n, 5, n_levels, 0.4, seed)
    if certain:
        window["y_prob"][-1] = 1.0
    p, amount = window["y_prob"], window["amount"]
    costs = DEFAULT_COSTS | {"review": float(np.random.default_rng(seed).choice([0.0, 1.0, 8.0, 1e6]))}
    policy = choose_policy(p, amount, costs)

    thresholds = np.append(np.unique(p), 1.0)
    cheapest = min(
        expected_cost(window, {"review_threshold": low, "decline_threshold": high, "costs": costs})
        for low, high in itertools.combinations_with_replacement(thresholds, 2)
    )
    assert expected_cost(window, policy) == pytest.approx(cheapest, rel=1e-9, abs=1e-9)
    levels = policy["risk_levels"]
    assert 0 < levels["medium"] <= levels["high"] <= levels["critical"] <= 1
    assert (levels["high"], levels["critical"]) == (policy["review_threshold"], policy["decline_threshold"])


def test_policy_leaves_everything_alone_when_interference_costs_too_much() -> None:
    costs = DEFAULT_COSTS | {"review": 1e6, "false_decline_rate": 1.0}
    policy = choose_policy([0.2, 0.3, 0.4], [10.0, 10.0, 1e6], costs)
    assert (policy["review_threshold"], policy["decline_threshold"]) == (1.0, 1.0)
    assert decisions([0.2, 0.3, 0.4], policy).tolist() == [0, 0, 0]


def test_thresholds_are_included_in_their_decision() -> None:
    taken = decisions([0.0, 0.2999, 0.3, 0.6999, 0.7, 1.0], POLICY)
    assert [POLICY_ACTIONS[i] for i in taken] == ["approve", "approve", "review", "review", "decline", "decline"]


def test_policy_decides_online_as_it_was_evaluated() -> None:
    window = make_window(500, 20, 20, 0.3, seed=1)
    chosen = choose_policy(window["y_prob"], window["amount"], DEFAULT_COSTS)
    online = msgspec.convert(chosen, Policy)
    probabilities = [*window["y_prob"], chosen["review_threshold"], chosen["decline_threshold"], 0.0, 1.0]
    evaluated = [POLICY_ACTIONS[i] for i in decisions(probabilities, chosen)]
    assert evaluated == [verdict_of(online, probability).decision for probability in probabilities]
    assert set(evaluated) == set(POLICY_ACTIONS)


def test_severity_is_evaluated_as_it_decides_online() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random(400)
    severities = [(*SEVERITIES, None)[i] for i in rng.integers(len(SEVERITIES) + 1, size=400)]
    levels = {"medium": 0.1, "high": 0.3, "critical": 0.7}
    policy = POLICY | {"risk_levels": levels, "severity_actions": {"HIGH": "review", "CRITICAL": "decline"}}
    online = msgspec.convert(policy, Policy)
    evaluated = [POLICY_ACTIONS[i] for i in decisions(scores, policy, severities)]
    assert evaluated == [verdict_of(online, *row).decision for row in zip(scores, severities, strict=True)]
    assert evaluated != [POLICY_ACTIONS[i] for i in decisions(scores, policy)]


def test_decision_costs_are_the_documented_ones() -> None:
    costs = {"review": 4.0, "review_recall": 0.75, "false_decline_rate": 0.1, "chargeback_fee": 20.0}
    assert decision_costs([1, 0], [100.0, 50.0], costs).tolist() == [[120.0, 0.0], [34.0, 4.0], [0.0, 5.0]]


def test_a_large_window_takes_seconds() -> None:
    window = make_window(300_000, 5_000, 10**6, 0.01, seed=0, days=30)
    start = time.process_time()
    measure(**window, policy=POLICY, n_bootstrap=40).intervals()
    assert time.process_time() - start < 4.0
