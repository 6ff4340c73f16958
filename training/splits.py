"""The train, validation, calibration and test windows in time, as of a moment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.errors import DataError

MS_PER_DAY = 86_400_000
BURN_IN_MS = 30 * MS_PER_DAY


@dataclass(frozen=True)
class Windows:
    """Slices of a table in the order of arrival, each apart from the next by the gap.

    `train` is fitted with early stopping on `validation`, `refit` covers both, `calibration` is used by the calibrator
    alone, `test` for evaluation alone.
    """

    train: slice
    validation: slice
    calibration: slice
    test: slice

    @property
    def refit(self) -> slice:
        return slice(self.train.start, self.validation.stop)

    @property
    def all(self) -> slice:
        """From the first row of training to the last of the test."""
        return slice(self.train.start, self.test.stop)

    def within(self, window: slice) -> slice:
        """Return a window as rows of `X`, whose first row is the first of `all`."""
        return slice(window.start - self.train.start, window.stop - self.train.start)


def split_by_time(
    times: NDArray[np.int64],
    label_delay_ms: int,
    as_of: int,
    test: tuple[int, int],
    shares: tuple[float, float],
) -> Windows:
    """Return the windows for a model trained as of a moment.

    Parameters
    ----------
    times : (n,) int64
        Arrival of each row, ms, ascending.
    label_delay_ms : int
        The time from an event until its label is taken as known. It is also the gap between two windows, at most a
        twentieth of the span; without a gap, training would use labels that are not known yet.
    as_of : int
        When the model is trained, ms; rows of the last `label_delay_ms` before it have no label yet.
    test : (int, int)
        Begin and end of the test window, ms.
    shares : (float, float)
        The validation and calibration windows' shares of the time before `as_of` that has labels.

    Raises
    ------
    DataError
        There is too little data before `as_of`, or none to test on.
    """
    start, known = int(times[0]), as_of - label_delay_ms
    span = known - start
    if span < 14 * MS_PER_DAY:
        raise DataError(
            f"{max(span, 0) / MS_PER_DAY:.1f} days with known labels lie before {moment(as_of)}; at least 14 are "
            "needed; give more data, a later moment or a shorter label delay"
        )
    gap = min(label_delay_ms, span // 20)
    begin = start + min(BURN_IN_MS, span // 8)  # histories are still empty
    validation_share, calibration_share = shares
    calibration = known - int(span * calibration_share)
    validation = calibration - gap - int(span * validation_share)

    def rows(first: int, end: int) -> slice:
        return slice(*(int(i) for i in np.searchsorted(times, [first, end])))

    windows = Windows(
        rows(begin, validation - gap), rows(validation, calibration - gap), rows(calibration, known), rows(*test)
    )
    for name in ("train", "validation", "calibration", "test"):
        window = getattr(windows, name)
        if window.stop <= window.start:
            raise DataError(
                f"the {name} window holds no transaction; "
                f"the data goes from {moment(start)} to {moment(int(times[-1]))}"
            )
    return windows


def split_by_order(n: int, shares: tuple[float, float, float]) -> Windows:
    """Return windows of a table without times, in file order; shares of validation, calibration and test."""
    ends = [round(n * (1 - sum(shares[i:]))) for i in range(3)]
    bounds = [0, *ends, n]
    if min(np.diff(bounds)) < 1:
        raise DataError(f"{n} rows are too few to train, stop, calibrate and test on")
    return Windows(*(slice(a, b) for a, b in pairwise(bounds)))


def known_labels(
    label: NDArray[np.int8],
    event_time_ms: NDArray[np.int64],
    label_time_ms: NDArray[np.int64],
    label_delay_ms: int,
    as_of: int,
) -> NDArray[np.int8]:
    """Return the labels as known at a moment: 1, 0, or -1 for unknown.

    A fraud counts from its label time. Anything else counts as legitimate once the label delay is over, including a
    fraud reported later: that was the knowledge at that moment.
    """
    known = np.full(len(label), -1, np.int8)
    known[(label >= 0) & (event_time_ms + label_delay_ms <= as_of)] = 0
    known[(label == 1) & (label_time_ms <= as_of)] = 1
    return known


def moment(ms: int) -> str:
    """Return a time as RFC 3339, to the second, UTC."""
    return pd.Timestamp(ms, unit="ms", tz="UTC").strftime("%Y-%m-%dT%H:%M:%SZ")
