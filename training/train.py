"""One training from a table to a run folder: bundle, report, plots, tables, run.json."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.detectors.calibration import UNCALIBRATED, Calibrator
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm, Detector
from fraud.errors import DataError
from fraud.features.featurizer import Featurizer, Matrix
from fraud.models.bundle import Preprocessor
from fraud.schema import FeatureSpec
from training.calibrate import fit_calibrator
from training.config import Config
from training.currencies import amounts_of, stakes
from training.data import Mapping
from training.evaluate import Outcomes, Samples, Scored, measure, no_skill
from training.fit import Fitted
from training.package import write_model
from training.policy import choose_policy, declines_too_many, review_the_riskiest
from training.preflight import check_features, check_folder, check_windows
from training.replay import further_features, replay, requested_columns, transaction_spec
from training.report import ModelFacts, model_card, write_report
from training.splits import Windows, known_labels, moment, split_by_order, split_by_time
from training.tables import ExplainedRows, Window
from training.trained_table import trained_table

Progress = Callable[[str, int, int], None]
NO_PROGRESS: Progress = lambda stage, done, total: None  # noqa: E731
PLAIN_FIELDS = {"amount", "amount_log", "hour", "weekday"}
N_EXPLAINED = 2000
DEFAULT_LABEL_DELAY_MS = 7 * 86_400_000


@dataclass
class StageTimer:
    """Times each stage, seconds."""

    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - begin, 3)


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


@dataclass(frozen=True)
class Trained:
    """A fitted model with its calibrator and policy."""

    fitted: Fitted
    calibrator: Calibrator
    policy: dict[str, Any]
    algorithm: Algorithm
    detector: Detector


@dataclass(frozen=True)
class Run:
    """A finished training."""

    folder: Path
    digest: str
    metrics: dict[str, Any]
    baseline: dict[str, Any]
    timings_s: dict[str, float]
    windows: list[Window]
    warnings: list[str]
    """What a person should look at before the model decides anything."""


def label_delay_of(table: pd.DataFrame, mapping: Mapping) -> int:
    """Return the time after which an unlabelled transaction counts as legitimate, ms.

    The mapping's fixed delay, or else the delay within which 90% of the frauds became known.
    """
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
    packaged: bool = True,
) -> PreparedData:
    """Check a table of transactions, replay it and return the data of a training.

    A model that is not `packaged`, as in a backtest, needs no labels in the test window and no golden rows.
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
    check_windows(table, y, windows, config.shares, evaluated=packaged)
    warnings = check_features(table, windows, spec) if packaged else []
    amounts = amounts_of(table, spec.currencies or {})[windows.train]
    preprocessor = Preprocessor(np.quantile(amounts, np.linspace(0, 0.99, 100)).tolist())
    if spec.currencies:
        table = table.assign(stake=stakes(table, spec.currencies, windows.train))
    featurizer = Featurizer(spec, preprocessor.amount_quantiles)
    n = len(table)
    X = replay(table, featurizer, windows.all, lambda done: progress("replay", done, n))
    return PreparedData(table, windows, spec, preprocessor, X, y, label_delay_ms, stake_of(table), warnings)


def _prepare(
    table: pd.DataFrame, mapping: Mapping, config: Config, clock: StageTimer, progress: Progress
) -> PreparedData:
    if mapping.kind == "features":
        return prepare_features(table, mapping, config)
    times = table["processing_time_ms"].to_numpy(np.int64)
    delay = label_delay_of(table, mapping)
    as_of = int(times[-1] - (times[-1] - times[0]) * config.test_share)
    shares = (config.validation_share, config.calibration_share)
    windows = split_by_time(times, delay, as_of, (as_of, int(times[-1]) + 1), shares)
    with clock.stage("replay"):
        return prepare_transactions(table, mapping, windows, as_of, delay, config, progress)


def prepare_features(table: pd.DataFrame, mapping: Mapping, config: Config) -> PreparedData:
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
    check_windows(table, y, windows, config.shares, evaluated=True)
    warnings = check_features(table, windows, spec)
    X = np.empty((len(table), len(spec.features)), np.float64)
    requested_columns(table, spec, X)
    return PreparedData(table, windows, spec, Preprocessor(), X, y, 0, stake_of(table), warnings)


def stake_of(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the money at stake in each row: a transaction's amount, or the stake column of ready features."""
    column = "stake" if "stake" in table else "amount" if "customer_id" in table else None
    return None if column is None else table[column].to_numpy(np.float64)


def fit_model(
    prepared: PreparedData,
    config: Config,
    progress: Progress = NO_PROGRESS,
    columns: NDArray[np.int64] | None = None,
    algorithm: Algorithm = LIGHTGBM,
) -> Trained:
    """Fit detector, calibrator and policy, each on its own window."""
    fitted: Fitted = algorithm.fit()(prepared.X, prepared.y, prepared.windows, prepared.spec, config, progress, columns)
    calibration = prepared.windows.within(prepared.windows.calibration)
    y = prepared.y[calibration]
    X = prepared.X[calibration] if columns is None else prepared.X[calibration][:, columns]
    margins = algorithm.load(fitted.files(UNCALIBRATED), X.shape[1]).raw_margin(X)
    calibrator = fit_calibrator(margins, y)
    detector = algorithm.load(fitted.files(calibrator), X.shape[1])
    known = y >= 0
    probabilities = detector.decision_score(margins)[known]
    if prepared.stake is None:
        policy = review_the_riskiest(y[known], probabilities, config.review_rate)
    else:
        stake = prepared.stake[prepared.windows.calibration][known]
        policy = choose_policy(y[known], probabilities, stake, config.costs, config.review_capacity)
    return Trained(fitted, calibrator, policy, algorithm, detector)


def _scales(spec: FeatureSpec) -> dict[str, str]:
    """Return the typical amounts as a mapping writes them, for the report."""
    if not spec.currencies:
        return {}
    typical = {code: c.typical_minor_units / 10.0**c.minor_digits for code, c in spec.currencies.items()}
    return {"typical amounts": ", ".join(f"{code}: {amount:.12g}" for code, amount in typical.items())}


def plain_columns(spec: FeatureSpec) -> NDArray[np.int64]:
    """Return the columns of the plain baseline: the request's own fields, without any history."""
    return np.array(
        [i for i, f in enumerate(spec.features) if f.source == "request" or f.name in PLAIN_FIELDS], dtype=np.int64
    )


def train(
    table: pd.DataFrame,
    mapping: Mapping,
    config: Config,
    *,
    name: str,
    dataset: dict[str, Any],
    runs: Path,
    progress: Progress = NO_PROGRESS,
) -> Run:
    """Train, calibrate, evaluate and package a model of the mapping's kind.

    Parameters
    ----------
    table : DataFrame
        The canonical table, with labels. Its last share is the test window: of the time, or of the rows of a table of
        ready features. A transaction model is trained as of the beginning of that window.
    name : str
        The model's.
    dataset : dict
        Name and digest of the file that the table was read from.
    runs : Path
        Where the run folder is made.
    """
    check_folder(runs)
    clock = StageTimer()
    prepared = _prepare(table, mapping, config, clock, progress)
    with clock.stage("train"):
        trained = fit_model(prepared, config, progress)
    columns = plain_columns(prepared.spec) if prepared.spec.kind == "transaction" else np.arange(1, dtype=np.int64)
    with clock.stage("baseline"):
        unsearched = config.model_copy(update={"search_trials": 0})
        plain = fit_model(prepared, unsearched, lambda stage, *done: progress(f"baseline: {stage}", *done), columns)
    with clock.stage("evaluate"):
        progress("evaluate", 0, 1)
        X, test = prepared.rows(prepared.windows.test)
        labelled = (test["label"] >= 0).to_numpy()
        scored = _scored(trained, X[labelled])
        plain_scored = _scored(plain, X[labelled][:, columns])
        amounts = None if prepared.stake is None else prepared.stake[prepared.windows.test][labelled]
        test = test[labelled]
        samples = measure_window(scored, test, amounts, config)
        plain_samples = measure_window(plain_scored, test, amounts, config)
        facts = ModelFacts(
            name=name,
            spec=prepared.spec,
            data={
                **dataset,
                "label delay in days": round(prepared.label_delay_ms / 86_400_000, 3),
                **_scales(prepared.spec),
            },
            windows=_windows(prepared),
            config=config.flat() | {"trees": trained.fitted.n_trees},
            policy=trained.policy,
            metrics=samples.intervals(),
            baseline=plain_samples.intervals(),
            difference=samples.minus(plain_samples),
            no_skill=no_skill(test["label"], policy=trained.policy, amount=amounts, **_who_and_when(test)),
        )
        progress("evaluate", 1, 1)
    created = datetime.now(UTC)
    folder = runs / f"{name}-{created:%Y%m%dT%H%M%S%f}Z"
    folder.mkdir(parents=True)
    with clock.stage("package"):
        metrics = {
            part: {measure_: list(interval) for measure_, interval in getattr(facts, part).items()}
            for part in ("metrics", "baseline", "difference")
        }
        digest = write_model(
            folder / "bundle",
            name=name,
            spec=prepared.spec,
            preprocessor=prepared.preprocessor,
            algorithm=trained.algorithm,
            detector_files=trained.fitted.files(trained.calibrator),
            policy=trained.policy,
            metrics=metrics | {"no_skill": dict(facts.no_skill)},
            model_card=model_card(facts),
            X=prepared.rows(prepared.windows.calibration)[0],
            probabilities=trained.detector.decision_score(
                trained.detector.raw_margin(prepared.rows(prepared.windows.calibration)[0])
            ),
            examples=test,
            data={**dataset, "windows": [window._asdict() for window in facts.windows]},
            seed=config.seed,
        )
    with clock.stage("report"):
        progress("report", 0, 1)
        write_report(
            folder,
            facts,
            Outcomes(
                test["label"].to_numpy(np.int64),
                test["event_time_ms"].to_numpy(np.int64) if "event_time_ms" in test else None,
                amounts,
            ),
            scored,
            plain_scored,
            _explained(trained, X[labelled], config.seed),
            {
                "made": f"{created:%Y-%m-%d %H:%M} UTC",
                "digest": digest,
                **{f"{k}, s": v for k, v in clock.timings_s.items()},
            },
        )
        progress("report", 1, 1)
    run = {
        "name": name,
        "kind": prepared.spec.kind,
        "created": created.isoformat(),
        "config": facts.config,
        "metrics": {k: v._asdict() for k, v in facts.metrics.items()},
        "baseline": {k: v._asdict() for k, v in facts.baseline.items()},
        "search": trained.fitted.trials,
        "dataset": dataset,
        "bundle_digest": digest,
        "timings_s": clock.timings_s,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    warning = declines_too_many(facts.metrics["decline_rate"].value, facts.no_skill["average_precision"])
    warnings = [*prepared.warnings, *([] if warning is None else [warning])]
    return Run(
        folder, digest, dict(facts.metrics), dict(facts.baseline), clock.timings_s, list(facts.windows), warnings
    )


def _scored(trained: Trained, X: Matrix) -> Scored:
    margins = trained.detector.raw_margin(X)
    return Scored(margins, trained.detector.decision_score(margins), trained.policy)


def _who_and_when(test: pd.DataFrame) -> dict[str, Any]:
    if "customer_id" not in test:
        return {}
    return {
        "customer_codes": test["customer_id"].cat.codes.to_numpy(),
        "event_time_ms": test["event_time_ms"].to_numpy(),
    }


def measure_window(scored: Scored, test: pd.DataFrame, amounts: NDArray[np.float64] | None, config: Config) -> Samples:
    """Measure the scores of labelled rows; the bootstrap draws customers if the rows name them."""
    return measure(
        test["label"],
        scored.y_prob,
        scored.raw_margin,
        policy=scored.policy,
        amount=amounts,
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        **_who_and_when(test),
    )


def _windows(prepared: PreparedData) -> list[Window]:
    windows = []
    for name in ("train", "validation", "calibration", "test"):
        rows = prepared.table.iloc[getattr(prepared.windows, name)]
        begin, end = (None, None)
        if "event_time_ms" in rows:
            begin, end = moment(int(rows["event_time_ms"].iloc[0])), moment(int(rows["event_time_ms"].iloc[-1]))
        windows.append(Window(name, begin, end, len(rows), int((rows["label"] == 1).sum())))
    return windows


def _explained(trained: Trained, X: Matrix, seed: int) -> ExplainedRows:
    chosen = np.sort(np.random.default_rng(seed).permutation(len(X))[:N_EXPLAINED])
    return ExplainedRows(X[chosen], trained.detector.contributions(X[chosen]), trained.fitted.gain())
