"""Read LightGBM's text model into checked trees.

LightGBM trusts its text: a wrong size or child makes it abort the process or read beyond its arrays. A booster comes
with a bundle, from elsewhere, so it is read and checked here before LightGBM sees it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

from fraud.errors import BundleError


class MalformedBooster(BundleError):
    """The text is no consistent model."""


@dataclass(frozen=True)
class Split:
    """An inner node; `left` and `right` are splits from 0 up, or leaves as ~leaf."""

    feature: int
    threshold: float
    left: int
    right: int
    n_rows: int  # of the training data
    default_left: bool
    missing: str  # what goes the default way: "none", "zero" or "nan"
    categories: tuple[int, ...] | None  # bit sets of 32 codes a word that go left; None for a numeric split


@dataclass(frozen=True)
class Tree:
    """One tree: every split and leaf is reached once from split 0; a constant tree is one leaf without splits."""

    splits: tuple[Split, ...]
    leaf_values: tuple[float, ...]
    leaf_rows: tuple[int, ...]
    linear: bool

    def rows_of(self, child: int) -> int:
        """Return the number of training rows at a child of a split."""
        return self.splits[child].n_rows if child >= 0 else self.leaf_rows[~child]


@dataclass(frozen=True)
class ParsedBooster:
    """What a text model says."""

    n_features: int
    n_outputs: int
    trees: tuple[Tree, ...]


def parse_booster(text: str) -> ParsedBooster:
    """Return the checked trees of LightGBM's text model.

    Raises
    ------
    MalformedBooster
        Its parts are missing, do not fit each other, or are no trees.
    """
    body, end, _ = text.partition("\nend of trees")
    if not end or not text.startswith("tree\n"):
        raise MalformedBooster("the booster is not LightGBM's text model: it has no 'tree' header and 'end of trees'")
    header, *parts = body.split("\nTree=")
    try:
        fields = dict(line.partition("=")[::2] for line in header.split("\n"))
        n_features, n_outputs = int(fields["max_feature_idx"]) + 1, int(fields["num_tree_per_iteration"])
        sizes = [int(size) for size in fields["tree_sizes"].split()]
    except (KeyError, ValueError) as error:
        raise MalformedBooster(f"the booster's header cannot be read: {error!r}") from error
    starts = list(accumulate((len(f"\nTree={part}") for part in parts), initial=0))
    if not body[len(header) :].isascii() or list(accumulate(sizes, initial=0)) != starts:
        raise MalformedBooster("the booster's tree_sizes are not the sizes of its trees")
    trees = []
    for number, part in enumerate(parts):
        try:
            trees.append(_tree(part, n_features))
        except (KeyError, ValueError, IndexError, OverflowError) as error:
            raise MalformedBooster(f"tree {number} of the booster cannot be read: {error!r}") from error
        except MalformedBooster as error:
            raise MalformedBooster(f"tree {number} of the booster {error.message}") from None
    return ParsedBooster(n_features, n_outputs, tuple(trees))


def _tree(part: str, n_features: int) -> Tree:
    _, *lines = part.rstrip("\n").split("\n")
    fields = dict(line.split("=", 1) for line in lines)
    n = int(fields["num_leaves"]) - 1
    leaf_values = _floats(fields["leaf_value"], n + 1)
    if not all(map(math.isfinite, leaf_values)):
        raise MalformedBooster("has an infinite leaf")
    linear = fields.get("is_linear", "0") != "0"
    if n == 0:
        return Tree((), leaf_values, (), linear)
    columns = (
        _integers(fields["split_feature"], n),
        _floats(fields["threshold"], n),
        _integers(fields["left_child"], n),
        _integers(fields["right_child"], n),
        _integers(fields["internal_count"], n),
        _integers(fields["decision_type"], n),
    )
    sets = _category_sets(fields)
    splits = []
    for feature, threshold, left, right, n_rows, decision in zip(*columns, strict=True):
        if not 0 <= feature < n_features:
            raise MalformedBooster(f"splits on feature {feature} of {n_features}")
        categories = None
        if decision & 1:
            if not 0 <= threshold < len(sets):
                raise MalformedBooster("has a categorical split without its categories")
            categories = sets[int(threshold)]
        missing = ("none", "zero", "nan")[decision >> 2]
        splits.append(Split(feature, threshold, left, right, n_rows, bool(decision & 2), missing, categories))
    if sorted(child for split in splits for child in (split.left, split.right)) != [*range(-n - 1, 0), *range(1, n)]:
        raise MalformedBooster("does not reach every split and leaf once")
    if any(0 <= child <= parent for parent, split in enumerate(splits) for child in (split.left, split.right)):
        raise MalformedBooster("has a split above its parent")
    return Tree(tuple(splits), leaf_values, _integers(fields["leaf_count"], n + 1), linear)


def _category_sets(fields: dict[str, str]) -> list[tuple[int, ...]]:
    n_sets = int(fields["num_cat"])
    if n_sets == 0:
        return []
    bounds = _integers(fields["cat_boundaries"], n_sets + 1)
    words = _integers(fields["cat_threshold"], bounds[-1])
    if bounds[0] != 0 or any(start > end for start, end in pairwise(bounds)):
        raise MalformedBooster("has category sets that overlap")
    if not all(0 <= word < 2**32 for word in words):
        raise MalformedBooster("has category sets that are no 32-bit words")
    return [words[start:end] for start, end in pairwise(bounds)]


def _floats(text: str, size: int) -> tuple[float, ...]:
    values = tuple(map(float, text.split()))
    if len(values) != size or any(map(math.isnan, values)):
        raise ValueError(f"not {size} numbers but {text[:100]!r}")
    return values


def _integers(text: str, size: int) -> tuple[int, ...]:
    values = tuple(map(int, text.split()))
    if len(values) != size:
        raise ValueError(f"not {size} whole numbers but {text[:100]!r}")
    return values
