"""Measures of a set of scores, with intervals from a bootstrap over customers.

A customer's transactions resemble each other, so the bootstrap draws customers, not rows. The rows are sorted
once; each resample only changes how often a customer counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from fraud.decisions.anomaly import Severity
from fraud.decisions.costs import decision_costs
from fraud.errors import DataError
from training.measures import (
    DAY_MS,
    FALSE_POSITIVE_RATES,
    TOP_CARDS,
    CardDays,
    Ranking,
    Sums,
    equal_mass_bins,
)
from training.policy import decisions

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Interval(NamedTuple):
    """A measure on the whole sample and the 2.5th and 97.5th percentile of its resamples."""

    value: float
    low: float
    high: float


class Outcomes(NamedTuple):
    """The true outcomes of a window's transactions; arrays of shape (n_transactions,)."""

    y_true: Ints
    event_time_ms: Ints | None = None
    amount: Floats | None = None


class Scored(NamedTuple):
    """One model's scores of the same transactions, and its policy; with severities if it measures them."""

    raw_margin: Floats
    y_prob: Floats
    policy: Mapping[str, Any]
    severity: Sequence[Severity | None] | None = None

    @property
    def taken(self) -> Ints:
        """What the policy does with each, as indices into POLICY_ACTIONS."""
        return decisions(self.y_prob, self.policy, self.severity)


@dataclass(frozen=True)
class Samples:
    """The measures of one set of scores, and the same measures on every resample.

    Attributes
    ----------
    names : tuple of str
        The measures' names.
    values : ndarray, shape (n_measures,), float64
    resampled : ndarray, shape (n_bootstrap, n_measures), float64
    """

    names: tuple[str, ...]
    values: Floats
    resampled: Floats

    def intervals(self) -> dict[str, Interval]:
        """Return each measure with its 95 % percentile interval."""
        low, high = np.percentile(self.resampled, [2.5, 97.5], axis=0)
        rows = zip(self.names, self.values, low, high, strict=True)
        return {name: Interval(float(value), float(a), float(b)) for name, value, a, b in rows}

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Return the measures of several parts, each with its own resamples, of equal number."""
        return cls(
            tuple(name for part in parts for name in part.names),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.resampled for part in parts], axis=1),
        )

    def without(self, names: Sequence[str]) -> Samples:
        """Return the other measures."""
        kept = [i for i, name in enumerate(self.names) if name not in names]
        return Samples(tuple(self.names[i] for i in kept), self.values[kept], self.resampled[:, kept])

    def minus(self, other: Samples) -> Samples:
        """Return the gains of this set of scores over another one, on the same resamples.

        Both must come from the same rows, customers, `n_bootstrap` and `seed`; then resample i of both holds
        the same customers, and the interval of the difference is far narrower than the two intervals suggest.
        """
        if self.names != other.names or self.resampled.shape != other.resampled.shape:
            raise ValueError("the two sets of scores were not measured on the same resamples")
        return Samples(self.names, self.values - other.values, self.resampled - other.resampled)

    @classmethod
    def mean(cls, parts: Sequence[Samples]) -> Samples:
        """Return the mean over several windows, each with its own resamples, of equal number."""
        values, resampled = ([getattr(part, name) for part in parts] for name in ("values", "resampled"))
        return cls(parts[0].names, np.mean(values, axis=0), np.mean(resampled, axis=0))


def measure(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    raw_margin: ArrayLike,
    *,
    policy: Mapping[str, Any],
    customer_codes: ArrayLike | None = None,
    event_time_ms: ArrayLike | None = None,
    amount: ArrayLike | None = None,
    severity: Sequence[Severity | None] | None = None,
    n_bootstrap: int = 200,
    seed: int = 0,
) -> Samples:
    """Measure scores against labels on the sample and on resamples of its customers.

    Ranking measures use `raw_margin`, so that the plateaus of an isotonic calibrator make no ties; the others
    use `y_prob`.

    ``roc_auc``, ``average_precision``
        As scikit-learn's `roc_auc_score` and `average_precision_score`.
    ``recall_at_fpr_x``, ``precision_at_fpr_x``
        At the lowest threshold whose false-positive rate is at most x (0.001, 0.005, 0.01), with no
        interpolation between thresholds. Both are 0 when no threshold alerts on a fraud within x.
    ``card_precision_at_100``
        The Fraud Detection Handbook's card precision top-k (Le Borgne et al., chapter 4): each UTC day a
        customer's score is the highest of the day and its label says whether any transaction of the day is
        fraud; the precision of a day is the number of fraudulent customers among the 100 with the highest
        scores, divided by 100 even on a day with fewer customers; the measure is the mean over the days that
        have transactions. Equal scores rank by customer code. The handbook's refinement, to take a customer
        out of later days once found, is not applied. Left out when customers or times are missing.
    ``brier_score``, ``log_loss``
        As scikit-learn's `brier_score_loss` and `log_loss` (probabilities clipped to the float64 epsilon).
    ``expected_calibration_error``
        Mean of abs(mean probability - fraud rate) over 15 bins of equal mass (equal numbers of rows; equal
        probabilities share a bin, so there can be fewer bins), weighted by rows. The bins are the sample's,
        in resamples too. Resampling adds noise, which an absolute value never cancels: its interval leans up.
    ``expected_to_observed``
        Sum of probabilities over number of frauds: 1 when calibrated in the large.
    ``review_rate``, ``decline_rate``
        Share of transactions that the policy sends to review, and declines.
    ``alert_recall``, ``alert_precision``, ``alert_amount_recall``
        Frauds reviewed or declined over all frauds; over all alerts (0 without any); and the first in money.
    ``cost_per_1000``
        Cost of the policy's decisions per 1,000 transactions (`decision_costs`), in the unit of `amount`.
    ``savings``
        1 - cost / cost of approving everything (Bahnsen et al., 2013). These two and ``alert_amount_recall`` are
        left out where the policy has no costs.

    Parameters
    ----------
    y_true : array, shape (n_transactions,)
        1 fraud, 0 legitimate; both must occur.
    y_prob, raw_margin : arrays, shape (n_transactions,), float64
        Calibrated probability in [0, 1], and log-odds that rank.
    policy : mapping
        As policy.json; read are `review_threshold`, `decline_threshold`, `severity_actions` and `costs`.
    customer_codes : array of int, shape (n_transactions,), optional
        The customer of each row; without it every row is drawn alone.
    event_time_ms : array of int, shape (n_transactions,), optional
        Milliseconds since the epoch, UTC.
    amount : array, shape (n_transactions,), float64, optional
        Money, in the unit of the policy's costs; without it every transaction counts 1.
    severity : sequence, shape (n_transactions,), optional
        Of a model that measures it.
    n_bootstrap : int
        Number of resamples. A draw without any fraud, or without anything else, is drawn again.
    seed : int

    Raises
    ------
    DataError
        When the window has no fraud or no legitimate transaction, or a value cannot be measured.
    """
    y, p, margin = _checked(y_true, y_prob, raw_margin)
    money = np.ones(len(y)) if amount is None else np.asarray(amount, dtype=np.float64)
    if n_bootstrap < 1:
        raise ValueError(f"n_bootstrap is {n_bootstrap}; allowed: 1 or more")
    if customer_codes is None:
        n_clusters, cluster = len(y), np.arange(len(y), dtype=np.int64)
    else:
        customers, cluster = np.unique(np.asarray(customer_codes), return_inverse=True)
        n_clusters = len(customers)
    parts: list[Ranking | CardDays | Sums] = [Ranking(y, margin, cluster)]
    if customer_codes is not None and event_time_ms is not None:
        parts.append(CardDays(y, margin, cluster, np.asarray(event_time_ms, dtype=np.int64)))
    parts.append(Sums(y, p, money, cluster, n_clusters, policy, decisions(p, policy, severity)))

    def measures(counts: Ints) -> list[float]:
        return [value for part in parts for value in part.measures(counts)]

    frauds = np.bincount(cluster, weights=y, minlength=n_clusters) > 0
    legitimates = np.bincount(cluster, weights=1 - y, minlength=n_clusters) > 0
    rng = np.random.default_rng(seed)
    resampled: list[list[float]] = []
    while len(resampled) < n_bootstrap:
        counts = np.bincount(rng.integers(n_clusters, size=n_clusters), minlength=n_clusters)
        if counts[frauds].any() and counts[legitimates].any():
            resampled.append(measures(counts))
    names = tuple(name for part in parts for name in part.names)
    whole = measures(np.ones(n_clusters, dtype=np.int64))
    return Samples(names, np.asarray(whole), np.asarray(resampled))


def _checked(y_true: ArrayLike, y_prob: ArrayLike, raw_margin: ArrayLike) -> tuple[Ints, Floats, Floats]:
    y = np.asarray(y_true, dtype=np.int64)
    p = np.asarray(y_prob, dtype=np.float64)
    margin = np.asarray(raw_margin, dtype=np.float64)
    if not np.isin(y, (0, 1)).all():
        raise DataError("evaluation takes rows labelled 1 (fraud) or 0 (legitimate); leave unknown ones out")
    frauds = int(y.sum())
    if frauds in (0, len(y)):
        raise DataError(
            f"the evaluation window has {len(y)} transactions of which {frauds} are fraud; "
            "both kinds are needed, so take a longer window"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("probabilities are not all within 0 and 1")
    if not np.isfinite(margin).all():
        raise DataError("raw margins are not all finite")
    return y, p, margin


def no_skill(
    y_true: ArrayLike,
    *,
    policy: Mapping[str, Any],
    customer_codes: ArrayLike | None = None,
    event_time_ms: ArrayLike | None = None,
    amount: ArrayLike | None = None,
) -> dict[str, float]:
    """Return the measures of `measure` for a no-skill baseline, which knows only the fraud rate.

    Every transaction gets the fraud rate as its probability and is approved. Measures of ranking are their
    expectation under a random order of the transactions, for card precision of each day's customers;
    `log_loss` is the labels' entropy and `brier_score` their variance.
    """
    y = np.asarray(y_true, dtype=np.int64)
    rate = float(y.mean())
    measures = {"roc_auc": 0.5, "average_precision": rate}
    for allowed in FALSE_POSITIVE_RATES:
        measures |= {f"recall_at_fpr_{allowed}": allowed, f"precision_at_fpr_{allowed}": rate}
    if customer_codes is not None and event_time_ms is not None:
        day = np.asarray(event_time_ms, dtype=np.int64) // DAY_MS
        cards, card = np.unique(np.stack([day, np.asarray(customer_codes)]), axis=1, return_inverse=True)
        fraud = np.bincount(card, weights=y) > 0
        _, card_day = np.unique(cards[0], return_inverse=True)
        n_cards = np.bincount(card_day)
        shown = np.minimum(n_cards, TOP_CARDS) / TOP_CARDS
        measures[f"card_precision_at_{TOP_CARDS}"] = float(np.mean(shown * np.bincount(card_day, fraud) / n_cards))
    measures |= {
        "brier_score": rate * (1 - rate),
        "log_loss": float(-rate * np.log(rate) - (1 - rate) * np.log(1 - rate)),
        "expected_calibration_error": 0.0,
        "expected_to_observed": 1.0,
        "review_rate": 0.0,
        "decline_rate": 0.0,
        "alert_recall": 0.0,
        "alert_precision": 0.0,
    }
    if not policy["costs"]:
        return measures
    money = np.ones(len(y)) if amount is None else np.asarray(amount, dtype=np.float64)
    cost = float(decision_costs(y, money, policy["costs"])[0].mean())
    return measures | {"alert_amount_recall": 0.0, "cost_per_1000": 1000 * cost, "savings": 0.0}


def reliability(y_true: ArrayLike, y_prob: ArrayLike, n_bins: int = 12) -> dict[str, Floats]:
    """Return probability against observed fraud rate, in bins that expect equally many frauds.

    Bins of equal numbers of rows would put nearly every fraud into the last one.

    Returns
    -------
    dict of ndarrays, shape (at most n_bins,), float64
        `rows`, `frauds`, `mean_probability`, `fraud_rate`, and `low` and `high`, the rate's 95 % interval
        (Wilson, 1927).
    """
    y, p = np.asarray(y_true, dtype=np.float64), np.asarray(y_prob, dtype=np.float64)
    place = equal_mass_bins(p, n_bins, mass=p)
    rows = np.bincount(place).astype(np.float64)
    frauds = np.bincount(place, weights=y)
    intervals = [binomtest(int(k), int(n)).proportion_ci(0.95, "wilson") for k, n in zip(frauds, rows, strict=True)]
    return {
        "rows": rows,
        "frauds": frauds,
        "mean_probability": np.bincount(place, weights=p) / rows,
        "fraud_rate": frauds / rows,
        "low": np.array([interval.low for interval in intervals]),
        "high": np.array([interval.high for interval in intervals]),
    }
