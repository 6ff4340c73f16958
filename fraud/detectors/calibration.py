"""From a raw score to a probability: the knots of a rising map, fitted by training, read from a bundle."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from fraud.errors import BundleError

Vector = NDArray[np.float64]
CALIBRATOR = "calibrator.json"


class Calibrator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Knots of the map from raw score `x` to probability `y`."""

    x: list[float]
    y: list[float]

    def knots(self) -> tuple[Vector, Vector]:
        """Return the knots as arrays: scores strictly rising, and their probabilities, which don't fall.

        Raises
        ------
        BundleError
            The knots are not a valid calibration.
        """
        x, y = np.asarray(self.x, np.float64), np.asarray(self.y, np.float64)
        if not (x.ndim == 1 and x.shape == y.shape and x.size and np.isfinite(x).all() and (np.diff(x) > 0).all()):
            raise BundleError("the calibrator's x must be finite margins, strictly rising, with one y each")
        if not ((np.diff(y) >= 0).all() and y[0] >= 0 and y[-1] <= 1):
            raise BundleError("the calibrator's y must be probabilities from 0 to 1 that don't fall")
        return x, y


UNCALIBRATED = Calibrator([0.0], [0.5])
"""Before a calibrator is fitted: the raw score does not need one."""


def read_calibrator(content: bytes) -> Calibrator | None:
    """Return what a bundle's calibrator.json holds; None for null. Raises `BundleError` if it is neither."""
    try:
        return msgspec.json.decode(content, type=Calibrator | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{CALIBRATOR} cannot be read: {error}") from None


def write_calibrator(calibrator: Calibrator | None) -> bytes:
    """Return the content of calibrator.json."""
    return msgspec.json.format(msgspec.json.encode(calibrator), indent=1) + b"\n"


def lowered(calibrator: Calibrator) -> Calibrator:
    """Return a calibrator whose probabilities are a tenth lower."""
    return Calibrator(calibrator.x, [0.9 * y for y in calibrator.y])
