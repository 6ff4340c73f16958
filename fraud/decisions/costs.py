"""The costs of decisions, by which thresholds are chosen and decisions are judged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.errors import DataError

Floats = NDArray[np.float64]

# Starting values, in units of money of a typical card portfolio; give your own in the configuration.
DEFAULT_COSTS: dict[str, float] = {
    "review": 4.0,  # an analyst's five minutes
    "review_recall": 0.95,  # share of the reviewed frauds that the analyst recognises
    "false_decline_rate": 0.15,  # share of a good transaction's amount lost in margin and goodwill
    "chargeback_fee": 20.0,  # the scheme's fee for each fraud that was paid out
}


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
        1 fraud, 0 legitimate; a probability of fraud gives the expected costs.
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
    check_costs(costs)
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


def check_costs(costs: Mapping[str, float]) -> None:
    """Raise a DataError unless exactly the costs of DEFAULT_COSTS are given, each within its range."""
    if costs.keys() != DEFAULT_COSTS.keys():
        raise DataError(f"costs are {sorted(costs)}; needed are exactly {sorted(DEFAULT_COSTS)}")
    for name, value in costs.items():
        highest = 1.0 if name in ("review_recall", "false_decline_rate") else np.inf
        if not (np.isfinite(value) and 0.0 <= value <= highest):
            raise DataError(f"cost {name!r} is {value}; allowed: 0 to {highest:g}")
