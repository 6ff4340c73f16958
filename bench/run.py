"""Run the project's benchmarks, one after the other, and compare commits.

    python -m bench.run                    all of them; each writes bench/results/NAME.json
    python -m bench.run library service    these
    python -m bench.run --compare OLD NEW  both commits in turns on this machine; what differs by more than a tenth

A comparison checks each commit out beside this one and runs the benchmark's own code of that commit, so that both
are judged by what they could do then, in one sitting: figures of two sittings say little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
# in the order of their length; what each one measures stands in its own docstring
BENCHMARKS = ("library", "approximation", "parts", "overload", "history", "training", "service", "load")
COMPARED = ("library",)
NOTICED = 0.1

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


def compare(commits: list[str], names: list[str], turns: int) -> None:
    """Print the figures whose medians differ, old over new."""
    measured: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    with checkout(commits[0]) as old, checkout(commits[1]) as new:
        for _ in range(turns):
            for root, kept in zip((old, new), measured, strict=True):
                for name in names:
                    out = root / f"{name}.json"
                    run(name, root, "--out", str(out))
                    for path, value in figures(json.loads(out.read_text())):
                        kept[f"{name}: {path}"].append(value)
    table = Table("figure", *commits, "new/old", title=f"medians of {turns} turns, differences above {NOTICED:.0%}")
    same = 0
    for path, values in measured[0].items():
        before, after = statistics.median(values), statistics.median(measured[1].get(path, [float("nan")]))
        ratio = after / before if before else float("nan")
        if 1 / (1 + NOTICED) <= ratio <= 1 + NOTICED:
            same += 1
        else:
            table.add_row(path, f"{before:.4g}", f"{after:.4g}", f"{ratio:.2f}")
    console.print(table)
    console.print(f"{same} figures are the same within {NOTICED:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"benchmarks: {', '.join(present(ROOT))}; all when none is named")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two commits")
    parser.add_argument("--turns", type=int, default=3, help="of each commit, alternating")
    given = parser.parse_args()
    unknown = set(given.names) - set(present(ROOT))
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(present(ROOT))}")
    if given.compare:
        compare(given.compare, given.names or list(COMPARED), given.turns)
        return
    for name in given.names or present(ROOT):
        console.rule(name)
        run(name, ROOT)


if __name__ == "__main__":
    main()
