"""Booster and calibrator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray


class Model:
    """LightGBM's booster and the isotonic knots behind it."""

    contributions_fallback: str | None = None

    def __init__(self, booster_text: str, calibrator: Mapping[str, Sequence[float]]) -> None:
        self._booster = lgb.Booster(model_str=booster_text)
        self._x = np.asarray(calibrator["x"], np.float64)
        self._y = np.asarray(calibrator["y"], np.float64)

    def raw_margin(self, X: NDArray[np.float64]) -> Any:
        return self._booster.predict(X, raw_score=True)

    def probability(self, raw_margin: NDArray[np.float64]) -> Any:
        return np.interp(raw_margin, self._x, self._y)

    def contributions(self, X: NDArray[np.float64]) -> Any:
        return self._booster.predict(X, pred_contrib=True)

    def verify_contributions(self, X: NDArray[np.float64]) -> None:
        pass

    def warm_up(self) -> None:
        pass
