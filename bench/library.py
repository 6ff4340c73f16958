"""Scores and contributions without a service: microseconds a row against LightGBM, its scikit-learn wrapper and shap.

``python -m bench.library`` trains one model of 300 trees, 31 leaves and 15 features, times everyone in turns on the
same rows in one thread, prints ratios and writes bench/results/library.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import lightgbm as lgb
import numpy as np
import shap
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bench.hardware import describe_hardware
from bench.model import SEED, table
from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.lightgbm.text import read_text
from fraud.detectors.trees.treeshap import TreeShap

Matrix = NDArray[np.float64]
Call = Callable[[Matrix], Any]
SIZES = (1, 10, 100, 1000)
CALLS_A_LOOK = 8
RESULTS = Path(__file__).parent / "results" / "library.json"
OURS, THEIRS = "this project", "LightGBM Booster"
console = Console()


def contenders(n_fit: int = 60_000, n_calibrate: int = 20_000) -> tuple[Model, str, dict[str, dict[str, Call]]]:
    """Train the model; return it, its text, and what is timed: job -> who -> call on rows (n, 15)."""
    frame, y = table(n_fit + n_calibrate, SEED)
    X = frame.to_numpy()
    classifier = lgb.LGBMClassifier(
        n_estimators=300, num_leaves=31, random_state=1, verbose=-1, deterministic=True, n_jobs=1
    )
    classifier.fit(X[:n_fit], y[:n_fit])
    calibrated = CalibratedClassifierCV(FrozenEstimator(classifier), method="isotonic").fit(X[n_fit:], y[n_fit:])
    booster = classifier.booster_
    margins = booster.predict(X[n_fit:], raw_score=True)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(margins, y[n_fit:])
    text = booster.model_to_string()
    model = Model(text, Calibrator(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist()))
    model.warm_up()
    model.verify_contributions(X[:16])
    if model.contributions_fallback:
        raise SystemExit(f"the fast contributions are not in use: {model.contributions_fallback}")
    explainer = shap.TreeExplainer(classifier)
    return (
        model,
        text,
        {
            "score": {
                OURS: lambda rows: model.decision_score(model.raw_margin(rows)),
                THEIRS: lambda rows: booster.predict(rows, raw_score=True, num_threads=1),
                "LGBMClassifier": classifier.predict_proba,
                "CalibratedClassifierCV": calibrated.predict_proba,
            },
            "contributions": {
                OURS: model.contributions,
                THEIRS: lambda rows: booster.predict(rows, pred_contrib=True, num_threads=1),
                "shap.TreeExplainer": explainer.shap_values,
            },
        },
    )


def time_in_turns(calls: dict[str, Call], X: Matrix, size: int, rounds: int, seconds: float) -> dict[str, float]:
    """Return the median over `rounds` of each call's CPU time in µs a row; each call of a turn takes other rows."""
    batches = [X[start : start + size] for start in range(0, len(X) - size + 1, size)]
    turns: dict[str, list[float]] = {who: [] for who in calls}
    for who, call in itertools.chain.from_iterable(calls.items() for _ in range(rounds + 1)):
        turns[who].append(1e6 * _seconds_a_call(call, itertools.cycle(batches), seconds) / size)
    return {who: median(measured[1:]) for who, measured in turns.items()}  # the first turn warms up


def _seconds_a_call(call: Call, batches: Iterator[Matrix], seconds: float) -> float:
    n_calls, began = 0, time.thread_time()
    while (spent := time.thread_time() - began) < seconds or n_calls == 0:
        for _ in range(CALLS_A_LOOK):  # a look at the clock costs a microsecond, a tenth of the shortest call
            call(next(batches))
        n_calls += CALLS_A_LOOK
    return spent / n_calls


def exactness(n_rows: int = 10_000) -> dict[str, Any]:
    """Compare with pred_contrib on rows with missing values and categories, by a model trained on such."""
    rng = np.random.default_rng(SEED)
    X = rng.normal(size=(n_rows + 20_000, 15))
    X[:, 12], X[:, 13], X[:, 14] = (rng.integers(0, n, len(X)) for n in (3, 20, 200))
    margin = X[:, 0] + X[:, 1] * X[:, 2] + (X[:, 12] == 1) + np.sin(X[:, 13]) + np.sin(X[:, 14])
    X[rng.random(X.shape) < 0.1] = np.nan
    fit, test = X[n_rows:], X[:n_rows]
    data = lgb.Dataset(fit, margin[n_rows:] > 1.5, categorical_feature=[12, 13, 14])
    booster = lgb.train({"objective": "binary", "num_leaves": 31, "verbosity": -1, "num_threads": 1}, data, 300)
    found = TreeShap(read_text(booster.model_to_string())).contributions(test)
    expected, margins = booster.predict(test, pred_contrib=True), booster.predict(test, raw_score=True)
    return {
        "rows": n_rows,
        "largest_difference_to_pred_contrib": float(np.abs(found - expected).max()),
        "largest_difference_of_sum_to_margin": float(np.abs(found.sum(axis=1) - margins).max()),
    }


STARTED = """
import json, sys, time
clock = time.perf_counter
began = clock()
from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.model import Model
imported = clock()
model = Model(sys.stdin.read(), Calibrator([0.0], [0.5]))
loaded = clock()
model.warm_up()
ready, cpu = clock(), time.process_time()
import psutil
print(json.dumps({
    "import_s": imported - began, "load_s": loaded - imported, "warm_up_s": ready - loaded, "total_s": ready - began,
    "cpu_s": cpu, "memory_mb": psutil.Process().memory_info().rss / 2**20,
}))
"""


def start(text: str) -> dict[str, float]:
    """Return how long a new process takes until its first score, and its memory; the kernels' cache is warm."""
    run = subprocess.run([sys.executable, "-c", STARTED], input=text, capture_output=True, text=True, check=True)
    return {key: round(value, 3) for key, value in json.loads(run.stdout).items()}


def run(rounds: int, seconds: float) -> dict[str, Any]:
    """Return everything that the report shows."""
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names")
        warnings.filterwarnings("ignore", message="LightGBM binary classifier with TreeExplainer")
        model, text, jobs = contenders()
        X = table(2000, 7)[0].to_numpy()
        figures = {
            job: {size: time_in_turns(calls, X, size, rounds, seconds) for size in SIZES} for job, calls in jobs.items()
        }
        expected = jobs["score"][THEIRS](X)
        return {
            "hardware": describe_hardware(("lightgbm", "numba", "numpy", "scikit-learn", "shap")),
            "model": "300 trees, 31 leaves, 15 features",
            "unit": "µs of CPU time a row, one thread, median of interleaved turns",
            "figures": figures,
            "margins_bit_for_bit": bool(np.array_equal(model.raw_margin(X), expected)),
            "exactness": exactness(),
            "start": start(text),
        }


def show(report: dict[str, Any]) -> None:
    """Print the report."""
    for job, sizes in report["figures"].items():
        shown = Table(title=f"{job}: µs a row (times {OURS})")
        shown.add_column("rows a call", justify="right")
        who = list(next(iter(sizes.values())))
        for name in who:
            shown.add_column(name, justify="right")
        for size, figures in sizes.items():
            ours = figures[OURS]
            shown.add_row(
                str(size),
                *(
                    f"{figures[name]:,.1f}" + (f" ({figures[name] / ours:.1f}x)" if name != OURS else "")
                    for name in who
                ),
            )
        console.print(shown)
    for key in ("margins_bit_for_bit", "exactness", "start", "hardware"):
        console.print(f"{key}: {report[key]}")


def main() -> None:
    """Run, show, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender, the median counts")
    parser.add_argument("--seconds", type=float, default=0.1, help="length of a turn, s of CPU time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args()
    report = run(options.rounds, options.seconds)
    show(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
