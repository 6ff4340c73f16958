"""One trained model of LightGBM: its trees, and the calibrated probability of their raw scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.additive import AdditiveTrees
from fraud.detectors.lightgbm.text import read_text
from fraud.detectors.severity import SeverityScale

Vector = NDArray[np.float64]


class Model(AdditiveTrees):
    """LightGBM's booster, whose raw scores are log-odds, and its calibration.

    Parameters
    ----------
    booster_text : str
        LightGBM's text model, of one output.
    calibrator : Calibrator
    n_features : int, optional
        The number in the specification, which the booster must match.

    Raises
    ------
    BundleError
        The text is not a consistent model of one output, or the knots are not a calibration.
    """

    is_calibrated = True
    severity: SeverityScale | None = None

    def __init__(self, booster_text: str, calibrator: Calibrator, n_features: int | None = None) -> None:
        self._knots_x, self._knots_y = calibrator.knots()
        super().__init__(read_text(booster_text), n_features)

    def decision_score(self, raw_margin: Vector) -> Vector:
        """Return calibrated probabilities (n,) float64: linear between the knots, constant beyond them."""
        return np.interp(raw_margin, self._knots_x, self._knots_y)

    def anomaly_score(self, raw_margin: Vector) -> None:
        """Return None: the trees learned from labels what is fraud, not what is unusual."""

    def warm_up(self) -> None:
        super().warm_up()
        self.decision_score(np.zeros(1))
