"""An anomaly model beside a champion: it reads the champion's features, so that a transaction is featurized once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import numpy as np

from fraud.decisions.anomaly import Anomaly
from fraud.errors import BundleError
from fraud.features.featurizer import Matrix
from fraud.models.scorer import ModelName, Score, Scorer, Scores
from fraud.schema import Feature, Row

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
RANKED = ("amount_global_percentile", "amount_is_globally_unusual")
"""History features that depend on the amounts of a model's own training."""
MOST_NAMED = 5


class Beside:
    """An anomaly model, and how it reads the features of each champion it was asked for.

    Parameters
    ----------
    scorer : Scorer
        Of a model that measures how unusual a row is.

    Raises
    ------
    BundleError
        It does not measure that.
    """

    def __init__(self, scorer: Scorer) -> None:
        if not scorer.measures_anomaly:
            raise BundleError(
                f"{scorer.name.name} {scorer.name.version} measures no anomaly, as FRAUD_ANOMALY_MODEL must: it is a "
                f"model of {scorer.bundle.algorithm.name}"
            )
        self.scorer = scorer
        self._readers: dict[str, Reader | str] = {}

    def misfit(self, champion: Scorer) -> str | None:
        """Return why the features of a champion are not enough for the anomaly model; None if they are."""
        reader = self._reader(champion)
        return reader if isinstance(reader, str) else None

    def features(self, champion: Scorer, X: Matrix) -> Matrix:
        """Return the anomaly model's features (n, n_its_features) of rows by a champion's (n, n_features).

        Raises
        ------
        BundleError
            They do not have them all.
        """
        reader = self._reader(champion)
        if isinstance(reader, str):
            raise BundleError(reader)
        return reader(X)

    def anomalies(self, champion: Scorer, X: Matrix, rows: Sequence[Row]) -> list[Anomaly]:
        """Return how unusual rows are, by a champion's features of them; raises as `features` does."""
        own = self.features(champion, X)
        found = self.scorer.anomalies(own, self.scorer.score(own), rows)
        assert found is not None
        return found

    def _reader(self, champion: Scorer) -> Reader | str:
        digest = champion.name.digest
        if digest not in self._readers:
            self._readers = {**self._readers, digest: _reader_of(self.scorer, champion)}  # threads see the old or new
        return self._readers[digest]


class Reader:
    """Makes the features of one model from those of another.

    Parameters
    ----------
    columns : sequence of int
        For each feature, the column of the other model that it is made from.
    changed : mapping of int to callable
        By feature, what makes its values (n,) from that column (n,); the others are taken as they are.
    n_other : int
        How many columns the other model has.
    """

    def __init__(self, columns: Sequence[int], changed: dict[int, Callable[[Vector], Vector]], n_other: int) -> None:
        self._columns = np.array(columns, np.int64)
        self._changed = changed
        self._is_same = not changed and list(columns) == list(range(n_other))

    def __call__(self, X: Matrix) -> Matrix:
        """Return (n, n_features) float64."""
        if self._is_same:
            return X
        own = X[:, self._columns]
        for feature, change in self._changed.items():
            own[:, feature] = change(own[:, feature])
        return own


class Measured(NamedTuple):
    """How unusual some rows are.

    Attributes
    ----------
    anomalies : iterable of Anomaly or None
        One a row; endlessly None where no model measures it.
    model : ModelName or None
        Which model measured it, where it is not the one that scored.
    lacks : tuple of str
        ``anomaly``, where the model beside cannot read the features.
    """

    anomalies: Iterable[Anomaly | None]
    model: ModelName | None = None
    lacks: tuple[str, ...] = ()

    def rows(self, scores: Scores) -> Iterator[Score]:
        """Return scores row by row, each with its anomaly."""
        if self is NOT_MEASURED:
            return scores.rows()
        pairs = zip(scores.rows(), self.anomalies, strict=False)
        return (score._replace(anomaly=anomaly) for score, anomaly in pairs)


NOT_MEASURED = Measured(repeat(None))


def measure(scorer: Scorer, beside: Beside | None, X: Matrix, scores: Scores, rows: Sequence[Row]) -> Measured:
    """Return how unusual rows are, by the model that scored them or else the one beside."""
    own = scorer.anomalies(X, scores, rows)
    if own is not None:
        return Measured(own)
    if beside is None:
        return NOT_MEASURED
    if beside.misfit(scorer) is not None:
        return NOT_MEASURED._replace(lacks=("anomaly",))
    return Measured(beside.anomalies(scorer, X, rows), beside.scorer.name)


def _reader_of(scorer: Scorer, champion: Scorer) -> Reader | str:
    """Return how a model reads a champion's features, or why it cannot."""
    spec, other = scorer.spec, champion.spec
    title = f"{scorer.name.name} {scorer.name.version} cannot be beside {champion.name.name} {champion.name.version}"
    if spec.kind != other.kind:
        return f"{title}: it reads rows of kind {spec.kind}, not {other.kind}"
    if spec.currencies != other.currencies:
        return f"{title}: their currencies have other scales; train both with the same typical amounts in the mapping"
    at = {(feature.name, feature.source): i for i, feature in enumerate(other.features)}
    quantiles = scorer.featurizer.amount_quantiles
    ranks_alike = np.array_equal(quantiles, champion.featurizer.amount_quantiles)
    columns: list[int] = []
    changed: dict[int, Callable[[Vector], Vector]] = {}
    lacking: list[str] = []
    for i, feature in enumerate(spec.features):
        ranked = feature.source == "history" and feature.name in RANKED and not ranks_alike
        found = at.get(("amount", "history") if ranked else (feature.name, feature.source))
        if found is None or (not ranked and other.features[found].type != feature.type):
            lacking.append(feature.name)
            continue
        columns.append(found)
        if ranked:
            changed[i] = _rank(feature.name, quantiles)
        elif feature.categories != other.features[found].categories:
            changed[i] = _recode(other.features[found], feature)
    if lacking:
        more = f" and {len(lacking) - MOST_NAMED} more" if len(lacking) > MOST_NAMED else ""
        return f"{title}: that has no {', '.join(lacking[:MOST_NAMED])}{more}; train both with the same mapping"
    return Reader(columns, changed, len(other.features))


def _rank(name: str, quantiles: Vector) -> Callable[[Vector], Vector]:
    """Return what ranks amounts among the training's, as `fraud.features.kernels` does."""
    if name == "amount_is_globally_unusual":
        return lambda amount: np.where(amount > quantiles[-1], 1.0, 0.0)
    return lambda amount: np.searchsorted(quantiles, amount) / float(len(quantiles))


def _recode(before: Feature, after: Feature) -> Callable[[Vector], Vector]:
    """Return what turns the codes of one list of categories into those of another, NaN for one that is not in it."""
    codes = {category: float(code) for code, category in enumerate(after.categories)}
    table = np.array([*(codes.get(category, np.nan) for category in before.categories), np.nan])
    return lambda column: table[np.where(np.isnan(column), len(table) - 1, column).astype(np.int64)]
