"""Calibration on a window of its own: an isotonic map without its plateaus, exported as knots."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression

from fraud.detectors.calibration import Calibrator
from fraud.errors import DataError

Vector = NDArray[np.float64]
STEP = 0.25
"""Most log-odds between two knots: lines between them in probability are within 1% of one in log-odds (STEP² / 8)."""
BEYOND = 1.0
"""Log-odds by which the map rises beyond the outermost blocks, up to a window's range of margins away from it."""
LEAST_FRAUDS = 5
"""Of a block: fewer say little, and one fraud alone at the top would be certain."""
FRAUDS_A_CORNER = 10
"""A block of more frauds has several corners at its height: the more of them say that it is flat, the flatter it is."""
ROUNDS = 5
LEAST_RISE = 1e-6


def fit_calibrator(raw_margin: Vector, y: NDArray[np.int8]) -> Calibrator:
    """Return a strictly increasing map from raw margins to probabilities.

    Isotonic regression is flat in blocks, in which it ties what the margins rank. Here each block has a corner in its
    centre, or several where it has many frauds, and corners are joined by lines in log-odds, which go on with a small
    slope beyond the outermost ones. The corners are moved until the mean probability around each is nearly the block's
    share of frauds. From the top on, blocks are put together until they have `LEAST_FRAUDS`; one of frauds alone, or
    without any, counts half a row of the other kind.

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
    part, share = _parts(margins, labels)
    rows = np.bincount(part)

    def mean(of_rows: Vector) -> Vector:
        return np.bincount(part, of_rows) / rows

    centres, wanted = mean(margins), logit(share)
    heights = _rising(centres, wanted)
    for _ in range(ROUNDS):
        x, log_odds = _knots(centres, heights, margins)
        now = logit(mean(np.interp(margins, x, expit(log_odds))))
        heights = _rising(centres, heights + (wanted - now) / 2)
    x, log_odds = _knots(centres, heights, margins)
    return Calibrator(x.tolist(), expit(log_odds).tolist())


def _parts(margins: Vector, labels: NDArray[np.int8]) -> tuple[NDArray[np.int64], Vector]:
    """Return the part of each row, one a corner and rising with the margin, and the share of frauds in its block."""
    block = _blocks(margins, labels)
    rows, frauds = np.bincount(block), np.bincount(block, labels)
    share = np.where((frauds > 0) & (frauds < rows), frauds / rows, (frauds + 0.5) / (rows + 1))
    within = np.zeros(len(block), np.int64)
    for i, corners in enumerate(np.maximum(frauds // FRAUDS_A_CORNER, 1).astype(np.int64).tolist()):
        some = block == i
        cuts = np.quantile(margins[some], np.arange(1, corners) / corners)
        within[some] = np.searchsorted(cuts, margins[some])
    parts, part = np.unique(block * (1 + within.max()) + within, return_inverse=True)
    return part, share[parts // (1 + within.max())]


def _blocks(margins: Vector, labels: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the block of each row, rising with the margin."""
    _, block = np.unique(IsotonicRegression().fit_transform(margins, labels), return_inverse=True)
    frauds = np.bincount(block, labels)
    joined, at, gathered = np.zeros(len(frauds), np.int64), 0, 0.0
    for i in reversed(range(len(frauds))):
        if gathered >= LEAST_FRAUDS or (gathered and not frauds[i]):
            at, gathered = at + 1, 0.0
        joined[i] = at
        gathered += frauds[i]
    return (at - joined)[block]


def _rising(x: Vector, y: Vector) -> Vector:
    """Return the nearest rising values, by squares, each at least `LEAST_RISE` above the one before."""
    steps = LEAST_RISE * np.arange(len(y))
    rising: Vector = IsotonicRegression().fit_transform(x, y - steps) + steps
    return rising


def _knots(centres: Vector, log_odds: Vector, margins: Vector) -> tuple[Vector, Vector]:
    """Return margins, strictly rising, and their log-odds, at most `STEP` apart."""
    low, high = float(margins.min()), float(margins.max())
    away = (high - low) or 1.0
    corners = np.concatenate([[low - away], centres, [high + away]])
    heights = np.concatenate([[log_odds[0] - BEYOND], log_odds, [log_odds[-1] + BEYOND]])
    parts = np.ceil(np.diff(heights) / STEP).astype(np.int64)
    at = np.append(np.repeat(np.arange(len(parts)), parts) + _fractions(parts), len(parts))
    x, first = np.unique(np.interp(at, np.arange(len(corners)), corners), return_index=True)
    return x, np.interp(at, np.arange(len(heights)), heights)[first]


def _fractions(parts: NDArray[np.int64]) -> Vector:
    """Return 0, 1/k, ..., (k - 1)/k for each k of `parts`, one after another."""
    starts = np.repeat(np.cumsum(parts) - parts, parts)
    return (np.arange(parts.sum()) - starts) / np.repeat(parts, parts)
