"""Exact path-dependent SHAP values of a forest by Gauss-Legendre quadrature.

The Shapley value of a feature on one leaf (Lundberg et al. 2020, doi:10.1038/s42256-019-0138-9) is an integral over t
in [0, 1]: (o - z) times the product over the other features of the path of (z(1 - t) + o t), times the leaf's value,
where z is the share of training rows that satisfies the path's splits on the feature and o whether the row does. For k
distinct features on a path the integrand is a polynomial of degree k - 1, so k/2 Gauss-Legendre points are exact.

Per split and point, with z the share of the earlier splits on the same feature (1 if none), r the left child's share,
a = 1 if the row goes left, and w = a - r (0 once the row has left the path on this feature):
  h = t / (z(1 - t) + t), c = z / (z(1 - t) + t)^2, F = r + w h.
Up the tree:   H = H_right + F (H_left - H_right), a leaf's H being its value.
Down the tree: contribution += P c w (H_left - H_right), P_left = P F, P_right = P - P_left, P at the root the weight.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fraud.detectors.trees import kernels
from fraud.detectors.trees.lanes import WIDTH
from fraud.detectors.trees.operands import Operands
from fraud.detectors.trees.structure import Forest, Tree, UnsupportedModel

Array = NDArray[Any]
MAX_FEATURES_ON_A_PATH = 32
FEW_ROWS = 4  # up to here the one-row kernel is cheaper than a block of eight


class TreeShap:
    """Contributions of every feature to the raw score of a forest; safe to use from several threads.

    Parameters
    ----------
    forest : Forest
        Its leaves, and so the contributions, are in the unit of the raw score.

    Attributes
    ----------
    n_features : int
    base_value : float
        The expected raw score over the training rows.
    thresholds : tuple of ndarray
        For each feature the values that the model's splits compare it with: thresholds, or the codes that go left.

    Raises
    ------
    UnsupportedModel
        Training rows that don't add up, or more than 32 distinct features on one path.
    """

    def __init__(self, forest: Forest) -> None:
        packer = _Packer(forest.n_features)
        for number, tree in enumerate(forest.trees):
            try:
                packer.add(tree)
            except UnsupportedModel as error:
                raise UnsupportedModel(f"tree {number} of the forest {error.message}") from None
        self.n_features = forest.n_features
        self.base_value = packer.base_value
        self._model = packer.arrays()
        self.thresholds = packer.thresholds()

    @property
    def n_bytes(self) -> int:
        """Memory of the packed model."""
        return sum(int(array.nbytes) for array in self._model)

    def contributions(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (n, n_features + 1) float64, the base value last; rows sum to the raw score.

        Parameters
        ----------
        X : ndarray of shape (n, n_features)
            Read as float64; NaN is missing, a categorical feature holds its code.
        """
        X = np.ascontiguousarray(X, np.float64)
        if X.ndim != 2 or X.shape[1] != self.n_features:
            raise ValueError(f"X has the shape {X.shape}; the model takes (n, {self.n_features})")
        contributions = np.empty((len(X), self.n_features + 1))
        contributions[:, -1] = self.base_value
        n_blocked = len(X) - len(X) % WIDTH
        if len(X) - n_blocked > FEW_ROWS:
            n_blocked = len(X)
        if n_blocked:
            kernels.eight_rows(X[:n_blocked], *self._model, contributions[:n_blocked, :-1])
        for i in range(n_blocked, len(X)):
            kernels.one_row(X[i], *self._model, contributions[i, :-1])
        return contributions


class _Packer:
    """Collects trees into the arrays that the kernels read."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.base_value = 0.0
        self._operands = Operands()
        self._coefficients: dict[tuple[float, int], int] = {}
        self._weights: dict[int, int] = {}
        self._points: list[NDArray[np.float64]] = []
        self._n_points = 0
        self._splits: list[tuple[float, ...]] = []
        self._trees: list[tuple[int, ...]] = []
        self._leaves: list[float] = []

    def add(self, tree: Tree) -> None:
        """Pack one tree."""
        n = len(tree.splits)
        if n == 0:
            self.base_value += tree.leaf_values[0]
            return
        shares = [tree.rows_of(split.left) / max(split.n_rows, 1) for split in tree.splits]
        paths: list[dict[int, tuple[float, int]]] = [{} for _ in range(n)]  # feature -> share so far, code of the last
        most_features = 0
        for i, split in enumerate(tree.splits):  # parents come before their children
            left, right = tree.rows_of(split.left), tree.rows_of(split.right)
            if left <= 0 or right <= 0 or left + right != split.n_rows:
                raise UnsupportedModel("has training rows that don't add up, or a node without any")
            share, _ = paths[i].get(split.feature, (1.0, 0))
            most_features = max(most_features, len(paths[i] | {split.feature: ()}))
            if most_features > MAX_FEATURES_ON_A_PATH:  # at once: a deep tree's paths would take memory without bound
                raise UnsupportedModel(
                    f"has {most_features} features on a path; at most {MAX_FEATURES_ON_A_PATH} are exact"
                )
            for child, ratio, went_left in ((split.left, left, 1), (split.right, right, 0)):
                if child >= 0:
                    paths[child] = paths[i] | {split.feature: (share * ratio / split.n_rows, 2 * i + went_left)}
        n_points = (most_features + 1) // 2
        self._trees.append((len(self._splits), n, len(self._leaves), n_points, self._weights_at(n_points)))
        for i, split in enumerate(tree.splits):
            share, earlier = paths[i].get(split.feature, (1.0, 2 * n))
            self._splits.append(
                (
                    kernels.threshold_of(split),
                    shares[i],
                    self._operands.place(split),
                    *(child if child >= 0 else n + ~child for child in (split.left, split.right)),
                    earlier,
                    self._coefficients_at(share, n_points),
                    split.feature,
                )
            )
        self._leaves += tree.leaf_values
        n_rows = tree.splits[0].n_rows
        self.base_value += sum(v * rows / n_rows for v, rows in zip(tree.leaf_values, tree.leaf_rows, strict=True))

    def _append(self, values: NDArray[np.float64]) -> int:
        start = self._n_points
        self._points.append(values)
        self._n_points += values.size
        return start

    def _weights_at(self, n_points: int) -> int:
        if n_points not in self._weights:
            self._weights[n_points] = self._append(_quadrature(n_points)[1])
        return self._weights[n_points]

    def _coefficients_at(self, share: float, n_points: int) -> int:
        """Return where h and c of the module's formulas stand, in turns of eight points."""
        key = (share, n_points)
        if key not in self._coefficients:
            t, _ = _quadrature(n_points)
            inverse = 1 / (share * (1 - t) + t)
            pair = np.stack([t * inverse, share * inverse**2]).reshape(2, -1, WIDTH)
            self._coefficients[key] = self._append(pair.transpose(1, 0, 2).ravel())
        return self._coefficients[key]

    def arrays(self) -> tuple[Array, Array, Array, Array, Array, Array]:
        """Return operands, category words, splits, trees, leaves and points, as the kernels take them."""
        return (
            *self._operands.arrays(),
            np.array(self._splits, kernels.SPLIT),
            np.array(self._trees, kernels.TREE),
            np.array(self._leaves, np.float64),
            np.concatenate([*self._points, np.zeros(0)]),
        )

    def thresholds(self) -> tuple[NDArray[np.float64], ...]:
        """Return for each feature what its splits compare it with."""
        found: list[set[float]] = [set() for _ in range(self.n_features)]
        for feature, _, words in self._operands:
            found[feature] |= {32.0 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1}
        kinds = [kind for _, kind, _ in self._operands]
        for split in np.array(self._splits, kernels.SPLIT):
            if kinds[split["operand"]] != kernels.CATEGORIES:
                found[split["feature"]].add(float(split["threshold"]))
        return tuple(np.array(sorted(values), np.float64) for values in found)


@cache
def _quadrature(n_points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points and weights on [0, 1], padded to whole lanes with points of weight 0."""
    t, weights = np.polynomial.legendre.leggauss(n_points)
    fill = (0, -n_points % WIDTH)
    return np.pad((t + 1) / 2, fill, constant_values=0.5), np.pad(weights / 2, fill)
