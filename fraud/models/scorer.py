"""One verified model version: scores and explains checked rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fraud.detectors.explain import Explainer
from fraud.detectors.protocol import Detector
from fraud.errors import BundleError, RequestError
from fraud.features.featurizer import Featurizer, Histories, Matrix
from fraud.models.bundle import Bundle, Golden, read_bundle, row_of
from fraud.schema import RowDecoder

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


class ModelName(msgspec.Struct, frozen=True):
    """Which version answered."""

    name: str
    version: str
    digest: str


class Scorer:
    """A bundle ready to score; immutable, and safe to use from several threads.

    Parameters
    ----------
    bundle : Bundle
    max_ahead_ms : int
        How far an event time may lie ahead of the clock, ms.
    """

    def __init__(self, bundle: Bundle, max_ahead_ms: int = 86_400_000) -> None:
        self.bundle = bundle
        self.name = ModelName(bundle.manifest.name, bundle.version, bundle.digest)
        self.spec = bundle.spec
        self.policy = bundle.policy
        self.decoder = RowDecoder(bundle.spec, max_ahead_ms)
        self.featurizer = Featurizer(bundle.spec, bundle.preprocessor.amount_quantiles)
        self.explainer = Explainer(bundle.spec, bundle.algorithm.unit)
        self.detector: Detector = bundle.algorithm.load(bundle.detector_files, len(bundle.spec.features))

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
        """Build a checked bundle, check it against its golden rows and warm it up; raises `BundleError`."""
        scorer = cls(bundle, max_ahead_ms)
        scorer.verify()
        scorer.detector.warm_up()
        return scorer

    def verify(self) -> None:
        """Score the golden requests and compare every feature, margin and probability exactly."""
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
        margins = self.detector.raw_margin(X)
        probabilities = self.detector.probability(margins)
        contributions = self.detector.contributions(X)
        for i, g in enumerate(golden):
            self._compare(i, "features", X[i], expected[i])
            self._compare(i, "raw_margin", margins[i], g.raw_margin)
            self._compare(i, "fraud_probability", probabilities[i], g.fraud_probability)
            if not np.allclose(contributions[i], g.contributions, rtol=0, atol=1e-9):
                self._compare(i, "contributions", contributions[i], g.contributions)

    def _compare(self, i: int, what: str, now: Any, then: Any) -> None:
        if not np.array_equal(now, then, equal_nan=True):
            trained = ", ".join(f"{k} {v}" for k, v in self.bundle.manifest.libraries.items())
            raise BundleError(
                f"golden request {i} of {self.name.name} {self.name.version} gives another {what} here than in "
                f"training ({now} instead of {then}); the model was trained with {trained}"
            )

    def score(self, X: Matrix) -> tuple[Vector, Vector]:
        """Return raw scores in the detector's unit and calibrated probabilities, both (n,) float64."""
        margins = self.detector.raw_margin(X)
        return margins, self.detector.probability(margins)

    def contributions(self, X: Matrix) -> Matrix:
        """Return (n, n_features + 1) float64 in the detector's unit, the base value last."""
        return self.detector.contributions(X)


def golden_of(instances: Sequence[bytes], X: Matrix, detector: Detector) -> bytes:
    """Return `golden.jsonl` for requests and their features."""
    margins = detector.raw_margin(X)
    probabilities = detector.probability(margins)
    contributions = detector.contributions(X)
    return b"".join(
        msgspec.json.encode(
            Golden(
                msgspec.Raw(instance),
                [None if np.isnan(value) else float(value) for value in X[i]],
                float(margins[i]),
                float(probabilities[i]),
                contributions[i].tolist(),
            )
        )
        + b"\n"
        for i, instance in enumerate(instances)
    )
