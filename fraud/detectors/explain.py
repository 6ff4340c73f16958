"""Reasons and explanations in words, made from contributions in the detector's unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from fraud.detectors.protocol import Matrix, Unit, Vector
from fraud.detectors.ranking import SOMETHING, strongest, telling
from fraud.detectors.words import clause_of, meaning_of, readable
from fraud.features.kernels import NEW_CUSTOMER_BELOW
from fraud.schema import FeatureSpec, Row

TOP_REASONS = 5
TOP_HABITS = 3
"""Named in an explanation."""
UNUSUAL_TOGETHER = "An unusual combination of usual values"
NO_HABITS = " (a new customer, who has no habits yet)"
NOTHING = "Nothing about it is unusual"


class Reason(msgspec.Struct, frozen=True, gc=False):
    """One reason for a score: a feature, its value, and what it adds to the raw score."""

    feature: str
    value: float | bool | str | None
    contribution: float
    direction: Literal["raises", "lowers"]
    text: str


class Explained(NamedTuple):
    """A row's base value, every feature's contribution, the strongest of them, their unit, a sentence on its habits."""

    base_value: float
    contributions: dict[str, float]
    reasons: list[Reason]
    unit: str
    text: str


class Explainer:
    """Words the contributions of one model's features.

    An explanation adds up the contributions of each habit (money, time, merchant, device, place, pace, ...), since
    features of one habit share their credit, and names the unusual values of those that raise the score most. A new
    customer has no habits, and the text says so.
    """

    def __init__(self, spec: FeatureSpec, unit: Unit) -> None:
        self.unit = unit
        self.features = spec.features
        self._names = [feature.name for feature in spec.features]
        self._no_shares = dict.fromkeys(self._names, 0.0)
        self._clauses = [clause_of(feature) for feature in spec.features]
        self._words = [
            (feature.name, feature, clause, meaning_of(feature))
            for feature, clause in zip(spec.features, self._clauses, strict=True)
        ]
        self._currencies = {} if spec.currencies is msgspec.UNSET else spec.currencies
        self._effects = (f", which {unit.lowers}", f", which {unit.raises}")
        habits = {habit: i for i, habit in enumerate(dict.fromkeys(clause.habit for clause in self._clauses))}
        at = {feature.name: i for i, feature in enumerate(spec.features) if feature.source == "history"}
        self._plainly = [at.get(clause.plainly, i) for i, clause in enumerate(self._clauses)]
        self._count_at = at.get("customer_count_lifetime", -1)
        self._new_at = at.get("customer_is_new", -1)
        self._habits = (
            np.array([habits[clause.habit] for clause in self._clauses], np.int64),
            np.array([(clause.below, clause.above) for clause in self._clauses], np.float64),
            np.array([clause.by_custom for clause in self._clauses], np.bool_),
            self._new_at,
            self._count_at,
            TOP_HABITS,
        )

    def warm_up(self) -> None:
        """Compile the kernels, so that the first explanation does not wait."""
        n = len(self.features)
        for writeable in (True, False):
            X, contributions = np.zeros((1, n)), np.zeros((1, n + 1))
            X.flags.writeable = contributions.flags.writeable = writeable
            strongest(contributions, 1)
            telling(X, contributions, *self._habits)

    def strongest(self, contributions: Matrix, top: int = TOP_REASONS) -> list[list[tuple[str, float]]]:
        """Return the largest contributions by magnitude of each of (n, n_features + 1) rows, by feature name."""
        rows = zip(contributions.tolist(), self._ranked(contributions, top), strict=True)
        return [[(self._names[i], row[i]) for i in order if row[i]] for row, order in rows]

    def explained(self, X: Matrix, contributions: Matrix, rows: Sequence[Row]) -> list[Explained]:
        """Word rows as they were scored.

        Parameters
        ----------
        X : (n, n_features) float64
        contributions : (n, n_features + 1) float64
            In the detector's unit, the base value last.
        rows : sequence of Row, n of them
            As read: the text names their time, and their amounts in their currency.
        """
        ranked, named = self._ranked(contributions, TOP_REASONS), telling(X, contributions, *self._habits).tolist()
        explained = []
        for x, shares, order, columns, row in zip(X.tolist(), contributions.tolist(), ranked, named, rows, strict=True):
            is_new, by_name = self._is_new(x), self._no_shares.copy()  # a copy has its full size already
            by_name.update(zip(self._names, shares, strict=False))  # the base value has no name
            explained.append(
                Explained(
                    shares[-1],
                    by_name,
                    self._reasons(x, shares, order, row, is_new),
                    self.unit.name,
                    self._text(x, columns, row, is_new),
                )
            )
        return explained

    def texts(self, X: Matrix, contributions: Matrix, rows: Sequence[Row]) -> list[str]:
        """Return the explanations of rows alone, without their reasons; the parameters are those of `explained`."""
        named = telling(X, contributions, *self._habits).tolist()
        return [
            self._text(x, columns, row, self._is_new(x))
            for x, columns, row in zip(X.tolist(), named, rows, strict=True)
        ]

    def reasons(self, x: Vector, contributions: Vector, row: Row, top: int = TOP_REASONS) -> list[Reason]:
        """Return the largest contributions of one row by magnitude, without those that are 0.

        Parameters
        ----------
        x : (n_features,) float64
            The row as it was scored.
        contributions : (n_features + 1,) float64
            In the detector's unit, the base value last.
        row : Row
            As read.
        """
        (order,) = self._ranked(contributions[np.newaxis], top)
        values = x.tolist()
        return self._reasons(values, contributions.tolist(), order, row, self._is_new(values))

    def _ranked(self, contributions: Matrix, top: int) -> list[list[int]]:
        ranked: list[list[int]] = strongest(contributions, min(top, len(self._names))).tolist()
        return ranked

    def _reasons(self, x: list[float], shares: list[float], order: list[int], row: Row, is_new: bool) -> list[Reason]:
        words, currencies, (lowers, raises) = self._words, self._currencies, self._effects
        reasons = []
        for i in order:
            share, value = shares[i], x[i]
            if not share:
                break  # the others are 0 too
            name, feature, clause, meaning = words[i]
            if value != value:  # NaN
                text, shown = f"{meaning} is unknown", None
            else:
                text = clause.say(value, row, currencies)
                shown = value if feature.type == "numeric" else readable(feature, value)
                if is_new and clause.by_custom:
                    text += NO_HABITS
            if share > 0:
                reasons.append(Reason(name, shown, share, "raises", text + raises))
            else:
                reasons.append(Reason(name, shown, share, "lowers", text + lowers))
        return reasons

    def _text(self, x: list[float], columns: list[int], row: Row, is_new: bool) -> str:
        """Return the sentence on the habits of one row; `columns` are those of `telling`."""
        said = [self._said(x, i, row) for i in columns if i >= 0]
        if not said:
            said.append(UNUSUAL_TOGETHER if columns[0] == SOMETHING else NOTHING)
        elif self.features[columns[0]].source == "history":
            said[0] = said[0][0].upper() + said[0][1:]
        if is_new:
            said.append(self._newness(x))
        return "; ".join(said) + "."

    def _said(self, x: list[float], column: int, row: Row) -> str:
        """Return the clause of a column's value, or of the one that says the same plainly."""
        plain = self._plainly[column]
        told = plain if x[plain] > self._clauses[plain].above else column
        return self._clauses[told].say(x[told], row, self._currencies)

    def _is_new(self, x: list[float]) -> bool:
        return (self._new_at >= 0 and x[self._new_at] > 0) or (
            self._count_at >= 0 and x[self._count_at] < NEW_CUSTOMER_BELOW
        )

    def _newness(self, x: list[float]) -> str:
        if self._count_at < 0:
            return "the customer is new and has no habits yet"
        n = x[self._count_at]
        known = "this is the first transaction" if n == 0 else f"{n:.0f} earlier transaction{'' if n == 1 else 's'}"
        return f"the customer is new and has no habits yet ({known})"
