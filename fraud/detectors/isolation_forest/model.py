"""One isolation forest: anomaly scores from its trees, and a calibrated probability where labels gave one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.calibration import Calibrator
from fraud.detectors.isolation_forest.scores import expect_isolation_forest, power_of_two
from fraud.detectors.lightgbm.additive import AdditiveTrees
from fraud.detectors.lightgbm.text import read_text
from fraud.detectors.severity import SeverityScale

Vector = NDArray[np.float64]


class IsolationForest(AdditiveTrees):
    """Isolation trees, whose raw score is the logarithm of the anomaly score to base 2.

    Parameters
    ----------
    text : str
        The trees as LightGBM's text model; leaves hold path lengths as `fraud.detectors.isolation_forest.scores` says.
    calibrator : Calibrator or None
        From raw scores to probabilities; None without labels to calibrate by.
    n_features : int, optional
        The number in the specification, which the trees must match.
    severity : SeverityScale, optional
        The levels of the score, where they were calibrated.

    Raises
    ------
    BundleError
        The text is not an isolation forest, or the knots are not a calibration.
    """

    def __init__(
        self,
        text: str,
        calibrator: Calibrator | None,
        n_features: int | None = None,
        severity: SeverityScale | None = None,
    ) -> None:
        self.severity = severity
        self._knots = None if calibrator is None else calibrator.knots()
        forest = read_text(text)
        expect_isolation_forest(forest)
        super().__init__(forest, n_features)

    @property
    def is_calibrated(self) -> bool:
        """Whether the decision score is a probability of fraud."""
        return self._knots is not None

    def decision_score(self, raw_margin: Vector) -> Vector:
        """Return calibrated probabilities (n,) float64 or, without a calibration, anomaly scores."""
        if self._knots is None:
            return self.anomaly_score(raw_margin)
        return np.interp(raw_margin, *self._knots)

    def anomaly_score(self, raw_margin: Vector) -> Vector:
        """Return anomaly scores (n,) float64 in (0, 1]: 2^raw_margin."""
        scores: Vector = power_of_two(np.minimum(raw_margin, 0.0))
        return scores

    def warm_up(self) -> None:
        super().warm_up()
        self.decision_score(self.anomaly_score(np.zeros(1)) - 1.0)
