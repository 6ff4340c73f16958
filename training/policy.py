"""What a decision costs, and the thresholds that cost least."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.decisions.verdict import actions_at
from fraud.errors import DataError

Floats = NDArray[np.float64]

# Starting values, in units of money of a typical card portfolio; give your own in the configuration.
DEFAULT_COSTS: dict[str, float] = {
    "review": 4.0,  # an analyst's five minutes
    "review_recall": 0.95,  # share of the reviewed frauds that the analyst recognises
    "false_decline_rate": 0.15,  # share of a good transaction's amount lost in margin and goodwill
    "chargeback_fee": 20.0,  # the scheme's fee for each fraud that was paid out
}


def decisions(y_prob: ArrayLike, policy: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the index into ACTIONS that the policy takes at each probability; a threshold is included."""
    return actions_at(y_prob, policy["review_threshold"], policy["decline_threshold"])


def decision_costs(y_true: ArrayLike, amount: ArrayLike, costs: Mapping[str, float]) -> Floats:
    """Return what each decision would cost on each transaction.

    ========  ==================================================  ===============================
    decision  fraud                                               legitimate
    ========  ==================================================  ===============================
    approve   amount + chargeback_fee                             0
    review    review + (1 - review_recall) * (amount + fee)       review
    decline   0                                                   false_decline_rate * amount
    ========  ==================================================  ===============================

    Parameters
    ----------
    y_true : array, shape (n_transactions,)
        1 fraud, 0 legitimate.
    amount : array, shape (n_transactions,), float64
        Money; the costs `review` and `chargeback_fee` are in the same unit.
    costs : mapping
        With the keys of DEFAULT_COSTS.

    Returns
    -------
    ndarray, shape (3, n_transactions), float64
        One row each for approve, review and decline.

    Raises
    ------
    DataError
        When a cost is missing, unknown, negative or, for a share, above 1.
    """
    _check_costs(costs)
    fraud = np.asarray(y_true, dtype=np.float64)
    money = np.asarray(amount, dtype=np.float64)
    paid_out = fraud * (money + costs["chargeback_fee"])
    return np.stack(
        [
            paid_out,
            costs["review"] + (1.0 - costs["review_recall"]) * paid_out,
            (1.0 - fraud) * costs["false_decline_rate"] * money,
        ]
    )


def _check_costs(costs: Mapping[str, float]) -> None:
    if costs.keys() != DEFAULT_COSTS.keys():
        raise DataError(f"costs are {sorted(costs)}; needed are exactly {sorted(DEFAULT_COSTS)}")
    for name, value in costs.items():
        highest = 1.0 if name in ("review_recall", "false_decline_rate") else np.inf
        if not (np.isfinite(value) and 0.0 <= value <= highest):
            raise DataError(f"cost {name!r} is {value}; allowed: 0 to {highest:g}")


def choose_policy(
    y_true: ArrayLike, y_prob: ArrayLike, amount: ArrayLike, costs: Mapping[str, float]
) -> dict[str, Any]:
    """Return the policy whose two thresholds cost least on these transactions.

    With t_r <= t_d the review and decline thresholds, and A, R, D the costs of `decision_costs`, the total is

    ::

        sum(A) + sum over p >= t_r of (R - A) + sum over p >= t_d of (D - R)

    Each sum depends on one threshold, so the minimum over all ordered pairs of thresholds needs one sort and
    two cumulative sums. Candidates lie halfway between neighbouring probabilities, with 1.0 for (next to)
    never; among equally cheap ones the highest thresholds win, which interfere least.

    Give the calibration window: the booster has not seen it, and the test window stays untouched. Thresholds
    on a probability, not on an expected loss, keep a decision easy to explain and independent of the amount.

    The levels follow the thresholds: ``critical`` from the decline threshold, ``high`` from the review
    threshold, ``medium`` from the geometric mean of the fraud rate and the review threshold.

    Parameters
    ----------
    y_true, y_prob, amount : arrays, shape (n_transactions,)
        Label (1 fraud, 0 legitimate), calibrated probability in [0, 1], money.
    costs : mapping
        With the keys of DEFAULT_COSTS.

    Returns
    -------
    dict
        As policy.json: `review_threshold`, `decline_threshold`, `risk_levels`, `costs`.
    """
    p = np.asarray(y_prob, dtype=np.float64)
    approve, review, decline = decision_costs(y_true, amount, costs)
    order = np.argsort(-p, kind="stable")
    ranked = p[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    values = ranked[ends]
    # candidate 0 is 1.0, candidate i includes the i highest values
    candidates = np.concatenate(([1.0], (values + np.append(values[1:], 0.0)) / 2))
    reviewed = np.concatenate(([0.0], np.cumsum((review - approve)[order])[ends]))
    declined = np.concatenate(([0.0], np.cumsum((decline - review)[order])[ends]))
    if values[0] == 1.0:  # a certain fraud is above every threshold
        candidates, reviewed, declined = candidates[1:], reviewed[1:], declined[1:]
        candidates[0] = 1.0
    cheapest_above = np.minimum.accumulate(declined)
    at_review = int(np.argmin(reviewed + cheapest_above))
    at_decline = int(np.argmin(declined[: at_review + 1]))
    review_threshold, decline_threshold = float(candidates[at_review]), float(candidates[at_decline])
    fraud_rate = float(np.mean(np.asarray(y_true)))
    return {
        "review_threshold": review_threshold,
        "decline_threshold": decline_threshold,
        "risk_levels": {
            "medium": float(np.sqrt(min(fraud_rate, review_threshold) * review_threshold)),
            "high": review_threshold,
            "critical": decline_threshold,
        },
        "costs": {name: float(costs[name]) for name in DEFAULT_COSTS},
    }
