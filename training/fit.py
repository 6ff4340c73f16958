"""Fits the booster: early stopping on a validation window, then a refit that includes that window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.algorithm import detector_files
from fraud.detectors.lightgbm.text import read_text, write_text
from fraud.detectors.severity import SeverityScale
from fraud.errors import DataError
from fraud.features.featurizer import Matrix
from fraud.schema import FeatureSpec
from training.config import BoosterOptions, Config
from training.splits import Windows

Progress = Callable[[str, int, int], None]
METRIC = "average_precision"


class HabitFact(NamedTuple):
    """A feature whose unusual values count, the side on which they are, and the median; for the model card."""

    feature: str
    odd: str
    median: float


class FittedDetector(Protocol):
    """What an algorithm's fitting function returns."""

    @property
    def n_trees(self) -> int: ...

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The table of the hyperparameter search; empty without one."""

    def files(self, calibrator: Calibrator | None, severity: SeverityScale | None = None) -> dict[str, bytes]:
        """Return the detector's files of a bundle; None before it is calibrated, or if it is not."""

    def gain(self) -> NDArray[np.float64]:
        """Return what each feature did for the fit, (n_features,)."""

    def habits_of(self, spec: FeatureSpec) -> list[HabitFact]:
        """Return the habits that a fit without labels judges by; none otherwise."""


@dataclass(frozen=True)
class Fitted:
    """A booster's text, how many trees it has, each feature's gain, and the search's table if there was one."""

    text: str
    n_trees: int
    gains: NDArray[np.float64]
    validation_average_precision: float
    parameters: BoosterOptions
    trials: list[dict[str, Any]]

    def files(self, calibrator: Calibrator | None, severity: SeverityScale | None = None) -> dict[str, bytes]:
        """Return the detector's files of a bundle; it measures no severity."""
        return detector_files(self.text, calibrator)

    def gain(self) -> NDArray[np.float64]:
        """Return the total gain of each feature, (n_features,)."""
        return self.gains

    def habits_of(self, spec: FeatureSpec) -> list[HabitFact]:
        """Return none: it learns from labels."""
        return []


def fit_booster(
    X: Matrix,
    y: NDArray[np.int8],
    windows: Windows,
    spec: FeatureSpec,
    config: Config,
    progress: Progress | None = None,
    columns: NDArray[np.int64] | None = None,
) -> Fitted:
    """Train a booster; the same input gives the same text.

    Parameters
    ----------
    X : (n, n_features) float64
        From the first row of the train window on.
    y : (n,) int8
        1 fraud, 0 legitimate, -1 unknown at training time: such rows are left out.
    windows : Windows
    spec : FeatureSpec
    config : Config
    progress : callable, optional
        Called with a stage, a boosting round and the maximum number of rounds, which falls after early stopping.
    columns : (k,) int64, optional
        Train on these columns of `X` alone, for a baseline.

    Raises
    ------
    DataError
        A window without a fraud or without a legitimate transaction.
    """
    train, validation = windows.within(windows.train), windows.within(windows.validation)
    for name, window in (("train", train), ("validation", validation)):
        for value, what in ((1, "fraud"), (0, "legitimate transaction")):
            if not (y[window] == value).any():
                raise DataError(f"no known {what} in the {name} window; give more data or another window")
    parameters = config.booster
    trials: list[dict[str, Any]] = []
    train_set = _dataset(X, y, train, spec, config, columns)
    validation_set = _dataset(X, y, validation, spec, config, columns, train_set)
    if config.search_trials:
        parameters, trials = _search(train_set, validation_set, config, progress)
    stopped = _boost(train_set, parameters, config, config.rounds, progress, "boost", validation_set)
    n_trees = stopped.best_iteration
    score = stopped.best_score["validation"][METRIC]
    del train_set, validation_set
    whole = _dataset(X, y, windows.within(windows.refit), spec, config, columns)
    boosters = []
    for i in range(config.seeds):
        seeded = config.model_copy(update={"seed": (config.seed + i) % 2**31})
        stage = "refit" if config.seeds == 1 else f"refit {i + 1}/{config.seeds}"
        boosters.append(_boost(whole, parameters, seeded, n_trees, progress, stage))
    gains = np.asarray([booster.feature_importance("gain") for booster in boosters], np.float64).sum(axis=0)
    text = _averaged([booster.model_to_string() for booster in boosters])
    return Fitted(text, n_trees * config.seeds, gains, float(score), parameters, trials)


def _averaged(texts: list[str]) -> str:
    """Return one booster whose margins are the means of those of several: all their trees, leaf values divided."""
    if len(texts) == 1:
        return texts[0]
    forests = [read_text(text) for text in texts]
    trees = (
        replace(tree, leaf_values=tuple(value / len(texts) for value in tree.leaf_values))
        for forest in forests
        for tree in forest.trees
    )
    return write_text(replace(forests[0], trees=tuple(trees)))


def _dataset(
    X: Matrix,
    y: NDArray[np.int8],
    window: slice,
    spec: FeatureSpec,
    config: Config,
    columns: NDArray[np.int64] | None,
    reference: lgb.Dataset | None = None,
) -> lgb.Dataset:
    features = spec.features if columns is None else [spec.features[i] for i in columns]
    data = X[window] if columns is None else np.ascontiguousarray(X[window][:, columns])
    known = y[window] >= 0
    dataset = lgb.Dataset(
        data,
        np.maximum(y[window], 0),
        weight=None if known.all() else known.astype(np.float32),
        reference=reference,
        feature_name=[f"f{i}" for i in range(len(features))],  # its text form allows no free names
        categorical_feature=[i for i, f in enumerate(features) if f.type == "categorical"],
        params={**_fixed(config), "max_bin": config.booster.max_bin},
    )
    return dataset.construct()


def _fixed(config: Config) -> dict[str, Any]:
    return {
        "objective": "binary",
        "metric": METRIC,
        "deterministic": True,
        "force_row_wise": True,
        "seed": config.seed,
        "num_threads": 0,  # OpenMP's own number: OMP_NUM_THREADS in any of its forms, else this process's processors
        "verbosity": -1,
        "feature_pre_filter": False,
    }


def _boost(
    data: lgb.Dataset,
    parameters: BoosterOptions,
    config: Config,
    rounds: int,
    progress: Progress | None,
    stage: str,
    validation: lgb.Dataset | None = None,
) -> lgb.Booster:
    callbacks: list[Callable[..., Any]] = []
    if validation is not None:
        callbacks.append(lgb.early_stopping(config.early_stopping_rounds, verbose=False))
    boosted = 0

    def report(env: Any) -> None:
        nonlocal boosted
        boosted = env.iteration + 1
        if progress is not None:
            progress(stage, boosted, rounds)

    booster = lgb.train(
        {**_fixed(config), **parameters.model_dump()},
        data,
        rounds,
        valid_sets=None if validation is None else [validation],
        valid_names=None if validation is None else ["validation"],
        callbacks=[*callbacks, report],
        keep_training_booster=False,
    )
    if progress is not None:
        progress(stage, boosted, boosted)
    return booster


def _search(
    train: lgb.Dataset, validation: lgb.Dataset, config: Config, progress: Progress | None
) -> tuple[BoosterOptions, list[dict[str, Any]]]:
    """Look for better parameters with optuna's seeded TPE, by average precision on the validation window."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def parameters_of(trial: optuna.Trial | optuna.trial.FrozenTrial) -> BoosterOptions:
        return config.booster.model_copy(
            update={
                "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.1, log=True),
                "num_leaves": trial.suggest_int("num_leaves", 15, 127, log=True),
                "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 20, 500, log=True),
                "feature_fraction": trial.suggest_float("feature_fraction", 0.3, 0.9),
                "lambda_l2": trial.suggest_float("lambda_l2", 0.1, 100.0, log=True),
            }
        )

    def objective(trial: optuna.Trial) -> float:
        stage = f"search {trial.number + 1}/{config.search_trials}"
        booster = _boost(train, parameters_of(trial), config, config.rounds, progress, stage, validation)
        trial.set_user_attr("n_trees", booster.best_iteration)
        return float(booster.best_score["validation"][METRIC])

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.optimize(objective, config.search_trials)
    trials = [{METRIC: t.value, **t.user_attrs, **t.params} for t in study.trials]
    return parameters_of(study.best_trial), trials
