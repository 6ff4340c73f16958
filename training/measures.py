"""The measures, as functions of the weight of each customer.

A bootstrap draws customers. So each class sorts or adds up the rows once, and `measures(counts)` takes an
int64 array with the number of times that each customer was drawn (all ones for the sample itself). `names`
says what the values are; `training.evaluate.measure` defines them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.decisions.costs import decision_costs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_MS = 86_400_000
FALSE_POSITIVE_RATES = (0.001, 0.005, 0.01)
TOP_CARDS = 100
CALIBRATION_BINS = 15
MONEY_MEASURES = ("alert_amount_recall", "cost_per_1000", "savings")


class Ranking:
    """ROC AUC, average precision and operating points; frauds and the others as two sorted lists."""

    names = (
        "roc_auc",
        "average_precision",
        *(f"{measure}_at_fpr_{rate}" for rate in FALSE_POSITIVE_RATES for measure in ("recall", "precision")),
    )

    def __init__(self, y: Ints, margin: Floats, cluster: Ints) -> None:
        order = np.argsort(-margin, kind="stable")
        fraud = y[order] == 1
        ranked = margin[order]
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        self.fraud_cluster = cluster[order][fraud]
        self.other_cluster = cluster[order][~fraud]
        # at or above each distinct margin: so many frauds, so many others
        self.n_fraud = np.cumsum(fraud)[ends]
        self.n_other = ends + 1 - self.n_fraud
        self.holds_fraud = np.flatnonzero(np.diff(self.n_fraud, prepend=0) > 0)

    def measures(self, counts: Ints) -> list[float]:
        tp = np.concatenate(([0], np.cumsum(counts[self.fraud_cluster])))
        fp = np.concatenate(([0], np.cumsum(counts[self.other_cluster])))
        here, above = self.holds_fraud, self.holds_fraud - 1
        tp_here, fp_here = tp[self.n_fraud[here]], fp[self.n_other[here]]
        fp_above = np.where(above < 0, 0, fp[self.n_other[above]])
        gained = np.diff(tp_here, prepend=0)
        ranked_below = fp[-1] - (fp_here + fp_above) / 2
        # a margin whose customers were not drawn adds nothing: any divisor will do
        precision = tp_here / np.maximum(tp_here + fp_here, 1)
        values = [gained @ ranked_below / (tp[-1] * fp[-1]), gained @ precision / tp[-1]]
        for rate in FALSE_POSITIVE_RATES:
            allowed = np.searchsorted(fp, rate * fp[-1] * (1 + 1e-12), side="right") - 1
            last = np.searchsorted(self.n_other, allowed, side="right") - 1
            found, wrong = (tp[self.n_fraud[last]], fp[self.n_other[last]]) if last >= 0 else (0, 0)
            values += [found / tp[-1], found / max(found + wrong, 1)]
        return [float(value) for value in values]


class CardDays:
    """Card precision; one row for each customer and day, sorted by day and falling score."""

    names = (f"card_precision_at_{TOP_CARDS}",)

    def __init__(self, y: Ints, margin: Floats, cluster: Ints, event_time_ms: Ints) -> None:
        day = event_time_ms // DAY_MS
        best_first = np.lexsort((-margin, cluster, day))
        starts = np.flatnonzero(_changes(day[best_first]) | _changes(cluster[best_first]))
        best = best_first[starts]
        fraud = np.maximum.reduceat(y[best_first], starts)
        order = np.lexsort((cluster[best], -margin[best], day[best]))
        self.cluster = cluster[best][order]
        self.fraud = np.flatnonzero(fraud[order])
        days = np.flatnonzero(_changes(day[best][order]))
        self.n_days = len(days)
        self.day_start = np.repeat(days, np.diff(days, append=len(order)))[self.fraud]

    def measures(self, counts: Ints) -> list[float]:
        weight = counts[self.cluster]
        before = np.concatenate(([0], np.cumsum(weight)))
        rank = before[self.fraud] - before[self.day_start]
        found = np.clip(TOP_CARDS - rank, 0, weight[self.fraud]).sum()
        return [float(found / (TOP_CARDS * self.n_days))]


class Sums:
    """Measures that are sums over rows, or ratios of sums: added up once for each customer.

    MONEY_MEASURES are left out where the policy has no costs: money is not known there.
    """

    names: tuple[str, ...] = (
        "brier_score",
        "log_loss",
        "expected_calibration_error",
        "expected_to_observed",
        "review_rate",
        "decline_rate",
        "alert_recall",
        "alert_precision",
        *MONEY_MEASURES,
    )

    def __init__(
        self,
        y: Ints,
        p: Floats,
        amount: Floats,
        cluster: Ints,
        n_clusters: int,
        policy: Mapping[str, Any],
        taken: Ints,
    ) -> None:
        epsilon = np.finfo(np.float64).eps
        sure = np.clip(np.where(y == 1, p, 1 - p), epsilon, 1 - epsilon)
        rows = [
            np.ones(len(y)),
            (p - y) ** 2,
            -np.log(sure),
            p,
            y,
            taken == 1,
            taken == 2,
            y * (taken > 0),
        ]
        if policy["costs"]:
            costs = decision_costs(y, amount, policy["costs"])
            rows += [
                y * amount,
                y * amount * (taken > 0),
                np.take_along_axis(costs, taken[np.newaxis], axis=0)[0],
                costs[0],
            ]
        else:
            self.names = tuple(name for name in Sums.names if name not in MONEY_MEASURES)
        self.first_bin = len(rows)
        bins = equal_mass_bins(p, CALIBRATION_BINS)
        rows += [(p - y) * (bins == b) for b in range(bins.max() + 1)]
        self.sums = np.stack([np.bincount(cluster, weights=row, minlength=n_clusters) for row in rows], axis=1)

    def measures(self, counts: Ints) -> list[float]:
        total = counts @ self.sums
        n, brier, log_loss, expected, frauds, reviewed, declined, caught = total[:8]
        values = [
            brier / n,
            log_loss / n,
            np.abs(total[self.first_bin :]).sum() / n,
            expected / frauds,
            reviewed / n,
            declined / n,
            caught / frauds,
            caught / max(reviewed + declined, 1),
        ]
        if self.first_bin > 8:
            fraud_amount, caught_amount, cost, cost_of_approving = total[8:12]
            values += [caught_amount / fraud_amount, 1000 * cost / n, 1 - cost / cost_of_approving]
        return [float(value) for value in values]


def _changes(values: Ints) -> NDArray[np.bool_]:
    return np.append(True, values[1:] != values[:-1])


def equal_mass_bins(values: ArrayLike, n_bins: int, mass: ArrayLike | None = None) -> Ints:
    """Return the bin of each value, so that the bins hold about equal mass and equal values share a bin.

    Parameters
    ----------
    values : array, shape (n,), float64
    n_bins : int
        At most so many bins; fewer when one value holds the mass of several.
    mass : array, shape (n,), float64, optional
        Weight of each value; 1 without it.

    Returns
    -------
    ndarray, shape (n,), int64
        0 for the lowest values, without gaps.
    """
    _, place = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    held = np.bincount(place, weights=None if mass is None else np.asarray(mass, dtype=np.float64))
    middle = (np.cumsum(held) - held / 2) / (held.sum() or 1.0)
    wanted = np.minimum((middle * n_bins).astype(np.int64), n_bins - 1)
    return np.unique(wanted, return_inverse=True)[1][place]
