"""Run the project's benchmarks, one after the other, and compare commits.

    python -m bench.run                    all of them; each writes bench/results/NAME.json
    python -m bench.run library service    these
    python -m bench.run --compare OLD NEW  both commits in turns on this machine
    python -m bench.run --compare OLD NEW service -- --servers fraud_bento,fraud_bento_history --connections 32

A comparison checks each commit out beside this one and runs the benchmark's own code of that commit, so that both
are judged by what they could do then, in one sitting: figures of two sittings say little. Each figure's ratio, new
over old, is taken turn by turn and shown with its 95% interval (Student's t over the logarithms of the ratios).
What stands after `--` goes to the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

ROOT = Path(__file__).parents[1]
# in the order of their length; what each one measures stands in its own docstring
BENCHMARKS = (
    "library",
    "forest",
    "rules",
    "approximation",
    "parts",
    "overload",
    "questions",
    "history",
    "training",
    "service",
    "load",
)
COMPARED = ("library",)

console = Console()


def present(root: Path) -> list[str]:
    return [name for name in BENCHMARKS if (root / "bench" / f"{name}.py").is_file()]


def run(name: str, root: Path, *options: str) -> None:
    """Run one benchmark with the code of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", *options], cwd=root, env=environment)
    if done.returncode:
        raise SystemExit(f"bench.{name} ended with {done.returncode}")


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(root), commit], cwd=ROOT, check=True)
        try:
            yield root
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=ROOT, check=True)


def figures(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result by its path; an object in a list is named by its strings."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not (path == "" and key == "hardware"):
                yield from figures(part, f"{path} / {key}" if path else str(key))
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, dict):
                name = " ".join(text for text in part.values() if isinstance(text, str))
                yield from figures({k: v for k, v in part.items() if not isinstance(v, str)}, f"{path} / {name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def compare(commits: list[str], names: list[str], turns: int, options: list[str]) -> None:
    """Print the ratio of every figure, new over old, with its interval."""
    measured: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    with checkout(commits[0]) as old, checkout(commits[1]) as new:
        for turn in range(turns):
            pair = list(zip((old, new), measured, strict=True))
            for root, kept in pair if turn % 2 == 0 else reversed(pair):
                for name in names:
                    out = root / f"{name}.json"
                    run(name, root, *options, "--out", str(out))
                    for path, value in figures(json.loads(out.read_text())):
                        kept[f"{name}: {path}"].append(value)
    table = Table("figure", *commits, "new/old", "95% interval", title=f"medians of {turns} turns")
    for path, before in measured[0].items():
        after = measured[1].get(path, [])
        if len(before) == len(after) and min(before) > 0 and min(after) > 0:
            ratio, low, high = paired_ratio(before, after)
            bold = "bold" if not low <= 1 <= high else ""
            medians = (f"{np.median(values):.4g}" for values in (before, after))
            table.add_row(path, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", style=bold)
    console.print(table)


def paired_ratio(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the ratios after/before of each turn, and the ends of its 95% interval."""
    logs = np.log(np.array(after) / np.array(before))
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs) if len(logs) > 1 else np.inf
    ratio, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]).tolist()
    return ratio, low, high


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"benchmarks: {', '.join(present(ROOT))}; all when none is named")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two commits")
    parser.add_argument("--turns", type=int, default=5, help="of each commit, alternating")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    unknown = set(given.names) - set(present(ROOT))
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(present(ROOT))}")
    if given.compare:
        compare(given.compare, given.names or list(COMPARED), given.turns, options)
        return
    for name in given.names or present(ROOT):
        console.rule(name)
        run(name, ROOT, *options)


if __name__ == "__main__":
    main()
