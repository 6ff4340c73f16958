"""Reasons in words, made from contributions in the detector's unit."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from fraud.detectors.protocol import Unit
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.schema import Feature, FeatureSpec

TOP_REASONS = 5


class Reason(msgspec.Struct, frozen=True):
    """One reason for a score: a feature, its value, and what it adds to the raw score."""

    feature: str
    value: float | bool | str | None
    contribution: float
    direction: Literal["raises", "lowers"]
    text: str


class Explained(NamedTuple):
    """A row's base value, the contribution of every feature, the strongest of them in words, and their unit."""

    base_value: float
    contributions: dict[str, float]
    reasons: list[Reason]
    unit: str


class Explainer:
    """Words the contributions of one model's features."""

    def __init__(self, spec: FeatureSpec, unit: Unit) -> None:
        self.unit = unit
        self.features = spec.features
        self._names = [feature.name for feature in spec.features]
        self._meanings = [_meaning(feature) for feature in spec.features]

    def strongest(
        self, contributions: np.ndarray[Any, np.dtype[np.float64]], top: int = TOP_REASONS
    ) -> list[list[tuple[str, float]]]:
        """Return the largest contributions by magnitude of each of (n, n_features + 1) rows, by feature name."""
        rows = zip(contributions.tolist(), _ranked(contributions, top), strict=True)
        return [[(self._names[i], row[i]) for i in order if row[i]] for row, order in rows]

    def explained(
        self, X: np.ndarray[Any, np.dtype[np.float64]], contributions: np.ndarray[Any, np.dtype[np.float64]]
    ) -> list[Explained]:
        """Word rows as they were scored.

        Parameters
        ----------
        X : (n, n_features) float64
        contributions : (n, n_features + 1) float64
            In the detector's unit, the base value last.
        """
        ranked = _ranked(contributions, TOP_REASONS)
        return [
            Explained(
                row[-1], dict(zip(self._names, row[:-1], strict=True)), self._reasons(x, row, order), self.unit.name
            )
            for x, row, order in zip(X.tolist(), contributions.tolist(), ranked, strict=True)
        ]

    def reasons(
        self,
        x: np.ndarray[Any, np.dtype[np.float64]],
        contributions: np.ndarray[Any, np.dtype[np.float64]],
        top: int = TOP_REASONS,
    ) -> list[Reason]:
        """Return the largest contributions of one row by magnitude, without those that are 0.

        Parameters
        ----------
        x : (n_features,) float64
            The row as it was scored.
        contributions : (n_features + 1,) float64
            In the detector's unit, the base value last.
        """
        (order,) = _ranked(contributions[np.newaxis], top)
        return self._reasons(x.tolist(), contributions.tolist(), order)

    def _reasons(self, x: list[float], contributions: list[float], order: list[int]) -> list[Reason]:
        return [self._reason(i, x[i], contributions[i]) for i in order if contributions[i]]

    def _reason(self, i: int, number: float, contribution: float) -> Reason:
        feature = self.features[i]
        value = readable(feature, number)
        direction: Literal["raises", "lowers"] = "raises" if contribution > 0 else "lowers"
        effect = self.unit.raises if contribution > 0 else self.unit.lowers
        text = f"{self._meanings[i]} is {_shown(value)}, which {effect}"
        return Reason(feature.name, value, contribution, direction, text)


def _ranked(contributions: np.ndarray[Any, np.dtype[np.float64]], top: int) -> list[list[int]]:
    """Return for each row the columns of its `top` largest contributions by magnitude; ties go to the first."""
    order: list[list[int]] = np.argsort(-np.abs(contributions[:, :-1]), axis=1, kind="stable")[:, :top].tolist()
    return order


def readable(feature: Feature, number: float) -> float | bool | str | None:
    """Return a value of `X` as the caller sent it: a category by name, a flag as a boolean."""
    if math.isnan(number):
        return None
    if feature.type == "categorical":
        return feature.categories[int(number)]
    if feature.type == "boolean":
        return bool(number)
    return number


def _meaning(feature: Feature) -> str:
    known = HISTORY_FEATURES.get(feature.name) if feature.source == "history" else None
    return feature.meaning or (known.meaning if known else feature.name)


def _shown(value: float | bool | str | None) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return f"{value:,.6g}" if abs(value) < 100_000 else f"{value:,.0f}"
