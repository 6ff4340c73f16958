"""One verified model version: scores and explains checked rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fraud.decisions.anomaly import Anomaly, Severity
from fraud.detectors.explain import NOTHING, Explainer
from fraud.detectors.protocol import Detector
from fraud.errors import BundleError, RequestError
from fraud.features.featurizer import Featurizer, Histories, Matrix
from fraud.models.bundle import Bundle, Golden, read_bundle, row_of
from fraud.models.libraries import differing
from fraud.schema import Row, RowDecoder

logger = logging.getLogger(__name__)

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
AVERAGE_SCORE = 0.5
"""The anomaly score of a row whose path is as long as that of an average row."""


class ModelName(msgspec.Struct, frozen=True):
    """Which version answered."""

    name: str
    version: str
    digest: str


class Score(NamedTuple):
    """The scores of one row, as `Scores` has those of many."""

    raw_margin: float
    decision_score: float
    fraud_probability: float | None
    anomaly: Anomaly | None

    @property
    def severity(self) -> Severity | None:
        """How rare the anomaly is, where that is known."""
        return None if self.anomaly is None else self.anomaly.severity


class Scores(NamedTuple):
    """The scores of rows, each (n,) float64.

    Attributes
    ----------
    raw_margin : Vector
        In the detector's unit.
    decision_score : Vector
        What the policy's thresholds are on, in [0, 1].
    fraud_probability : Vector or None
        The decision score, where it is a calibrated probability.
    anomaly : Vector or None
        How unusual each row is, in (0, 1], from a detector that measures it.
    severity : list or None
        How rare such a score is, from a detector with a severity scale; None in it where no level is offered.
    """

    raw_margin: Vector
    decision_score: Vector
    fraud_probability: Vector | None
    anomaly: Vector | None
    severity: list[Severity | None] | None

    def measured(self) -> dict[str, Vector]:
        """Return the probability and the anomaly score, those that there are, as columns of a table by name."""
        columns = {"fraud_probability": self.fraud_probability, "anomaly_score": self.anomaly}
        return {name: values for name, values in columns.items() if values is not None}

    def rows(self) -> Iterator[Score]:
        """Return the scores row by row."""
        nothing: repeat[None] = repeat(None)
        probabilities = nothing if self.fraud_probability is None else self.fraud_probability.tolist()
        severities = nothing if self.severity is None else self.severity
        anomalies = nothing if self.anomaly is None else map(Anomaly, self.anomaly.tolist(), severities)
        return map(Score, self.raw_margin.tolist(), self.decision_score.tolist(), probabilities, anomalies)


class Scorer:
    """A bundle ready to score; immutable, and safe to use from several threads.

    Parameters
    ----------
    bundle : Bundle
    max_ahead_ms : int
        How far an event time may lie ahead of the clock, ms.

    Attributes
    ----------
    loaded_at_ms : int
        When it was built in this process, ms since the epoch.
    """

    def __init__(self, bundle: Bundle, max_ahead_ms: int = 86_400_000) -> None:
        self.bundle = bundle
        self.name = ModelName(bundle.manifest.name, bundle.version, bundle.digest)
        self.loaded_at_ms = time.time_ns() // 1_000_000
        self.spec = bundle.spec
        self.policy = bundle.policy
        self.decoder = RowDecoder(bundle.spec, max_ahead_ms)
        self.featurizer = Featurizer(bundle.spec, bundle.preprocessor.amount_quantiles)
        self.explainer = Explainer(bundle.spec, bundle.algorithm.unit)
        self.detector: Detector = bundle.algorithm.load(bundle.detector_files, len(bundle.spec.features))

    @property
    def measures_anomaly(self) -> bool:
        """Whether it says how unusual a row is."""
        return self.detector.anomaly_score(np.zeros(0)) is not None

    @classmethod
    def load(cls, model_dir: Path, preprocessor_dir: Path | None = None, max_ahead_ms: int = 86_400_000) -> Scorer:
        """Check a bundle, build it, check it against its golden rows and warm it up.

        Raises
        ------
        BundleError
            The bundle is damaged or invalid, or scores a golden row differently than in training.
        """
        return cls.of(read_bundle(model_dir, preprocessor_dir), max_ahead_ms)

    @classmethod
    def of(cls, bundle: Bundle, max_ahead_ms: int = 86_400_000) -> Scorer:
        """Build a checked bundle, check it against its golden rows and warm it up; raises `BundleError`.

        Libraries of other versions than in training are logged if the golden rows come out the same.
        """
        scorer = cls(bundle, max_ahead_ms)
        scorer.verify()
        if others := differing(bundle.manifest.libraries):
            logger.warning("%s %s: %s; its golden rows come out the same", bundle.manifest.name, bundle.version, others)
        scorer.detector.warm_up()
        scorer.explainer.warm_up()
        return scorer

    def verify(self) -> None:
        """Score the golden requests; compare every feature, margin and probability exactly, contributions to 1e-9."""
        golden = self.bundle.golden
        try:
            rows = [self.decoder.decode(g.instance, f"$.golden[{i}]") for i, g in enumerate(golden)]
        except RequestError as error:
            raise BundleError(f"a golden request of {self.name.name} {self.name.version} is refused: {error}") from None
        if self.spec.kind == "transaction":
            X = self.featurizer.advance(rows, Histories.new(rows))
        else:
            X = self.featurizer.ready(rows)
        expected = np.array([row_of(g.features) for g in golden])
        self.detector.verify_contributions(expected)
        scores = self.score(X)
        contributions = self.detector.contributions(X)
        for i, (g, score) in enumerate(zip(golden, scores.rows(), strict=True)):
            self._compare(i, "features", X[i], expected[i])
            self._compare(i, "raw_margin", score.raw_margin, g.raw_margin)
            self._compare(i, "fraud_probability", score.fraud_probability, g.fraud_probability)
            if not np.allclose(contributions[i], g.contributions, rtol=0, atol=1e-9):
                self._compare(i, "contributions", contributions[i], g.contributions)

    def _compare(
        self, i: int, what: str, now: float | Vector | None, then: float | Vector | list[float] | None
    ) -> None:
        equal = now == then if now is None or then is None else np.array_equal(now, then, equal_nan=True)
        if not equal:
            others = differing(self.bundle.manifest.libraries)
            cause = (
                f"these libraries differ: {others}; install the versions of training, or train again with these"
                if others
                else "its libraries are those of training, so its files or this processor differ"
            )
            raise BundleError(
                f"golden request {i} of {self.name.name} {self.name.version} gives another {what} here than in "
                f"training ({now} instead of {then}); {cause}"
            )

    def score(self, X: Matrix) -> Scores:
        """Return the scores of rows (n, n_features)."""
        return scores_of(self.detector, self.detector.raw_margin(X))

    def anomalies(self, X: Matrix, scores: Scores, rows: Sequence[Row]) -> list[Anomaly] | None:
        """Return how unusual rows are, in words; None from a detector that does not measure it.

        Only rows above the lowest severity are explained by their contributions: these take longer than the score.
        Where no severity is offered, a score below that of an average row counts as usual (0.5, Liu et al. 2008).

        Parameters
        ----------
        X : (n, n_features) float64
        scores : Scores
            Of `X`.
        rows : sequence of Row, n of them
        """
        if scores.anomaly is None:
            return None
        scale = self.detector.severity
        severities = scores.severity or [None] * len(rows)
        low = "" if scale is None else scale.usual
        texts = [
            low if severity == "LOW" else f"{NOTHING}." if severity is None and score < AVERAGE_SCORE else ""
            for severity, score in zip(severities, scores.anomaly.tolist(), strict=True)
        ]
        rare = [i for i, text in enumerate(texts) if not text]
        if rare:
            some = X[rare]
            for i, text in zip(
                rare, self.explainer.texts(some, self.contributions(some), [rows[i] for i in rare]), strict=True
            ):
                texts[i] = text
        return list(map(Anomaly, scores.anomaly.tolist(), severities, texts))

    def contributions(self, X: Matrix) -> Matrix:
        """Return (n, n_features + 1) float64 in the detector's unit, the base value last."""
        return self.detector.contributions(X)


def scores_of(detector: Detector, raw_margin: Vector) -> Scores:
    """Return the scores that a detector gives for raw scores (n,)."""
    decided = detector.decision_score(raw_margin)
    probability = decided if detector.is_calibrated else None
    severity = None if detector.severity is None else detector.severity.of(raw_margin)
    return Scores(raw_margin, decided, probability, detector.anomaly_score(raw_margin), severity)


def golden_of(instances: Sequence[bytes], X: Matrix, detector: Detector) -> bytes:
    """Return `golden.jsonl` for requests and their features."""
    scores = list(scores_of(detector, detector.raw_margin(X)).rows())
    contributions = detector.contributions(X)
    return b"".join(
        msgspec.json.encode(
            Golden(
                msgspec.Raw(instance),
                [None if np.isnan(value) else float(value) for value in X[i]],
                scores[i].raw_margin,
                scores[i].fraud_probability,
                contributions[i].tolist(),
            )
        )
        + b"\n"
        for i, instance in enumerate(instances)
    )
