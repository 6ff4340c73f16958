"""The protocol of a detector: what bundles, scorers, explanations and training use of it.

A detector is a trained model that gives each row a raw score, equal to the sum of its features' contributions, and from
it the decision score that a policy's thresholds are on: a calibrated probability of fraud, or, where no labels
calibrated one, an anomaly score. An algorithm makes detectors of one kind. It is a folder beside this file, registered
by one line in `fraud.detectors.registered`, which also names its fitting function; only training imports that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.severity import SeverityScale

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


class Unit(NamedTuple):
    """The unit of the raw score and of the contributions, and the words that describe a contribution."""

    name: str
    raises: str
    lowers: str


class Detector(Protocol):
    """A trained model; immutable once its golden rows are verified, and safe to use from several threads."""

    @property
    def n_features(self) -> int:
        """How many columns `X` has."""

    @property
    def contributions_fallback(self) -> str | None:
        """Why contributions use the slow method; None where there is only one, or the fast one is used."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the decision score is a probability of fraud, calibrated with labels."""

    @property
    def severity(self) -> SeverityScale | None:
        """The levels of the anomaly score, where they were calibrated."""

    def raw_margin(self, X: Matrix) -> Vector:
        """Return raw scores (n,) float64 in the algorithm's unit for `X` (n, n_features); NaN is a missing value.

        A row's score has the same bits alone and in any batch. Raises ValueError if `X` has another shape.
        """

    def decision_score(self, raw_margin: Vector) -> Vector:
        """Return what the policy's thresholds are on (n,) float64 in [0, 1], non-decreasing in the raw score.

        The calibrated probability of fraud; where `is_calibrated` is false, the anomaly score.
        """

    def anomaly_score(self, raw_margin: Vector) -> Vector | None:
        """Return how unusual the rows are (n,) float64 in (0, 1]; None if the algorithm does not measure that."""

    def contributions(self, X: Matrix) -> Matrix:
        """Return (n, n_features + 1) float64 in the same unit, the base value last; rows sum to the raw score."""

    def verify_contributions(self, X_golden: Matrix) -> None:
        """Verify the contributions on golden rows (n, n_features); fall back to the slow method if they differ.

        Raises
        ------
        BundleError
            They don't sum to the raw score.
        """

    def warm_up(self) -> None:
        """Load and compile everything, so that the first rows do not wait."""


Load = Callable[[Mapping[str, bytes], int], Detector]
Vary = Callable[[Mapping[str, bytes]], dict[str, bytes]]


@dataclass(frozen=True, eq=False)
class Algorithm:
    """One kind of detector.

    Attributes
    ----------
    name : str
        As the manifest of a bundle names it.
    unit : Unit
    files : mapping of str to int
        Its files in a bundle, and how many bytes each may have.
    load : callable
        Makes a detector from the content of its files and the number of features of the specification. Treats the files
        as untrusted; raises `BundleError` if they hold no valid detector.
    vary : callable
        Returns files of a detector with lower decision scores: `fraud verify` uses them as a second version.
    fitting : str
        ``module:function`` of training that fits it.
    reads_labels : bool
        Whether it is fitted to labels. Otherwise they are needed only to calibrate a probability.
    """

    name: str
    unit: Unit
    files: Mapping[str, int]
    load: Load
    vary: Vary
    fitting: str
    reads_labels: bool

    def fit(self) -> Callable[..., Any]:
        """Return its fitting function, described in `training.fit`; imports the training dependencies."""
        module, _, function = self.fitting.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
