"""The names that a rule may use, and the columns of numbers that stand for them.

A rule set reads one row of float64 values for each transaction:

1. the columns of `X` as the model's specification orders them: NaN for missing, codes for categories, flags 0 or 1;
2. the model's outputs (`OUTPUTS`);
3. the set's own *facts*: what it asks of the request beyond `X`. A text counts as the number of the literal that it
   equals, -1 for none of them; a comparison of two texts as 0 or 1.

Facts are recorded with a decision, so a replay needs no text, and no text of a personal field is recorded for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from fraud.decisions.anomaly import SEVERITIES, Anomaly
from fraud.decisions.rules.lists import Lists
from fraud.schema import POSITION_ROLES, FeatureSpec, Row

Type = Literal["number", "flag", "category", "text"]
OUTPUTS = ("fraud_probability", "anomaly_score", "severity")
"""What a model says of a transaction, before any rule; missing where it does not say it."""
OTHER = -1.0
"""The code of a text that no literal of the set equals."""
MISSING = math.nan
DAY_MS, HOUR_MS = 86_400_000, 3_600_000


def outputs_of(
    fraud_probability: float | None, anomaly: Anomaly | msgspec.UnsetType | None
) -> tuple[float, float, float]:
    """Return a model's outputs as columns; a severity as its index in `SEVERITIES`."""
    probability = MISSING if fraud_probability is None else fraud_probability
    if not isinstance(anomaly, Anomaly):
        return probability, MISSING, MISSING
    severity = MISSING if anomaly.severity is None else float(SEVERITIES.index(anomaly.severity))
    return probability, anomaly.score, severity


class Name(NamedTuple):
    """What a name stands for: a column, or where `column` is None, a field of the request."""

    text: str
    type: Type
    column: int | None = None
    categories: tuple[str, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)


class Fact(NamedTuple):
    """One value that a set asks of the request.

    A number, the code of a text, whether two texts are the same, or whether a text is on the list `other`.
    """

    kind: Literal["number", "text", "same", "member"]
    name: str
    other: str = ""


class Names:
    """The names of one model's specification.

    Parameters
    ----------
    spec : FeatureSpec
    lists : collection of str
        The names of the lists that rules may look into.

    Attributes
    ----------
    n_features, width : int
        How many columns there are of `X`, and of the model with its outputs.
    """

    def __init__(self, spec: FeatureSpec, lists: Collection[str] = ()) -> None:
        self.lists = tuple(lists)
        self.n_features = len(spec.features)
        self.width = self.n_features + len(OUTPUTS)
        fields: list[Name] = []
        if spec.kind == "transaction":
            fields = [Name(name, "number") for name in ("amount", "hour", "weekday")]
            fields += [Name(name, "text") for name in ("customer_id", "merchant_id")]
            fields += [Name(role.name, "number" if role.name in POSITION_ROLES else "text") for role in spec.roles]
        self._names = {name.text: name for name in fields}
        for column, feature in enumerate(spec.features):
            low = -math.inf if feature.minimum is None else feature.minimum
            high = math.inf if feature.maximum is None else feature.maximum
            kind: Type = "number"
            if feature.type != "numeric":
                kind = "flag" if feature.type == "boolean" else "category"
            self._names[feature.name] = Name(feature.name, kind, column, feature.categories, (low, high))
        for i, output in enumerate(OUTPUTS, self.n_features):
            self._names[output] = Name(output, "number", i, bounds=(0.0, 1.0))
        self._names["severity"] = Name("severity", "category", self.width - 1, SEVERITIES)

    @property
    def all(self) -> list[Name]:
        """Every name, those of the request that are no features first."""
        return list(self._names.values())

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """The bounds of each column of the model, as its specification states them."""
        by_column = {name.column: name.bounds for name in self._names.values()}
        return [by_column.get(column, (-math.inf, math.inf)) for column in range(self.width)]

    def find(self, name: str) -> Name | None:
        """Return what a name stands for, or None."""
        return self._names.get(name)


class Facts:
    """The facts of one rule set, gathered while its rules are checked.

    Attributes
    ----------
    asked : dict of Fact to int
        Each fact with its column.
    literals : dict of str to dict of str to float
        The literals that a text is compared with, by the name of the text, each with its code.
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.asked: dict[Fact, int] = {}
        self.literals: dict[str, dict[str, float]] = {}

    def column(self, fact: Fact) -> int:
        """Return the column of a fact."""
        return self.asked.setdefault(fact, self.names.width + len(self.asked))

    def code(self, name: str, literal: str) -> float:
        """Return the number that stands for a literal beside a text."""
        codes = self.literals.setdefault(name, {})
        return codes.setdefault(literal, float(len(codes)))

    def reader(self) -> Callable[[Row, Sequence[float], Lists], list[float]]:
        """Return what reads the facts of a row, given its row of `X` and the lists as they are now."""
        readers = [self._reader(fact) for fact in self.asked]
        return lambda row, x, lists: [read(row, x, lists) for read in readers]

    def _reader(self, fact: Fact) -> _Reader:
        if fact.kind == "number":
            return _number(fact.name)
        text = self._text(fact.name)
        if fact.kind == "text":
            return _coded(text, self.literals.get(fact.name, {}))
        if fact.kind == "member":
            return _member(text, fact.other)
        return _same(text, self._text(fact.other))

    def _text(self, name: str) -> _TextReader:
        found = self.names.find(name)
        if found is not None and found.column is not None:
            return _category(found.column, found.categories)
        if name == "customer_id":
            return lambda row, x: row.customer_id or None
        return lambda row, x: row.text_role(name)


_Reader = Callable[[Row, Sequence[float], Lists], float]
_TextReader = Callable[[Row, Sequence[float]], str | None]


def _number(name: str) -> _Reader:
    match name:
        case "amount":
            return lambda row, x, lists: row.history_amount
        case "hour":
            return lambda row, x, lists: row.event_time_ms % DAY_MS / HOUR_MS
        case "weekday":
            return lambda row, x, lists: float((row.event_time_ms // DAY_MS + 3) % 7)  # 1970 began on a Thursday
        case _:
            return lambda row, x, lists: MISSING if (value := row.roles.get(name)) is None else float(value)


def _coded(text: _TextReader, codes: Mapping[str, float]) -> _Reader:
    def read(row: Row, x: Sequence[float], lists: Lists) -> float:
        value = text(row, x)
        return MISSING if value is None else codes.get(value, OTHER)

    return read


def _same(text: _TextReader, other: _TextReader) -> _Reader:
    def read(row: Row, x: Sequence[float], lists: Lists) -> float:
        a, b = text(row, x), other(row, x)
        return MISSING if a is None or b is None else float(a == b)

    return read


def _member(text: _TextReader, name: str) -> _Reader:
    def read(row: Row, x: Sequence[float], lists: Lists) -> float:
        value = text(row, x)
        return MISSING if value is None else float(lists.holds(name, value))

    return read


def _category(column: int, categories: tuple[str, ...]) -> _TextReader:
    return lambda row, x: None if x[column] != x[column] else categories[int(x[column])]
