"""Raw scores of a forest: each row walks every tree, and the leaves are added up in the order of the trees.

Sums have the bits of LightGBM's own, which adds in that order, starting from 0. Eight walks, of eight rows or in eight
trees, go on together until the last is at its leaf, which is its own child: so few branches are mispredicted, and the
processor is busy while each walk waits for its next node.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.trees import kernels
from fraud.detectors.trees.operands import Operands
from fraud.detectors.trees.structure import Forest, Tree

Array = NDArray[Any]
Model = tuple[Array, Array, Array, Array, Array]
"""Operands, words of categories, nodes, values of the nodes, and trees."""
FEW_ROWS = 16
"""Up to here each row walks eight trees at a time, which takes microseconds; above, eight rows walk one tree."""


class TreeScores:
    """A forest packed for scoring; safe to use from several threads.

    Parameters
    ----------
    forest : Forest
    """

    def __init__(self, forest: Forest) -> None:
        operands = Operands()
        nodes: list[tuple[float, int, int, int]] = []
        values: list[float] = []
        trees = []
        for tree in forest.trees:
            trees.append((len(nodes), tree.depth))
            nodes += _nodes(tree, len(nodes), operands)
            values += [0.0] * len(tree.splits) + list(tree.leaf_values)
        self._model: Model = (
            *operands.arrays(),
            np.array(nodes, kernels.NODE),
            np.array(values, np.float64),
            np.array(trees, kernels.ROOT),
        )

    def raw_scores(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the raw scores (n,) float64 of a C-contiguous float64 matrix (n, n_features)."""
        scores = np.empty(len(X))
        kernel = kernels.scores_by_tree if len(X) <= FEW_ROWS else kernels.scores_by_row
        kernel(X, *self._model, scores)
        return scores


def _nodes(tree: Tree, start: int, operands: Operands) -> list[tuple[float, int, int, int]]:
    """Return the splits of a tree and then its leaves, as rows of `kernels.NODE` that begin at `start`."""
    n = len(tree.splits)
    nodes = []
    for split in tree.splits:
        left, right = (start + (child if child >= 0 else n + ~child) for child in (split.left, split.right))
        nodes.append((kernels.threshold_of(split), operands.place(split), left, right))
    return nodes + [(0.0, 0, start + n + leaf, start + n + leaf) for leaf in range(n + 1)]
