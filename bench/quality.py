"""How good the models are: the table of docs/quality.md, from finished run folders.

``python -m bench.quality "title=runs/fraud-transaction-..." ...`` writes the measures of each run between the page's
markers, beside the plain baseline of the same run: LightGBM on the request's own fields alone.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import typer

PAGE = Path(__file__).parent.parent / "docs" / "quality.md"
SHOWN = (
    "roc_auc",
    "average_precision",
    "recall_at_fpr_0.001",
    "recall_at_fpr_0.005",
    "recall_at_fpr_0.01",
    "card_precision_at_100",
    "brier_score",
    "expected_calibration_error",
    "cost_per_1000",
)


def main(runs: list[str], page: Path = PAGE) -> None:
    """Write the table of the given runs, each named as TITLE=FOLDER."""
    parts = [table(*run.split("=", 1)) for run in runs]
    marked = re.compile(r"(?<=<!-- quality -->\n).*(?=<!-- /quality -->)", re.DOTALL)
    page.write_text(marked.sub(lambda _: "\n".join(parts), page.read_text()))


def table(title: str, folder: str) -> str:
    """Return one run's measures as Markdown."""
    run = json.loads((Path(folder) / "run.json").read_text())
    with (Path(folder) / "tables" / "windows.csv").open() as file:
        test = list(csv.DictReader(file))[-1]
    rows, frauds = int(float(test["rows"])), int(float(test["frauds"]))
    lines = [
        f"### {title}",
        "",
        f"{run['dataset']['rows']:,} transactions; test window of {rows:,} with {frauds:,} frauds "
        f"({frauds / rows:.2%}); {run['config']['trees']} trees.",
        "",
        "| measure | model | request's own fields alone |",
        "|---|---|---|",
    ]
    for name in SHOWN:
        cells = [_cell(run[part][name]) for part in ("metrics", "baseline")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""])


def _cell(interval: dict[str, float]) -> str:
    digits = 2 if abs(interval["value"]) >= 10 else 4
    value, low, high = (f"{interval[part]:,.{digits}f}" for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    typer.run(main)
