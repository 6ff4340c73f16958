"""The kernels that choose which features of a row are worth a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np

from fraud.compiling import compiled
from fraud.features.kernels import NEW_CUSTOMER_BELOW

NONE, SOMETHING = -1, -2


@compiled
def strongest(contributions: Any, top: Any) -> Any:
    """Return the columns of the `top` largest contributions by magnitude of each row; ties go to the first.

    Parameters
    ----------
    contributions : (n, n_features + 1) float64
        The base value last.
    top : int
        At most n_features.

    Returns
    -------
    (n, top) int64
    """
    n, width = contributions.shape
    chosen = np.empty((n, top), np.int64)
    for i in range(n):
        size = 0
        for j in range(width - 1):
            magnitude = abs(contributions[i, j])
            at = size
            while at > 0 and abs(contributions[i, chosen[i, at - 1]]) < magnitude:
                at -= 1
            if at < top:
                size = min(size + 1, top)
                for k in range(size - 1, at, -1):
                    chosen[i, k] = chosen[i, k - 1]
                chosen[i, at] = j
    return chosen


@compiled
def is_new(x: Any, new_at: Any, count_at: Any) -> Any:
    """Return whether a row says that its customer is new, by either column; -1 where there is none."""
    return (new_at >= 0 and x[new_at] > 0) or (count_at >= 0 and x[count_at] < NEW_CUSTOMER_BELOW)


@compiled
def telling(
    X: Any, contributions: Any, habit_of: Any, limits: Any, by_custom: Any, new_at: Any, count_at: Any, top: Any
) -> Any:
    """Return for each row the features to name, one of each of its `top` habits that raise the score most.

    A habit's contribution is the sum of those of its features. Named is its unusual feature with the largest
    contribution; a habit without an unusual feature that raises the score is passed over.

    Parameters
    ----------
    X : (n, n_features) float64
    contributions : (n, n_features + 1) float64
    habit_of : (n_features,) int64
        The habit of each feature, numbered from 0.
    limits : (n_features, 2) float64
        A value below the first or above the second is unusual.
    by_custom : (n_features,) bool
        Which features are not named of a new customer.
    new_at, count_at : int
        See `is_new`.

    Returns
    -------
    (n, top) int64
        Columns in the order of their habits' contributions, `NONE` beyond the last. The first is `SOMETHING` where
        a habit raises the score, but none has an unusual feature.
    """
    n, width = X.shape
    n_habits = habit_of.max() + 1
    chosen = np.full((n, top), NONE, np.int64)
    for i in range(n):
        totals, best = np.zeros(n_habits), np.full(n_habits, -1, np.int64)
        new = is_new(X[i], new_at, count_at)
        for j in range(width):
            habit, contribution = habit_of[j], contributions[i, j]
            totals[habit] += contribution
            unusual = X[i, j] < limits[j, 0] or X[i, j] > limits[j, 1]
            named = unusual and contribution > 0 and not (new and by_custom[j])
            if named and (best[habit] < 0 or contribution > contributions[i, best[habit]]):
                best[habit] = j
        size = 0
        for habit in range(n_habits):
            if totals[habit] <= 0:
                continue
            if best[habit] < 0:
                chosen[i, 0] = SOMETHING if size == 0 else chosen[i, 0]
                continue
            at = size
            while at > 0 and totals[habit_of[chosen[i, at - 1]]] < totals[habit]:
                at -= 1
            if at < top:
                size = min(size + 1, top)
                for k in range(size - 1, at, -1):
                    chosen[i, k] = chosen[i, k - 1]
                chosen[i, at] = best[habit]
    return chosen
