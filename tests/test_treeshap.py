"""TreeShap against LightGBM's own pred_contrib, on every kind of model that either can hold."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fraud.detectors.lightgbm.text import MalformedBooster, read_text
from fraud.detectors.trees.structure import UnsupportedModel
from fraud.detectors.trees.treeshap import TreeShap

Matrix = NDArray[np.float64]
QUIET = {"objective": "binary", "verbosity": -1, "num_threads": 1, "deterministic": True, "min_data_in_leaf": 5}
FIRST_CATEGORICAL = 6  # of the 8 features of `table`: 6 numeric, one of 4 categories, one of 40


def table(n_rows: int = 600, missing: float = 0.1, seed: int = 1) -> tuple[Matrix, NDArray[np.float64]]:
    """Numeric columns with zeros, categorical ones, and values missing from both."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_rows, 8)).round(1)
    X[:, 6], X[:, 7] = rng.integers(0, 4, n_rows), rng.integers(0, 40, n_rows)
    effect = rng.normal(size=40)
    margin = (
        X[:, 0] * X[:, 1] + np.abs(X[:, 2]) + (X[:, 6] == 2) + effect[X[:, 7].astype(int)] + rng.normal(size=n_rows)
    )
    X[rng.random(X.shape) < missing] = np.nan
    return X, (margin > 0.8).astype(np.float64)


def train(
    params: dict[str, Any] | None = None, n_trees: int = 15, categorical: bool = True, **data: Any
) -> lgb.Booster:
    X, y = table(**data)
    columns = [6, 7] if categorical else []
    return lgb.train(QUIET | (params or {}), lgb.Dataset(X, y, categorical_feature=columns), n_trees)


def hard_rows(shap: TreeShap, n_rows: int = 120, seed: int = 2) -> Matrix:
    """Rows of the values that a reimplementation gets wrong, the model's own thresholds among them."""
    rng = np.random.default_rng(seed)
    odd = [np.nan, 0.0, -0.0, 1e-36, -1e-36, 1e-35, 2e-35, np.inf, -np.inf, 1.7e308, -1.0, -0.5, 0.5, 2.9, 31.0, 32.0]
    odd += [63.5, 64.0, 1e6, 2147483647.0, 2147483648.0, 1e300]
    X = np.empty((n_rows, shap.n_features))
    for j, values in enumerate(shap.thresholds):
        with np.errstate(over="ignore"):
            around = np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)])
        usual = rng.normal(size=n_rows)
        choices = [usual, rng.choice(odd, n_rows), rng.choice(around, n_rows) if len(around) else usual]
        X[:, j] = np.choose(rng.integers(0, 3, n_rows), choices)
    X[0], X[-1] = np.nan, 0.0
    return X


def check(booster: lgb.Booster, tolerance: float = 1e-9) -> TreeShap:
    """Assert that both kernels agree with pred_contrib on rows of the table and on hard ones."""
    text = booster.model_to_string()
    oracle = lgb.Booster(model_str=text)
    shap = TreeShap(read_text(text))
    X = hard_rows(shap)
    if shap.n_features == 8:
        X = np.concatenate([X, table(80, missing=0.3, seed=3)[0]])
    expected = oracle.predict(X, pred_contrib=True, num_threads=1)
    contributions = shap.contributions(X)
    np.testing.assert_allclose(contributions, expected, rtol=0, atol=tolerance)
    margins = oracle.predict(X, raw_score=True, num_threads=1)
    np.testing.assert_allclose(contributions.sum(axis=1), margins, rtol=0, atol=tolerance)
    for i in range(0, len(X), 7):
        np.testing.assert_array_equal(shap.contributions(X[i : i + 1])[0], contributions[i])
    return shap


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_hot_categories": {"max_cat_to_onehot": 64},
    "many_categories": {"max_cat_to_onehot": 1, "min_data_per_group": 1, "cat_smooth": 0.1, "cat_l2": 0.1},
    "zero_as_missing": {"zero_as_missing": True},
    "use_missing_false": {"use_missing": False},
    "bagging": {"bagging_fraction": 0.5, "bagging_freq": 1, "feature_fraction": 0.5},
    "random_forest": {"boosting": "rf", "bagging_fraction": 0.6, "bagging_freq": 1},
    "dart": {"boosting": "dart", "drop_rate": 0.5},
    "goss": {"data_sample_strategy": "goss", "learning_rate": 0.5},
    "quantised": {"use_quantized_grad": True},
    "monotone": {"monotone_constraints": [1, -1, 0, 0, 0, 0, 0, 0]},
    "extra_trees": {"extra_trees": True, "path_smooth": 1.0},
    "stumps": {"num_leaves": 2},
    "255_leaves": {"num_leaves": 255, "min_data_in_leaf": 1, "min_sum_hessian_in_leaf": 0.0},
    "regression": {"objective": "regression"},
    "unbalanced": {"is_unbalance": True},
}


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_equals_pred_contrib(params: dict[str, Any]) -> None:
    check(train(params))


@pytest.mark.parametrize("categorical", [True, False])
@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_equals_pred_contrib_whatever_is_missing(categorical: bool, missing: float) -> None:
    check(train(categorical=categorical, missing=missing))


def test_equals_pred_contrib_of_weighted_rows() -> None:
    X, y = table()
    weight = np.random.default_rng(4).exponential(size=len(y))
    check(lgb.train(QUIET, lgb.Dataset(X, y, weight=weight), 15))


def test_equals_pred_contrib_of_infinite_training_values() -> None:
    X, y = table()
    X[::7, 0], X[::11, 1] = np.inf, -np.inf
    check(lgb.train(QUIET, lgb.Dataset(X, y), 15))


def test_equals_pred_contrib_of_200_features() -> None:
    rng = np.random.default_rng(5)
    X = rng.normal(size=(400, 200))
    booster = lgb.train(QUIET, lgb.Dataset(X, X[:, :30].sum(axis=1) > 0), 10)
    check(booster)


def test_takes_the_iterations_that_predict_takes() -> None:
    """Early stopping: `predict` uses the best iteration, and so does the saved text."""
    X, y = table()
    X_valid, y_valid = table(seed=9)
    booster = lgb.train(
        QUIET | {"learning_rate": 0.3, "num_leaves": 4},
        lgb.Dataset(X, y),
        60,
        valid_sets=[lgb.Dataset(X_valid, y_valid)],
        callbacks=[lgb.early_stopping(3, verbose=False)],
        keep_training_booster=True,
    )
    assert 0 < booster.best_iteration < booster.current_iteration()
    shap = check(booster)
    expected = booster.predict(X_valid, pred_contrib=True, num_threads=1)
    np.testing.assert_allclose(shap.contributions(X_valid), expected, rtol=0, atol=1e-9)


def test_truncated_continued_and_refitted_models() -> None:
    X, y = table()
    booster = train()
    check(lgb.Booster(model_str=booster.model_to_string(num_iteration=4)))
    check(lgb.Booster(model_str=booster.model_to_string(start_iteration=5)))
    check(lgb.train(QUIET, lgb.Dataset(X, 1 - y), 5, init_model=booster))
    check(booster.refit(X[:300], y[:300]))


def test_a_constant_model_is_its_base_value() -> None:
    X, _ = table()
    one_label = lgb.train(QUIET, lgb.Dataset(X, np.ones(600)), 2)
    no_split = lgb.train(QUIET | {"min_data_in_leaf": 600}, lgb.Dataset(X, np.tile([0.0, 1.0, 1.0], 200)), 2)
    check(one_label)
    shap = check(no_split)
    assert shap.base_value == pytest.approx(np.log(2))
    assert not shap.contributions(X[:9])[:, :-1].any()


def chain_of(n_features: int) -> lgb.Booster:
    """One tree that is a chain of splits, each on a feature of its own."""
    rng = np.random.default_rng(6)
    X = np.eye(n_features)[rng.integers(0, n_features, 3000)]
    y = X @ np.arange(n_features)
    params = QUIET | {"objective": "regression", "num_leaves": n_features + 1, "min_data_in_leaf": 1, "max_bin": 15}
    return lgb.train(params, lgb.Dataset(X, y), 3)


def test_more_features_on_a_path_than_one_turn_of_points_covers() -> None:
    check(chain_of(24), tolerance=1e-9)


def test_refuses_more_features_on_a_path_than_are_exact() -> None:
    with pytest.raises(UnsupportedModel, match=r"tree 0 of the forest has \d+ features on a path; at most 32"):
        TreeShap(read_text(chain_of(60).model_to_string()))


def test_refuses_linear_trees_and_several_outputs() -> None:
    X, y = table(missing=0.0)
    linear = lgb.train(QUIET | {"linear_tree": True}, lgb.Dataset(X, y), 2)
    with pytest.raises(UnsupportedModel, match="is linear"):
        TreeShap(read_text(linear.model_to_string()))
    multiclass = lgb.train(QUIET | {"objective": "multiclass", "num_class": 3}, lgb.Dataset(X, X[:, 6] % 3), 2)
    with pytest.raises(UnsupportedModel, match="the booster has 3 outputs"):
        TreeShap(read_text(multiclass.model_to_string()))


def edited(text: str, field: str, edit: Callable[[list[str]], list[str]]) -> str:
    """Return a model's text with one field of its first tree changed."""
    head, separator, tail = text.partition(f"\n{field}=")
    line, newline, rest = tail.partition("\n")
    return resized(head + separator + " ".join(edit(line.split(" "))) + newline + rest)


def resized(text: str) -> str:
    """Return an edited text model with the header's tree sizes made right again."""
    body, end, rest = text.partition("\nend of trees")
    header, *trees = body.split("\nTree=")
    before, after = header.split("tree_sizes=")
    _, newline, after = after.partition("\n")
    sizes = " ".join(str(len(f"\nTree={tree}")) for tree in trees)
    return "\nTree=".join([f"{before}tree_sizes={sizes}{newline}{after}", *trees]) + end + rest


def test_refuses_training_rows_that_do_not_add_up() -> None:
    text = train().model_to_string()
    for field, edit in (
        ("leaf_count", lambda v: [str(int(v[0]) + 1), *v[1:]]),
        ("leaf_count", lambda v: ["0", *v[1:]]),
        ("internal_count", lambda v: ["0", *v[1:]]),
    ):
        with pytest.raises(UnsupportedModel, match="tree 0 of the forest has training rows that don't add up"):
            TreeShap(read_text(edited(text, field, edit)))


@pytest.mark.parametrize(
    ("field", "edit", "message"),
    [
        ("left_child", lambda v: ["9999", *v[1:]], "does not reach every split and leaf once"),
        ("left_child", lambda v: ["0", *v[1:]], "does not reach every split and leaf once"),
        ("left_child", lambda v: [v[0], v[1], "1", *v[3:]], "does not reach every split and leaf once"),
        ("split_feature", lambda v: ["8", *v[1:]], "splits on feature 8 of 8"),
        ("split_feature", lambda v: ["-1", *v[1:]], "splits on feature -1 of 8"),
        ("threshold", lambda v: v[:-1], "cannot be read: .*not 30 numbers"),
        ("threshold", lambda v: ["nan", *v[1:]], "cannot be read: .*not 30 numbers"),
        ("leaf_value", lambda v: ["inf", *v[1:]], "infinite leaf"),
        ("leaf_count", lambda v: v[1:], "cannot be read: .*not 31 whole numbers"),
        ("decision_type", lambda v: ["14", *v[1:]], "cannot be read"),
        ("num_cat", lambda v: ["0"], "without its categories"),
        ("cat_threshold", lambda v: ["4294967296", *v[1:]], "no 32-bit words"),
        ("cat_boundaries", lambda v: [*v[:-2], v[-1], v[-1]], "category sets that overlap"),
    ],
)
def test_refuses_a_text_that_is_no_consistent_model(
    field: str, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    with pytest.raises(MalformedBooster, match=f"tree 0 of the booster .*({message})"):
        TreeShap(read_text(edited(train().model_to_string(), field, edit)))


def test_refuses_tree_sizes_that_are_not_the_trees() -> None:
    """LightGBM would abort the process."""
    text = train().model_to_string()
    with pytest.raises(MalformedBooster, match="tree_sizes are not the sizes of its trees"):
        TreeShap(read_text(text.replace("\nshrinkage=1\n", "\nshrinkage=1.0\n", 1)))


def test_refuses_what_is_no_model_at_all() -> None:
    with pytest.raises(MalformedBooster, match="not LightGBM's text model"):
        TreeShap(read_text("{}"))
    with pytest.raises(MalformedBooster, match="header cannot be read: KeyError\\('max_feature_idx'\\)"):
        TreeShap(read_text("tree\nversion=v4\n\nend of trees\n"))


def test_a_row_has_the_same_bits_alone_and_in_any_batch() -> None:
    shap = TreeShap(read_text(train().model_to_string()))
    X = hard_rows(shap, 40)
    alone = np.concatenate([shap.contributions(row[None]) for row in X])
    for n in range(1, 41):
        np.testing.assert_array_equal(shap.contributions(X[:n]), alone[:n])


def test_takes_other_layouts_and_no_rows() -> None:
    shap = TreeShap(read_text(train().model_to_string()))
    X = table(50)[0]
    expected = shap.contributions(X)
    np.testing.assert_array_equal(shap.contributions(np.asfortranarray(X)), expected)
    np.testing.assert_array_equal(shap.contributions(X[::2]), expected[::2])
    assert shap.contributions(X[:0]).shape == (0, 9)
    with pytest.raises(ValueError, match=r"the shape \(50, 7\); the model takes \(n, 8\)"):
        shap.contributions(X[:, :7])


def test_threads_do_not_disturb_each_other() -> None:
    shap = TreeShap(read_text(train().model_to_string()))
    parts = [hard_rows(shap, 1 + seed % 19, seed) for seed in range(60)]
    expected = [shap.contributions(part) for part in parts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, alone in zip(pool.map(shap.contributions, parts), expected, strict=True):
                np.testing.assert_array_equal(found, alone)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.1, 0.7]),
    categorical=st.booleans(),
    params=st.fixed_dictionaries(
        {
            "num_leaves": st.integers(2, 40),
            "max_bin": st.sampled_from([2, 15, 255]),
            "min_data_in_leaf": st.sampled_from([1, 10]),
            "use_missing": st.booleans(),
            "zero_as_missing": st.booleans(),
            "max_cat_to_onehot": st.sampled_from([1, 4, 50]),
            "min_data_per_group": st.sampled_from([1, 50]),
            "extra_trees": st.booleans(),
            "learning_rate": st.sampled_from([0.01, 1.0]),
        }
    ),
)
def test_random_models(seed: int, missing: float, categorical: bool, params: dict[str, Any]) -> None:
    check(train(params | {"seed": seed}, 4, categorical, n_rows=200, missing=missing, seed=seed))


@pytest.mark.parametrize("categorical", [True, False])
def test_ten_thousand_rows_with_missing_values_and_categories(categorical: bool) -> None:
    booster = train({"num_leaves": 31}, 30, categorical, n_rows=3000)
    X, _ = table(10_000, missing=0.2, seed=8)
    expected = booster.predict(X, pred_contrib=True, num_threads=1)
    found = TreeShap(read_text(booster.model_to_string())).contributions(X)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
