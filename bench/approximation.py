"""How far the bounded history is from an unbounded one, on simulated transactions.

    python -m bench.approximation --rows 100000 --out bench/results/approximation.json

For each transaction the features of the service are compared with the same figures from all earlier
transactions of the customer: sliding windows of exact length, every merchant by name, every amount.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fraud.checks.history import simulated
from fraud.features.featurizer import Featurizer
from fraud.schema import Feature, FeatureSpec
from training.replay import replay

DAY = 86_400_000
NAMES = (
    "customer_count_1d",
    "customer_count_7d",
    "customer_count_30d",
    "customer_amount_mean_7d",
    "customer_amount_mean_30d",
    "customer_amount_percentile",
    "customer_merchant_familiarity",
    "customer_category_familiarity",
)


def main() -> None:
    """Compare and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("bench/results/approximation.json"))
    options = parser.parse_args()
    table = simulated(options.rows, 3)
    spec = FeatureSpec("transaction", tuple(Feature(name, "history") for name in NAMES))
    bounded = replay(table, Featurizer(spec, [0.0]), slice(None))
    exact = np.array(list(exact_rows(table)))
    result: dict[str, Any] = {"rows": len(table), "customers": int(table["customer_id"].nunique()), "features": {}}
    for j, name in enumerate(NAMES):
        both = ~np.isnan(bounded[:, j]) & ~np.isnan(exact[:, j])
        difference = np.abs(bounded[both, j] - exact[both, j])
        result["features"][name] = {
            "rows_that_differ": round(float((difference > 1e-9).mean()), 5),
            "mean_difference": round(float(difference.mean()), 5),
            "p99_difference": round(float(np.quantile(difference, 0.99)), 5),
            "mean_value": round(float(exact[both, j].mean()), 5),
            "correlation": round(float(np.corrcoef(bounded[both, j], exact[both, j])[0, 1]), 5),
        }
        print(name, result["features"][name])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def exact_rows(table: pd.DataFrame) -> Iterator[list[float]]:
    """Yield the exact features of each row, in the order of arrival."""
    times: dict[str, list[int]] = defaultdict(list)
    amounts: dict[str, list[int]] = defaultdict(list)
    merchants: dict[str, Counter[Any]] = defaultdict(Counter)
    categories: dict[str, Counter[Any]] = defaultdict(Counter)
    columns = ("customer_id", "event_time_ms", "amount", "merchant_id", "category")
    for customer, time, amount, merchant, category in zip(*(table[c] for c in columns), strict=True):
        minor = round(amount * 100)
        at = bisect_right(times[customer], time)  # the few that are later are not known as of this one
        past, spent = times[customer], amounts[customer]
        begin_1, begin_7, begin_30 = (bisect_left(past, time - days * DAY + 1) for days in (1, 7, 30))
        week, month = spent[begin_7:at], spent[begin_30:at]
        ranked = sorted(spent[:at])
        below = (bisect_left(ranked, minor) + bisect_right(ranked, minor)) / 2
        yield [
            at - begin_1,
            at - begin_7,
            at - begin_30,
            sum(week) / len(week) / 100 if week else np.nan,
            sum(month) / len(month) / 100 if month else np.nan,
            below / at if at else np.nan,
            merchants[customer][merchant],
            categories[customer][category] / at if at else np.nan,
        ]
        past.insert(at, time)
        spent.insert(at, minor)
        merchants[customer][merchant] += 1
        categories[customer][category] += 1


if __name__ == "__main__":
    main()
