"""One training from a table to a run folder: bundle, report, plots, tables, run.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm, Detector
from fraud.features.featurizer import Matrix
from fraud.schema import FeatureSpec
from training.assess import Candidate, assess
from training.calibrate import fit_calibrator
from training.config import Config
from training.data import Mapping
from training.fit import FittedDetector
from training.package import write_model
from training.policy import choose_policy, review_the_most_unusual, review_the_riskiest
from training.preflight import check_folder
from training.prepare import ALL_WINDOWS, NO_PROGRESS, PreparedData, Progress, prepare
from training.report import ModelFacts, model_card, write_report
from training.severity import fit_severity
from training.splits import moment
from training.tables import ExplainedRows, Window

Vector = NDArray[np.float64]
PLAIN_FIELDS = {"amount", "amount_log", "hour", "weekday"}
N_EXPLAINED = 2000


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
class Trained:
    """A fitted model with its calibrator and policy."""

    fitted: FittedDetector
    calibrator: Calibrator | None
    policy: dict[str, Any]
    algorithm: Algorithm
    detector: Detector

    @property
    def files(self) -> dict[str, bytes]:
        """The detector's files of a bundle."""
        return self.fitted.files(self.calibrator, self.detector.severity)


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


def fit_model(
    prepared: PreparedData,
    config: Config,
    progress: Progress = NO_PROGRESS,
    columns: NDArray[np.int64] | None = None,
    algorithm: Algorithm = LIGHTGBM,
) -> Trained:
    """Fit a detector, and calibrate its probability, its severity and its policy on a window of their own."""
    fitted: FittedDetector = algorithm.fit()(
        prepared.X, prepared.y, prepared.windows, prepared.spec, config, progress, columns
    )
    calibration = prepared.windows.within(prepared.windows.calibration)
    y = prepared.y[calibration]
    X = prepared.X[calibration] if columns is None else prepared.X[calibration][:, columns]
    detector = algorithm.load(fitted.files(None), X.shape[1])
    margins = detector.raw_margin(X)
    severity = None
    if detector.anomaly_score(margins) is not None:
        severity = fit_severity(margins, _customers(prepared), config.severity, config.seed)
    calibrator = fit_calibrator(margins, y) if is_calibrated(algorithm, config) else None
    detector = algorithm.load(fitted.files(calibrator, severity), X.shape[1])
    policy = _policy(prepared, detector, margins, config) | {"severity_actions": dict(config.severity.actions)}
    return Trained(fitted, calibrator, policy, algorithm, detector)


def _customers(prepared: PreparedData) -> NDArray[np.int64] | None:
    """Return the customer of each row of the calibration window; None where rows name none."""
    if "customer_id" not in prepared.table:
        return None
    codes = prepared.table["customer_id"].cat.codes.to_numpy()
    return codes[prepared.windows.calibration].astype(np.int64)


def _policy(prepared: PreparedData, detector: Detector, margins: Vector, config: Config) -> dict[str, Any]:
    """Return the policy that the calibration window asks for, whose raw scores are `margins`."""
    if not detector.is_calibrated:
        return review_the_most_unusual(detector.decision_score(margins), config.review_rate)
    known = prepared.y[prepared.windows.within(prepared.windows.calibration)] >= 0
    probabilities = detector.decision_score(margins)[known]
    if prepared.stake is None:
        return review_the_riskiest(probabilities, config.review_rate)
    stake = prepared.stake[prepared.windows.calibration][known]
    return choose_policy(probabilities, stake, config.costs, config.review_capacity)


def is_calibrated(algorithm: Algorithm, config: Config) -> bool:
    """Return whether a probability is calibrated with labels."""
    return algorithm.reads_labels or config.forest.decides_on == "fraud_probability"


def labelled_windows(algorithm: Algorithm, config: Config) -> tuple[str, ...]:
    """Return the windows in which a training needs labels."""
    if algorithm.reads_labels:
        return ALL_WINDOWS
    return ("calibration",) if is_calibrated(algorithm, config) else ()


def _scales(spec: FeatureSpec) -> dict[str, str]:
    """Return the typical amounts as a mapping writes them, for the report."""
    if not spec.currencies:
        return {}
    typical = {code: c.typical_minor_units / 10.0**c.minor_digits for code, c in spec.currencies.items()}
    return {"typical amounts": ", ".join(f"{code}: {amount:.12g}" for code, amount in typical.items())}


def plain_columns(spec: FeatureSpec, algorithm: Algorithm = LIGHTGBM) -> NDArray[np.int64]:
    """Return the columns of the plain baseline: the request's own fields without any history, or the first feature."""
    usable = [i for i, f in enumerate(spec.features) if algorithm.reads_labels or f.type != "categorical"]
    if spec.kind == "features":
        return np.array(usable[:1], dtype=np.int64)
    plain = [i for i in usable if spec.features[i].source == "request" or spec.features[i].name in PLAIN_FIELDS]
    return np.array(plain, dtype=np.int64)


def train(
    table: pd.DataFrame,
    mapping: Mapping,
    config: Config,
    *,
    name: str,
    dataset: dict[str, Any],
    runs: Path,
    progress: Progress = NO_PROGRESS,
    algorithm: Algorithm = LIGHTGBM,
) -> Run:
    """Train, calibrate, evaluate and package a model of the mapping's kind.

    Parameters
    ----------
    table : DataFrame
        The canonical table, with labels if the algorithm reads them. Its last share is the test window: of the time, or
        of the rows of a table of ready features. A transaction model is trained as of the beginning of that window.
    name : str
        The model's.
    dataset : dict
        Name and digest of the file that the table was read from.
    runs : Path
        Where the run folder is made.
    algorithm : Algorithm
        Of the detector.
    """
    check_folder(runs)
    clock = StageTimer()
    with clock.stage("replay"):
        prepared = prepare(table, mapping, config, labelled_windows(algorithm, config), progress)
    with clock.stage("train"):
        trained = fit_model(prepared, config, progress, None, algorithm)
    columns = plain_columns(prepared.spec, algorithm)
    unsearched = config.model_copy(update={"search_trials": 0})

    def on_baseline(stage: str, done: int, total: int) -> None:
        progress(f"baseline: {stage}", done, total)

    with clock.stage("baseline"):
        plain = fit_model(prepared, unsearched, on_baseline, columns, algorithm)
        model = _candidate(trained, prepared, unsearched, on_baseline, None)
        simple = _candidate(plain, prepared, unsearched, on_baseline, columns)
    with clock.stage("evaluate"):
        progress("evaluate", 0, 1)
        assessed = assess(prepared, model, simple, config)
        facts = ModelFacts(
            name=name,
            spec=prepared.spec,
            algorithm=algorithm,
            is_calibrated=trained.calibrator is not None,
            is_labelled=assessed.is_labelled,
            habits=trained.fitted.habits_of(prepared.spec),
            data={**dataset, **_label_delay(prepared, assessed.is_labelled), **_scales(prepared.spec)},
            windows=_windows(prepared),
            config=config.flat() | {"trees": trained.fitted.n_trees},
            policy=trained.policy,
            severity=trained.detector.severity,
            metrics=assessed.samples.intervals(),
            baseline=assessed.plain_samples.intervals(),
            difference=assessed.samples.minus(assessed.plain_samples).intervals(),
            no_skill=assessed.no_skill,
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
            detector_files=trained.files,
            policy=trained.policy,
            metrics=metrics | {"no_skill": dict(facts.no_skill)},
            model_card=model_card(facts),
            X=prepared.rows(prepared.windows.calibration)[0],
            examples=assessed.test,
            data={**dataset, "windows": [window._asdict() for window in facts.windows]},
            seed=config.seed,
        )
    with clock.stage("report"):
        progress("report", 0, 1)
        write_report(
            folder,
            facts,
            assessed.outcomes,
            assessed.scored,
            assessed.plain_scored,
            _explained(trained, assessed.X, config.seed),
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
    warning = facts.declines_too_many
    warnings = [*prepared.warnings, *([] if warning is None else [warning])]
    return Run(
        folder, digest, dict(facts.metrics), dict(facts.baseline), clock.timings_s, list(facts.windows), warnings
    )


def _candidate(
    trained: Trained,
    prepared: PreparedData,
    config: Config,
    progress: Progress,
    columns: NDArray[np.int64] | None,
) -> Candidate:
    """Return a model as it is assessed; one without labels beside a fit with another seed."""
    other = None
    if not trained.algorithm.reads_labels:
        reseeded = config.model_copy(update={"seed": config.seed + 1})
        other = fit_model(prepared, reseeded, progress, columns, trained.algorithm).detector
    return Candidate(trained.detector, trained.policy, other, columns)


def _label_delay(prepared: PreparedData, is_labelled: bool) -> dict[str, float]:
    return {"label delay in days": round(prepared.label_delay_ms / 86_400_000, 3)} if is_labelled else {}


def _windows(prepared: PreparedData) -> list[Window]:
    windows = []
    for name in ALL_WINDOWS:
        rows = prepared.table.iloc[getattr(prepared.windows, name)]
        begin, end = (None, None)
        if "event_time_ms" in rows:
            begin, end = moment(int(rows["event_time_ms"].iloc[0])), moment(int(rows["event_time_ms"].iloc[-1]))
        windows.append(Window(name, begin, end, len(rows), int((rows["label"] == 1).sum())))
    return windows


def _explained(trained: Trained, X: Matrix, seed: int) -> ExplainedRows:
    chosen = np.sort(np.random.default_rng(seed).permutation(len(X))[:N_EXPLAINED])
    return ExplainedRows(X[chosen], trained.detector.contributions(X[chosen]), trained.fitted.gain())
