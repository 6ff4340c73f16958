"""Logs a finished run folder as a W&B run. Imports wandb, so only the SDK's process may import this module."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import wandb

MAX_TABLE_ROWS = 10_000


def log_folder(run: Any, folder: Path) -> None:
    """Log a finished run folder: its configuration once, and all results as one row of history."""
    facts = json.loads((folder / "run.json").read_text())
    run.name = f"{facts['name']} {facts['created'][:19]}"
    run.config.update(
        facts["config"]
        | {"kind": facts["kind"], "bundle_digest": facts["bundle_digest"], "dataset": facts["dataset"]}
        | {"created": facts["created"]}
    )
    row: dict[str, Any] = {}
    for metric, interval in facts["metrics"].items():
        row[f"metrics/{metric}"] = interval["value"]
        run.summary.update({f"metrics/{metric}_{bound}": interval[bound] for bound in ("low", "high")})
    for metric, interval in facts["baseline"].items():
        run.summary[f"baseline/{metric}"] = interval["value"]
    for step, seconds in facts["timings_s"].items():
        row[f"timings_s/{step}"] = seconds
    for path in sorted(folder.glob("tables/*.csv")):
        row[f"tables/{path.stem}"] = read_table(path)
    for path in sorted(folder.glob("plots/*.png")):
        row[f"plots/{path.stem}"] = wandb.Image(str(path))
    if (folder / "report.html").is_file():
        row["report"] = wandb.Html(str(folder / "report.html"), inject=False)
    run.log(row)


def read_table(path: Path) -> Any:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    return wandb.Table(
        columns=list[str | int](header), data=[[number_or_text(cell) for cell in row] for row in rows[:MAX_TABLE_ROWS]]
    )


def number_or_text(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
