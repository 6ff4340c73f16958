"""The data of a training: windows, features and labels, checked, from a table."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.errors import DataError
from fraud.features.featurizer import Featurizer, Matrix
from fraud.models.bundle import Preprocessor
from fraud.schema import FeatureSpec
from training.config import Config
from training.currencies import amounts_of, stakes
from training.data import Mapping
from training.preflight import check_features, check_windows
from training.replay import further_features, replay, requested_columns, transaction_spec
from training.splits import Windows, known_labels, split_by_order, split_by_time
from training.trained_table import trained_table

Progress = Callable[[str, int, int], None]
NO_PROGRESS: Progress = lambda stage, done, total: None  # noqa: E731
DEFAULT_LABEL_DELAY_MS = 7 * 86_400_000
ALL_WINDOWS = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class PreparedData:
    """The data of one training: a table with its windows, features, and labels as known at training time."""

    table: pd.DataFrame
    windows: Windows
    spec: FeatureSpec
    preprocessor: Preprocessor
    X: Matrix
    y: NDArray[np.int8]
    label_delay_ms: int
    stake: NDArray[np.float64] | None
    """Money at stake in each row of the table, in the unit of the costs; None where it is not known."""
    warnings: list[str] = field(default_factory=list)
    """What the service would do differently than expected."""

    def rows(self, window: slice) -> tuple[Matrix, pd.DataFrame]:
        return self.X[self.windows.within(window)], self.table.iloc[window]


def label_delay_of(table: pd.DataFrame, mapping: Mapping) -> int:
    """Return the time after which an unlabelled transaction counts as legitimate, ms.

    The mapping's fixed delay, or else the delay within which 90% of the frauds became known; 0 without any label.
    """
    if not (table["label"] >= 0).any():
        return 0
    if mapping.label_delay_ms is not None:
        return mapping.label_delay_ms
    frauds = table[table["label"] == 1]
    if frauds.empty:
        return DEFAULT_LABEL_DELAY_MS
    return int(np.quantile(frauds["label_time_ms"] - frauds["event_time_ms"], 0.9))


def prepare_transactions(
    table: pd.DataFrame,
    mapping: Mapping,
    windows: Windows,
    as_of: int,
    label_delay_ms: int,
    config: Config,
    progress: Progress = NO_PROGRESS,
    *,
    labelled: Collection[str] = ALL_WINDOWS,
    packaged: bool = True,
) -> PreparedData:
    """Check a table of transactions, replay it and return the data of a training.

    The windows `labelled` need both frauds and legitimate transactions. A model that is not `packaged`, as in a
    backtest, needs no golden rows.
    """
    spec = transaction_spec(table, mapping, windows.train)
    part = table.iloc[windows.all]
    y = known_labels(
        part["label"].to_numpy(np.int8),
        part["event_time_ms"].to_numpy(np.int64),
        part["label_time_ms"].to_numpy(np.int64),
        label_delay_ms,
        as_of,
    )
    check_windows(table, y, windows, config.shares, labelled)
    warnings = check_features(table, windows, spec) if packaged else []
    amounts = amounts_of(table, spec.currencies or {})[windows.train]
    preprocessor = Preprocessor(np.quantile(amounts, np.linspace(0, 0.99, 100)).tolist())
    if spec.currencies:
        table = table.assign(stake=stakes(table, spec.currencies, windows.train))
    featurizer = Featurizer(spec, preprocessor.amount_quantiles)
    n = len(table)
    X = replay(table, featurizer, windows.all, lambda done: progress("replay", done, n))
    return PreparedData(table, windows, spec, preprocessor, X, y, label_delay_ms, stake_of(table), warnings)


def prepare(
    table: pd.DataFrame, mapping: Mapping, config: Config, labelled: Collection[str], progress: Progress = NO_PROGRESS
) -> PreparedData:
    """Return the data of a training on a table of the mapping's kind; the windows `labelled` need labels."""
    if mapping.kind == "features":
        return prepare_features(table, mapping, config, labelled)
    times = table["processing_time_ms"].to_numpy(np.int64)
    delay = label_delay_of(table, mapping)
    as_of = int(times[-1] - (times[-1] - times[0]) * config.test_share)
    shares = (config.validation_share, config.calibration_share)
    windows = split_by_time(times, delay, as_of, (as_of, int(times[-1]) + 1), shares)
    return prepare_transactions(table, mapping, windows, as_of, delay, config, progress, labelled=labelled)


def prepare_features(
    table: pd.DataFrame, mapping: Mapping, config: Config, labelled: Collection[str] = ALL_WINDOWS
) -> PreparedData:
    """Return the data of a training on a table of ready features, in row order."""
    if "stake" not in table and "costs" in config.model_fields_set:
        raise DataError(
            "the configuration gives costs in money, but the mapping does not say what money is at stake in a row; "
            "add for example 'stake: loan_amount' (a column) or 'stake: 5000' to the mapping, or leave the costs out: "
            "then a share of the rows is reviewed (review_rate) and none is declined"
        )
    windows = split_by_order(len(table), (config.validation_share, config.calibration_share, config.test_share))
    spec = FeatureSpec("features", tuple(further_features(table, mapping, windows.train)), table=trained_table(table))
    y = table["label"].to_numpy(np.int8)
    check_windows(table, y, windows, config.shares, labelled)
    warnings = check_features(table, windows, spec)
    X = np.empty((len(table), len(spec.features)), np.float64)
    requested_columns(table, spec, X)
    return PreparedData(table, windows, spec, Preprocessor(), X, y, 0, stake_of(table), warnings)


def stake_of(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the money at stake in each row: a transaction's amount, or the stake column of ready features."""
    column = "stake" if "stake" in table else "amount" if "customer_id" in table else None
    return None if column is None else table[column].to_numpy(np.float64)
