"""Tiny real models, trained in a moment on the project's own features, for tests of what stands around them."""

from __future__ import annotations

import importlib.metadata
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np

from fraud.detectors.calibration import Calibrator
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM, detector_files
from fraud.detectors.protocol import Algorithm
from fraud.features.featurizer import HISTORY_FEATURES, Featurizer, Histories, Matrix
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import canonical_json, read_bundle, read_files, read_manifest, write_bundle
from fraud.models.registry import Registry
from fraud.models.scorer import golden_of
from fraud.schema import Feature, FeatureSpec, Kind, Role, RowDecoder
from training.config import Config, ForestOptions, SeverityOptions
from training.isolation import fit_forest
from training.severity import fit_severity
from training.splits import split_by_order

KINDS: tuple[Kind, ...] = ("transaction", "features")
START_MS = 1_767_225_600_000  # 2026-01-01
TRANSACTION_SPEC = FeatureSpec(
    "transaction",
    (
        *(Feature(name, "history", meaning=feature.meaning) for name, feature in HISTORY_FEATURES.items()),
        Feature("category", "request", "categorical", ("cafe", "fuel", "shop"), missing=True),
        Feature("basket_size", "request", minimum=0.0, missing=True),
    ),
    tuple(
        Role(name, missing=True)
        for name in (
            "merchant_id",
            "category",
            "device_id",
            "latitude",
            "longitude",
            "merchant_latitude",
            "merchant_longitude",
        )
    ),
)
FEATURES_SPEC = FeatureSpec(
    "features",
    (
        Feature("income", "request", minimum=0.0),
        Feature("velocity", "request", missing=True),
        Feature("has_phone", "request", "boolean"),
        Feature("email_domain", "request", "categorical", ("corporate", "disposable", "free")),
    ),
)
FORM_SPEC = FeatureSpec(
    "features",
    (
        Feature("amt", "request", minimum=0.0),
        Feature("hour", "request", minimum=0.0, maximum=23.0),
        Feature("day_of_week", "request", minimum=0.0, maximum=6.0),
        Feature("category", "request", "categorical", ("cafe", "fuel", "shop"), "missing"),
    ),
)
AMOUNT_QUANTILES = [float(q) for q in np.geomspace(1.0, 500.0, 100)]
OFTEN_UNUSUAL = SeverityOptions(medium=0.5, high=0.3, critical=0.2)
"""So that a few hundred rows are of every severity."""
POLICY = {
    "review_threshold": 0.3,
    "decline_threshold": 0.7,
    "risk_levels": {"medium": 0.2, "high": 0.5, "critical": 0.8},
}


def rfc3339(event_time_ms: int) -> str:
    return datetime.fromtimestamp(event_time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def transactions(n: int, seed: int, *, customers: int = 20, merchants: int = 12) -> list[dict[str, Any]]:
    """Random transactions in the order of their event times, about one a minute, some fields missing."""
    rng = np.random.default_rng(seed)
    times = START_MS + np.cumsum(rng.integers(1, 120_000, n))
    instances = []
    for i, time in enumerate(times.tolist()):
        instance: dict[str, Any] = {
            "transaction_id": f"t{seed}-{i}",
            "event_time": rfc3339(time),
            "customer_id": f"c{rng.integers(customers)}",
            "merchant_id": f"m{rng.integers(merchants)}",
            "amount": round(float(rng.lognormal(3.0, 1.0)) + 0.01, 2),
            "category": ["cafe", "fuel", "shop"][rng.integers(3)],
            "device_id": f"d{rng.integers(5)}",
            "latitude": float(rng.uniform(-60, 60)),
            "longitude": float(rng.uniform(-180, 180)),
            "merchant_latitude": float(rng.uniform(-60, 60)),
            "merchant_longitude": float(rng.uniform(-180, 180)),
            "basket_size": float(rng.integers(1, 9)),
        }
        for name in ("merchant_id", "category", "device_id", "latitude", "merchant_latitude", "basket_size"):
            if rng.random() < 0.1:
                del instance[name]
        instances.append(instance)
    return instances


def ready_rows(n: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "income": float(rng.lognormal(10.0, 0.5)),
            "velocity": float(rng.normal()),
            "has_phone": bool(rng.random() < 0.5),
            "email_domain": ["corporate", "disposable", "free"][rng.integers(3)],
        }
        for _ in range(n)
    ]


def form_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Random payments of the contract merchant-form."""
    rng = np.random.default_rng(seed)
    return [
        {
            "amt": round(float(rng.lognormal(3.0, 1.0)) + 0.01, 2),
            "hour": int(rng.integers(24)),
            "day_of_week": int(rng.integers(7)),
            "category": ["cafe", "fuel", "shop"][rng.integers(3)],
        }
        for _ in range(n)
    ]


def store_of_tiny_models(home: Path) -> dict[str, str]:
    """Make a Bento store with one tiny model of each kind; return the environment in which a service serves both."""
    tags = [
        BentoStore(home).import_bundle(write_tiny_bundle(home / kind, kind, name=f"tiny-{kind}"), {}) for kind in KINDS
    ]
    return {
        **os.environ,
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "FRAUD_MODEL": ",".join(tags),
        "FRAUD_STATE_DIR": str(home / "state"),
    }


def tiny_anomaly_model(home: Path) -> str:
    """Add an anomaly model of transactions to a Bento store; return its tag, for FRAUD_ANOMALY_MODEL."""
    bundle = write_tiny_bundle(home / "anomaly", "transaction", name="tiny-anomaly", algorithm=ISOLATION_FOREST)
    return BentoStore(home).import_bundle(bundle, {})


def tiny_form_model(home: Path) -> str:
    """Add a model of the contract merchant-form to a Bento store; return its tag, for FRAUD_MODEL."""
    bundle = write_tiny_bundle(home / "form", "features", name="tiny-form", is_form=True)
    return BentoStore(home).import_bundle(bundle, {})


def register_tiny(home: Path, kind: Kind, *aliases: str, seed: int = 0) -> str:
    """Import a tiny model into a Bento store and register it under some aliases; return its version."""
    bundle = write_tiny_bundle(home / f"{kind}-{seed}", kind, name=f"tiny-{kind}", seed=seed)
    digest, manifest = read_manifest(bundle)
    tag = BentoStore(home).import_bundle(bundle, {})
    Registry.beside(home).register(manifest.name, digest, manifest.preprocessor_digest, who="test", aliases=aliases)
    return tag.rpartition(":")[2]


def with_files(bundle: Path, folder: Path, **changed: object) -> Path:
    """Write a copy of a bundle in which some JSON files, named without ``.json``, have other contents."""
    _, manifest, files = read_files(bundle)
    files = {name: content for name, content in files.items() if name != "manifest.json"}
    write_bundle(
        folder,
        files | {f"{name}.json": canonical_json(content) for name, content in changed.items()},
        algorithm=read_bundle(bundle).algorithm,
        name=manifest.name,
        kind=manifest.kind,
        libraries=manifest.libraries,
        data=manifest.data,
        seed=manifest.seed,
        git_commit=manifest.git_commit,
    )
    return folder


def write_tiny_bundle(
    folder: Path,
    kind: Kind,
    *,
    name: str | None = None,
    seed: int = 0,
    algorithm: Algorithm = LIGHTGBM,
    is_form: bool = False,
) -> Path:
    """Train and write a bundle of 300 rows and 12 small trees, whose decisions are of all kinds.

    `is_form` makes a model of ready features one of the contract merchant-form's.
    """
    spec = TRANSACTION_SPEC if kind == "transaction" else FORM_SPEC if is_form else FEATURES_SPEC
    quantiles = AMOUNT_QUANTILES if kind == "transaction" else []
    made = transactions if kind == "transaction" else form_rows if is_form else ready_rows
    instances = [json.dumps(i).encode() for i in made(300, seed)]
    decoder, featurizer = RowDecoder(spec), Featurizer(spec, quantiles)
    rows = [decoder.decode(instance, "$") for instance in instances]
    X = featurizer.advance(rows, Histories.new(rows)) if kind == "transaction" else featurizer.ready(rows)
    files, policy = (_boosted if algorithm is LIGHTGBM else _isolated)(X, spec, seed)
    write_bundle(
        folder,
        {
            "features.json": canonical_json(spec),
            "preprocessor.json": canonical_json({"amount_quantiles": quantiles}),
            **files,
            "policy.json": canonical_json(policy),
            "model_card.md": b"# A tiny model for tests\n",
            "metrics.json": canonical_json({}),
            "reference.json": canonical_json({}),
            "golden.jsonl": golden_of(instances[:5], X[:5], algorithm.load(files, X.shape[1])),
        },
        algorithm=algorithm,
        name=name or f"fraud-{kind}",
        kind=kind,
        libraries={"lightgbm": importlib.metadata.version("lightgbm"), "numpy": np.__version__},
        data={"rows": 300},
        seed=seed,
        git_commit="",
    )
    return folder


def _boosted(X: Matrix, spec: FeatureSpec, seed: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """LightGBM's trees, with probabilities that spread from 0 to 1."""
    y = np.random.default_rng(seed).random(300) < 1 / (1 + np.exp(-2 * (X[:, 0] - X[:, 0].mean()) / X[:, 0].std()))
    categorical = [i for i, feature in enumerate(spec.features) if feature.type == "categorical"]
    booster = lightgbm.train(
        {"objective": "binary", "num_leaves": 7, "min_data_in_leaf": 5, "verbose": -1, "seed": seed, "num_threads": 1},
        lightgbm.Dataset(X, y, feature_name=list(spec.names), categorical_feature=categorical),
        12,
    )
    calibrator = Calibrator([-3.0, -1.0, 0.0, 1.0, 3.0], [0.01, 0.2, 0.45, 0.75, 0.99])
    return detector_files(booster.model_to_string(), calibrator), POLICY


def _isolated(X: Matrix, spec: FeatureSpec, seed: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """An isolation forest without a calibration, whose policy acts on a third of these rows."""
    config = Config(seed=seed, forest=ForestOptions(trees=12, samples=64))
    fitted = fit_forest(X, np.full(300, -1, np.int8), split_by_order(300, (0.2, 0.2, 0.2)), spec, config)
    margins = ISOLATION_FOREST.load(fitted.files(None), X.shape[1]).raw_margin(X)
    files = fitted.files(None, fit_severity(margins, None, OFTEN_UNUSUAL, seed))
    detector = ISOLATION_FOREST.load(files, X.shape[1])
    medium, high, critical = np.quantile(detector.decision_score(detector.raw_margin(X)), [0.4, 0.65, 0.9]).tolist()
    levels = {"medium": medium, "high": high, "critical": critical}
    return files, {"review_threshold": high, "decline_threshold": critical, "risk_levels": levels}
