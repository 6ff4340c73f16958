"""Exact path-dependent SHAP values of a LightGBM model by Gauss-Legendre quadrature.

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

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fraud import treeshap_kernels as kernels
from fraud.errors import BundleError
from fraud.lanes import WIDTH

Array = NDArray[Any]
MAX_FEATURES_ON_A_PATH = 32
FEW_ROWS = 4  # up to here the one-row kernel is cheaper than a block of eight


class UnsupportedModel(BundleError):
    """The booster has something that these contributions are not defined or not proven for."""


class TreeShap:
    """Contributions of every feature to a LightGBM model's raw score; safe to use from several threads.

    Parameters
    ----------
    booster_text : str
        What ``lightgbm.Booster.model_to_string`` wrote: all its iterations count, as in `predict` of the loaded model.

    Attributes
    ----------
    n_features : int
    base_value : float
        The expected raw score over the training rows, log-odds.
    thresholds : tuple of ndarray
        For each feature the values that the model's splits compare it with: thresholds, or the codes that go left.

    Raises
    ------
    UnsupportedModel
        Several outputs, linear trees, shares that don't add up, more than 32 distinct features on one path, or a text
        that is no consistent model.
    """

    def __init__(self, booster_text: str) -> None:
        header, trees = _sections(booster_text)
        packer = _Packer(header)
        for number, fields in enumerate(trees):
            try:
                packer.add(fields)
            except (KeyError, ValueError, IndexError, OverflowError) as error:
                raise UnsupportedModel(f"tree {number} of the booster cannot be read: {error!r}") from error
            except UnsupportedModel as error:
                raise UnsupportedModel(f"tree {number} of the booster {error.message}") from None
        self.n_features = packer.n_features
        self.base_value = packer.base_value
        self._model = packer.arrays()
        self.thresholds = packer.thresholds()

    @property
    def n_bytes(self) -> int:
        """Memory of the packed model."""
        return sum(int(array.nbytes) for array in self._model)

    def contributions(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (n, n_features + 1) float64 in log-odds, the base value last; rows sum to the raw score.

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


def _sections(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the header's fields and each tree's."""
    body, end, _ = text.partition("\nend of trees")
    if not end or not text.startswith("tree\n"):
        raise UnsupportedModel("the booster is not LightGBM's text model: it has no 'tree' header and 'end of trees'")
    header, *trees = body.split("\nTree=")
    fields = [dict(line.partition("=")[::2] for line in part.split("\n") if "=" in line) for part in (header, *trees)]
    return fields[0], fields[1:]


@dataclass
class _Node:
    """A split on its way into the packed model."""

    split: int  # LightGBM's number
    path: dict[int, tuple[float, int]]  # feature -> share of the splits on it so far, code of the last


class _Packer:
    """Collects checked trees into the arrays that the kernels read."""

    def __init__(self, header: dict[str, str]) -> None:
        if header.get("num_tree_per_iteration") != "1":
            raise UnsupportedModel("the booster has several outputs; contributions are of one")
        self.n_features = int(header["max_feature_idx"]) + 1
        self.base_value = 0.0
        self._operands: dict[tuple[int, int, tuple[int, ...]], int] = {}
        self._coefficients: dict[tuple[float, int], int] = {}
        self._weights: dict[int, int] = {}
        self._points: list[NDArray[np.float64]] = []
        self._n_points = 0
        self._splits: list[tuple[float, ...]] = []
        self._trees: list[tuple[int, ...]] = []
        self._leaves: list[float] = []

    def add(self, fields: dict[str, str]) -> None:
        """Check and pack one tree."""
        if fields.get("is_linear", "0") != "0":
            raise UnsupportedModel("is linear")
        n = int(fields["num_leaves"]) - 1
        leaf_value = _numbers(fields["leaf_value"], n + 1)
        if n == 0:
            self.base_value += leaf_value[0]
            return
        feature, left, right = (_integers(fields[key], n) for key in ("split_feature", "left_child", "right_child"))
        count, leaf_count = _integers(fields["internal_count"], n), _integers(fields["leaf_count"], n + 1)
        if min(count) <= 0 or min(leaf_count) <= 0:
            raise UnsupportedModel("has a node without training rows")
        if not all(0 <= f < self.n_features for f in feature):
            raise UnsupportedModel("splits on a feature that the model does not have")

        def rows(child: int) -> int:
            return count[child] if child >= 0 else leaf_count[~child]

        nodes, position = [_Node(0, {})], {0: 0}
        most_features = 0
        for node in nodes:  # parents before children
            f, share = feature[node.split], node.path.get(feature[node.split], (1.0, 0))[0]
            if rows(left[node.split]) + rows(right[node.split]) != count[node.split]:
                raise UnsupportedModel("has training rows that don't add up")
            for child, went_left in ((left[node.split], 1), (right[node.split], 0)):
                path = node.path | {f: (share * rows(child) / count[node.split], 2 * position[node.split] + went_left)}
                most_features = max(most_features, len(path))
                if child >= 0:
                    if child in position:
                        raise UnsupportedModel("reaches a node twice")
                    position[child] = len(nodes)
                    nodes.append(_Node(child, path))
        if len(nodes) != n or sorted(~child for child in left + right if child < 0) != list(range(n + 1)):
            raise UnsupportedModel("does not reach every node once")
        if most_features > MAX_FEATURES_ON_A_PATH:
            raise UnsupportedModel(
                f"has {most_features} features on one path; at most {MAX_FEATURES_ON_A_PATH} are exact"
            )

        n_points = (most_features + 1) // 2
        operands = self._operands_of(fields, feature)
        thresholds = _numbers(fields["threshold"], n)
        self._trees.append((len(self._splits), n, len(self._leaves), n_points, self._weights_at(n_points)))
        for node in nodes:
            i = node.split
            share, earlier = node.path.get(feature[i], (1.0, 2 * n))
            operand, categorical = operands[i]
            self._splits.append(
                (
                    0.5 if categorical else float(np.clip(thresholds[i], -kernels.LARGEST, kernels.LARGEST)),
                    rows(left[i]) / count[i],
                    operand,
                    *(position[child] if child >= 0 else n + ~child for child in (left[i], right[i])),
                    earlier,
                    self._coefficients_at(share, n_points),
                    feature[i],
                )
            )
        self._leaves += leaf_value
        self.base_value += sum(value * rows / count[0] for value, rows in zip(leaf_value, leaf_count, strict=True))

    def _operands_of(self, fields: dict[str, str], feature: list[int]) -> list[tuple[int, bool]]:
        """Return for each split its operand's number and whether it is categorical."""
        n, n_sets = len(feature), int(fields["num_cat"])
        sets: list[tuple[int, ...]] = []
        if n_sets:
            bounds = _integers(fields["cat_boundaries"], n_sets + 1)
            words = _integers(fields["cat_threshold"], bounds[-1])
            sets = [tuple(words[start:end]) for start, end in pairwise(bounds)]
        kinds = {(0, 0): kernels.PLAIN, (0, 2): kernels.PLAIN, (4, 0): kernels.ZERO_RIGHT, (4, 2): kernels.ZERO_LEFT}
        kinds |= {(8, 0): kernels.NAN_RIGHT, (8, 2): kernels.NAN_LEFT}
        operands = []
        for decision, threshold, f in zip(
            _integers(fields["decision_type"], n), _numbers(fields["threshold"], n), feature, strict=True
        ):
            if decision & 1:
                if not 0 <= threshold < n_sets:
                    raise UnsupportedModel("has a categorical split without its categories")
                key = (f, kernels.CATEGORIES, sets[int(threshold)])
            else:
                key = (f, kinds[decision & 12, decision & 2], ())
            operands.append((self._operands.setdefault(key, len(self._operands)), bool(decision & 1)))
        return operands

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
        operands, words = [], [0]
        for feature, kind, category_words in self._operands:
            operands.append((feature, kind, len(words), len(category_words)))
            words += category_words
        return (
            np.array(operands, kernels.OPERAND),
            np.array(words, np.uint32),
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
    """Return points and weights on [0, 1], filled up to whole lanes by points of no weight."""
    t, weights = np.polynomial.legendre.leggauss(n_points)
    fill = (0, -n_points % WIDTH)
    return np.pad((t + 1) / 2, fill, constant_values=0.5), np.pad(weights / 2, fill)


def _numbers(text: str, size: int) -> list[float]:
    values = [float(item) for item in text.split()]
    if len(values) != size or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} finite numbers where {size} belong")
    return values


def _integers(text: str, size: int) -> list[int]:
    values = [int(item) for item in text.split()]
    if len(values) != size:
        raise ValueError(f"{len(values)} whole numbers where {size} belong")
    return values
