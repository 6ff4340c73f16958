"""How good decisions were, by their labels: each measure equal to scikit-learn's, with an interval by customers.

The curves take the same floating-point steps as `sklearn.metrics`, so that the results are equal to the last digit.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fraud.decisions.rules.effect import wilson

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

DAY_MS = 86_400_000
TOP_CARDS = 100
CALIBRATION_BINS = 10
SHARES = ("precision", "recall", "accuracy", "false_positive_rate", "false_negative_rate")
OF_PROBABILITIES = ("brier_score", "expected_calibration_error", "expected_to_observed")
OF_MONEY = ("cost", "cost_per_1000", "cost_saved_share")
MEASURES = (
    *SHARES,
    "f1",
    "auc",
    "average_precision",
    f"card_precision_at_{TOP_CARDS}",
    *OF_PROBABILITIES,
    "fraud_amount",
    "missed_amount",
    *OF_MONEY,
)


class Labelled(NamedTuple):
    """Decisions whose label is known.

    Attributes
    ----------
    is_fraud, is_flagged : (n,) bool
        What the label says; whether the transaction was not approved.
    score : (n,) float64
        The score that decided.
    amount : (n,) float64
    customer : (n,) int64
        Codes; the bootstrap draws customers.
    event_time_ms : (n,) int64
    cost, cost_of_approving : (n,) float64
        What the decision cost by the policy's costs, and what approving would have; NaN where that is not known.
    """

    is_fraud: Bools
    is_flagged: Bools
    score: Floats
    amount: Floats
    customer: Ints
    event_time_ms: Ints
    cost: Floats
    cost_of_approving: Floats

    def rows(self, at: Ints) -> Labelled:
        return Labelled._make(column[at] for column in self)


class Estimate(NamedTuple):
    """A measure with its 95% interval; None where nothing says it."""

    value: float | None
    low: float | None
    high: float | None


class _Window:
    """Decisions sorted by score once, so that each resample only adds up weights."""

    def __init__(self, rows: Labelled, is_calibrated: bool) -> None:
        self.rows = rows.rows(np.argsort(rows.score, kind="stable")[::-1])
        self.is_calibrated = is_calibrated
        score = self.rows.score
        self.ends = np.r_[np.flatnonzero(np.diff(score)), len(score) - 1]
        held = np.diff(self.ends, prepend=-1)
        middle = (np.cumsum(held) - held / 2) / len(score)  # equal scores share a bin, bins hold about equally many
        self.bin = np.repeat(np.minimum((middle * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1), held)
        day = self.rows.event_time_ms // DAY_MS
        cards = (day - day.min()) * (int(self.rows.customer.max()) + 1) + self.rows.customer
        _, at, card = np.unique(cards, return_index=True, return_inverse=True)
        best = np.sort(at)  # each customer's highest score of a day
        fraudulent = np.bincount(card, weights=self.rows.is_fraud)[card[best]] > 0
        order = np.argsort(day[best], kind="stable")
        self.card_day, self.card_fraud, self.card_customer = (
            column[order] for column in (day[best], fraudulent, self.rows.customer[best])
        )

    def measured(self, weight_of: Floats) -> dict[str, float]:
        """Return the measures with customers weighted; NaN where nothing says one."""
        rows = self.rows
        w = weight_of[rows.customer]
        fraud, flagged = rows.is_fraud, rows.is_flagged
        tp, fp = float(w[fraud & flagged].sum()), float(w[~fraud & flagged].sum())
        fn, tn = float(w[fraud & ~flagged].sum()), float(w[~fraud & ~flagged].sum())
        auc, average_precision = self._curves(w)
        found = {
            "precision": _ratio(tp, tp + fp),
            "recall": _ratio(tp, tp + fn),
            "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
            "false_positive_rate": _ratio(fp, fp + tn),
            "false_negative_rate": _ratio(fn, tp + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "auc": auc,
            "average_precision": average_precision,
            f"card_precision_at_{TOP_CARDS}": self._card_precision(weight_of),
        }
        total = float(w.sum())
        if self.is_calibrated:
            error = np.bincount(self.bin, weights=w * (rows.score - fraud), minlength=CALIBRATION_BINS)
            found |= {
                "brier_score": float(np.average((rows.score - fraud) ** 2, weights=w)) if total else np.nan,
                "expected_calibration_error": _ratio(float(np.abs(error).sum()), total),
                "expected_to_observed": _ratio(float((w * rows.score).sum()), tp + fn),
            }
        cost, approving = float((w * rows.cost).sum()), float((w * rows.cost_of_approving).sum())
        return found | {
            "fraud_amount": float((w * rows.amount)[fraud].sum()),
            "missed_amount": float((w * rows.amount)[fraud & ~flagged].sum()),
            "cost": cost,
            "cost_per_1000": 1000 * _ratio(cost, total),
            "cost_saved_share": 1 - _ratio(cost, approving),
        }

    def _curves(self, w: Floats) -> tuple[float, float]:
        """Return area under the ROC curve and average precision, in scikit-learn's own floating-point steps."""
        tps = np.cumsum(w * self.rows.is_fraud)[self.ends]
        fps = np.cumsum(w * ~self.rows.is_fraud)[self.ends]
        if tps[-1] == 0 or fps[-1] == 0:
            return np.nan, np.nan
        turns = np.r_[True, np.logical_or(np.diff(fps, 2), np.diff(tps, 2)), True] if len(fps) > 2 else slice(None)
        fpr, tpr = np.r_[0, fps[turns]] / fps[-1], np.r_[0, tps[turns]] / tps[-1]
        flagged = tps + fps
        precision = np.divide(tps, flagged, out=np.zeros_like(tps), where=flagged != 0)
        recall = tps / tps[-1]
        precision, recall = np.hstack((precision[::-1], 1)), np.hstack((recall[::-1], 0))
        return float(np.trapezoid(tpr, fpr)), float(max(0.0, -np.sum(np.diff(recall) * precision[:-1])))

    def _card_precision(self, weight_of: Floats) -> float:
        """Return the share of fraudulent cards among each day's `TOP_CARDS` with the highest scores, days equal."""
        w = weight_of[self.card_customer]
        starts = np.flatnonzero(np.r_[True, np.diff(self.card_day) != 0])
        before = np.concatenate(([0.0], np.cumsum(w)[:-1]))
        rank = before - np.repeat(before[starts], np.diff(starts, append=len(w)))
        taken = np.clip(TOP_CARDS - rank, 0, w)
        looked, found = np.add.reduceat(taken, starts), np.add.reduceat(taken * self.card_fraud, starts)
        return float(np.mean(found[looked > 0] / looked[looked > 0])) if (looked > 0).any() else np.nan


def measure(rows: Labelled, is_calibrated: bool, n_bootstrap: int = 200, seed: int = 0) -> dict[str, Estimate]:
    """Return every measure with its 95% interval.

    The interval is the 2.5% to 97.5% quantiles over resamples of customers; of a share it also covers Wilson's, which
    does not shrink to a point when nothing was found. Where the rows hold only one customer there is no interval.

    Parameters
    ----------
    rows : Labelled, n of them
    is_calibrated : bool
        Whether `score` is a probability; if not, the measures of probabilities are None.
    n_bootstrap : int
    seed : int
    """
    nothing = dict.fromkeys(MEASURES, Estimate(None, None, None))
    if not len(rows.score):
        return nothing
    _, customer = np.unique(rows.customer, return_inverse=True)
    window = _Window(rows._replace(customer=customer), is_calibrated)
    n = int(customer.max()) + 1
    whole = window.measured(np.ones(n))
    rng = np.random.default_rng(seed)
    draws = [
        window.measured(np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64))
        for _ in range(n_bootstrap if n > 1 else 0)
    ]
    return nothing | {
        name: Estimate(value, *_interval(name, rows, np.array([draw[name] for draw in draws])))
        for name, value in whole.items()
        if np.isfinite(value)
    }


def _interval(name: str, rows: Labelled, draws: Floats) -> tuple[float | None, float | None]:
    draws = draws[np.isfinite(draws)]
    ends = [float(end) for end in np.quantile(draws, [0.025, 0.975])] if len(draws) else []
    if name in SHARES:
        ends += [end for end in wilson(*_counts(name, rows)) if end is not None]
    return (min(ends), max(ends)) if ends else (None, None)


def _counts(name: str, rows: Labelled) -> tuple[int, int]:
    """Return how many of how many a share is."""
    fraud, flagged = rows.is_fraud, rows.is_flagged
    part, whole = {
        "precision": (fraud, flagged),
        "recall": (flagged, fraud),
        "accuracy": (fraud == flagged, np.ones_like(fraud)),
        "false_positive_rate": (flagged, ~fraud),
        "false_negative_rate": (~flagged, fraud),
    }[name]
    return int((part & whole).sum()), int(whole.sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
