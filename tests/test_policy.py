"""Policies that a person finds consistent: within the team's capacity, in money that is known, or by a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraud.decisions.costs import DEFAULT_COSTS
from fraud.decisions.policy import Policy
from fraud.decisions.verdict import verdict_of
from fraud.errors import DataError
from fraud.models.scorer import Scorer
from tests.conftest import EXAMPLES, TINY
from tests.test_evaluate import expected_cost, make_window
from training.config import Config
from training.data import Mapping, load_features
from training.policy import choose_policy, declines_too_many, review_the_riskiest
from training.train import Run, train

sizes = st.tuples(
    st.integers(2, 60),
    st.just(5),
    st.sampled_from([3, 10**6]),
    st.sampled_from([0.02, 0.4]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.floats(0.001, 0.5), st.sampled_from([1.0, 1e-3, 1e4]))
def test_prediction_level_and_decision_say_one_thing(
    shape: tuple[int, int, int, float, int], capacity: float, rate: float, money: float
) -> None:
    window = make_window(*shape)
    p = window["y_prob"]
    made = [
        choose_policy(p, window["amount"] * money, DEFAULT_COSTS, capacity),
        review_the_riskiest(p, rate),
    ]
    agree = {
        "approve": {("low", False), ("medium", False)},
        "review": {("high", True)},
        "decline": {("critical", True)},
    }
    levels = ["low", "medium", "high", "critical"]
    for chosen in made:
        policy = msgspec.convert(chosen, Policy)
        asked = sorted([*p, *chosen["risk_levels"].values(), 0.0, 1.0])
        answers = [verdict_of(policy, float(probability)) for probability in asked]
        for fraud, level, decision in answers:
            assert (level, fraud) in agree[decision]
        ranks = [levels.index(level) for _, level, _ in answers]
        assert ranks == sorted(ranks), "a higher probability is never a lower risk"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, st.sampled_from([0.0, 0.05, 0.2, 0.5]))
def test_the_policy_is_the_cheapest_that_people_can_work_through(
    shape: tuple[int, int, int, float, int], capacity: float
) -> None:
    window = make_window(*shape)
    p, amount = window["y_prob"], window["amount"]
    costs = DEFAULT_COSTS | {"review": 0.5}
    policy = choose_policy(p, amount, costs, capacity)

    def reviewed(low: float, high: float) -> float:
        return float(np.mean((p >= low) & (p < high)))

    thresholds = np.append(np.unique(p), 1.0)
    cheapest = min(
        expected_cost(window, {"review_threshold": low, "decline_threshold": high, "costs": costs})
        for low in thresholds
        for high in thresholds[thresholds >= low]
        if reviewed(low, high) <= capacity + 1e-12
    )
    assert reviewed(policy["review_threshold"], policy["decline_threshold"]) <= capacity + 1e-12
    assert expected_cost(window, policy) == pytest.approx(cheapest, rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, st.floats(0.001, 0.5))
def test_a_policy_by_rate_reviews_the_nearest_share_and_declines_none(
    shape: tuple[int, int, int, float, int], rate: float
) -> None:
    window = make_window(*shape)
    p = window["y_prob"]
    policy = review_the_riskiest(p, rate)
    shares = [float(np.mean(p >= threshold)) for threshold in [*np.unique(p), 2.0]]
    reviewed = float(np.mean(p >= policy["review_threshold"]))
    assert abs(reviewed - rate) == pytest.approx(min(abs(share - rate) for share in shares))
    assert policy["decline_threshold"] == 1.0
    assert policy["costs"] == {}


def test_declining_more_than_ten_times_the_frauds_is_warned_of() -> None:
    assert declines_too_many(0.2, 0.02) is None
    warning = declines_too_many(0.38, 0.029)
    assert warning is not None
    assert warning.startswith(
        "The policy declines 38.0% of the transactions at a fraud rate of 2.90%: of 13 declined, at most one is a "
        "fraud."
    )


def trained_on(data: Path, tmp_path: Path, stake: str, config: Config = TINY) -> Run:
    text = (EXAMPLES / "features.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("stake: "))
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(text.replace(line, stake))
    mapped = Mapping.from_yaml(mapping)
    dataset = {"name": data.name, "digest": "sha256:0"}
    return train(load_features(data, mapped), mapped, config, name="loans", dataset=dataset, runs=tmp_path / "runs")


def test_ready_features_with_a_stake_decline_few_good_customers(features_run: Run) -> None:
    fraud_rate = features_run.windows[-1].frauds / features_run.windows[-1].rows
    assert features_run.metrics["decline_rate"].value < 2 * fraud_rate
    assert features_run.metrics["review_rate"].value < 0.08
    assert features_run.metrics["savings"].value > 0
    assert features_run.warnings == []
    policy = Scorer.load(features_run.folder / "bundle").policy
    assert verdict_of(policy, 0.012).decision == "approve"


def test_ready_features_without_a_stake_are_reviewed_by_rate(simulated_features: Path, tmp_path: Path) -> None:
    run = trained_on(simulated_features, tmp_path, "")
    assert run.metrics["decline_rate"].value == 0.0
    assert run.metrics["review_rate"].value < 0.05
    assert not {"cost_per_1000", "savings", "alert_amount_recall"} & run.metrics.keys()
    assert run.warnings == []
    card = (run.folder / "bundle" / "model_card.md").read_text()
    assert "the mapping names no stake" in card
    assert "cost least" not in card
    assert Scorer.load(run.folder / "bundle").policy.costs == {}


def test_a_stake_in_another_unit_than_the_costs_is_warned_of(simulated_features: Path, tmp_path: Path) -> None:
    """One of money a row beside a chargeback fee of 20, and nothing lost with a good customer."""
    config = TINY.model_copy(update={"costs": DEFAULT_COSTS | {"false_decline_rate": 0.0}})
    run = trained_on(simulated_features, tmp_path, "stake: 1.0", config)
    (warning,) = run.warnings
    assert "The policy declines" in warning
    assert warning in (run.folder / "report.html").read_text().replace("&#39;", "'")
    assert warning in (run.folder / "bundle" / "model_card.md").read_text()


def test_costs_in_money_need_to_know_the_money(simulated_features: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"rounds": 5, "costs": {"review": 5.0}})
    assert config.costs == DEFAULT_COSTS | {"review": 5.0}
    with pytest.raises(DataError, match=r"add for example 'stake: loan_amount' \(a column\) or 'stake: 5000'"):
        trained_on(simulated_features, tmp_path, "", config)


@pytest.mark.parametrize(
    ("costs", "said"),
    [({"reviews": 1.0}, "costs are"), ({"review_recall": 95.0}, "cost 'review_recall' is 95.0; allowed: 0 to 1")],
)
def test_costs_out_of_range_are_refused_with_the_configuration(
    costs: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"costs: {costs}\n")
    with pytest.raises(DataError, match=r"config\.yaml: costs: .*" + said):
        Config.from_yaml(path)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"kind": "features", "numeric": ["a"], "stake": 0}, "stake: 0 is not a sum of money above zero"),
        (
            {"event_time": "t", "customer_id": "c", "amount": "a", "stake": "a"},
            "role 'stake' is for kind: features; the stake of a transaction is its amount",
        ),
        ({"kind": "features", "numeric": ["stake"]}, "numeric 'stake' has the name of a role"),
    ],
)
def test_a_stake_that_is_none_is_refused(mapping: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mapping.model_validate(mapping)


def test_a_stake_is_read_beside_its_feature(tmp_path: Path) -> None:
    data = tmp_path / "loans.csv"
    data.write_text("amount,fraud\n100,0\n250.5,1\n0,0\n")
    mapping = Mapping.model_validate({"kind": "features", "label": "fraud", "numeric": ["amount"], "stake": "amount"})
    table = load_features(data, mapping)
    assert table["stake"].tolist() == table["amount"].tolist() == [100.0, 250.5, 0.0]
    data.write_text("amount,fraud\n100,0\n-5,1\n")
    with pytest.raises(DataError, match=r"column 'amount' \(stake\) must be a sum of money, zero or above; 1 of 2"):
        load_features(data, mapping)


def test_the_model_card_of_costs_is_as_before(features_run: Run) -> None:
    card = (features_run.folder / "bundle" / "model_card.md").read_text()
    assert "Chosen as the two thresholds that are expected to cost least" in card
