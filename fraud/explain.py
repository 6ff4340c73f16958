"""From contributions in log-odds to reasons in words."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np

from fraud.features import HISTORY_FEATURES
from fraud.schema import Feature, FeatureSpec

TOP_REASONS = 5


class Reason(msgspec.Struct, frozen=True):
    """Why a score is what it is: one feature, its value, and what it adds to the log-odds."""

    feature: str
    value: float | bool | str | None
    contribution: float
    direction: Literal["raises", "lowers"]
    text: str


class Explainer:
    """Words the contributions of one model's features."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.features = spec.features
        self._meanings = [_meaning(feature) for feature in spec.features]

    def contributions(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
        """Return contributions by feature name from (n_features + 1,) float64, the last being the base value."""
        return dict(zip((f.name for f in self.features), values.tolist()[:-1], strict=True))

    def strongest(
        self, contributions: np.ndarray[Any, np.dtype[np.float64]], top: int = TOP_REASONS
    ) -> list[list[tuple[str, float]]]:
        """Return the largest contributions by size of each of (n, n_features + 1) rows, by feature name."""
        order = np.argsort(-np.abs(contributions[:, :-1]), axis=1, kind="stable")[:, :top]
        values = np.take_along_axis(contributions, order, axis=1).tolist()
        names = [feature.name for feature in self.features]
        return [
            [(names[i], value) for i, value in zip(indices, some, strict=True) if value]
            for indices, some in zip(order.tolist(), values, strict=True)
        ]

    def reasons(
        self,
        x: np.ndarray[Any, np.dtype[np.float64]],
        contributions: np.ndarray[Any, np.dtype[np.float64]],
        top: int = TOP_REASONS,
    ) -> list[Reason]:
        """Return the largest contributions by size, those of no effect left out.

        Parameters
        ----------
        x : (n_features,) float64
            The row as it was scored.
        contributions : (n_features + 1,) float64
            In log-odds, the base value last.
        """
        sizes = np.abs(contributions[:-1])
        order = np.argsort(-sizes, kind="stable")[:top]
        return [self._reason(int(i), float(x[i]), float(contributions[i])) for i in order if sizes[i] > 0]

    def _reason(self, i: int, number: float, contribution: float) -> Reason:
        feature = self.features[i]
        value = readable(feature, number)
        direction: Literal["raises", "lowers"] = "raises" if contribution > 0 else "lowers"
        text = f"{self._meanings[i]} is {_shown(value)}, which {direction} the risk"
        return Reason(feature.name, value, contribution, direction, text)


def readable(feature: Feature, number: float) -> float | bool | str | None:
    """Return a number of `X` as its caller knows it: a category by name, a flag as a boolean."""
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
