"""Calibrates a severity scale on scores that the detector was not fitted on; see `fraud.detectors.severity`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from fraud.detectors.severity import LEVELS, Level, SeverityScale
from training.config import SeverityOptions

Vector = NDArray[np.float64]


def fit_severity(
    raw_margin: Vector,
    customers: NDArray[np.int64] | None,
    options: SeverityOptions,
    seed: int,
) -> SeverityScale:
    """Return the scale whose levels are reached at their rates at most, with the confidence given.

    Parameters
    ----------
    raw_margin : (n,) float64
        Raw scores of a window that the detector was not fitted on, frauds among them as they come.
    customers : (n,) int64, optional
        The customer of each; None where each row stands for itself, as ready features do.
    options : SeverityOptions
        The rates and the confidence.
    seed : int
        Of the sample.
    """
    sample = np.arange(len(raw_margin)) if customers is None else one_a_customer(customers, seed)
    falling = np.sort(raw_margin[sample])[::-1]
    n = len(falling)
    rates = options.rates
    ranks = {level: rank_for(rates[level], n, options.confidence) for level in LEVELS}
    return SeverityScale(
        options.confidence,
        n,
        n if customers is None else len(np.unique(customers[sample])),
        tuple(
            Level(level, rates[level], rank, float(falling[rank - 1]) if rank else None)
            for level, rank in ranks.items()
        ),
    )


def one_a_customer(customers: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the places of a sample with at most one row a customer, in which every row is equally likely to be.

    A customer is chosen with a probability in proportion to the number of its rows, then one of its rows. One row of
    every customer would give the few transactions of rare customers the weight of the many of frequent ones.

    Parameters
    ----------
    customers : (n,) int64
        The customer of each row.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(customers))
    _, first, counts = np.unique(customers[shuffled], return_index=True, return_counts=True)
    chosen = rng.random(len(first)) * counts.max(initial=0) < counts
    return np.sort(shuffled[first[chosen]])


def rank_for(rate: float, rows: int, confidence: float) -> int:
    """Return the largest rank whose order statistic of a sample is exceeded by at most `rate`, 0 if there is none.

    The share that exceeds rank k of n is Beta(k, n + 1 - k), whose distribution function falls with k.

    Examples
    --------
    >>> [rank_for(0.01, rows, 0.95) for rows in (298, 299, 5_000)]
    [0, 1, 39]
    """
    low, high = 0, rows
    while low < high:
        middle = (low + high + 1) // 2
        if betainc(middle, rows + 1 - middle, rate) >= confidence:
            low = middle
        else:
            high = middle - 1
    return low
