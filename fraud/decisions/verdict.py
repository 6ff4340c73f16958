"""The verdict on a transaction: prediction, risk level and decision.

Every verdict is made here: by the pipeline, a shadow, a replay of the decision log, the checks of `fraud verify`,
and the evaluation of a policy in training.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.decisions.policy import Action, Policy, RiskLevel

ACTIONS: tuple[Action, ...] = ("approve", "review", "decline")
"""What can be done with a transaction, from the mildest to the strictest."""


class Verdict(NamedTuple):
    """The verdict on one transaction; `prediction` is true when it is called fraud."""

    prediction: bool
    risk_level: RiskLevel
    decision: Action


_VERDICTS: dict[tuple[RiskLevel, Action], Verdict] = {
    (level, action): Verdict(action != "approve", level, action) for level in get_args(RiskLevel) for action in ACTIONS
}


def verdict_of(policy: Policy, score: float) -> Verdict:
    """Return the verdict on one decision score; a score equal to a threshold reaches it.

    The score is a calibrated probability of fraud, or the anomaly score of a model without one. A transaction is called
    fraud from the review threshold on.
    """
    levels = policy.risk_levels
    level: RiskLevel = "low"
    if score >= levels.critical:
        level = "critical"
    elif score >= levels.high:
        level = "high"
    elif score >= levels.medium:
        level = "medium"
    action: Action = "approve"
    if score >= policy.decline_threshold:
        action = "decline"
    elif score >= policy.review_threshold:
        action = "review"
    return _VERDICTS[level, action]


def actions_at(y_prob: ArrayLike, review_threshold: float, decline_threshold: float) -> NDArray[np.int64]:
    """Return the actions that `verdict_of` takes at many probabilities, as indices into `ACTIONS`.

    Parameters
    ----------
    y_prob : array, shape (n_transactions,), float64
        Decision scores, such as calibrated probabilities.
    review_threshold, decline_threshold : float
        Those of the policy.

    Returns
    -------
    ndarray, shape (n_transactions,), int64
    """
    p = np.asarray(y_prob, dtype=np.float64)
    return np.where(p >= decline_threshold, 2, np.where(p >= review_threshold, 1, 0)).astype(np.int64)
