"""Fits an isolation forest with scikit-learn, and writes it as trees over the columns of `X`.

A habit is odd on one side only. The forest is grown on log1p(max(0, x - median)), with the sign of x - median turned
where low values are odd, and the median in place of a missing value. This rises or falls with x, so each split on it is
a split on x: the written trees take `X` as it is, and nothing is transformed when they score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import IsolationForest

from fraud.detectors.calibration import Calibrator
from fraud.detectors.isolation_forest.algorithm import detector_files, load
from fraud.detectors.isolation_forest.scores import leaf_values
from fraud.detectors.lightgbm.text import write_text
from fraud.detectors.severity import SeverityScale
from fraud.detectors.trees.structure import Forest, Split, Tree
from fraud.errors import DataError
from fraud.features.featurizer import Matrix
from fraud.schema import FeatureSpec
from training.config import Config, Odd
from training.fit import HabitFact
from training.splits import Windows

Vector = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

BEHAVIOUR: dict[str, Odd] = {
    "amount_log": "high",
    "customer_amount_zscore": "high",
    "customer_amount_percentile": "high",
    "customer_velocity_ratio": "high",
    "customer_hour_deviation": "high",
    "customer_weekday_deviation": "high",
    "customer_seconds_since_last": "low",
    "customer_merchant_familiarity": "low",
    "customer_is_new": "high",
    "amount_is_globally_unusual": "high",
}
"""The features of a transaction model that a forest is grown on where the configuration names none."""
COMPARED_ROWS = 20_000
TOLERANCE = 1e-12
LARGEST = np.finfo(np.float64).max


@dataclass(frozen=True)
class Habit:
    """A column of `X` that a forest is grown on, the side on which its values are odd, and their median."""

    column: int
    odd: Odd
    median: float

    def seen(self, x: Vector) -> Vector:
        """Return what the forest is grown on (n,) for values (n,); NaN is missing."""
        if self.odd == "both":
            return x
        beyond = x - self.median if self.odd == "high" else self.median - x
        return np.log1p(np.maximum(np.where(np.isnan(beyond), 0.0, beyond), 0.0))

    def cuts(self, thresholds: Vector) -> Vector:
        """Return the largest x whose `seen` value passes each threshold (n,); where low is odd, the least, less a step.

        scikit-learn rounds what it sees to float32 before it compares, so the cuts lie where the rounding turns. A
        value nearer to 0 than 1e-35 is 0 for LightGBM, whose trees these become.
        """
        if self.odd == "low":
            return np.nextafter(-_last_at_most(lambda u: self.seen(-u), thresholds), -np.inf)
        return _last_at_most(self.seen, thresholds)


@dataclass(frozen=True)
class FittedForest:
    """A fitted forest: its text, and what its splits are on."""

    text: str
    n_trees: int
    habits: tuple[Habit, ...]
    split_rows: Vector
    """How many training rows each column's splits divided, (n_features,)."""

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Return no table: nothing is searched without labels."""
        return []

    def files(self, calibrator: Calibrator | None, severity: SeverityScale | None = None) -> dict[str, bytes]:
        """Return the detector's files of a bundle."""
        return detector_files(self.text, calibrator, severity)

    def gain(self) -> Vector:
        """Return the number of training rows that each feature's splits divided, (n_features,)."""
        return self.split_rows

    def habits_of(self, spec: FeatureSpec) -> list[HabitFact]:
        """Return the features that it is grown on."""
        return [HabitFact(spec.features[habit.column].name, habit.odd, habit.median) for habit in self.habits]


def fit_forest(
    X: Matrix,
    y: NDArray[np.int8],
    windows: Windows,
    spec: FeatureSpec,
    config: Config,
    progress: Progress | None = None,
    columns: NDArray[np.int64] | None = None,
) -> FittedForest:
    """Fit a forest on the train and validation windows, without looking at labels; the same input gives the same text.

    Parameters
    ----------
    X : (n, n_features) float64
        From the first row of the train window on.
    y : (n,) int8
        Not read.
    windows : Windows
    spec : FeatureSpec
    config : Config
    progress : callable, optional
        Called with a stage, what is done of it, and all of it.
    columns : (k,) int64, optional
        Fit on these columns of `X` alone, both sides of each, as the plain baseline does.

    Raises
    ------
    DataError
        The configuration names a feature that there is not, there is no feature to fit on, or a value is too large.
    """
    report = progress or (lambda stage, done, total: None)
    report("forest", 0, 1)
    chosen = spec.features if columns is None else [spec.features[i] for i in columns]
    X = X if columns is None else X[:, columns]
    learn = X[windows.within(windows.refit)]
    odd = odd_sides(FeatureSpec("features", tuple(chosen)) if columns is not None else spec, config.forest.features)
    names = [feature.name for feature in chosen]
    habits = tuple(_habit(names.index(name), side, learn) for name, side in odd.items())
    grown = IsolationForest(
        n_estimators=config.forest.trees, max_samples=min(config.forest.samples, len(learn)), random_state=config.seed
    ).fit(_seen(learn, habits))
    forest = _written(grown, habits, X.shape[1])
    text = write_text(forest)
    _verify(text, grown, habits, X[windows.within(windows.calibration)][:COMPARED_ROWS])
    report("forest", 1, 1)
    return FittedForest(text, len(forest.trees), habits, _split_rows(forest))


def odd_sides(spec: FeatureSpec, named: dict[str, Odd] | None) -> dict[str, Odd]:
    """Return which features a forest is grown on, and the odd side of each.

    Those `named`; by default the behaviour of customers, or all numbers and flags of ready features, on both sides.

    Raises
    ------
    DataError
        A named feature is not there or is categorical, or none is left.
    """
    usable = [feature.name for feature in spec.features if feature.type != "categorical"]
    if named is not None:
        if wrong := [name for name in named if name not in usable]:
            raise DataError(
                f"forest.features names {', '.join(wrong)}; the numeric and boolean features are {', '.join(usable)}"
            )
        chosen = named
    elif spec.kind == "transaction":
        chosen = {name: side for name, side in BEHAVIOUR.items() if name in usable}
    else:
        chosen = dict.fromkeys(usable, "both")
    if not chosen:
        raise DataError("an isolation forest needs a numeric or boolean feature; the mapping gives none")
    return chosen


def _habit(column: int, odd: Odd, learn: Matrix) -> Habit:
    values = learn[:, column]
    values = values[~np.isnan(values)]
    return Habit(column, odd, float(np.median(values)) if len(values) else 0.0)


def _seen(X: Matrix, habits: tuple[Habit, ...]) -> Matrix:
    """Return what the forest is grown on, (n, n_habits) float64."""
    return np.column_stack([habit.seen(X[:, habit.column]) for habit in habits])


def _written(grown: IsolationForest, habits: tuple[Habit, ...], n_features: int) -> Forest:
    """Return a fitted forest as trees over the columns of `X`."""
    parts = [
        (estimator.tree_, features)
        for estimator, features in zip(grown.estimators_, grown.estimators_features_, strict=True)
    ]
    trees = []
    for tree, features in parts:
        is_split = tree.children_left >= 0
        place = np.where(is_split, np.cumsum(is_split) - 1, -np.cumsum(~is_split))  # in pre-order: parents come first
        splits = tuple(_splits(tree, habits, features, is_split, place))
        rows = tree.n_node_samples[~is_split]
        n_leaves = len(rows)
        unvalued = Tree(splits, (0.0,) * n_leaves, tuple(rows.tolist()) if splits else ())
        trees.append(replace(unvalued, leaf_values=tuple(leaf_values(unvalued, len(parts)))))
    return Forest(n_features, tuple(trees))


def _splits(
    tree: Any,
    habits: tuple[Habit, ...],
    features: NDArray[np.int64],
    is_split: NDArray[np.bool_],
    place: NDArray[np.int64],
) -> list[Split]:
    """Return the splits of one of scikit-learn's trees, as splits of `X`."""
    nodes = np.flatnonzero(is_split)
    of_habit = features[tree.feature[nodes]]
    cuts = np.empty(len(nodes))
    for i in np.unique(of_habit):
        cuts[of_habit == i] = habits[i].cuts(tree.threshold[nodes][of_habit == i])
    splits = []
    for node, i, cut in zip(nodes.tolist(), of_habit.tolist(), cuts.tolist(), strict=True):
        habit = habits[i]
        left, right = int(place[tree.children_left[node]]), int(place[tree.children_right[node]])
        missing_left = bool(tree.missing_go_to_left[node]) if habit.odd == "both" else True  # the median is never odd
        if habit.odd == "low":
            left, right, missing_left = right, left, not missing_left
        rows = int(tree.n_node_samples[node])
        splits.append(Split(habit.column, cut, left, right, rows, missing_left, "nan", None))
    return splits


def _split_rows(forest: Forest) -> Vector:
    rows = np.zeros(forest.n_features)
    for tree in forest.trees:
        for split in tree.splits:
            rows[split.feature] += split.n_rows
    return rows


def _verify(text: str, grown: IsolationForest, habits: tuple[Habit, ...], X: Matrix) -> None:
    """Compare the written trees with scikit-learn's own scores; raises `DataError` if they differ."""
    detector = load(detector_files(text, None), X.shape[1])
    ours = detector.anomaly_score(detector.raw_margin(X))
    difference = float(np.abs(ours + grown.score_samples(_seen(X, habits))).max(initial=0.0))
    if not difference <= TOLERANCE:
        raise DataError(f"the written forest differs from scikit-learn's scores by {difference:.3g}")


def _last_at_most(rising: Callable[[Vector], Vector], thresholds: Vector) -> Vector:
    """Return for each threshold the largest float64 whose image, rounded to float32, is at most the threshold.

    Bisection over the order of float64 numbers: 64 steps, each for all thresholds at once.
    """
    low, high = _ordered(np.full(len(thresholds), -LARGEST)), _ordered(np.full(len(thresholds), LARGEST))
    with np.errstate(over="ignore"):
        for _ in range(64):
            middle = (low & high) + ((low ^ high) >> 1)
            passes = rising(_float_at(middle)).astype(np.float32) <= thresholds
            low, high = np.where(passes, middle, low), np.where(passes, high, middle)
    return _float_at(low)


def _ordered(x: Vector) -> NDArray[np.int64]:
    """Return integers in the order of the numbers, neighbours for neighbours."""
    bits = x.view(np.int64)
    return np.where(bits >= 0, bits, np.iinfo(np.int64).min - bits)


def _float_at(order: NDArray[np.int64]) -> Vector:
    bits = np.where(order >= 0, order, np.iinfo(np.int64).min - order)
    return bits.view(np.float64)
