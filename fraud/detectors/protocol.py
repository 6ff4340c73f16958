"""What a detector is: all that a bundle, a scorer, an explanation and training need of it.

A detector is a trained model that gives each row a raw score, which its features' contributions add up to, and a
probability. An algorithm makes detectors of one kind. It is written in a folder beside this file, and registered by one
line of `fraud.detectors.registered`; its fitting is found there too, by name, and imported by training alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


class Unit(NamedTuple):
    """What the raw score and the contributions are measured in, and what a contribution does, in words."""

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
        """Why contributions come from the slow way; None where there is none, or the fast way is in use."""

    def raw_margin(self, X: Matrix) -> Vector:
        """Return raw scores (n,) float64 in the algorithm's unit for `X` (n, n_features), of which NaN is missing.

        A row has the same bits alone and in any batch. A ValueError says that `X` has another shape.
        """

    def probability(self, raw_margin: Vector) -> Vector:
        """Return calibrated probabilities (n,) float64 in [0, 1], which never fall where the raw score rises."""

    def contributions(self, X: Matrix) -> Matrix:
        """Return (n, n_features + 1) float64 in the same unit, the base value last; rows sum to the raw score."""

    def verify_contributions(self, X_golden: Matrix) -> None:
        """Prove the contributions on golden rows (n, n_features), or use the slow way.

        Raises
        ------
        BundleError
            They don't sum to the raw score.
        """

    def warm_up(self) -> None:
        """Load and compile what the first rows would otherwise wait for."""


Load = Callable[[Mapping[str, bytes], int], Detector]
Vary = Callable[[Mapping[str, bytes]], dict[str, bytes]]


@dataclass(frozen=True)
class Algorithm:
    """One kind of detector.

    Attributes
    ----------
    name : str
        As the manifest of a bundle names it.
    unit : Unit
    files : mapping of str to int
        The files of a bundle that are its own, and how many bytes each may have.
    load : callable
        Makes a detector from the content of its files and the number of features of the specification. Raises
        `BundleError` for whatever is no detector, without trusting anything in it.
    vary : callable
        Returns files of a detector whose probabilities differ from those of these files: `fraud verify` tells two
        versions apart by them.
    fitting : str
        ``module:function`` of training that fits it.
    """

    name: str
    unit: Unit
    files: Mapping[str, int]
    load: Load
    vary: Vary
    fitting: str

    def fit(self) -> Callable[..., Any]:
        """Return the function that fits it, as `training.fit` says; imports what training needs."""
        module, _, function = self.fitting.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found
