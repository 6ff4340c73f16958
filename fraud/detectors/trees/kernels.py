"""The numba kernels of trees: scores, and TreeSHAP for one row with lanes over points, or eight with lanes over rows.

TreeSHAP's two do the same floating-point operations in the same order for each (row, point), so a row's contributions
have the same bits whether it comes alone or in a batch. All indices were checked when the model was packed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fraud.compiling import compiled, compiled_short
from fraud.detectors.trees.lanes import WIDTH, aligned, at_most, fma, load, mul, splat, store, sub
from fraud.detectors.trees.structure import Split

PLAIN, NAN_LEFT, NAN_RIGHT, ZERO_LEFT, ZERO_RIGHT, CATEGORIES = range(6)  # how an operand treats its feature's value
LARGEST = np.finfo(np.float64).max
ZERO_THRESHOLD = float(np.float32(1e-35))  # LightGBM's kZeroThreshold

OPERAND = np.dtype([("feature", "u4"), ("kind", "u4"), ("first_word", "u4"), ("n_words", "u4")])
SPLIT = np.dtype(
    [
        ("threshold", "f8"),  # left when operand <= threshold
        ("left_share", "f8"),  # of the node's training rows
        ("operand", "u4"),
        ("left", "u4"),  # child: a split below n_splits, else n_splits + leaf
        ("right", "u4"),
        ("earlier", "u4"),  # 2 * split + (went left) of the last split on this feature above; 2 * n_splits if none
        ("coefficients", "u4"),  # where its row of `points` starts
        ("feature", "u4"),
    ]
)
NODE = np.dtype([("threshold", "f8"), ("operand", "u4"), ("left", "u4"), ("right", "u4")])
"""A split, or a leaf, which is its own child."""
ROOT = np.dtype([("first_node", "i8"), ("depth", "i8")])
TREE = np.dtype(
    [("first_split", "i8"), ("n_splits", "i8"), ("first_leaf", "i8"), ("n_points", "i8"), ("weights", "i8")]
)


def threshold_of(split: Split) -> float:
    """Return what a split's operand is compared with: one that holds categories is 0 where it goes left."""
    return 0.5 if split.categories is not None else min(max(split.threshold, -LARGEST), LARGEST)


@compiled
def _operands(row: Any, operands: Any, words: Any, values: Any, lane: int, stride: int) -> None:
    """Write a row's operands, to be compared with `split.threshold`: missing values and categories are resolved."""
    for j in range(len(operands)):
        operand = operands[j]
        value = row[operand.feature]
        if abs(value) <= ZERO_THRESHOLD:
            value = 0.0
        if operand.kind == CATEGORIES:
            left = False
            if -1.0 < value < 2147483648.0:
                code = np.int64(value)
                if code >> 5 < operand.n_words:
                    left = (words[operand.first_word + (code >> 5)] >> np.uint32(code & 31)) & np.uint32(1) != 0
            value = 0.0 if left else 1.0
        elif operand.kind == PLAIN:
            value = 0.0 if np.isnan(value) else min(max(value, -LARGEST), LARGEST)
        elif operand.kind == NAN_LEFT or operand.kind == NAN_RIGHT:
            missing = -np.inf if operand.kind == NAN_LEFT else np.inf
            value = missing if np.isnan(value) else min(max(value, -LARGEST), LARGEST)
        else:
            missing = -np.inf if operand.kind == ZERO_LEFT else np.inf
            value = missing if np.isnan(value) or value == 0.0 else min(max(value, -LARGEST), LARGEST)
        values[j * stride + lane] = value


@compiled
def _next(node: Any, value: Any) -> Any:
    """Return the child of a node for the value of its operand, without a branch."""
    left, right = np.int64(node.left), np.int64(node.right)
    return right + (left - right) * np.int64(value <= node.threshold)


@compiled_short
def scores_by_tree(X: Any, operands: Any, words: Any, nodes: Any, values: Any, trees: Any, out: Any) -> None:
    """Write the raw scores (n,) of rows (n, n_features): a row walks eight trees at a time."""
    at = np.empty(WIDTH, np.int64)
    x = np.empty(len(operands))
    for i in range(len(X)):
        _operands(X[i], operands, words, x, 0, 1)
        score = 0.0
        for start in range(0, len(trees), WIDTH):
            n = min(WIDTH, len(trees) - start)
            depth = 0
            for lane in range(WIDTH):
                tree = trees[np.uint64(start + min(lane, n - 1))]
                at[lane] = tree.first_node
                depth = max(depth, tree.depth)
            for _ in range(depth):
                moved = 0
                for lane in range(WIDTH):
                    node = nodes[np.uint64(at[lane])]
                    child = _next(node, x[np.uint64(node.operand)])
                    moved |= child ^ at[lane]
                    at[lane] = child
                if moved == 0:
                    break
            for lane in range(n):
                score += values[np.uint64(at[lane])]
        out[i] = score


@compiled
def scores_by_row(X: Any, operands: Any, words: Any, nodes: Any, values: Any, trees: Any, out: Any) -> None:
    """Write the raw scores (n,) of rows (n, n_features): eight rows walk a tree, all rows one tree after another."""
    n_rows, n_operands = len(X), len(operands)
    x = np.empty(n_rows * n_operands)
    for i in range(n_rows):
        _operands(X[i], operands, words, x, i * n_operands, 1)
    at = np.empty(WIDTH, np.int64)
    out[:] = 0.0
    for t in range(len(trees)):
        tree = trees[t]
        for start in range(0, n_rows, WIDTH):
            n = min(WIDTH, n_rows - start)
            for lane in range(WIDTH):
                at[lane] = tree.first_node
            for _ in range(tree.depth):
                moved = 0
                for lane in range(WIDTH):
                    node = nodes[np.uint64(at[lane])]
                    row = start + min(lane, n - 1)
                    child = _next(node, x[np.uint64(row * n_operands + np.int64(node.operand))])
                    moved |= child ^ at[lane]
                    at[lane] = child
                if moved == 0:
                    break
            for lane in range(n):
                out[start + lane] += values[np.uint64(at[lane])]


@compiled
def one_row(row: Any, operands: Any, words: Any, splits: Any, trees: Any, leaves: Any, points: Any, out: Any) -> None:
    """Write the contributions (n_features,) of one row; see fraud.detectors.trees.treeshap for the formulas."""
    n_features = len(out)
    n_splits = 0
    for t in range(len(trees)):
        n_splits = max(n_splits, trees[t].n_splits)
    value = aligned(WIDTH * (2 * n_splits + 1))  # H on the way up, P on the way down
    factor, weighted = aligned(WIDTH * n_splits), aligned(WIDTH * n_splits)
    total = aligned(WIDTH * n_features)
    total[:] = 0.0
    step, follows = np.empty(n_splits), np.empty(2 * n_splits + 1)
    x = np.empty(len(operands))
    _operands(row, operands, words, x, 0, 1)
    for t in range(len(trees)):
        tree = trees[t]
        n, first = tree.n_splits, tree.first_split
        follows[2 * n] = 1.0
        for i in range(n):
            split = splits[np.uint64(first + i)]
            left = 1.0 if x[split.operand] <= split.threshold else 0.0
            unbroken = follows[split.earlier]
            unbroken_left = unbroken * left
            follows[np.uint64(2 * i + 1)] = unbroken_left
            follows[np.uint64(2 * i)] = unbroken - unbroken_left
            step[np.uint64(i)] = unbroken_left - unbroken * split.left_share
        for chunk in range((tree.n_points + WIDTH - 1) // WIDTH):
            for leaf in range(n + 1):
                store(value, (n + leaf) * WIDTH, splat(leaves[np.uint64(tree.first_leaf + leaf)]))
            for i in range(n - 1, -1, -1):
                split = splits[np.uint64(first + i)]
                s = splat(step[np.uint64(i)])
                h = load(points, np.int64(split.coefficients) + chunk * 2 * WIDTH)
                right = load(value, np.int64(split.right) * WIDTH)
                difference = sub(load(value, np.int64(split.left) * WIDTH), right)
                f = fma(s, h, splat(split.left_share))
                store(factor, i * WIDTH, f)
                store(weighted, i * WIDTH, mul(difference, s))
                store(value, i * WIDTH, fma(f, difference, right))
            store(value, 0, load(points, tree.weights + chunk * WIDTH))
            for i in range(n):
                split = splits[np.uint64(first + i)]
                path = load(value, i * WIDTH)
                c = load(points, np.int64(split.coefficients) + chunk * 2 * WIDTH + WIDTH)
                at = np.int64(split.feature) * WIDTH
                store(total, at, fma(mul(path, c), load(weighted, i * WIDTH), load(total, at)))
                path_left = mul(path, load(factor, i * WIDTH))
                store(value, np.int64(split.left) * WIDTH, path_left)
                store(value, np.int64(split.right) * WIDTH, sub(path, path_left))
    for j in range(n_features):
        contribution = 0.0
        for point in range(WIDTH):
            contribution += total[j * WIDTH + point]
        out[j] = contribution


@compiled
def _place(child: Any, n_splits: int, stride: int) -> Any:
    """Return where a child's values start, and their step: a leaf's value is the same at every point."""
    node = np.int64(child)
    if node < n_splits:
        return node * stride, WIDTH
    return n_splits * stride + (node - n_splits) * WIDTH, 0


@compiled
def _tree_of_eight_rows(
    chunk_points: Any, chunk: int, tree: Any, splits: Any, leaves: Any, points: Any, step: Any, value: Any,
    weighted: Any, total: Any,
) -> None:  # fmt: skip
    """Add one tree's share at `len(chunk_points)` points: a tuple, so that the loops over it have a fixed count."""
    n_points = len(chunk_points)
    stride = n_points * WIDTH
    n, first = tree.n_splits, tree.first_split
    for leaf in range(n + 1):
        store(value, n * stride + leaf * WIDTH, splat(leaves[np.uint64(tree.first_leaf + leaf)]))
    for i in range(n - 1, -1, -1):
        split = splits[np.uint64(first + i)]
        s, share = load(step, i * WIDTH), splat(split.left_share)
        left_at, left_step = _place(split.left, n, stride)
        right_at, right_step = _place(split.right, n, stride)
        h_at = np.int64(split.coefficients) + chunk * 2 * WIDTH
        for q in range(n_points):
            right = load(value, right_at + q * right_step)
            difference = sub(load(value, left_at + q * left_step), right)
            f = fma(s, splat(points[np.uint64(h_at + q)]), share)
            store(weighted, i * stride + q * WIDTH, mul(difference, s))
            store(value, i * stride + q * WIDTH, fma(f, difference, right))
    for q in range(n_points):
        store(value, q * WIDTH, splat(points[np.uint64(tree.weights + chunk * WIDTH + q)]))
    for i in range(n):
        split = splits[np.uint64(first + i)]
        s, share = load(step, i * WIDTH), splat(split.left_share)
        left_at, left_step = _place(split.left, n, stride)
        right_at, right_step = _place(split.right, n, stride)
        h_at = np.int64(split.coefficients) + chunk * 2 * WIDTH
        total_at = np.int64(split.feature) * WIDTH * WIDTH
        for q in range(n_points):
            path = load(value, i * stride + q * WIDTH)
            c = splat(points[np.uint64(h_at + WIDTH + q)])
            at = total_at + q * WIDTH
            store(total, at, fma(mul(path, c), load(weighted, i * stride + q * WIDTH), load(total, at)))
            path_left = mul(path, fma(s, splat(points[np.uint64(h_at + q)]), share))
            store(value, left_at + q * left_step, path_left)
            store(value, right_at + q * right_step, sub(path, path_left))


@compiled
def eight_rows(X: Any, operands: Any, words: Any, splits: Any, trees: Any, leaves: Any, points: Any, out: Any) -> None:
    """Write the contributions (n, n_features) of rows (n, n_features), eight at a time."""
    n_rows, n_features = out.shape
    n_splits = 0
    for t in range(len(trees)):
        n_splits = max(n_splits, trees[t].n_splits)
    value = aligned(WIDTH * (WIDTH * n_splits + n_splits + 1))
    weighted = aligned(WIDTH * WIDTH * n_splits)
    total = aligned(WIDTH * WIDTH * n_features)  # by feature, point, row
    step, follows = aligned(WIDTH * n_splits), aligned(WIDTH * (2 * n_splits + 1))
    x = aligned(WIDTH * len(operands))
    for start in range(0, n_rows, WIDTH):
        for lane in range(WIDTH):
            _operands(X[min(start + lane, n_rows - 1)], operands, words, x, lane, WIDTH)
        total[:] = 0.0
        for t in range(len(trees)):
            tree = trees[t]
            n, first = tree.n_splits, tree.first_split
            store(follows, 2 * n * WIDTH, splat(1.0))
            for i in range(n):
                split = splits[np.uint64(first + i)]
                left = at_most(load(x, np.int64(split.operand) * WIDTH), splat(split.threshold))
                unbroken = load(follows, np.int64(split.earlier) * WIDTH)
                unbroken_left = mul(unbroken, left)
                store(follows, (2 * i + 1) * WIDTH, unbroken_left)
                store(follows, 2 * i * WIDTH, sub(unbroken, unbroken_left))
                store(step, i * WIDTH, sub(unbroken_left, mul(unbroken, splat(split.left_share))))
            for chunk in range((tree.n_points + WIDTH - 1) // WIDTH):
                left_over = tree.n_points - chunk * WIDTH
                rest = (chunk, tree, splits, leaves, points, step, value, weighted, total)
                if left_over <= 2:
                    _tree_of_eight_rows((0,) * 2, *rest)
                elif left_over <= 4:
                    _tree_of_eight_rows((0,) * 4, *rest)
                elif left_over <= 6:
                    _tree_of_eight_rows((0,) * 6, *rest)
                else:
                    _tree_of_eight_rows((0,) * 8, *rest)
        for lane in range(min(WIDTH, n_rows - start)):
            for j in range(n_features):
                contribution = 0.0
                for point in range(WIDTH):
                    contribution += total[(j * WIDTH + point) * WIDTH + lane]
                out[start + lane, j] = contribution
