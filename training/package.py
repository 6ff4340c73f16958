"""Packages a trained model as a bundle: text files, determined by data, configuration and seed."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fraud.detectors.protocol import Algorithm, Detector
from fraud.features.featurizer import Featurizer, Histories, Matrix
from fraud.models.bundle import Preprocessor, canonical_json, write_bundle
from fraud.models.libraries import installed_libraries
from fraud.models.scorer import Scores, golden_of, scores_of
from fraud.schema import FeatureSpec, RowDecoder
from training.replay import instances_of

GOLDEN_CUSTOMERS, GOLDEN_ROWS_EACH = 8, 8
GOLDEN_IDS = {"transaction_id": "golden", "customer_id": "customer", "merchant_id": "merchant", "device_id": "device"}


def write_model(
    folder: Path,
    *,
    name: str,
    spec: FeatureSpec,
    preprocessor: Preprocessor,
    algorithm: Algorithm,
    detector_files: Mapping[str, bytes],
    policy: dict[str, Any],
    metrics: dict[str, Any],
    model_card: str,
    X: Matrix,
    examples: pd.DataFrame,
    data: dict[str, Any],
    seed: int,
) -> str:
    """Write the bundle and return its digest.

    Parameters
    ----------
    X : (n, n_features) float64
        The reference that later traffic is compared with.
    examples : DataFrame
        Rows of the canonical table from which golden requests are taken, with their labels.
    """
    detector = algorithm.load(detector_files, len(spec.features))
    files = {
        "features.json": canonical_json(spec),
        "preprocessor.json": canonical_json(preprocessor),
        **detector_files,
        "policy.json": canonical_json(policy),
        "model_card.md": model_card.encode(),
        "metrics.json": canonical_json(metrics),
        "reference.json": canonical_json(_reference(spec, X, scores_of(detector, detector.raw_margin(X)))),
        "golden.jsonl": _golden(spec, preprocessor, detector, examples),
    }
    return write_bundle(
        folder,
        files,
        algorithm=algorithm,
        name=name,
        kind=spec.kind,
        libraries=installed_libraries(),
        data=data,
        seed=seed,
        git_commit=_git_commit(),
    )


def _golden(spec: FeatureSpec, preprocessor: Preprocessor, detector: Detector, examples: pd.DataFrame) -> bytes:
    instances = instances_of(_golden_rows(spec, examples), spec)
    decoder = RowDecoder(spec)
    rows = [decoder.decode(instance, f"$.golden[{i}]") for i, instance in enumerate(instances)]
    featurizer = Featurizer(spec, preprocessor.amount_quantiles)
    X = featurizer.advance(rows, Histories.new(rows)) if spec.kind == "transaction" else featurizer.ready(rows)
    return golden_of(instances, X, detector)


def _golden_rows(spec: FeatureSpec, examples: pd.DataFrame) -> pd.DataFrame:
    """Choose some rows that the model accepts, frauds included; ids are replaced because they may be personal."""
    accepted = np.ones(len(examples), bool)
    for feature in spec.requested:
        column = examples[feature.name]
        if feature.type == "categorical" and feature.unknown == "refuse":
            accepted &= column.isin(feature.categories) | (column.isna() & feature.missing)
    examples = examples[accepted]
    if spec.kind == "features":
        order = examples["label"].to_numpy().argsort(kind="stable")
        half = GOLDEN_CUSTOMERS * GOLDEN_ROWS_EACH // 2
        return examples.iloc[np.sort(np.concatenate([order[:half], order[half:][-half:]]))]
    frauds_first = (
        examples.groupby("customer_id", observed=True)["label"].max().sort_values(ascending=False, kind="stable")
    )
    half = GOLDEN_CUSTOMERS // 2
    customers = [*frauds_first.index[:half], *frauds_first.index[half:][-half:]]
    chosen = examples[examples["customer_id"].isin(customers)]
    chosen = chosen[chosen.groupby("customer_id", observed=True).cumcount() < GOLDEN_ROWS_EACH]
    renamed = chosen.copy()
    for role, prefix in GOLDEN_IDS.items():
        if role in chosen.columns:
            codes, _ = pd.factorize(chosen[role])
            renamed[role] = [f"{prefix}-{code}" if code >= 0 else None for code in codes]
    return renamed


def _reference(spec: FeatureSpec, X: Matrix, scores: Scores) -> dict[str, Any]:
    """Return the distributions of features and scores, for drift: deciles, or counts of categories."""
    features = {}
    for j, feature in enumerate(spec.features):
        column = X[:, j]
        present = column[~np.isnan(column)]
        facts: dict[str, Any] = {"missing": 1.0 - len(present) / max(len(column), 1)}
        if feature.type == "categorical":
            counts = np.bincount(present.astype(np.int64), minlength=len(feature.categories))
            facts["shares"] = (counts / max(len(present), 1)).tolist()
        else:
            facts["deciles"] = np.quantile(present, np.linspace(0, 1, 11)).tolist() if len(present) else []
        features[feature.name] = facts
    edges = np.linspace(0, 1, 21)
    return {
        "rows": len(X),
        "features": features,
        **{
            name: {
                "deciles": np.quantile(values, np.linspace(0, 1, 11)).tolist(),
                "edges": edges.tolist(),
                "shares": (np.histogram(values, edges)[0] / max(len(values), 1)).tolist(),
            }
            for name, values in scores.measured().items()
        },
    }


def _git_commit() -> str:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return asked.stdout.strip()
