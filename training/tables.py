"""The report's tables, one row a fact, as pandas frames with plain column names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.decisions.costs import decision_costs
from fraud.decisions.verdict import POLICY_ACTIONS
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.schema import Feature
from training.evaluate import Interval, Outcomes, Scored, reliability
from training.measures import DAY_MS

Floats = NDArray[np.float64]


class Window(NamedTuple):
    """One of the windows that the data was split into; times are RFC 3339 or None for rows without times."""

    name: str
    begin: str | None
    end: str | None
    rows: int
    frauds: int


@dataclass(frozen=True)
class ExplainedRows:
    """Some test transactions with their contributions, and what each did for the fit.

    Attributes
    ----------
    X : ndarray, shape (n_explained, n_features), float64
    contributions : ndarray, shape (n_explained, n_features + 1), float64
        In the detector's unit, the base value last, as LightGBM's ``pred_contrib``.
    gain : ndarray, shape (n_features,), float64
    """

    X: Floats
    contributions: Floats
    gain: Floats


def metrics(
    model: Mapping[str, Interval],
    baseline: Mapping[str, Interval],
    difference: Mapping[str, Interval],
    no_skill: Mapping[str, float],
) -> pd.DataFrame:
    """Every measure with its intervals: of the model, of the baseline, and of their difference."""
    rows = []
    for name, interval in model.items():
        row: dict[str, str | float] = {"metric": name, "value": interval.value}
        row |= {"low": interval.low, "high": interval.high}
        for prefix, other in (("baseline", baseline[name]), ("difference", difference[name])):
            row |= {f"{prefix}_{bound}": number for bound, number in other._asdict().items()}
        rows.append(row | {"no_skill": no_skill[name]})
    return pd.DataFrame(rows)


def windows(split: Sequence[Window]) -> pd.DataFrame:
    """The windows of the data, with their fraud rates."""
    table = pd.DataFrame(split, columns=list(Window._fields))
    return table.assign(fraud_rate=table["frauds"] / table["rows"])


def meaning(feature: Feature) -> str:
    """Return the meaning of a feature, in words."""
    if feature.meaning or feature.source == "request":
        return feature.meaning or "as the caller sends it"
    return HISTORY_FEATURES[feature.name].meaning


def features(listed: Sequence[Feature], explained: ExplainedRows) -> pd.DataFrame:
    """The features by falling effect: mean absolute contribution and share of the fit's gain."""
    table = pd.DataFrame(
        {
            "feature": [feature.name for feature in listed],
            "source": [feature.source for feature in listed],
            "type": [feature.type for feature in listed],
            "effect": np.abs(explained.contributions[:, :-1]).mean(axis=0),
            "gain_share": explained.gain / (explained.gain.sum() or 1.0),
            "missing_share": np.isnan(explained.X).mean(axis=0),
            "meaning": [meaning(feature) for feature in listed],
        }
    )
    return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


def decisions(outcomes: Outcomes, scores: Mapping[str, Scored]) -> pd.DataFrame:
    """The decisions of each policy, and their costs if money is known."""
    y = (outcomes.y_true == 1).astype(np.int64)
    amount = np.ones(len(y)) if outcomes.amount is None else outcomes.amount
    rows = []
    for name, scored in scores.items():
        taken, prices = scored.taken, scored.policy["costs"]
        costs = decision_costs(y, amount, prices) if prices else None
        for i, decision in enumerate(POLICY_ACTIONS):
            here = taken == i
            row: dict[str, str | float] = {"scores": name, "decision": decision}
            row |= {"transactions": int(here.sum()), "frauds": int(y[here].sum())}
            if costs is not None:
                row |= {
                    "fraud_amount": float((y * amount)[here].sum()),
                    "legitimate_amount": float(((1 - y) * amount)[here].sum()),
                    "cost": float(costs[i, here].sum()),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def calibration(outcomes: Outcomes, scores: Mapping[str, Scored]) -> pd.DataFrame:
    """The bins of the calibration plot."""
    bins = [
        pd.DataFrame({"scores": name, **reliability(outcomes.y_true, scored.y_prob)}) for name, scored in scores.items()
    ]
    return pd.concat(bins, ignore_index=True)


def daily(outcomes: Outcomes, scores: Mapping[str, Scored]) -> pd.DataFrame:
    """Transactions, frauds and each policy's reviews, declines and found frauds for each UTC day."""
    if outcomes.event_time_ms is None:
        raise ValueError("rows without event times have no days")
    days, place = np.unique(outcomes.event_time_ms // DAY_MS, return_inverse=True)
    y = (outcomes.y_true == 1).astype(np.int64)
    dates = np.datetime_as_string(days.astype("datetime64[D]"))
    tables = []
    for name, scored in scores.items():
        taken = scored.taken
        counts = {
            "transactions": np.ones(len(y)),
            "frauds": y,
            "reviewed": taken == 1,
            "declined": taken == 2,
            "frauds_found": y * (taken > 0),
        }
        columns = {column: np.bincount(place, weights=rows).astype(int) for column, rows in counts.items()}
        tables.append(pd.DataFrame({"scores": name, "day": dates, **columns}))
    return pd.concat(tables, ignore_index=True)
