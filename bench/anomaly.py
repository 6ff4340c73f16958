"""The anomaly model that the benchmark puts beside its model with history: 100 isolation trees on its features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.model import EXAMPLES, POLICY, SEED
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.features.featurizer import Featurizer
from fraud.models.bundle import read_bundle
from training.config import Config
from training.data import Mapping, load_transactions
from training.isolation import fit_forest
from training.package import write_model
from training.replay import replay
from training.severity import fit_severity
from training.splits import split_by_order


def write_anomaly_bundle(folder: Path, history: Path, table_file: Path) -> Path:
    """Write a bundle named ``bench-anomaly``, unless it is there; return its folder.

    Parameters
    ----------
    history : Path
        The bundle of the model that it is beside.
    table_file : Path
        The transactions that this one was trained on.
    """
    if folder.exists():
        return folder
    bundle = read_bundle(history)
    spec, preprocessor = bundle.spec, bundle.preprocessor
    table = load_transactions(table_file, Mapping.from_yaml(EXAMPLES / "simulated.yaml"))
    X = replay(table, Featurizer(spec, preprocessor.amount_quantiles), slice(0, len(table)))
    windows, config = split_by_order(len(table), (0.12, 0.12, 0.2)), Config(seed=SEED)
    fitted = fit_forest(X, np.full(len(X), -1, np.int8), windows, spec, config)
    margins = ISOLATION_FOREST.load(fitted.files(None), X.shape[1]).raw_margin(X[windows.calibration])
    severity = fit_severity(margins, None, config.severity, SEED)  # as if each row had its own customer
    policy = {
        "review_threshold": POLICY.review_threshold,
        "decline_threshold": POLICY.decline_threshold,
        "risk_levels": {"medium": 0.55, "high": 0.6, "critical": 0.7},
    }
    write_model(
        folder,
        name="bench-anomaly",
        spec=spec,
        preprocessor=preprocessor,
        algorithm=ISOLATION_FOREST,
        detector_files=fitted.files(None, severity),
        policy=policy,
        metrics={},
        model_card="The benchmark's anomaly model.\n",
        X=X[windows.calibration],
        examples=table.iloc[windows.test],
        data={"range": "", "digest": "", "rows": len(table)},
        seed=SEED,
    )
    return folder
