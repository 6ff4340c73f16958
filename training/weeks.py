"""Back-tests over several weeks: each is scored by a model trained as of its beginning, from labels known by then."""

from __future__ import annotations

from collections.abc import Mapping as Named
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.errors import DataError
from training.assess import Candidate, is_labelled
from training.backtest import prepare_as_of, scored_rows
from training.config import Config
from training.data import Mapping
from training.evaluate import Samples
from training.prepare import NO_PROGRESS, PreparedData, Progress
from training.splits import MS_PER_DAY, moment
from training.train import Trained, fit_model, plain_columns

WEEK_MS = 7 * MS_PER_DAY
MODEL, AGAINST, PLAIN = "model", "against", "plain"
"""The configuration, the one it is compared with, and the request's own fields alone in the first one's settings."""
MEAN = "mean"


@dataclass(frozen=True)
class Week:
    """One test week: when it begins, what was measured on, and the measures of each model by its name."""

    begin_ms: int
    rows: int
    frauds: int
    samples: dict[str, Samples]


def backtest_weeks(
    table: pd.DataFrame,
    mapping: Mapping,
    configs: Named[str, Config],
    *,
    n_weeks: int,
    until: int | None = None,
    label_delay_ms: int | None = None,
    defrauded_within_ms: int | None = None,
    progress: Progress = NO_PROGRESS,
    algorithm: Algorithm = LIGHTGBM,
) -> tuple[list[Week], pd.DataFrame]:
    """Train as of the beginning of each week, score the week, and move on to the next.

    A model never sees a label that was not known when its week began, so between the transactions that it learns from
    and those that it is judged by lies the label delay.

    Parameters
    ----------
    table : DataFrame
        The canonical table, with labels.
    configs : mapping
        Configurations by name, `MODEL` first. All are trained and measured on the same rows and resamples.
    n_weeks : int
        So many weeks follow one another.
    until : int, optional
        End of the last week, ms; by default the first midnight (UTC) after the last transaction.
    label_delay_ms : int, optional
        As `training.backtest.backtest`.
    defrauded_within_ms : int, optional
        Leave out the transactions of a customer of whom a fraud was known by the beginning of the day, if that happened
        at most so long before the week: such a card is blocked already.

    Returns
    -------
    weeks : list of Week
    scores : DataFrame
        As `backtest`, for `MODEL`, with `week`, its first day, and `measured`, false for rows that were left out; the
        columns of another configuration's scores begin with its name.

    Raises
    ------
    DataError
        There is too little data before a week, or a week without a fraud or without a legitimate transaction.
    """
    first = configs[MODEL]
    if until is None:
        until = (int(table["processing_time_ms"].iloc[-1]) // MS_PER_DAY + 1) * MS_PER_DAY
    weeks, parts = [], []
    for i in range(n_weeks):
        begin = until - (n_weeks - i) * WEEK_MS

        def on_stage(stage: str, done: int, total: int, week: int = i + 1) -> None:
            progress(f"week {week}/{n_weeks}: {stage}", done, total)

        prepared: dict[tuple[float, float], PreparedData] = {}
        trained: dict[str, tuple[PreparedData, Trained]] = {}
        for name, config in configs.items():
            shares = (config.validation_share, config.calibration_share)
            if shares not in prepared:
                span = (begin, begin + WEEK_MS)
                prepared[shares] = prepare_as_of(
                    table, mapping, config, begin, span, label_delay_ms, on_stage, algorithm
                )
            trained[name] = prepared[shares], fit_model(prepared[shares], config, on_stage, None, algorithm)
        data, model = trained[MODEL]
        kept = _measured_rows(data, begin, defrauded_within_ms)
        columns = plain_columns(data.spec, algorithm)
        plain = fit_model(data, first, on_stage, columns, algorithm)
        candidates = {name: (data, Candidate(it.detector, it.policy)) for name, (data, it) in trained.items()}
        candidates[PLAIN] = data, Candidate(plain.detector, plain.policy, None, columns)
        labels = data.table["label"].to_numpy()[data.windows.test][kept]
        samples = {name: _measured(data, candidate, kept, first) for name, (data, candidate) in candidates.items()}
        weeks.append(Week(begin, len(labels), int((labels == 1).sum()), samples))
        scores = scored_rows(data, model).assign(week=moment(begin)[:10], measured=kept)
        for name in (name for name in configs if name != MODEL):
            others = scored_rows(*trained[name])
            for column in others.columns[others.columns.get_loc("raw_margin") :]:
                scores[f"{name}_{column}"] = others[column]
        parts.append(scores)
    return weeks, pd.concat(parts, ignore_index=True)


def _measured_rows(data: PreparedData, begin: int, defrauded_within_ms: int | None) -> NDArray[np.bool_]:
    """Return which rows of the test week are measured: labelled ones, but of customers known as defrauded, if asked."""
    rows = data.table.iloc[data.windows.test]
    kept = (rows["label"] >= 0).to_numpy()
    if defrauded_within_ms is not None:
        earlier = data.table["event_time_ms"] >= begin - defrauded_within_ms
        defrauded = data.table[earlier & (data.table["label"] == 1)]
        known_from = defrauded.groupby("customer_id", observed=True)["label_time_ms"].min()
        known = rows["customer_id"].map(known_from).astype(np.float64).fillna(np.inf).to_numpy()
        kept = kept & (known > rows["event_time_ms"].to_numpy() // MS_PER_DAY * MS_PER_DAY)
    if not is_labelled(rows[kept]):
        frauds = int((rows["label"][kept] == 1).sum())
        raise DataError(
            f"the week from {moment(begin)} has {kept.sum()} transactions to measure, of which {frauds} are fraud; "
            "both kinds are needed: take fewer weeks or another --test-until"
        )
    return kept


def _measured(data: PreparedData, candidate: Candidate, kept: NDArray[np.bool_], config: Config) -> Samples:
    X, rows = data.rows(data.windows.test)
    stake = None if data.stake is None else data.stake[data.windows.test][kept]
    return candidate.measured(X[kept], rows[kept], stake, X[:0], config)


def table_of(weeks: list[Week]) -> pd.DataFrame:
    """Return one row for each week, model and measure, then the means over the weeks, then paired differences.

    Columns are `week` (its first day, or "mean"), `model`, `measure`, `value`, `low`, `high`, `spread`, `rows` and
    `frauds`. An interval is from resampled customers, of a mean from those of each week. `spread` is the standard
    deviation over the weeks, of means only. A model's name with " minus " is a difference on the same resamples.
    """
    names = list(weeks[0].samples)
    rows: list[dict[str, Any]] = []

    def add(where: str, model: str, samples: Samples, n: int, frauds: int, spreads: Sequence[float | None]) -> None:
        facts = {"week": where, "model": model, "rows": n, "frauds": frauds}
        for (name, interval), spread in zip(samples.intervals().items(), spreads, strict=True):
            rows.append(facts | {"measure": name, **interval._asdict(), "spread": spread})

    for model, other in [(name, None) for name in names] + [(MODEL, name) for name in names[1:]]:
        named = model if other is None else f"{model} minus {other}"
        parts = [w.samples[model] if other is None else w.samples[model].minus(w.samples[other]) for w in weeks]
        for week, part in zip(weeks, parts, strict=True):
            add(moment(week.begin_ms)[:10], named, part, week.rows, week.frauds, [None] * len(part.names))
        spreads = [None] * len(parts[0].names)
        if len(parts) > 1:
            spreads = np.std([part.values for part in parts], axis=0, ddof=1).tolist()
        add(MEAN, named, Samples.mean(parts), sum(w.rows for w in weeks), sum(w.frauds for w in weeks), spreads)
    return pd.DataFrame(rows)[["week", "model", "measure", "value", "low", "high", "spread", "rows", "frauds"]]
