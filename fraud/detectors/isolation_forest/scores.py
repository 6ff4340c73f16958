"""The anomaly score of Liu, Ting & Zhou (2008, doi:10.1109/ICDM.2008.17), written so that trees' leaves add up to it.

The score of a row is 2^(-E[h] / c(psi)), with h the path length in a tree grown on psi rows: the depth of the leaf plus
c(n), the mean depth that its n rows would still be split to. Each leaf holds -h / (trees c(psi)), so the sum over the
trees is the score's logarithm to base 2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fraud.compiling import compiled
from fraud.detectors.trees.structure import Forest, Tree
from fraud.errors import BundleError

Vector = NDArray[np.float64]

LOG_2_POWERS = tuple(math.log(2.0) ** k / math.factorial(k) for k in range(13, -1, -1))
"""The Taylor series of 2^x at 0, the highest power first: exact to the last bit or two for |x| <= 1/2."""


def mean_path_length(n: int) -> float:
    """Return c(n), the mean depth of a leaf in a random tree on n rows: 2 (H(n - 1) - (n - 1) / n), H by Euler."""
    if n <= 1:
        return 0.0
    if n == 2:
        return 1.0
    return 2.0 * (math.log(n - 1.0) + float(np.euler_gamma)) - 2.0 * (n - 1.0) / n


def leaf_value(depth: int, n_rows: int, n_trees: int, psi: int) -> float:
    """Return what a leaf at a depth holds, with the number of its rows, of all trees, and of a tree's rows."""
    return -(depth + mean_path_length(n_rows)) / (n_trees * mean_path_length(psi))


def leaf_values(tree: Tree, n_trees: int) -> list[float]:
    """Return what the leaves of an isolation tree hold; a tree that could not split holds the mean path length."""
    if not tree.splits:
        return [-1.0 / n_trees]
    depths, values = [0] * len(tree.splits), [0.0] * len(tree.leaf_values)
    psi = tree.splits[0].n_rows
    for parent, split in enumerate(tree.splits):  # parents come before their children
        for child in (split.left, split.right):
            if child >= 0:
                depths[child] = depths[parent] + 1
            else:
                values[~child] = leaf_value(depths[parent] + 1, tree.leaf_rows[~child], n_trees, psi)
    return values


def expect_isolation_forest(forest: Forest) -> None:
    """Check that every leaf holds its path length, so that a score lies in (0, 1] and is the published one.

    Raises
    ------
    BundleError
        There is no tree, trees were grown on different numbers of rows, or a leaf holds another number.
    """
    if not forest.trees:
        raise BundleError("an isolation forest has at least one tree")
    sizes = {tree.splits[0].n_rows for tree in forest.trees if tree.splits}
    if len(sizes) > 1 or min(sizes, default=2) < 2:
        raise BundleError(f"the trees of an isolation forest are grown on equally many rows, not {sorted(sizes)[:5]}")
    for number, tree in enumerate(forest.trees):
        for leaf, (found, expected) in enumerate(
            zip(tree.leaf_values, leaf_values(tree, len(forest.trees)), strict=True)
        ):
            if found != expected:
                raise BundleError(
                    f"leaf {leaf} of tree {number} holds {found}, its path length is {expected}: no isolation forest"
                )


@compiled
def power_of_two(exponents: Vector) -> Vector:
    """Return 2^x (n,) for x (n,) float64, 0 or below: of the same bits on every machine, unlike its libraries' own."""
    powers = np.empty(len(exponents))
    for i in range(len(exponents)):
        whole = np.rint(exponents[i])
        rest = exponents[i] - whole
        power = 0.0
        for coefficient in LOG_2_POWERS:
            power = power * rest + coefficient
        powers[i] = math.ldexp(power, int(whole))
    return powers
