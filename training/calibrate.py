"""Isotonic calibration on a window of its own, exported as knots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from fraud.detectors.calibration import Calibrator
from fraud.errors import DataError


def fit_calibrator(raw_margin: NDArray[np.float64], y: NDArray[np.int8]) -> Calibrator:
    """Return the isotonic map from raw margins to probabilities.

    The ends stay away from 0 and 1 by 1 / n, the resolution of a window of n transactions.

    Parameters
    ----------
    raw_margin : (n,) float64
        Raw scores on a window that the detector has not seen.
    y : (n,) int8
        1 fraud, 0 legitimate, -1 unknown: left out.
    """
    known = y >= 0
    margins, labels = raw_margin[known], y[known]
    if not 0 < labels.sum() < len(labels):
        raise DataError("the calibration window needs frauds and legitimate transactions; give more data")
    least = 1.0 / (len(labels) + 2)
    isotonic = IsotonicRegression(y_min=least, y_max=1.0 - least, out_of_bounds="clip").fit(margins, labels)
    return Calibrator(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist())
