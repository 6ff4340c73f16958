"""The isolation forest: scikit-learn's scores to the last bits, exact contributions, and what a bundle may hold."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import IsolationForest as Peer

from fraud.detectors.calibration import Calibrator
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST, detector_files, load
from fraud.detectors.isolation_forest.model import IsolationForest
from fraud.detectors.isolation_forest.scores import mean_path_length, power_of_two
from fraud.detectors.lightgbm.text import read_text, write_text
from fraud.detectors.protocol import Matrix
from fraud.detectors.trees.structure import Forest, Tree
from fraud.errors import BundleError, DataError
from fraud.schema import Feature, FeatureSpec
from training.config import Config, ForestOptions, Odd
from training.isolation import BEHAVIOUR, FittedForest, Habit, fit_forest, odd_sides
from training.splits import split_by_order

SIDES: tuple[Odd, ...] = ("high", "low", "both", "high", "low", "both")
SPEC = FeatureSpec("features", tuple(Feature(f"x{i}", "request", missing=True) for i in range(6)))


def table(n: int, seed: int = 1) -> Matrix:
    """Skewed, whole, rounded and normal numbers, some of them missing."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 6))
    X[:, 0] = rng.lognormal(3, 2, n)
    X[:, 1] = rng.integers(0, 4, n)
    X[:, 2] = np.round(X[:, 2], 1)
    X[:, 1:][rng.random((n, 5)) < 0.08] = np.nan
    return X


def fitted(X: Matrix, sides: tuple[Odd, ...], trees: int = 50, samples: int = 256) -> tuple[FittedForest, Peer]:
    """The forest of training, and scikit-learn's own on what the forest sees."""
    spec = FeatureSpec("features", SPEC.features[: X.shape[1]])
    windows = split_by_order(len(X), (0.2, 0.2, 0.2))
    options = ForestOptions(trees=trees, samples=samples, features=dict(zip(spec.names, sides, strict=True)))
    ours = fit_forest(X, np.full(len(X), -1, np.int8), windows, spec, Config(forest=options))
    learn = seen(ours, X[windows.within(windows.refit)])
    theirs = Peer(n_estimators=trees, max_samples=min(samples, len(learn)), random_state=Config().seed).fit(learn)
    return ours, theirs


def seen(forest: FittedForest, X: Matrix) -> Matrix:
    return np.column_stack([habit.seen(X[:, habit.column]) for habit in forest.habits])


def beside_thresholds(text: str, X: Matrix) -> Matrix:
    """Rows with thresholds and their float64 and float32 neighbours in place of most values."""
    rng = np.random.default_rng(5)
    X = X.copy()
    for j in range(X.shape[1]):
        cuts = np.array([s.threshold for tree in read_text(text).trees for s in tree.splits if s.feature == j])
        wide = cuts.astype(np.float32)
        near = [np.nextafter(wide, np.float32(side)).astype(np.float64) for side in (-np.inf, np.inf)]
        steps = [np.nextafter(cuts, side) for side in (-np.inf, np.inf)]
        chosen = rng.random(len(X)) < 0.6
        X[chosen, j] = rng.choice(np.concatenate([cuts, wide, *near, *steps]), int(chosen.sum()))
    return np.where(np.abs(X) <= 1e-35, 0.0, X)  # LightGBM, and so every detector here, takes these for 0


@pytest.mark.parametrize("sides", [SIDES, ("both",) * 6], ids=["habits", "two-sided"])
def test_scores_are_those_of_scikit_learn_also_beside_every_threshold(sides: tuple[Odd, ...]) -> None:
    X = table(6000)
    ours, theirs = fitted(X, sides)
    detector = load(ours.files(None), 6)
    for rows in (X, beside_thresholds(ours.text, X[:3000])):
        expected = -theirs.score_samples(seen(ours, rows))
        found = detector.anomaly_score(detector.raw_margin(rows))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        contributions = detector.contributions(rows)
        np.testing.assert_allclose(contributions.sum(axis=1), detector.raw_margin(rows), rtol=0, atol=1e-9)
    detector.verify_contributions(X[:32])
    assert detector.contributions_fallback is None


def test_a_threshold_as_scikit_learn_writes_it_would_not_be_enough() -> None:
    """float64 values between a threshold and its float32 go the other way: the cuts are needed."""
    habit = Habit(0, "both", 0.0)
    threshold = np.array([0.1])
    (cut,) = habit.cuts(threshold)
    assert cut != threshold[0]
    assert np.float32(cut) <= threshold[0] < np.float32(np.nextafter(cut, np.inf))


@pytest.mark.parametrize("odd", ["high", "low"])
def test_a_habit_counts_on_its_odd_side_alone_and_is_usual_where_missing(odd: Odd) -> None:
    habit = Habit(0, odd, 10.0)
    usual, strange = ([3.0, 10.0, -1e300], [10.5, 1e9]) if odd == "high" else ([11.0, 10.0, 1e300], [9.5, -1e9])
    assert habit.seen(np.array([*usual, np.nan])).tolist() == [0.0] * 4
    rising = habit.seen(np.array(strange))
    assert 0 < rising[0] < rising[1]
    np.testing.assert_allclose(rising[0], np.log1p(0.5))


def brute_force(tree: Tree, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Shapley values of one tree by their definition, with the path-dependent value of a set of features."""
    n = len(x)

    def value(known: frozenset[int], node: int) -> float:
        if node < 0:
            return tree.leaf_values[~node]
        split = tree.splits[node]
        if split.feature in known:
            missing = bool(np.isnan(x[split.feature]))
            goes_left = split.default_left if missing else bool(x[split.feature] <= split.threshold)
            return value(known, split.left if goes_left else split.right)
        left, right = (tree.rows_of(child) / split.n_rows for child in (split.left, split.right))
        return left * value(known, split.left) + right * value(known, split.right)

    values = np.zeros(n + 1)
    values[-1] = value(frozenset(), 0)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for some in combinations(others, size):
                gain = value(frozenset({*some, i}), 0) - value(frozenset(some), 0)
                values[i] += gain / (n * comb(n - 1, size))
    return values


def test_contributions_are_shapley_values() -> None:
    X = table(600)[:, :4]
    ours, _ = fitted(X, SIDES[:4], trees=8, samples=32)
    rows = X[:20]
    expected = np.array([[brute_force(tree, x) for tree in read_text(ours.text).trees] for x in rows]).sum(axis=1)
    found = load(ours.files(None), 4).contributions(rows)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_the_power_of_two_is_exact_to_the_last_bits() -> None:
    x = -np.random.default_rng(0).random(10_000) * 3
    np.testing.assert_allclose(power_of_two(x), np.exp2(x), rtol=4.5e-16)
    assert power_of_two(np.array([0.0, -1.0, -2.0])).tolist() == [1.0, 0.5, 0.25]


def test_the_mean_path_length_is_the_published_one() -> None:
    """Within Euler's approximation of 2 H(n - 1) - 2 (n - 1) / n, equation 1 of the paper."""
    assert [mean_path_length(n) for n in (0, 1, 2)] == [0.0, 0.0, 1.0]
    for n in (3, 16, 256):
        harmonic = sum(1 / i for i in range(1, n))
        assert mean_path_length(n) == pytest.approx(2 * harmonic - 2 * (n - 1) / n, abs=1.1 / (n - 1))


def test_the_same_input_gives_the_same_text_and_labels_are_not_read() -> None:
    X, windows = table(2000), split_by_order(2000, (0.2, 0.2, 0.2))
    config = Config(forest=ForestOptions(trees=5))
    texts = {fit_forest(X, np.full(2000, label, np.int8), windows, SPEC, config).text for label in (-1, 0, 1)}
    assert len(texts) == 1


def test_rows_that_are_all_equal_have_the_score_of_an_average_row() -> None:
    ours, theirs = fitted(np.ones((100, 6)), SIDES, trees=3)
    detector = load(ours.files(None), 6)
    assert detector.anomaly_score(detector.raw_margin(np.zeros((1, 6)))).tolist() == [0.5]
    assert theirs.score_samples(np.ones((1, 6))).tolist() == [-0.5]


# which features


def transaction_spec(*names: str) -> FeatureSpec:
    return FeatureSpec("transaction", tuple(Feature(name, "history") for name in names))


def test_a_forest_is_grown_on_behaviour_by_default() -> None:
    assert odd_sides(transaction_spec("hour", *BEHAVIOUR), None) == BEHAVIOUR
    assert odd_sides(transaction_spec("hour", "amount_log"), None) == {"amount_log": "high"}


def test_a_forest_on_ready_features_takes_numbers_and_flags_on_both_sides() -> None:
    features = (
        Feature("age", "request"),
        Feature("flag", "request", "boolean"),
        Feature("domain", "request", "categorical", ("a", "b")),
    )
    assert odd_sides(FeatureSpec("features", features), None) == {"age": "both", "flag": "both"}
    with pytest.raises(DataError, match=r"forest\.features names domain, ago; .* are age, flag"):
        odd_sides(FeatureSpec("features", features), {"domain": "both", "age": "low", "ago": "high"})
    with pytest.raises(DataError, match="needs a numeric or boolean feature"):
        odd_sides(FeatureSpec("features", features[2:]), None)


# what a bundle may hold


@pytest.fixture(scope="module")
def forest() -> Forest:
    return read_text(fitted(table(600), SIDES, trees=4, samples=32)[0].text)


def refused(forest: Forest) -> str:
    with pytest.raises(BundleError) as refusal:
        load(detector_files(write_text(forest), None), 6)
    return refusal.value.message


def test_a_leaf_that_holds_no_path_length_is_refused(forest: Forest) -> None:
    tree = forest.trees[1]
    for other in (0.25, np.nextafter(tree.leaf_values[0], 0.0)):
        changed = replace(tree, leaf_values=(float(other), *tree.leaf_values[1:]))
        said = refused(replace(forest, trees=(forest.trees[0], changed, *forest.trees[2:])))
        assert said.startswith("leaf 0 of tree 1 holds")
        assert said.endswith("no isolation forest")
    assert "no isolation forest" in refused(replace(forest, trees=forest.trees[:2]))  # the leaves are of four trees


def test_trees_of_different_samples_or_none_are_refused(forest: Forest) -> None:
    other = read_text(fitted(table(600), SIDES, trees=4, samples=16)[0].text)
    mixed = replace(forest, trees=(*forest.trees[:2], *other.trees[:2]))
    assert refused(mixed) == "the trees of an isolation forest are grown on equally many rows, not [16, 32]"
    assert refused(replace(forest, trees=())) == "an isolation forest has at least one tree"


def test_a_forest_is_calibrated_only_if_its_calibrator_is_not_null(forest: Forest) -> None:
    text = write_text(forest)
    X = table(50)
    plain = load(detector_files(text, None), 6)
    assert not plain.is_calibrated
    margins = plain.raw_margin(X)
    assert plain.decision_score(margins).tolist() == plain.anomaly_score(margins).tolist()
    calibrated = load(detector_files(text, Calibrator([-1.5, -0.5], [0.01, 0.4])), 6)
    assert calibrated.is_calibrated
    assert calibrated.decision_score(np.array([-1.5, -1.0, 0.0])).tolist() == [0.01, pytest.approx(0.205), 0.4]
    assert calibrated.anomaly_score(margins).tolist() == plain.anomaly_score(margins).tolist()
    assert isinstance(plain, IsolationForest)
    assert ISOLATION_FOREST.reads_labels is False
