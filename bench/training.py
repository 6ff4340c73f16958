"""How long a training of 1.75 million transactions takes, stage by stage, and how much memory.

Run as ``python -m bench.training``: simulates 5,000 customers and 10,000 merchants over six months, then reads,
replays, trains, calibrates, evaluates and packages, each once. Beside it, as the peer, the plainest LightGBM fit that
scikit-learn users write, on the same rows and features, says what a stage costs in units that travel.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import lightgbm as lgb
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench.hardware import describe_hardware
from fraud.simulation.simulate import simulate_transactions
from training.config import Config
from training.data import Mapping, load_transactions
from training.replay import replay, transaction_spec
from training.train import train

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench" / "results" / "training.json"
TARGET_S, TARGET_GB = 300.0, 4.0
COUNTED = ("replay", "train", "baseline", "evaluate")
PEER_TREES = 100


def main(
    customers: Annotated[int, typer.Option()] = 5000,
    merchants: Annotated[int, typer.Option()] = 10_000,
    days: Annotated[int, typer.Option()] = 183,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULT,
) -> None:
    """Simulate, train and say where the time goes."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "transactions.parquet"
        started = time.perf_counter()
        simulated = simulate_transactions(customers, days, 1, merchants=merchants, out=data)
        timings = {"simulate": time.perf_counter() - started}
        mapping = Mapping.from_yaml(ROOT / "examples" / "simulated.yaml")
        started = time.perf_counter()
        table = load_transactions(data, mapping)
        timings["read"] = time.perf_counter() - started
        run = train(table, mapping, Config(), name="bench", dataset={"digest": "simulated"}, runs=Path(folder))
        timings |= run.timings_s
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        peer_s = _peer(table, mapping)
        tree_count = json.loads((run.folder / "run.json").read_text())["config"]["trees"]
    total = sum(timings[stage] for stage in COUNTED)
    shown = Table("stage", "seconds", "share", title=f"{simulated.rows:,} transactions, {tree_count} trees")
    for stage, seconds in timings.items():
        shown.add_row(stage, f"{seconds:.1f}", f"{seconds / total:.0%}" if stage in COUNTED else "")
    console.print(shown)
    console.print(f"replay, train, calibrate and evaluate: {total:.0f} s (target {TARGET_S:.0f})")
    console.print(
        f"the peer, LGBMClassifier of {PEER_TREES} trees on the same rows: {peer_s:.0f} s, {total / peer_s:.1f} x"
    )
    console.print(f"peak memory {peak_gb:.2f} GB (target {TARGET_GB:.0f})")
    figures = {
        "hardware": describe_hardware(),
        "rows": simulated.rows,
        "trees": tree_count,
        "timings_s": {k: round(v, 2) for k, v in timings.items()},
        "total_s": round(total, 1),
        "peak_gb": round(peak_gb, 2),
        "peer_s": round(peer_s, 1),
        "average_precision": run.metrics["average_precision"].value,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")


def _peer(table: object, mapping: Mapping) -> float:
    """Return the seconds of the fit alone."""
    import pandas as pd

    from fraud.features.featurizer import Featurizer

    assert isinstance(table, pd.DataFrame)
    some = slice(len(table) // 5, len(table) // 5 * 4)
    spec = transaction_spec(table, mapping, some)
    X = replay(table, Featurizer(spec, np.geomspace(1, 1000, 100).tolist()), some)
    y = table["label"].to_numpy()[some] == 1
    classifier = lgb.LGBMClassifier(n_estimators=PEER_TREES, verbosity=-1)
    started = time.perf_counter()
    classifier.fit(X, y)
    return time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)
