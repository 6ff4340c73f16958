"""Isolation Forest as a registered algorithm: its files, its loader and its fitting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fraud.detectors.calibration import CALIBRATOR, Calibrator, lowered, read_calibrator, write_calibrator
from fraud.detectors.isolation_forest.model import IsolationForest
from fraud.detectors.isolation_forest.scores import power_of_two
from fraud.detectors.protocol import Algorithm, Unit
from fraud.detectors.severity import SEVERITY, SeverityScale, read_scale, write_scale
from fraud.errors import BundleError

FOREST = "forest.txt"
MIB = 1024 * 1024


def detector_files(text: str, calibrator: Calibrator | None, severity: SeverityScale | None = None) -> dict[str, bytes]:
    """Return the files of a forest; without a calibration or a severity scale, their files hold null."""
    return {FOREST: text.encode(), CALIBRATOR: write_calibrator(calibrator), SEVERITY: write_scale(severity)}


def load(files: Mapping[str, bytes], n_features: int) -> IsolationForest:
    """Return the forest that the files hold; raises `BundleError` if they hold none."""
    try:
        text = files[FOREST].decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{FOREST} is not UTF-8: {error}") from None
    return IsolationForest(text, read_calibrator(files[CALIBRATOR]), n_features, read_scale(files[SEVERITY]))


def vary(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files whose probabilities are a tenth lower: lower than the anomaly scores, where there are none."""
    calibrator = read_calibrator(files[CALIBRATOR])
    if calibrator is None:
        x = np.linspace(-4.0, 0.0, 65)
        calibrator = Calibrator(x.tolist(), power_of_two(x).tolist())
    return {**files, CALIBRATOR: write_calibrator(lowered(calibrator))}


ISOLATION_FOREST = Algorithm(
    name="isolation-forest",
    unit=Unit("log2 of the anomaly score", raises="makes it more unusual", lowers="makes it more usual"),
    files={FOREST: 32 * MIB, CALIBRATOR: 4 * MIB, SEVERITY: MIB},
    load=load,
    vary=vary,
    fitting="training.isolation:fit_forest",
    reads_labels=False,
)
