"""The evaluation of a model and its plain baseline on the test window, with labels or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.detectors.protocol import Detector
from fraud.features.featurizer import Matrix
from training.config import Config
from training.evaluate import Outcomes, Samples, Scored, measure, no_skill
from training.prepare import PreparedData

Floats = NDArray[np.float64]
TOP_SHARE = 0.01
PROBABILITY_MEASURES = ("brier_score", "log_loss", "expected_calibration_error", "expected_to_observed")
"""What `training.evaluate.measure` says of probabilities; left out for a model that has none."""


@dataclass(frozen=True)
class Candidate:
    """A detector to assess, and what it is compared with.

    Attributes
    ----------
    detector : Detector
    policy : mapping
    other_seed : Detector or None
        A detector fitted without labels on the same data with another seed.
    columns : ndarray or None
        The columns of `X` that it takes; all if None.
    """

    detector: Detector
    policy: Mapping[str, Any]
    other_seed: Detector | None = None
    columns: NDArray[np.int64] | None = None

    def scored(self, X: Matrix) -> Scored:
        margins = self.detector.raw_margin(self._of(X))
        severity = None if self.detector.severity is None else self.detector.severity.of(margins)
        return Scored(margins, self.detector.decision_score(margins), self.policy, severity)

    def _of(self, X: Matrix) -> Matrix:
        return X if self.columns is None else X[:, self.columns]

    def measured(
        self, X: Matrix, test: pd.DataFrame, stake: Floats | None, reference: Matrix, config: Config
    ) -> Samples:
        """Measure on test rows; `reference` are rows of the calibration window."""
        scored, parts = self.scored(X), []
        if is_labelled(test):
            samples = measure_window(scored, test, stake, config)
            parts.append(samples if self.detector.is_calibrated else samples.without(PROBABILITY_MEASURES))
        if self.other_seed is not None:
            other = self.other_seed.raw_margin(self._of(X))
            parts.append(_stability(scored, other, self.scored(reference).raw_margin, test, config))
        return Samples.joined(parts)


@dataclass(frozen=True)
class Assessment:
    """What the test window says of a model.

    Attributes
    ----------
    X : ndarray, shape (n_rows, n_features), float64
    test : DataFrame
        The rows measured: those with a label, or all where there are none.
    stake : ndarray or None
        Their money at stake.
    scored, plain_scored : Scored
        By the model and by the plain baseline.
    samples, plain_samples : Samples
    no_skill : dict
    """

    X: Matrix
    test: pd.DataFrame
    stake: Floats | None
    scored: Scored
    plain_scored: Scored
    samples: Samples
    plain_samples: Samples
    no_skill: dict[str, float]

    @property
    def is_labelled(self) -> bool:
        return is_labelled(self.test)

    @property
    def outcomes(self) -> Outcomes:
        times = self.test["event_time_ms"].to_numpy(np.int64) if "event_time_ms" in self.test else None
        return Outcomes(self.test["label"].to_numpy(np.int64), times, self.stake)


def is_labelled(test: pd.DataFrame) -> bool:
    """Return whether a window has labels of both kinds."""
    return bool((test["label"] == 1).any() and (test["label"] == 0).any())


def assess(prepared: PreparedData, model: Candidate, plain: Candidate, config: Config) -> Assessment:
    """Measure a model and its plain baseline on the test window, on the same resamples."""
    X, test = prepared.rows(prepared.windows.test)
    reference, _ = prepared.rows(prepared.windows.calibration)
    stake = None if prepared.stake is None else prepared.stake[prepared.windows.test]
    if is_labelled(test):
        known = (test["label"] >= 0).to_numpy()
        X, test, stake = X[known], test[known], None if stake is None else stake[known]
    samples = model.measured(X, test, stake, reference, config)
    plain_samples = plain.measured(X, test, stake, reference, config)
    chance: dict[str, float] = dict.fromkeys(samples.names, 0.0) | {"seed_agreement": TOP_SHARE}
    if is_labelled(test):
        chance |= no_skill(test["label"], policy=model.policy, amount=stake, **who_and_when(test))
    return Assessment(
        X,
        test,
        stake,
        model.scored(X),
        plain.scored(X),
        samples,
        plain_samples,
        {name: chance[name] for name in samples.names},
    )


def measure_window(scored: Scored, test: pd.DataFrame, amounts: Floats | None, config: Config) -> Samples:
    """Measure the scores of labelled rows; the bootstrap draws customers if the rows name them."""
    return measure(
        test["label"],
        scored.y_prob,
        scored.raw_margin,
        policy=scored.policy,
        amount=amounts,
        severity=scored.severity,
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        **who_and_when(test),
    )


def who_and_when(test: pd.DataFrame) -> dict[str, Any]:
    """Return customers and times of rows, where they have them, as `measure` takes them."""
    if "customer_id" not in test:
        return {}
    return {
        "customer_codes": test["customer_id"].cat.codes.to_numpy(),
        "event_time_ms": test["event_time_ms"].to_numpy(),
    }


def _stability(scored: Scored, other: Floats, reference: Floats, test: pd.DataFrame, config: Config) -> Samples:
    """Measure what needs no label.

    ``seed_agreement``
        Share of the 1% of rows with the highest scores that are also among the 1% of a detector fitted with another
        seed: chance moves the rest.
    ``score_psi``
        Population stability index of the scores against the calibration window's, in its deciles: sum of
        (p - q) ln(p / q). Above 0.1 the population has moved, above 0.25 much.
    ``review_rate``
        Share of the rows that the policy reviews; given where no labels measure it.
    """
    margin, n = scored.raw_margin, len(scored.raw_margin)
    top, other_top = (values >= np.quantile(values, 1 - TOP_SHARE) for values in (margin, other))
    edges = np.unique(np.quantile(reference, np.linspace(0.1, 0.9, 9)))
    bins, expected = np.searchsorted(edges, margin), np.bincount(np.searchsorted(edges, reference), minlength=10)
    reviewed = scored.taken > 0
    rows = [np.ones(n), top, top & other_top, reviewed, *(bins == b for b in range(10))]
    who = who_and_when(test)
    _, cluster = np.unique(who["customer_codes"], return_inverse=True) if who else (None, np.arange(n))
    n_clusters = int(cluster.max()) + 1
    sums = np.stack([np.bincount(cluster, weights=row, minlength=n_clusters) for row in rows], axis=1)
    q = np.maximum(expected / len(reference), 1e-4)

    def measures(counts: NDArray[np.int64]) -> list[float]:
        total = counts @ sums
        p = np.maximum(total[4:] / total[0], 1e-4)
        return [total[2] / max(total[1], 1), float(np.sum((p - q) * np.log(p / q))), total[3] / total[0]]

    rng = np.random.default_rng(config.seed)
    resampled = [
        measures(np.bincount(rng.integers(n_clusters, size=n_clusters), minlength=n_clusters))
        for _ in range(config.n_bootstrap)
    ]
    found = Samples(
        ("seed_agreement", "score_psi", "review_rate"),
        np.asarray(measures(np.ones(n_clusters, np.int64))),
        np.asarray(resampled),
    )
    return found.without(("review_rate",)) if is_labelled(test) else found
