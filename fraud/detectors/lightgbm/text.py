"""LightGBM's text model: read into checked trees, and written again from them.

LightGBM trusts its text: a wrong size or child makes it abort the process or read beyond its arrays, and it ends lines
and splits values where another reader does not. A bundle's text is untrusted. So it is parsed and checked here, and
LightGBM only ever reads text written from the checked trees.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

from fraud.detectors.trees.structure import Forest, MalformedTree, Missing, Split, Tree, UnsupportedModel
from fraud.errors import BundleError

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
MISSING: tuple[Missing, ...] = ("none", "zero", "nan")
CATEGORICAL, DEFAULT_LEFT = 1, 2  # bits of decision_type; the kind of missing value is in the bits above
HEADER_FIELDS = {
    *("version", "num_class", "num_tree_per_iteration", "label_index", "max_feature_idx", "objective", "feature_names"),
    *("feature_infos", "monotone_constraints", "tree_sizes", "average_output", "parser", "tree", ""),
}
TREE_FIELDS = {
    *("num_leaves", "num_cat", "split_feature", "split_gain", "threshold", "decision_type", "left_child"),
    *("right_child", "leaf_value", "leaf_weight", "leaf_count", "internal_value", "internal_weight", "internal_count"),
    *("cat_boundaries", "cat_threshold", "is_linear", "leaf_const", "num_features", "leaf_features", "leaf_coeff"),
    *("shrinkage", ""),
}


class MalformedBooster(BundleError):
    """The text is not a consistent model."""


def read_text(text: str) -> Forest:
    """Return the checked trees of LightGBM's text model.

    Raises
    ------
    MalformedBooster
        Parts are missing or inconsistent, or are not trees.
    UnsupportedModel
        It has several outputs, or its leaves are linear models.
    """
    body, end, _ = text.partition("\nend of trees")
    if not end or not text.startswith("tree\n"):
        raise MalformedBooster("the booster is not LightGBM's text model: it has no 'tree' header and 'end of trees'")
    if found := CONTROL.search(body):
        raise MalformedBooster(f"the booster holds the control character {found[0]!r}, which ends lines for LightGBM")
    header, *parts = body.split("\nTree=")
    try:
        fields = _fields(header.split("\n"), HEADER_FIELDS)
        n_features, n_outputs = int(fields["max_feature_idx"]) + 1, int(fields["num_tree_per_iteration"])
        sizes = [int(size) for size in fields["tree_sizes"].split()]
        n_names = len(fields["feature_names"].split(" "))
    except (KeyError, ValueError) as error:
        raise MalformedBooster(f"the booster's header cannot be read: {error!r}") from error
    if n_outputs != 1:
        raise UnsupportedModel(f"the booster has {n_outputs} outputs; a fraud model has one")
    if n_features != n_names:
        raise MalformedBooster(f"the booster is of {n_features} features and names {n_names}")
    starts = list(accumulate((len(f"\nTree={part}") for part in parts), initial=0))
    if not body[len(header) :].isascii() or list(accumulate(sizes, initial=0)) != starts:
        raise MalformedBooster("the booster's tree_sizes are not the sizes of its trees")
    return Forest(n_features, tuple(_trees(parts, n_features)))


def write_text(forest: Forest) -> str:
    """Return the text from which LightGBM makes these trees: the same scores and contributions, bit for bit.

    Names, gains, the objective and the training parameters are left out: neither needs them.
    """
    trees = [_tree_text(number, tree) for number, tree in enumerate(forest.trees)]
    header = {
        "version": "v4",
        "num_class": 1,
        "num_tree_per_iteration": 1,
        "label_index": 0,
        "max_feature_idx": forest.n_features - 1,
        "feature_names": _joined(f"f{i}" for i in range(forest.n_features)),
        "feature_infos": _joined("none" for _ in range(forest.n_features)),
        "tree_sizes": _joined(map(len, trees)),
    }
    return f"tree\n{_lines(header)}\n{''.join(trees)}end of trees\n"


def _trees(parts: list[str], n_features: int) -> Iterator[Tree]:
    for number, part in enumerate(parts):
        try:
            yield _tree(part, n_features)
        except (KeyError, ValueError, IndexError, OverflowError) as error:
            raise MalformedBooster(f"tree {number} of the booster cannot be read: {error!r}") from error
        except MalformedTree as error:
            raise MalformedBooster(f"tree {number} of the booster {error.message}") from None
        except UnsupportedModel as error:
            raise UnsupportedModel(f"tree {number} of the booster {error.message}") from None


def _tree(part: str, n_features: int) -> Tree:
    _, *lines = part.rstrip("\n").split("\n")
    fields = _fields(lines, TREE_FIELDS)
    if fields.get("is_linear", "0") != "0":
        raise UnsupportedModel("is linear; a leaf must be a number")
    n = int(fields["num_leaves"]) - 1
    leaf_values = _floats(fields["leaf_value"], n + 1)
    if n == 0:
        return Tree((), leaf_values, ())
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
            raise MalformedTree(f"splits on feature {feature} of {n_features}")
        if not 0 <= decision < len(MISSING) << 2:
            raise ValueError(f"no decision_type but {decision}")
        categories = None
        if decision & CATEGORICAL:
            if not (0 <= threshold < len(sets) and threshold.is_integer()):
                raise MalformedTree("has a categorical split without its categories")
            categories = sets[int(threshold)]
        default_left, missing = bool(decision & DEFAULT_LEFT), MISSING[decision >> 2]
        splits.append(Split(feature, threshold, left, right, n_rows, default_left, missing, categories))
    return Tree(tuple(splits), leaf_values, _integers(fields["leaf_count"], n + 1))


def _category_sets(fields: dict[str, str]) -> list[tuple[int, ...]]:
    n_sets = int(fields["num_cat"])
    if n_sets == 0:
        return []
    bounds = _integers(fields["cat_boundaries"], n_sets + 1)
    words = _integers(fields["cat_threshold"], bounds[-1])
    if bounds[0] != 0 or any(start > end for start, end in pairwise(bounds)):
        raise MalformedTree("has category sets that overlap")
    if not all(0 <= word < 2**32 for word in words):
        raise MalformedTree("has category sets that are no 32-bit words")
    return [words[start:end] for start, end in pairwise(bounds)]


def _tree_text(number: int, tree: Tree) -> str:
    sets: list[tuple[int, ...]] = []
    thresholds: list[str] = []
    for split in tree.splits:
        thresholds.append(repr(split.threshold) if split.categories is None else str(len(sets)))
        if split.categories is not None:
            sets.append(split.categories)
    fields: dict[str, object] = {"num_leaves": len(tree.leaf_values), "num_cat": len(sets)}
    if tree.splits:
        fields |= {
            "split_feature": _joined(split.feature for split in tree.splits),
            "threshold": _joined(thresholds),
            "decision_type": _joined(_decision(split) for split in tree.splits),
            "left_child": _joined(split.left for split in tree.splits),
            "right_child": _joined(split.right for split in tree.splits),
            "leaf_count": _joined(tree.leaf_rows),
            "internal_count": _joined(split.n_rows for split in tree.splits),
        }
    fields["leaf_value"] = _joined(map(repr, tree.leaf_values))
    if sets:
        fields["cat_boundaries"] = _joined(accumulate(map(len, sets), initial=0))
        fields["cat_threshold"] = _joined(word for words in sets for word in words)
    return f"Tree={number}\n{_lines(fields)}\n\n"


def _decision(split: Split) -> int:
    kind = CATEGORICAL * (split.categories is not None) | DEFAULT_LEFT * split.default_left
    return kind | MISSING.index(split.missing) << 2


def _fields(lines: Iterable[str], known: set[str]) -> dict[str, str]:
    """Return the values by name; a repeated or unknown name is refused."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition("=")
        if name not in known:
            raise ValueError(f"no field of a booster: {name[:100]!r}")
        if name and name in fields:
            raise ValueError(f"two lines for {name}")
        fields[name] = value
    return fields


def _lines(fields: dict[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in fields.items())


def _joined(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _floats(text: str, size: int) -> tuple[float, ...]:
    values = tuple(map(float, text.split()))
    if len(values) != size or any(value != value for value in values):
        raise ValueError(f"not {size} numbers but {text[:100]!r}")
    return values


def _integers(text: str, size: int) -> tuple[int, ...]:
    values = tuple(map(int, text.split()))
    if len(values) != size:
        raise ValueError(f"not {size} whole numbers but {text[:100]!r}")
    return values
