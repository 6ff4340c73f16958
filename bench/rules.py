"""What rules cost a decision: 100 rules and three lists, beside Google's CEL runtime and SQLite on the same rules.

    python -m bench.rules --out bench/results/rules.json

CPU time of this process for one row after another, and for a decision of the whole pipeline with rules and without.
CEL and SQLite get the same conditions: CEL each as an expression of its own, over one activation with the values of the
columns; SQLite all of them as one SELECT with parameters. The ratios are within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cel_expr_python import cel

from bench.hardware import describe_hardware
from fraud.decisions.rules.blocks import fired
from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.lists import ListEntry, Lists
from fraud.decisions.rules.sets import Rule, Rules, RuleSet
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.sqlite import SqliteStore
from tests.tiny import TRANSACTION_SPEC, transactions, write_tiny_bundle

RULES = 100
LISTS = ("blocked", "trusted", "watched")
ENTRIES = 100_000


def made(seed: int) -> RuleSet:
    """100 rules of three or four conditions on the columns of a transaction model; every tenth looks into a list."""
    rng = random.Random(seed)
    numeric = [feature.name for feature in TRANSACTION_SPEC.features if feature.type == "numeric"]
    some = []
    for i in range(RULES):
        parts = [
            f"{rng.choice(numeric)} {rng.choice('<>')} {rng.random() * 100:.3f}" for _ in range(rng.choice((2, 3)))
        ]
        parts.append(f"!({rng.choice(numeric)} < 1.0 && {rng.choice(numeric)} > 2.0)")
        if i % 10 == 0:
            parts.append(f"{rng.choice(('customer_id', 'merchant_id', 'device_id'))} in {rng.choice(LISTS)}")
        rng.shuffle(parts)
        some.append(Rule(id=f"r{i}", when=" && ".join(parts), outcome="review", max_share=1.0))
    return RuleSet(model="fraud-transaction", lists=LISTS, rules=tuple(some))


def us_a_call(call: Callable[[int], object], n: int) -> float:
    """CPU time of a call in microseconds, the median of five rounds."""
    rounds = []
    for _ in range(5):
        started = time.process_time()
        for i in range(n):
            call(i)
        rounds.append((time.process_time() - started) / n * 1e6)
    return statistics.median(rounds)


def languages(rules: Rules, columns: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    """Microseconds for all conditions on one row; CEL and SQLite without those of lists, which count as false."""
    names = TRANSACTION_SPEC.names
    rows = columns.tolist()
    plain = [re.sub(r"\w+ in \w+", "false", rule.when) for rule in rules.rules]
    env = cel.NewEnv(variables=dict.fromkeys(names, cel.Type.DOUBLE))
    compiled = [env.compile(text) for text in plain]

    def by_cel(row: dict[str, float]) -> list[object]:
        activation = env.Activation(row)
        return [expression.eval(activation) for expression in compiled]

    values = [{n: v for n, v in zip(names, row, strict=False) if v == v} for row in rows]
    sql = [text.replace("&&", "AND").replace("||", "OR").replace("!(", "NOT (") for text in plain]
    for i, name in sorted(enumerate(names), key=lambda pair: -len(pair[1])):
        sql = [re.sub(rf"\b{name}\b", f"?{i + 1}", text) for text in sql]
    db = sqlite3.connect(":memory:")
    select = f"SELECT {', '.join(sql)}"
    bound = [[None if v != v else v for v in row[: len(names)]] for row in rows]
    n = len(rows)
    return {
        "own": us_a_call(lambda i: rules.fired(rows[i % n]), 4 * n),
        "google_cel": us_a_call(lambda i: by_cel(values[i % n]), max(n // 20, 5)),
        "sqlite": us_a_call(lambda i: db.execute(select, bound[i % n]).fetchone(), max(n // 4, 5)),
    }


def decisions(scorer: Scorer, rules: RulesInForce | None, n: int) -> float:
    """Microseconds of CPU for one decision of the pipeline: history, score, verdict and record, one row a call."""
    instances = [json.dumps(instance).encode() for instance in transactions(n, 7, customers=50)]

    async def run(path: Path) -> float:
        pipeline = Pipeline({scorer.name.name: scorer}, SqliteStore(path / "history.db", durable=False))
        pipeline.rules = {} if rules is None else {scorer.name.digest: rules}
        started = time.process_time()
        for instance in instances:
            await pipeline.decide_requests([pipeline.read([instance])])
        used = time.process_time() - started
        await pipeline.close()
        return used / n * 1e6

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))


def run(rows: int, rounds: int) -> dict[str, Any]:
    """Measure everything, alternating within one run."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = Scorer.load(write_tiny_bundle(Path(folder) / "bundle", "transaction"))
    some = made(1)
    rules = Rules(some, scorer.spec)
    lists = Lists()
    for i, name in enumerate(LISTS):
        lists.apply(ListEntry(name, f"c{j}", revision=i * ENTRIES + j) for j in range(7, ENTRIES))
    rng = np.random.default_rng(2)
    columns = rng.random((rows, rules.width + rules.n_facts)) * 100
    columns[rng.random(columns.shape) < 0.05] = np.nan
    measured = languages(rules, columns)
    many = np.tile(columns, (200_000 // rows + 1, 1))[:200_000]
    started = time.process_time()
    fired(rules.definite, many)
    bulk_s = (time.process_time() - started) * 5
    without, with_rules = [], []
    for _ in range(rounds):
        without.append(decisions(scorer, None, rows))
        with_rules.append(decisions(scorer, RulesInForce(rules, lists=lists), rows))
    extra = [a - b for a, b in zip(with_rules, without, strict=True)]
    return {
        "hardware": msgspec.to_builtins(describe_hardware()),
        "rules": RULES,
        "list_entries": ENTRIES,
        "us_a_row": {name: round(value, 2) for name, value in measured.items()},
        "ratio_to_own": {name: round(value / measured["own"], 1) for name, value in measured.items()},
        "million_rows_cpu_s": round(bulk_s, 2),
        "decision_us": {
            "without": round(statistics.median(without), 1),
            "with_rules_and_lists": round(statistics.median(with_rules), 1),
            "extra": round(statistics.median(extra), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(with_rules, without, strict=True)), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.rules", description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rules.json")
    options = parser.parse_args()
    report = run(options.rows, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
