"""Train as of a moment with the labels known then, and score the following days in order of arrival."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.models.scorer import scores_of
from training.config import Config
from training.data import Mapping
from training.prepare import NO_PROGRESS, PreparedData, Progress, label_delay_of, prepare_transactions
from training.splits import split_by_time
from training.train import StageTimer, Trained, fit_model, labelled_windows


def backtest(
    table: pd.DataFrame,
    mapping: Mapping,
    config: Config,
    *,
    train_until: int,
    test: tuple[int, int],
    label_delay_ms: int | None = None,
    progress: Progress = NO_PROGRESS,
    clock: StageTimer | None = None,
    algorithm: Algorithm = LIGHTGBM,
) -> tuple[pd.DataFrame, Trained]:
    """Return one row for each transaction of the test days, and the model.

    Histories are updated through the test days, and labels become known only at their label time; the model is the one
    trained at `train_until`, from labels known by then.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    train_until : int
        When the model is trained, ms.
    test : (int, int)
        Begin and end of the test days, ms; the end is excluded.
    label_delay_ms : int, optional
        The time after which a label without a label time is known, and after which an unlabelled transaction counts as
        legitimate; by default from the mapping or the data.

    Returns
    -------
    scores : DataFrame
        transaction_id, event_time, customer_id, label, raw_margin, and fraud_probability, anomaly_score or both; in
        order of arrival.
    trained : Trained
    """
    clock = clock or StageTimer()
    with clock.stage("replay"):
        prepared = prepare_as_of(table, mapping, config, train_until, test, label_delay_ms, progress, algorithm)
    with clock.stage("train"):
        trained = fit_model(prepared, config, progress, None, algorithm)
    with clock.stage("score"):
        scores = scored_rows(prepared, trained)
    return scores, trained


def prepare_as_of(
    table: pd.DataFrame,
    mapping: Mapping,
    config: Config,
    train_until: int,
    test: tuple[int, int],
    label_delay_ms: int | None,
    progress: Progress,
    algorithm: Algorithm,
) -> PreparedData:
    """Return the data of a training as of a moment, with the test days replayed; arguments as `backtest`."""
    if label_delay_ms is not None and mapping.label_time is None:
        table = table.assign(label_time_ms=table["event_time_ms"] + label_delay_ms)
    delay = label_delay_of(table, mapping) if label_delay_ms is None else label_delay_ms
    times = table["processing_time_ms"].to_numpy(np.int64)
    windows = split_by_time(times, delay, train_until, test, (config.validation_share, config.calibration_share))
    needed = [window for window in labelled_windows(algorithm, config) if window != "test"]
    return prepare_transactions(
        table, mapping, windows, train_until, delay, config, progress, labelled=needed, packaged=False
    )


def scored_rows(prepared: PreparedData, trained: Trained) -> pd.DataFrame:
    """Return the scores of the test days, as `backtest`."""
    X, rows = prepared.rows(prepared.windows.test)
    given = scores_of(trained.detector, trained.detector.raw_margin(X))
    return pd.DataFrame(
        {
            "transaction_id": rows["transaction_id"].to_numpy(),
            "event_time": pd.to_datetime(rows["event_time_ms"].to_numpy(), unit="ms", utc=True),
            "customer_id": rows["customer_id"].astype(str).to_numpy(),
            "label": rows["label"].to_numpy(),
            "raw_margin": given.raw_margin,
            **given.measured(),
        }
    )
