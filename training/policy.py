"""The cheapest thresholds by the costs of decisions; or, without known money, a share to review.

In every policy decision, risk level and prediction agree: ``approve`` is risk level low or medium and prediction false,
``review`` is high and true, ``decline`` is critical and true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.decisions.anomaly import Severity
from fraud.decisions.costs import DEFAULT_COSTS, decision_costs
from fraud.decisions.verdict import actions_at

DECLINES_TOO_MANY = 10.0
"""Declining more than so many times the fraud rate is worth a warning: at least nine of ten are good customers."""

Floats = NDArray[np.float64]


def decisions(
    y_prob: ArrayLike, policy: Mapping[str, Any], severity: Sequence[Severity | None] | None = None
) -> NDArray[np.int64]:
    """Return the index into POLICY_ACTIONS that the policy takes at each decision score, and severity if it has one."""
    return actions_at(
        y_prob, policy["review_threshold"], policy["decline_threshold"], severity, policy.get("severity_actions", {})
    )


def choose_policy(
    y_prob: ArrayLike,
    amount: ArrayLike,
    costs: Mapping[str, float],
    review_capacity: float = 1.0,
) -> dict[str, Any]:
    """Return the policy whose two thresholds are expected to cost least on these transactions.

    A transaction of probability p counts as a fraud with weight p and as legitimate with 1 - p. The labels themselves
    are not read: calibration has drawn from them what they say, and a threshold chosen by a few dozen frauds once more
    lies where the last of them happened to fall.

    With t_r <= t_d the review and decline thresholds, and A, R, D the costs of `decision_costs` expected so, the total
    is

    ::

        sum(A) + sum over p >= t_r of (R - A) + sum over p >= t_d of (D - R)

    Each sum depends on one threshold, so the cost of every ordered pair of thresholds is known from one sort and two
    cumulative sums; pairs that send more to review than people can look at are left out. Candidates lie halfway
    between neighbouring probabilities, with 1.0 for (next to) never; among equally cheap ones the highest thresholds
    win, which interfere least.

    Give the calibration window: the booster has not seen it, and the test window stays untouched. Thresholds
    on a probability, not on an expected loss, keep a decision easy to explain and independent of the amount.

    The levels follow the thresholds: ``critical`` from the decline threshold, ``high`` from the review
    threshold, ``medium`` from the geometric mean of the fraud rate and the review threshold.

    Parameters
    ----------
    y_prob, amount : arrays, shape (n_transactions,)
        Calibrated probability in [0, 1], money.
    costs : mapping
        With the keys of DEFAULT_COSTS.
    review_capacity : float
        Most of the transactions that may be sent to review, a share within 0 and 1.

    Returns
    -------
    dict
        As policy.json: `review_threshold`, `decline_threshold`, `risk_levels`, `costs`.
    """
    p = np.asarray(y_prob, dtype=np.float64)
    approve, review, decline = decision_costs(p, amount, costs)
    order = np.argsort(-p, kind="stable")
    ranked = p[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    values = ranked[ends]
    # candidate 0 is 1.0, candidate i includes the i highest values
    candidates = np.concatenate(([1.0], (values + np.append(values[1:], 0.0)) / 2))
    reviewed = np.concatenate(([0.0], np.cumsum((review - approve)[order])[ends]))
    declined = np.concatenate(([0.0], np.cumsum((decline - review)[order])[ends]))
    above = np.concatenate(([0], ends + 1))
    if values[0] == 1.0:  # a certain fraud is above every threshold
        candidates, reviewed, declined, above = candidates[1:], reviewed[1:], declined[1:], above[1:]
        candidates[0] = 1.0
    # the lowest index of a decline threshold that leaves no more to each review threshold than can be reviewed
    first = np.searchsorted(above, above - review_capacity * len(p) - 1e-9)
    cheapest = [start + int(np.argmin(declined[start : end + 1])) for end, start in enumerate(first.tolist())]
    at_review = int(np.argmin(reviewed + declined[cheapest]))
    at_decline = cheapest[at_review]
    review_threshold, decline_threshold = float(candidates[at_review]), float(candidates[at_decline])
    policy = _thresholds(review_threshold, decline_threshold, float(p.mean()))
    return policy | {"costs": {name: float(costs[name]) for name in DEFAULT_COSTS}}


def review_the_riskiest(y_prob: ArrayLike, review_rate: float) -> dict[str, Any]:
    """Return the policy that reviews a share of the transactions and declines none: for tables without money.

    The cost of a wrong decline is unknown there, so a person decides. The threshold lies halfway between two
    neighbouring probabilities, where the share at or above it is nearest to `review_rate`; equal probabilities are
    reviewed together or not at all, and 1.0 reviews (next to) none.

    Parameters
    ----------
    y_prob : array, shape (n_transactions,)
        Calibrated probability on the calibration window.
    review_rate : float
        Share of the transactions, within 0 and 1.

    Returns
    -------
    dict
        As `choose_policy`, with empty `costs` and with `review_rate`.
    """
    values, counts = np.unique(np.asarray(y_prob, dtype=np.float64), return_counts=True)
    below = np.append(0.0, values)
    candidates = np.append((below[:-1] + below[1:]) / 2, 1.0)
    shares = np.append(np.cumsum(counts[::-1])[::-1], 0) / counts.sum()
    nearest = len(shares) - 1 - int(np.argmin(np.abs(shares[::-1] - review_rate)))
    policy = _thresholds(float(candidates[nearest]), 1.0, float(np.mean(np.asarray(y_prob))))
    return policy | {"costs": {}, "review_rate": review_rate}


def review_the_most_unusual(scores: ArrayLike, review_rate: float) -> dict[str, Any]:
    """Return the policy on anomaly scores that reviews the most unusual share, and declines none: nobody has labels.

    The risk level is high where a transaction is reviewed, and medium for ten times as many.

    Parameters
    ----------
    scores : array, shape (n_transactions,)
        Anomaly scores of the calibration window.
    review_rate : float
        Share of the transactions, within 0 and 1.

    Returns
    -------
    dict
        As policy.json, with empty `costs` and with `review_rate`.
    """
    medium, high = np.quantile(np.asarray(scores, np.float64), [max(0.0, 1 - 10 * review_rate), 1 - review_rate])
    return {
        "review_threshold": float(high),
        "decline_threshold": 1.0,
        "risk_levels": {"medium": float(medium), "high": float(high), "critical": 1.0},
        "costs": {},
        "review_rate": review_rate,
    }


def _thresholds(review: float, decline: float, fraud_rate: float) -> dict[str, Any]:
    """Return thresholds with their risk levels, so that level, decision and prediction agree at every probability."""
    medium = float(np.sqrt(min(fraud_rate, review) * review))
    levels = {"medium": medium, "high": review, "critical": decline}
    return {"review_threshold": review, "decline_threshold": decline, "risk_levels": levels}


def declines_too_many(decline_rate: float, fraud_rate: float) -> str | None:
    """Return the warning about a policy that declines far more transactions than there are frauds, or None."""
    if decline_rate <= DECLINES_TOO_MANY * fraud_rate:
        return None
    return (
        f"The policy declines {decline_rate:.1%} of the transactions at a fraud rate of {fraud_rate:.2%}: "
        f"of {decline_rate / fraud_rate:.0f} declined, at most one is a fraud. Check that the costs and the amounts "
        "(the mapping's stake) are in one unit, and that declining a good customer costs what it should."
    )
