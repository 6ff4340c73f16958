"""The scored model: LightGBM's bits, scikit-learn's calibration, contributions that add up or fall back."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.lightgbm.text import read_text
from fraud.detectors.trees.scores import FEW_ROWS, TreeScores
from fraud.errors import BundleError
from tests.test_treeshap import KINDS, QUIET, chain_of, edited, hard_rows, table, train
from tests.tiny import write_tiny_bundle

KNOTS = Calibrator([-3.0, 0.0, 2.0], [0.01, 0.2, 0.9])


@pytest.fixture(scope="module")
def text() -> str:
    return train().model_to_string()


@pytest.fixture(scope="module")
def model(text: str) -> Model:
    return Model(text, KNOTS)


@pytest.fixture(scope="module")
def hard(model: Model) -> NDArray[np.float64]:
    assert model._shap is not None
    return hard_rows(model._shap, 200)


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_margins_are_lightgbms_bit_for_bit(params: dict[str, Any]) -> None:
    booster = train(params)
    model = Model(booster.model_to_string(), KNOTS)
    assert model._shap is not None
    X = np.concatenate([hard_rows(model._shap), table(100, missing=0.3, seed=3)[0]])
    expected = booster.predict(X, raw_score=True)
    assert np.array_equal(model.raw_margin(X), expected)
    for n in (1, FEW_ROWS, FEW_ROWS + 1):
        assert np.array_equal(np.concatenate([model.raw_margin(X[i : i + n]) for i in range(0, len(X), n)]), expected)


def test_margins_of_other_layouts_types_and_no_rows(model: Model) -> None:
    X = table(50)[0]
    expected = model.raw_margin(X)
    assert np.array_equal(model.raw_margin(np.asfortranarray(X)), expected)
    assert np.array_equal(model.raw_margin(X[::2]), expected[::2])
    assert np.array_equal(model.raw_margin(X[:, :].tolist()), expected)
    assert model.raw_margin(X[:0]).shape == (0,)


@pytest.mark.parametrize("method", ["raw_margin", "contributions"])
def test_refuses_another_number_of_features(model: Model, method: str) -> None:
    with pytest.raises(ValueError, match=r"X has the shape \(2, 7\); the model takes \(n, 8\)"):
        getattr(model, method)(np.zeros((2, 7)))
    with pytest.raises(ValueError, match=r"X has the shape \(8,\)"):
        getattr(model, method)(np.zeros(8))


def test_probabilities_are_scikit_learns(model: Model) -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(size=500)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(margins, rng.random(500) < 1 / (1 + np.exp(-margins)))
    knots = Calibrator(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist())
    calibrated = Model(train(n_trees=1).model_to_string(), knots)
    asked = np.concatenate([rng.normal(size=2000) * 3, isotonic.X_thresholds_, [-50.0, 50.0]])
    assert np.array_equal(calibrated.decision_score(asked), isotonic.predict(asked))
    assert calibrated.decision_score(np.array([-50.0, 50.0])).tolist() == [knots.y[0], knots.y[-1]]


def test_one_knot_is_a_constant(text: str) -> None:
    assert Model(text, Calibrator([0.5], [0.25])).decision_score(np.array([-1.0, 0.5, 9.0])).tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([0.0, 1.0], [0.1]),
        ([0.0, 0.0], [0.1, 0.2]),
        ([1.0, 0.0], [0.1, 0.2]),
        ([0.0, np.nan], [0.1, 0.2]),
        ([0.0, 1.0], [0.2, 0.1]),
        ([0.0, 1.0], [-0.1, 0.1]),
        ([0.0, 1.0], [0.1, 1.1]),
        ([0.0, 1.0], [0.1, np.nan]),
    ],
)
def test_refuses_knots_that_are_no_calibration(text: str, x: list[float], y: list[float]) -> None:
    with pytest.raises(BundleError, match=r"the calibrator's [xy] must be"):
        Model(text, Calibrator(x, y))


def test_contributions_are_lightgbms_and_sum_to_the_margin(text: str, model: Model, hard: NDArray[np.float64]) -> None:
    contributions = model.contributions(hard)
    expected = lgb.Booster(model_str=text).predict(hard, pred_contrib=True)
    np.testing.assert_allclose(contributions, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(contributions.sum(axis=1), model.raw_margin(hard), rtol=0, atol=1e-9)


def test_verified_contributions_stay_fast(text: str, hard: NDArray[np.float64]) -> None:
    model = Model(text, KNOTS)
    model.verify_contributions(hard)
    assert model.contributions_fallback is None


def test_falls_back_where_the_fast_contributions_differ(text: str) -> None:
    """A missing value takes the other way than in LightGBM: seen though no golden row has a missing value."""
    model = Model(text, KNOTS)
    assert model._shap is not None
    operands = model._shap._model[0]
    left, right = 1, 2
    swapped = operands["kind"].copy()
    swapped[operands["kind"] == left], swapped[operands["kind"] == right] = right, left
    operands["kind"] = swapped
    X, _ = table(20, missing=0.0)
    model.verify_contributions(X)
    assert model.contributions_fallback is not None
    assert "differ from pred_contrib by 0." in model.contributions_fallback
    expected = lgb.Booster(model_str=text).predict(table()[0], pred_contrib=True)
    np.testing.assert_array_equal(model.contributions(table()[0]), expected)


def test_falls_back_where_the_fast_contributions_refuse() -> None:
    booster = chain_of(40)
    model = Model(booster.model_to_string(), KNOTS)
    assert model.contributions_fallback is not None
    assert "features on a path" in model.contributions_fallback
    X = np.eye(40)
    np.testing.assert_array_equal(model.contributions(X), booster.predict(X, pred_contrib=True))


def test_refuses_contributions_that_do_not_add_up(text: str, hard: NDArray[np.float64]) -> None:
    """Leaves so large that 1e-9 is beyond a float64's digits."""
    huge = edited(text, "leaf_value", lambda values: [repr(float(value) * 1e12) for value in values])
    model = Model(huge, KNOTS)
    with pytest.raises(BundleError, match="base value and contributions miss the raw margin by"):
        model.verify_contributions(hard)


def test_refuses_linear_trees() -> None:
    """They have no contributions, and LightGBM reads beyond its arrays where their features are wrong."""
    X, y = table(missing=0.0)
    booster = lgb.train(QUIET | {"linear_tree": True}, lgb.Dataset(X, y), 2)
    with pytest.raises(BundleError, match="tree 0 of the booster is linear"):
        Model(booster.model_to_string(), KNOTS)


def test_refuses_a_booster_of_other_features_than_the_specification(text: str) -> None:
    with pytest.raises(BundleError, match="the trees are of 8 features, the specification of 9"):
        Model(text, KNOTS, n_features=9)


def test_refuses_a_booster_of_several_outputs() -> None:
    X, _ = table(missing=0.0)
    booster = lgb.train(QUIET | {"objective": "multiclass", "num_class": 3}, lgb.Dataset(X, X[:, 6] % 3), 2)
    with pytest.raises(BundleError, match="the booster has 3 outputs"):
        Model(booster.model_to_string(), KNOTS)


def test_refuses_a_text_that_is_no_booster(text: str) -> None:
    with pytest.raises(BundleError, match="not LightGBM's text model"):
        Model("no model", KNOTS)
    with pytest.raises(BundleError, match=r"header cannot be read: .*no_names"):
        Model(text.replace("\nfeature_names=", "\nno_names="), KNOTS)


def test_threads_get_the_margins_and_contributions_of_their_own_rows(model: Model, hard: NDArray[np.float64]) -> None:
    parts = [hard[start : start + size] for size, start in itertools.product((1, 3, 8, 40), range(0, 160, 9))]
    calls: list[Callable[[NDArray[np.float64]], NDArray[np.float64]]] = [model.raw_margin, model.contributions]
    for call in calls:
        expected = [call(part) for part in parts]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                for found, alone in zip(pool.map(call, parts), expected, strict=True):
                    assert np.array_equal(found, alone)


def test_loads_and_scores_without_lightgbms_python_package(text: str) -> None:
    """Importing it would bring pandas and scikit-learn into every worker."""
    code = (
        "import sys; from fraud.detectors.lightgbm.model import Model; import numpy as np\n"
        "from fraud.detectors.calibration import UNCALIBRATED\n"
        "model = Model(sys.stdin.read(), UNCALIBRATED); model.warm_up()\n"
        "print(float(model.raw_margin(np.zeros((1, 8)))[0]))\n"
        "assert not {'lightgbm', 'pandas', 'sklearn', 'scipy.stats', 'shap'} & set(sys.modules), sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == lgb.Booster(model_str=text).predict(np.zeros((1, 8)), raw_score=True)[0]


def test_a_loaded_scorer_compiles_nothing_for_a_request(tmp_path: Path) -> None:
    """A kernel takes a second to compile, more than a caller should wait."""
    bundle = write_tiny_bundle(tmp_path / "bundle", "transaction")
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from fraud.detectors.trees import kernels; from fraud.models.scorer import Scorer\n"
        "scorer = Scorer.load(Path(sys.argv[1]))\n"
        "def compiled(): return len(kernels.one_row.signatures), len(kernels.eight_rows.signatures)\n"
        "before = compiled()\n"
        "for n in (1, 2, 8, 40):\n"
        "    X = np.zeros((n, len(scorer.spec.names)))\n"
        "    for X.flags.writeable in (True, False): scorer.contributions(X)\n"
        "assert compiled() == before, (compiled(), before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), leaves=st.integers(2, 40), rounds=st.integers(1, 40), rows=st.integers(1, 40))
def test_scores_have_the_bits_of_lightgbm_for_any_trees_and_rows(
    seed: int, leaves: int, rounds: int, rows: int
) -> None:
    """Numbers, categories and missing values of each kind; trees of one leaf, deep ones, more and fewer than eight."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(300, 5)).round(rng.integers(0, 4))
    X[:, 3] = rng.integers(0, 40, 300)
    X[rng.random(X.shape) < 0.1] = np.nan
    y = np.nan_to_num(X[:, 0]) * np.nan_to_num(X[:, 1]) + rng.normal(size=300) > 1
    options = {**QUIET, "num_leaves": leaves, "min_data_in_leaf": 1, "zero_as_missing": bool(seed % 2)}
    data = lgb.Dataset(X, y, categorical_feature=[3], params=options)
    booster = lgb.train({"objective": "binary", **options}, data, rounds)
    sent = np.concatenate([X, -X, rng.choice([0.0, -0.0, 1e-36, np.inf, -np.inf, np.nan, 39.0], (20, 5))])
    sent = sent[rng.permutation(len(sent))[:rows]]
    scores = TreeScores(read_text(booster.model_to_string()))
    expected = np.asarray(booster.predict(sent, raw_score=True, num_threads=1))
    assert scores.raw_scores(sent).tobytes() == expected.tobytes()
    assert np.concatenate([scores.raw_scores(sent[i : i + 1]) for i in range(rows)]).tobytes() == expected.tobytes()
