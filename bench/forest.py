"""Scores and reasons of an isolation forest: this project against its LightGBM champion and scikit-learn.

``python -m bench.forest`` fits a forest of 100 trees on the ten behavioural features and a booster of 300 trees of 31
leaves on the same, times everyone in turns on the same rows in one thread, prints ratios, compares 100,000 rows with
scikit-learn's own scores, and writes bench/results/forest.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import IsolationForest
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bench.hardware import describe_hardware
from bench.library import SIZES, time_in_turns
from bench.model import SEED
from fraud.detectors.calibration import Calibrator
from fraud.detectors.isolation_forest.algorithm import load
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.protocol import Detector
from fraud.schema import Feature, FeatureSpec
from training.config import Config
from training.isolation import BEHAVIOUR, FittedForest, fit_forest
from training.splits import split_by_order

Matrix = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results" / "forest.json"
FOREST, CHAMPION, SCIKIT_LEARN = "this project's forest", "LightGBM champion", "scikit-learn"
MOST_TO_CHAMPION, LEAST_ONE_ROW, LEAST_1000_ROWS = 1.5, 500.0, 1.5
MOST_DIFFERENT, MOST_APART = 1e-12, 1e-9
console = Console()


def table(n_rows: int, seed: int) -> Matrix:
    """Return rows of the ten features (n, 10): skewed, whole and bounded numbers, a tenth of the values missing."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_rows, len(BEHAVIOUR)))
    X[:, 3] = rng.lognormal(0, 1, n_rows)
    X[:, 6] = rng.lognormal(9, 2, n_rows)
    X[:, 7] = rng.integers(0, 30, n_rows)
    X[:, 8:] = rng.random((n_rows, 2)) < 0.05
    X[:, 1:8][rng.random((n_rows, 7)) < 0.1] = np.nan
    return X


def fitted(n_rows: int) -> tuple[FittedForest, IsolationForest, Model]:
    """Return the forest, scikit-learn's own on what the forest sees, and a booster on the same rows."""
    X, windows, config = table(n_rows, SEED), split_by_order(n_rows, (0.2, 0.2, 0.2)), Config(seed=SEED)
    spec = FeatureSpec("transaction", tuple(Feature(name, "history", missing=True) for name in BEHAVIOUR))
    forest = fit_forest(X, np.full(n_rows, -1, np.int8), windows, spec, config)
    learn = seen(forest, X[windows.within(windows.refit)])
    theirs = IsolationForest(
        n_estimators=config.forest.trees, max_samples=config.forest.samples, random_state=SEED
    ).fit(learn)
    margin = np.nan_to_num(X[:, 1]) + np.nan_to_num(X[:, 3]) * (X[:, 0] > 0) + X[:, 8]
    data = lgb.Dataset(X, margin > np.quantile(margin, 0.97))
    booster = lgb.train({"objective": "binary", "num_leaves": 31, "verbosity": -1, "num_threads": 1}, data, 300)
    champion = Model(booster.model_to_string(), Calibrator([-5.0, 5.0], [0.01, 0.99]))
    return forest, theirs, champion


def seen(forest: FittedForest, X: Matrix) -> Matrix:
    """Return what scikit-learn's forest is given for rows of the ten features."""
    return np.column_stack([habit.seen(X[:, habit.column]) for habit in forest.habits])


def with_reasons(detector: Detector) -> Callable[[Matrix], Any]:
    return lambda rows: (detector.decision_score(detector.raw_margin(rows)), detector.contributions(rows))


def exactness(forest: FittedForest, theirs: IsolationForest, detector: Detector, n_rows: int) -> dict[str, Any]:
    """Compare scores with scikit-learn's, and sums of contributions with the raw scores."""
    X = table(n_rows, 11)
    margin = detector.raw_margin(X)
    scores = detector.anomaly_score(margin)
    assert scores is not None
    return {
        "rows": n_rows,
        "largest_difference_to_score_samples": float(np.abs(scores + theirs.score_samples(seen(forest, X))).max()),
        "largest_difference_of_sum_to_raw_score": float(np.abs(detector.contributions(X).sum(axis=1) - margin).max()),
    }


def run(rounds: int, seconds: float, n_rows: int) -> dict[str, Any]:
    """Return everything that the report shows."""
    with threadpool_limits(1):
        forest, theirs, champion = fitted(40_000)
        detector = load(forest.files(None), len(BEHAVIOUR))
        for one in (detector, champion):
            one.warm_up()
            one.verify_contributions(table(32, 3))
            if one.contributions_fallback:
                raise SystemExit(f"the fast contributions are not in use: {one.contributions_fallback}")
        jobs = {
            "score": {
                FOREST: lambda rows: detector.decision_score(detector.raw_margin(rows)),
                CHAMPION: lambda rows: champion.decision_score(champion.raw_margin(rows)),
                SCIKIT_LEARN: theirs.score_samples,
            },
            "score and contributions": {FOREST: with_reasons(detector), CHAMPION: with_reasons(champion)},
        }
        X = np.nan_to_num(table(2000, 7))
        figures = {
            job: {size: time_in_turns(calls, X, size, rounds, seconds) for size in SIZES} for job, calls in jobs.items()
        }
        return {
            "hardware": describe_hardware(("lightgbm", "numba", "numpy", "scikit-learn")),
            "model": "100 isolation trees beside 300 boosted trees of 31 leaves, 10 features",
            "unit": "µs of CPU time a row, one thread, median of interleaved turns",
            "figures": figures,
            "exactness": exactness(forest, theirs, detector, n_rows),
        }


def targets(report: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Return what this run says of each target: its name, the figure, the bound, and whether it is met."""
    found = []
    for size in (1, 1000):
        figures = report["figures"]["score and contributions"][size]
        ratio = figures[FOREST] / figures[CHAMPION]
        name = f"score and contributions of {size} rows, to the champion"
        found.append((name, ratio, f"≤ {MOST_TO_CHAMPION:g}", ratio <= MOST_TO_CHAMPION))
    for size, least in ((1, LEAST_ONE_ROW), (1000, LEAST_1000_ROWS)):
        figures = report["figures"]["score"][size]
        ratio = figures[SCIKIT_LEARN] / figures[FOREST]
        found.append((f"times faster than score_samples, {size} rows", ratio, f"≥ {least:g}", ratio >= least))
    exact = report["exactness"]
    apart, sums = exact["largest_difference_to_score_samples"], exact["largest_difference_of_sum_to_raw_score"]
    found.append((f"score to score_samples, {exact['rows']:,} rows", apart, "≤ 1e-12", apart <= MOST_DIFFERENT))
    found.append(("sum of contributions to the raw score", sums, "≤ 1e-9", sums <= MOST_APART))
    return found


def show(report: dict[str, Any]) -> None:
    """Print the report."""
    for job, sizes in report["figures"].items():
        shown = Table("rows a call", *next(iter(sizes.values())), title=f"{job}: µs a row")
        for size, figures in sizes.items():
            shown.add_row(str(size), *[f"{value:,.2f}" for value in figures.values()])
        console.print(shown)
    for name, measured, bound, met in targets(report):
        console.print(f"{'met   ' if met else 'MISSED'} {name}: {measured:.4g} ({bound})")


def main() -> None:
    """Run, show, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, the median counts")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn, s of CPU time")
    parser.add_argument("--rows", type=int, default=100_000, help="rows that are compared with scikit-learn's scores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    report = run(options.rounds, options.seconds, options.rows)
    show(report)
    options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
