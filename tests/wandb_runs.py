"""Small real run folders to push: a LightGBM model of three features, retouched into as many versions as wanted."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import lightgbm as lgb
import msgspec
import numpy as np

from fraud.decisions.policy import Policy, RiskLevels
from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.algorithm import LIGHTGBM, detector_files
from fraud.detectors.protocol import Algorithm, Matrix
from fraud.models.bundle import Preprocessor, canonical_json, read_manifest, write_bundle
from fraud.models.libraries import installed_libraries
from fraud.models.scorer import golden_of
from fraud.schema import Feature, FeatureSpec
from training.config import Config, ForestOptions
from training.isolation import fit_forest
from training.splits import split_by_order

NAME = "fraud-features"
FEATURES = ("age_days", "n_failed", "amount_ratio")


@cache
def trained_files(algorithm: Algorithm) -> dict[str, bytes]:
    """Every file of a bundle but metrics.json, trained once."""
    rng = np.random.default_rng(7)
    X = rng.normal(size=(400, len(FEATURES)))
    spec = FeatureSpec("features", tuple(Feature(name, "request") for name in FEATURES))
    files = boosted(X, rng) if algorithm is LIGHTGBM else isolated(X, spec)
    rows = X[:4]
    instances = [json.dumps(dict(zip(FEATURES, row.tolist(), strict=True))).encode() for row in rows]
    return {
        **files,
        "features.json": canonical_json(spec),
        "preprocessor.json": canonical_json(Preprocessor()),
        "policy.json": canonical_json(Policy(0.3, 0.8, RiskLevels(0.1, 0.3, 0.8))),
        "model_card.md": b"# A small model\n",
        "reference.json": b"{}\n",
        "golden.jsonl": golden_of(instances, rows, algorithm.load(files, len(FEATURES))),
    }


def boosted(X: Matrix, rng: np.random.Generator) -> dict[str, bytes]:
    y = (X[:, 0] + 0.5 * X[:, 1] + rng.normal(size=400) > 1).astype(float)
    parameters = {"objective": "binary", "num_leaves": 7, "num_threads": 1, "verbosity": -1, "seed": 7}
    booster = lgb.train(parameters, lgb.Dataset(X, y, feature_name=list(FEATURES)), num_boost_round=8)
    return detector_files(booster.model_to_string(), Calibrator([-3.0, 0.0, 3.0], [0.01, 0.3, 0.99]))


def isolated(X: Matrix, spec: FeatureSpec) -> dict[str, bytes]:
    config = Config(forest=ForestOptions(trees=8, samples=64))
    windows = split_by_order(len(X), (0.2, 0.2, 0.2))
    return fit_forest(X, np.full(len(X), -1, np.int8), windows, spec, config).files(None)


def make_run(
    runs: Path,
    seed: int,
    average_precision: float = 0.8,
    *,
    name: str = NAME,
    libraries: dict[str, str] | None = None,
    files: dict[str, bytes] | None = None,
    algorithm: Algorithm = LIGHTGBM,
) -> Path:
    """Write ``runs/<name>-<seed>``, a finished run as training leaves it; another seed is another version."""
    folder = runs / f"{name}-2026010{seed}T000000Z"
    measured = {"value": average_precision, "low": average_precision - 0.05, "high": average_precision + 0.05}
    metrics = {"average_precision": measured, "brier_score": {"value": 0.02, "low": 0.01, "high": 0.03}}
    digest = write_bundle(
        folder / "bundle",
        {**trained_files(algorithm), "metrics.json": canonical_json(metrics), **(files or {})},
        algorithm=algorithm,
        name=name,
        kind="features",
        libraries=libraries if libraries is not None else installed_libraries(),
        data={"digest": "sha256:" + "d" * 64, "rows": 400},
        seed=seed,
        git_commit="0" * 40,
    )
    facts: dict[str, Any] = {
        "name": name,
        "kind": "features",
        "created": f"2026-01-0{seed}T00:00:00Z",
        "config": {"num_leaves": 7, "seed": seed},
        "metrics": metrics,
        "baseline": {"average_precision": {"value": 0.5, "low": 0.45, "high": 0.55}},
        "dataset": {
            "name": "loans.parquet",
            "digest": "sha256:" + "d" * 64,
            "rows": 400,
            "from": "2025-01-01T00:00:00Z",
            "to": "2025-06-30T00:00:00Z",
        },
        "bundle_digest": digest,
        "timings_s": {"train": 1.5},
    }
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "tables").mkdir()
    with (folder / "tables" / "thresholds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["threshold", "recall"], [0.3, 0.9], [0.8, 0.5]])
    (folder / "plots").mkdir()
    (folder / "plots" / "roc.png").write_bytes(one_pixel())
    (folder / "report.html").write_text("<h1>A report</h1>")
    return folder


def golden(bundle: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in (bundle / "golden.jsonl").read_bytes().splitlines()]


def digest_of(run: Path) -> str:
    return read_manifest(run / "bundle")[0]


def one_pixel() -> bytes:
    """The smallest PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixel = zlib.compress(b"\x00\xff\x00\x00")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
