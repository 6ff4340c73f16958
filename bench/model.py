"""The one model that every server of the benchmark answers with: 300 trees of 31 leaves over 15 features.

Written in each server's own form: LightGBM's text and isotonic knots, scikit-learn objects, this project's bundle.
Beside it a transaction model of the same size, for this project alone: the peers have no history.
"""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from pathlib import Path

import joblib
import lightgbm as lgb
import msgspec
import numpy as np
import pandas as pd
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.isotonic import IsotonicRegression

from fraud.decisions.policy import Policy, RiskLevels
from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.algorithm import LIGHTGBM, detector_files
from fraud.detectors.lightgbm.model import Model
from fraud.features.featurizer import Featurizer
from fraud.models.bundle import Preprocessor, canonical_json, write_bundle
from fraud.models.scorer import golden_of
from fraud.schema import Feature, FeatureSpec
from fraud.simulation.simulate import simulate_transactions
from training.data import Mapping, load_transactions
from training.package import write_model as write_transaction_bundle
from training.replay import instances_of, replay, transaction_spec

NAMES = [f"f{i}" for i in range(15)]
N_TRAIN, N_CALIBRATE = 60_000, 20_000
POLICY = Policy(0.2, 0.8, RiskLevels(0.05, 0.2, 0.8))
EXAMPLES = Path(__file__).parent.parent / "examples"
SEED = 20240501


def table(n_rows: int, seed: int) -> tuple[pd.DataFrame, np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """15 numeric features and a label, 3% positive, with interactions and noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_rows, len(NAMES)))
    X[:, 5:10] = np.exp(X[:, 5:10])
    signal = X[:, 0] + X[:, 1] * X[:, 2] + np.log(X[:, 5]) * (X[:, 3] > 0) + 0.5 * X[:, 10] ** 2
    y = signal + rng.normal(size=n_rows) > np.quantile(signal, 0.97)
    return pd.DataFrame(X.round(6), columns=NAMES), y.astype(np.int64)


def write_model(folder: Path) -> None:
    """Train and write all forms; does nothing when the folder is there already."""
    if folder.exists():
        return
    X, y = table(N_TRAIN + N_CALIBRATE, SEED)
    fit, calibrate = X.index < N_TRAIN, X.index >= N_TRAIN
    classifier = lgb.LGBMClassifier(n_estimators=300, num_leaves=31, random_state=1, verbose=-1, deterministic=True)
    classifier.fit(X[fit], y[fit])
    margins = classifier.predict_proba(X[calibrate], raw_score=True)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(margins, y[calibrate])
    knots = {"x": isotonic.X_thresholds_.tolist(), "y": isotonic.y_thresholds_.tolist()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrated = CalibratedClassifierCV(FrozenEstimator(classifier), method="isotonic")
        calibrated.fit(X[calibrate], y[calibrate])
    staging = folder.with_suffix(".new")
    staging.mkdir(parents=True)
    text = classifier.booster_.model_to_string()
    (staging / "booster.txt").write_text(text)
    (staging / "calibrator.json").write_text(json.dumps(knots))
    joblib.dump(classifier, staging / "classifier.joblib")
    joblib.dump(calibrated, staging / "calibrated.joblib")
    write_feature_bundle(staging / "bundle", text, knots, X.to_numpy()[:16])
    (staging / "transactions.json").write_text(json.dumps(write_history_bundle(staging / "history", staging)))
    staging.rename(folder)


def write_feature_bundle(
    folder: Path, booster_text: str, knots: dict[str, list[float]], X: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> None:
    """The booster as a feature-vector bundle named ``bench-features``."""
    spec = FeatureSpec(kind="features", features=tuple(Feature(name, "request") for name in NAMES))
    instances = [json.dumps(dict(zip(NAMES, row, strict=True))).encode() for row in X.tolist()]
    files = {
        "features.json": canonical_json(spec),
        "preprocessor.json": canonical_json(Preprocessor()),
        **detector_files(booster_text, Calibrator(**knots)),
        "policy.json": canonical_json(POLICY),
        "model_card.md": b"The benchmark's model.\n",
        "metrics.json": canonical_json({}),
        "reference.json": canonical_json({}),
        "golden.jsonl": golden_of(instances, X, Model(booster_text, Calibrator(**knots))),
    }
    libraries = {name: importlib.metadata.version(name) for name in ("lightgbm", "numpy", "scikit-learn")}
    data = {"range": "", "digest": "", "rows": N_TRAIN + N_CALIBRATE}
    write_bundle(
        folder,
        files,
        algorithm=LIGHTGBM,
        name="bench-features",
        kind="features",
        libraries=libraries,
        data=data,
        seed=SEED,
        git_commit="",
    )


def write_history_bundle(folder: Path, scratch: Path) -> list[dict[str, object]]:
    """A transaction bundle named ``bench-history``, of the same size; returns transactions to score with it."""
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    simulate_transactions(500, 40, SEED, out=scratch / "simulated.parquet")
    table = load_transactions(scratch / "simulated.parquet", mapping)
    n_fit = len(table) * 3 // 4
    fit, rest = slice(0, n_fit), slice(n_fit, len(table))
    spec = transaction_spec(table, mapping, fit)
    preprocessor = Preprocessor(np.quantile(table["amount"].to_numpy()[fit], np.linspace(0, 0.99, 100)).tolist())
    X = replay(table, Featurizer(spec, preprocessor.amount_quantiles), slice(0, len(table)))
    y = (table["label"].to_numpy() == 1).astype(np.int64)
    categorical = [i for i, feature in enumerate(spec.features) if feature.type == "categorical"]
    parameters = {"objective": "binary", "num_leaves": 31, "min_data_in_leaf": 5, "verbose": -1, "deterministic": True}
    dataset = lgb.Dataset(X[fit], y[fit], feature_name=list(spec.names), categorical_feature=categorical)
    booster = lgb.train(parameters, dataset, 300)
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(booster.predict(X[rest], raw_score=True), y[rest])
    calibrator = Calibrator(isotonic.X_thresholds_.tolist(), isotonic.y_thresholds_.tolist())
    write_transaction_bundle(
        folder,
        name="bench-history",
        spec=spec,
        preprocessor=preprocessor,
        algorithm=LIGHTGBM,
        detector_files=detector_files(booster.model_to_string(), calibrator),
        policy=msgspec.to_builtins(POLICY),
        metrics={},
        model_card="The benchmark's model with history.\n",
        X=X[rest],
        examples=table.iloc[rest],
        data={"range": "", "digest": "", "rows": len(table)},
        seed=SEED,
    )
    return [json.loads(instance) for instance in instances_of(table.iloc[rest].head(2000), spec)]


def instances(n_rows: int, seed: int = 7) -> list[dict[str, float]]:
    """Rows to score, other ones than the model was trained on."""
    X, _ = table(n_rows, seed)
    return [dict(zip(NAMES, row, strict=True)) for row in X.to_numpy().tolist()]
