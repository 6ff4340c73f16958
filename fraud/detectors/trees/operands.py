"""What the splits of a forest compare with their thresholds: values of a row in which missing ones are resolved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.trees import kernels
from fraud.detectors.trees.structure import Split

KINDS = {
    ("none", False): kernels.PLAIN,
    ("none", True): kernels.PLAIN,
    ("zero", False): kernels.ZERO_RIGHT,
    ("zero", True): kernels.ZERO_LEFT,
    ("nan", False): kernels.NAN_RIGHT,
    ("nan", True): kernels.NAN_LEFT,
}


class Operands:
    """The different operands of some splits, each once: a feature, and how its value is read."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int, tuple[int, ...]], int] = {}

    def __iter__(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        return iter(self._places)

    def place(self, split: Split) -> int:
        """Return the place of a split's operand."""
        if split.categories is not None:
            key = (split.feature, kernels.CATEGORIES, split.categories)
        else:
            key = (split.feature, KINDS[split.missing, split.default_left], ())
        return self._places.setdefault(key, len(self._places))

    def arrays(self) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """Return the operands and the words of their categories, as the kernels take them."""
        operands, words = [], [0]
        for feature, kind, category_words in self._places:
            operands.append((feature, kind, len(words), len(category_words)))
            words += category_words
        return np.array(operands, kernels.OPERAND), np.array(words, np.uint32)
