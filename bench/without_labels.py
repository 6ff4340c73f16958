"""How much fraud is found without a label: this project's forest beside scikit-learn, isotree and pyod in one run.

``python -m bench.without_labels "TITLE=DATA=MAPPING" ...`` hides the labels of each table, fits everyone on the same
rows of its train and validation windows, scores the same test rows, and writes the table of docs/quality.md and
bench/results/without_labels.json. The labels only measure. isotree and pyod run in an environment of their own, made on
first use (isotree is compiled, which takes minutes). Both are given the raw columns, and then this project's ten
features.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from sklearn.ensemble import IsolationForest

from bench.servers import PEERS, made_environment
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.features.featurizer import Matrix
from training.assess import who_and_when
from training.config import Config
from training.data import Mapping, load_transactions
from training.isolation import fit_forest
from training.measures import Ranking
from training.prepare import PreparedData, prepare
from training.train import PLAIN_FIELDS

PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
RESULTS = Path(__file__).parent / "results" / "without_labels.json"
N_BOOTSTRAP = 200
RAW, HABITS = "raw columns", "these ten features"
console = Console()


def main(tables: list[str], page: Path = PAGE, results: Path = RESULTS) -> None:
    """Measure on the given tables, each named as TITLE=DATA=MAPPING."""
    measured = {title: measure(Path(data), Path(mapping)) for title, data, mapping in (t.split("=") for t in tables)}
    results.write_text(json.dumps(measured, indent=1) + "\n")
    parts = [shown(title, found) for title, found in measured.items()]
    marked = re.compile(r"(?<=<!-- anomaly -->\n).*(?=<!-- /anomaly -->)", re.DOTALL)
    page.write_text(marked.sub(lambda _: "\n".join(parts), page.read_text()))


def measure(data: Path, mapping: Path) -> dict[str, Any]:
    """Return the measures of everyone on the test window of a table."""
    mapped = Mapping.from_yaml(mapping)
    table = load_transactions(data, mapped)
    label = table["label"].to_numpy()
    console.print(f"{data.name}: replay")
    config = Config()
    prepared = prepare(table.assign(label=np.int8(-1)), mapped, config, ())
    scores = scored(prepared, config)
    test = prepared.table.iloc[prepared.windows.test]
    y = label[prepared.windows.test]
    known = y >= 0
    found = ranked(y[known], {name: values[known] for name, values in scores.items()}, test[known])
    return {"rows": int(known.sum()), "frauds": int((y == 1).sum()), "found": found}


def scored(prepared: PreparedData, config: Config) -> dict[str, NDArray[np.float64]]:
    """Return the scores of the test rows, by who gave them on what."""
    windows = prepared.windows
    fitted = fit_forest(prepared.X, prepared.y, windows, prepared.spec, config)
    X, _ = prepared.rows(windows.test)
    detector = ISOLATION_FOREST.load(fitted.files(None), X.shape[1])
    scores = {"**this project's forest**, one-sided habits": detector.raw_margin(X)}
    columns = {RAW: raw_columns(prepared), HABITS: [habit.column for habit in fitted.habits]}
    for given, some in columns.items():
        learn, test = prepared.X[windows.within(windows.refit)][:, some], X[:, some]
        console.print(f"{given}: scikit-learn, isotree, pyod")
        scores[f"scikit-learn IsolationForest, {given}"] = (
            -IsolationForest(random_state=1).fit(learn).score_samples(test)
        )
        scores |= {f"{name}, {given}": values for name, values in peers(learn, test).items()}
    return scores


def raw_columns(prepared: PreparedData) -> list[int]:
    """Return the columns of the transaction itself; categories by their codes, as many a notebook has them."""
    return [
        i
        for i, f in enumerate(prepared.spec.features)
        if f.source == "request" or f.name in PLAIN_FIELDS - {"amount_log"}
    ]


def peers(learn: Matrix, test: Matrix) -> dict[str, NDArray[np.float64]]:
    """Return the scores of isotree and pyod, by name."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, learn=learn, test=test)
        subprocess.run([made_environment("anomaly") / "python", PEERS / "anomaly.py", given, found], check=True)
        with np.load(found) as scores:
            return {name: scores[name] for name in scores.files}


def ranked(y: NDArray[np.int8], scores: dict[str, NDArray[np.float64]], test: pd.DataFrame) -> dict[str, Any]:
    """Return ROC AUC, average precision and its 95% interval (customers resampled), and the recall of the top 1%."""
    customers, cluster = np.unique(who_and_when(test)["customer_codes"], return_inverse=True)
    rng = np.random.default_rng(0)
    drawn = [
        np.bincount(rng.integers(len(customers), size=len(customers)), minlength=len(customers))
        for _ in range(N_BOOTSTRAP)
    ]
    found = {}
    for name, values in scores.items():
        ranking = Ranking(y.astype(np.int64), values, cluster)
        roc_auc, precision = ranking.measures(np.ones(len(customers), np.int64))[:2]
        low, high = np.percentile([ranking.measures(counts)[1] for counts in drawn], [2.5, 97.5])
        top = values >= np.quantile(values, 0.99)
        found[name] = {
            "roc_auc": roc_auc,
            "average_precision": precision,
            "low": float(low),
            "high": float(high),
            "recall_at_top_0.01": float((y[top] == 1).sum() / (y == 1).sum()),
        }
    return found


def shown(title: str, measured: dict[str, Any]) -> str:
    """Return one table's measures as Markdown: this project's forest, scikit-learn, isotree, and pyod's best."""
    rate = measured["frauds"] / measured["rows"]
    found = dict(measured["found"])
    for given in (RAW, HABITS):
        of_pyod = {name: m for name, m in found.items() if name.startswith("pyod") and name.endswith(given)}
        best = max(of_pyod, key=lambda name: of_pyod[name]["average_precision"])
        for name in of_pyod.keys() - {best}:
            del found[name]
        found = {(f"{name} (pyod's best)" if name == best else name): m for name, m in found.items()}
    lines = [
        f"### {title}",
        "",
        f"{measured['rows']:,} test transactions with {measured['frauds']:,} frauds: chance is {rate:.4f}.",
        "",
        "| without labels | average precision | times chance | ROC AUC | frauds in the top 1% |",
        "|---|---|---|---|---|",
    ]
    for name, m in found.items():
        precision = f"{m['average_precision']:.4f} [{m['low']:.4f}, {m['high']:.4f}]"
        lines.append(
            f"| {name} | {precision} | {m['average_precision'] / rate:.1f} | {m['roc_auc']:.4f} "
            f"| {m['recall_at_top_0.01']:.1%} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
