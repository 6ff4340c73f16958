"""Decision trees as plain data, whichever library grew them.

A tree is checked when it is made, so the kernels follow child indices without bounds checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fraud.errors import BundleError

MAX_DEPTH = 512
"""Splits on one path: libraries walk down by recursion, and keep room for the square of it."""
MAX_CONTRIBUTION_WORK = 200_000_000
"""Leaves times squared depth, summed over the trees: what Lundberg's algorithm does for a row, about a second."""
INT32 = 2**31 - 1

Missing = Literal["none", "zero", "nan"]


class MalformedTree(BundleError):
    """The parts do not form a tree."""


class UnsupportedModel(BundleError):
    """The model is consistent, but uses a feature that is not supported here, or not verified for contributions."""


@dataclass(frozen=True)
class Split:
    """An inner node; `left` and `right` are splits from 0 up, or leaves as ~leaf."""

    feature: int
    threshold: float
    left: int
    right: int
    n_rows: int  # of the training data
    default_left: bool
    missing: Missing  # what goes the default way
    categories: tuple[int, ...] | None  # bit sets of 32 codes a word that go left; None for a numeric split


@dataclass(frozen=True)
class Tree:
    """One tree: every split and leaf is reached once from split 0; a constant tree is one leaf without splits.

    Raises
    ------
    MalformedTree
        It is not a tree, is deeper than `MAX_DEPTH`, or holds numbers that no library writes.
    """

    splits: tuple[Split, ...]
    leaf_values: tuple[float, ...]
    leaf_rows: tuple[int, ...]  # of the training data; none for a constant tree

    def __post_init__(self) -> None:
        n = len(self.splits)
        if len(self.leaf_values) != n + 1 or len(self.leaf_rows) != (n + 1 if n else 0):
            raise MalformedTree(f"has {len(self.leaf_values)} leaves for {n} splits")
        if not all(map(math.isfinite, self.leaf_values)):
            raise MalformedTree("has an infinite leaf")
        children = [child for split in self.splits for child in (split.left, split.right)]
        if n and sorted(children) != [*range(-n - 1, 0), *range(1, n)]:
            raise MalformedTree("does not reach every split and leaf once")
        if any(0 <= child <= parent // 2 for parent, child in enumerate(children)):
            raise MalformedTree("has a split above its parent")
        if not all(abs(rows) <= INT32 for rows in (*self.leaf_rows, *(split.n_rows for split in self.splits))):
            raise MalformedTree(f"counts more than {INT32} training rows")
        if self.depth > MAX_DEPTH:
            raise MalformedTree(f"is {self.depth} splits deep; at most {MAX_DEPTH} are allowed")

    @cached_property
    def depth(self) -> int:
        """The most splits on a path from the root to a leaf."""
        depths = [1] * len(self.splits)
        for parent, split in enumerate(self.splits):
            for child in (split.left, split.right):
                if child >= 0:
                    depths[child] = depths[parent] + 1
        return max(depths, default=0)

    def rows_of(self, child: int) -> int:
        """Return the number of training rows at a child of a split."""
        return self.splits[child].n_rows if child >= 0 else self.leaf_rows[~child]


@dataclass(frozen=True)
class Forest:
    """Trees whose leaves add up to a raw score.

    Raises
    ------
    MalformedTree
        A tree splits on a feature that does not exist, or exact contributions of one row would take seconds.
    """

    n_features: int
    trees: tuple[Tree, ...]

    def __post_init__(self) -> None:
        for number, tree in enumerate(self.trees):
            for split in tree.splits:
                if not 0 <= split.feature < self.n_features:
                    raise MalformedTree(f"tree {number} splits on feature {split.feature} of {self.n_features}")
        if self.contribution_work > MAX_CONTRIBUTION_WORK:
            raise MalformedTree(
                f"the trees' leaves times squared depths add up to {self.contribution_work}; "
                f"{MAX_CONTRIBUTION_WORK} are allowed"
            )

    @cached_property
    def contribution_work(self) -> int:
        """Leaves times squared depth, summed over the trees."""
        return sum(len(tree.leaf_values) * tree.depth**2 for tree in self.trees)
