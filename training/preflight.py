"""Checks before training: windows without labels, unknown categories, names that are not allowed."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.errors import DataError
from fraud.schema import Feature, FeatureSpec
from training.replay import MAX_CATEGORIES
from training.splits import Windows, moment

REFUSED_SHARE = 0.01
"""Warn of a model whose service would refuse a larger share of the test window's rows than this."""
NEEDED = (
    ("train", "learnt from", "give more data, or lower validation_share, calibration_share or test_share"),
    ("validation", "known when training stops", "raise validation_share"),
    ("calibration", "known for the calibrator and the policy", "raise calibration_share"),
    ("test", "there to measure on", "raise test_share, or test on later days that have labels"),
)
"""The windows, what a label in them is good for, and what to do where there is none."""
FOLDER_BYTES = 64 * 1024 * 1024
"""Free space that a run folder may need."""


def check_windows(
    table: pd.DataFrame, y: NDArray[np.int8], windows: Windows, shares: dict[str, float], labelled: Collection[str]
) -> None:
    """Raise a DataError unless each window that needs labels has a known fraud and a known legitimate transaction.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    y : (n,) int8
        The labels as they were known when the model is trained, of the rows of `windows.all`: 1, 0, -1 unknown.
    windows : Windows
    shares : dict
        The configuration's share of each window that has one, by the window's name.
    labelled : collection of str
        The windows that need labels.
    """
    problems = []
    for name, purpose, step in NEEDED:
        if name not in labelled:
            continue
        window: slice = getattr(windows, name)
        labels = table["label"].to_numpy()[window] if name == "test" else y[windows.within(window)]
        for value, what in ((1, "fraud"), (0, "legitimate transaction")):
            if not (labels == value).any():
                share = f" (now {shares[name]:g})" if name in shares else ""
                problems.append(
                    f"the {name} window, {_span(table, window)}, has no {what} that is {purpose}; "
                    f"the file has {int((table['label'] == value).sum()):,}{_when(table, value)}; {step}{share}"
                )
    if problems:
        raise DataError("\n".join(problems))


def _span(table: pd.DataFrame, window: slice) -> str:
    rows = f"{window.stop - window.start:,} rows"
    if "event_time_ms" not in table:
        return f"rows {window.start + 1:,} to {window.stop:,} of the file"
    times = table["event_time_ms"].to_numpy()[window]
    return f"{moment(int(times.min()))} to {moment(int(times.max()))} ({rows})"


def _when(table: pd.DataFrame, value: int) -> str:
    if "event_time_ms" not in table:
        return ""
    times = table["event_time_ms"].to_numpy()[table["label"].to_numpy() == value]
    return f" from {moment(int(times.min()))} to {moment(int(times.max()))}" if len(times) else ""


def check_features(table: pd.DataFrame, windows: Windows, spec: FeatureSpec) -> list[str]:
    """Raise a DataError if the service could answer no row of the test window; return warnings.

    A bundle needs golden rows, which each load scores again, so its features must accept some rows.
    """
    problems = [
        f"the feature {feature.name!r} has a quotation mark, a backslash or a control character in its name; "
        f"give it another in the mapping, such as my_feature: {{column: {feature.name!r}}}"
        for feature in spec.requested
        if any(c in '"\\' or c < " " for c in feature.name)
    ]
    test = table.iloc[windows.test]
    if (labelled := test["label"] >= 0).any():
        test = test[labelled]
    refused = np.zeros(len(test), bool)
    reasons: list[str] = []
    for feature in spec.requested:
        if feature.type != "categorical":
            continue
        if not feature.categories:
            problems.append(
                f"categorical {feature.name!r} is empty in the whole train window, {_span(table, windows.train)}, so "
                "no category of it is known; leave it out, name its categories in the mapping, or give more data"
            )
        elif feature.unknown == "refuse":
            unknown = refusals(test[feature.name], feature)
            refused |= unknown
            if unknown.any():
                reasons.append(_unknown(table[feature.name], feature, float(unknown.mean())))
    if reasons and refused.all():
        problems.append(
            "no row of the test window has only categories that the train window knows: " + "; ".join(reasons)
        )
    if problems:
        raise DataError("\n".join(problems))
    share = float(refused.mean()) if len(test) else 0.0
    if share <= REFUSED_SHARE:
        return []
    return [f"The service would refuse {share:.1%} of the test window: {'; '.join(reasons)}"]


def refusals(column: pd.Series[Any], feature: Feature) -> NDArray[np.bool_]:
    """Return which values of a categorical column are refused in a request."""
    missing = column.isna()
    known = column.isin(feature.categories) | (missing & feature.missing)
    return np.asarray(~known, dtype=bool)


def _unknown(column: pd.Series[Any], feature: Feature, share: float) -> str:
    different = int(column.nunique())
    limit = f", of which {MAX_CATEGORIES} are learnt" if different > MAX_CATEGORIES else ""
    return (
        f"categorical {feature.name!r} has {different:,} different values{limit}, and {share:.1%} of the test rows "
        "have one that is not; leave it out, or read what is unknown as missing: "
        f"{feature.name}: {{unknown: missing, missing: allowed}}"
    )


def check_folder(folder: Path) -> None:
    """Make a folder; raise an OSError unless it can be written to and its disk has space for a run."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(folder))
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < FOLDER_BYTES:
        raise OSError(28, f"less than {FOLDER_BYTES // 2**20} MiB are free", str(folder))
