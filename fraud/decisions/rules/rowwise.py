"""Decides one row at a time: all rules of a set as one Python function, about 10 microseconds for 100 rules.

The function's source holds generated names and operators alone: constants are handed in by name, columns are read by
number, so no text of a rule is ever code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from fraud.decisions.rules.tree import (
    All,
    Arithmetic,
    Column,
    Constant,
    Default,
    Definite,
    Holds,
    IsAmong,
    IsMissing,
    Number,
    Otherwise,
    Sign,
    Some,
    Truth,
)

Fired = Callable[[Sequence[float]], list[int]]
"""Takes a row's columns; returns the indices of the rules that fire, in their order."""
LEVELS = {"+": 1, "-": 1, "*": 2}
ATOM = 4
"""The precedence of what needs no parentheses."""


def row_function(rules: Sequence[Definite]) -> Fired:
    """Return the function that decides a row.

    Parameters
    ----------
    rules : sequence of Definite
        When each rule fires.
    """
    writer = _Writer()
    tests = [writer.condition(rule) for rule in rules]
    lines = ["def decide(v):", " fired = []", *writer.loads()]
    lines += [f" if {test}: fired.append({i})" for i, test in enumerate(tests)]
    lines.append(" return fired")
    known: dict[str, object] = {**writer.constants, **_FUNCTIONS, "__builtins__": {}}
    exec(compile("\n".join(lines), "<rules>", "exec"), known)
    return cast(Fired, known["decide"])


class _Writer:
    """Writes conditions as Python; gathers the columns that they read and the constants that they name."""

    def __init__(self) -> None:
        self.constants: dict[str, object] = {}
        self._columns: set[int] = set()
        self._names: dict[tuple[type, object], str] = {}

    def loads(self) -> list[str]:
        """Return the lines that read each column once."""
        return [f" v{at} = v[{at}]" for at in sorted(self._columns)]

    def condition(self, rule: Definite) -> str:
        match rule:
            case Truth(value):
                return "1" if value else "0"
            case All(parts):
                return "(" + " and ".join(map(self.condition, parts)) + ")"
            case Some(parts):
                return "(" + " or ".join(map(self.condition, parts)) + ")"
            case Otherwise(inner):
                return f"(not {self.condition(inner)})"
            case IsMissing(number, wanted):
                text = self.number(number)[0]
                return f"isnan({text})" if wanted else f"(not isnan({text}))"
            case IsAmong(number, values, wanted):
                text = self.number(number)[0]
                if wanted:
                    return f"({text}) in {self._constant(frozenset(values))}"
                return f"is_none_of({text}, {self._constant(frozenset(values))})"
            case Holds(op, left, right):
                one, other = self.number(left)[0], self.number(right)[0]
                return f"differ({one}, {other})" if op == "!=" else f"{one} {op} {other}"

    def number(self, number: Number) -> tuple[str, int]:
        """Return the source of a number, and its precedence."""
        match number:
            case Column(at):
                self._columns.add(at)
                return f"v{at}", ATOM
            case Constant(value):
                return self._constant(value), ATOM
            case Sign("abs", inner):
                return f"abs({self.number(inner)[0]})", ATOM
            case Sign(_, inner):
                return f"negative({self.number(inner)[0]})", ATOM
            case Default(inner, value):
                return f"default({self.number(inner)[0]}, {self._constant(value)})", ATOM
            case Arithmetic(op, left, right) if op in LEVELS:
                level = LEVELS[op]  # a long chain must not nest parentheses, of which Python takes 200
                (one, first), (other, second) = self.number(left), self.number(right)
                one = one if first >= level else f"({one})"
                other = other if second > level else f"({other})"
                return f"{one} {op} {other}", level
            case Arithmetic(op, left, right):
                name = {"/": "divide", "min": "least", "max": "greatest"}[op]
                return f"{name}({self.number(left)[0]}, {self.number(right)[0]})", ATOM

    def _constant(self, value: float | frozenset[float]) -> str:
        name = self._names.setdefault((type(value), value), f"c{len(self._names)}")
        self.constants[name] = value
        return name


def _isnan(a: float) -> bool:
    return a != a


def _differ(a: float, b: float) -> bool:
    return a < b or a > b


def _is_none_of(a: float, values: frozenset[float]) -> bool:
    return a == a and a not in values


def _divide(a: float, b: float) -> float:
    return a / b if b else NAN


def _default(a: float, value: float) -> float:
    return a if a == a else value


def _least(a: float, b: float) -> float:
    return a if a < b else b if b <= a else NAN


def _greatest(a: float, b: float) -> float:
    return a if a > b else b if b >= a else NAN


def _negative(a: float) -> float:
    return -a


NAN = float("nan")
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "isnan": _isnan,
    "differ": _differ,
    "is_none_of": _is_none_of,
    "divide": _divide,
    "default": _default,
    "least": _least,
    "greatest": _greatest,
    "negative": _negative,
    "abs": abs,
}
