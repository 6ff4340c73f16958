"""Calibration on a window of its own: an isotonic map without plateaus, exported as knots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from fraud.detectors.calibration import Calibrator
from fraud.errors import DataError

Vector = NDArray[np.float64]
RISE = 0.02
"""Log-odds by which a block begins below the share of frauds in it, and ends above it."""


def fit_calibrator(raw_margin: Vector, y: NDArray[np.int8]) -> Calibrator:
    """Return a strictly rising map from raw margins to probabilities.

    Isotonic regression is flat in blocks, so it ties what the margins rank. Here each block rises by `RISE` on either
    side of its height, or by a quarter of the way to the next block where that is less. Beyond the outermost margins
    the map rises by as much once more, over the window's range of margins. The ends stay away from 0 and 1 by about
    1 / n, the resolution of a window of n transactions.

    Parameters
    ----------
    raw_margin : (n,) float64
        Raw scores on a window that the detector has not seen.
    y : (n,) int8
        1 fraud, 0 legitimate, -1 unknown: left out.

    Raises
    ------
    DataError
        There is no fraud, or no legitimate transaction.
    """
    known = y >= 0
    margins, labels = raw_margin[known], y[known]
    if not 0 < labels.sum() < len(labels):
        raise DataError("the calibration window needs frauds and legitimate transactions; give more data")
    least = 1.0 / (len(labels) + 2)
    isotonic = IsotonicRegression(y_min=least, y_max=1.0 - least).fit(margins, labels)
    x, heights = isotonic.X_thresholds_, isotonic.y_thresholds_
    begins = np.flatnonzero(np.diff(heights, prepend=-1.0))
    ends = np.append(begins[1:], len(heights)) - 1
    blocks = logit(heights[begins])
    gaps = np.minimum(np.diff(blocks) / 4, RISE)
    rises = begins < ends  # a block of one margin is one knot
    low, high = blocks - rises * np.append(RISE, gaps), blocks + rises * np.append(gaps, RISE)
    beyond = max(x[-1] - x[0], 1.0)
    knots, kept = np.unique(
        np.concatenate([[x[0] - beyond], np.stack([x[begins], x[ends]], 1).ravel(), [x[-1] + beyond]]),
        return_index=True,
    )
    log_odds = np.concatenate([[low[0] - RISE], np.stack([low, high], 1).ravel(), [high[-1] + RISE]])
    return Calibrator(knots.tolist(), expit(log_odds[kept]).tolist())
