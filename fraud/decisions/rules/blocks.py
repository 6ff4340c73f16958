"""Decides many rows at once: the same rules as `fraud.decisions.rules.rowwise`, with NumPy, block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

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

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]
Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]
Columns = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.bool_]]
BLOCK_ROWS = 16_384


def fired(rules: Sequence[Definite], columns: Columns) -> Matrix:
    """Return which rules fire on which rows.

    Parameters
    ----------
    rules : sequence of Definite, n_rules
    columns : (n_rows, n_columns) float64
        NaN for missing.

    Returns
    -------
    (n_rules, n_rows) bool
    """
    result = np.empty((len(rules), len(columns)), np.bool_)
    with np.errstate(all="ignore"):
        for start in range(0, len(columns), BLOCK_ROWS):
            block = _Block(columns[start : start + BLOCK_ROWS])
            for i, rule in enumerate(rules):
                result[i, start : start + BLOCK_ROWS] = block.condition(rule)
    return result


class _Block:
    """Some rows; every part of every rule is computed once."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._conditions: dict[Definite, Bools] = {}
        self._numbers: dict[Number, Numbers] = {}

    def condition(self, rule: Definite) -> Bools:
        known = self._conditions.get(rule)
        if known is None:
            known = self._conditions[rule] = self._condition(rule)
        return known

    def _condition(self, rule: Definite) -> Bools:
        match rule:
            case Truth(value):
                return np.array([value])
            case All(parts):
                return reduce(np.logical_and, [self.condition(part) for part in parts])
            case Some(parts):
                return reduce(np.logical_or, [self.condition(part) for part in parts])
            case Otherwise(inner):
                return ~self.condition(inner)
            case IsMissing(number, wanted):
                missing = np.isnan(self.number(number))
                return missing if wanted else ~missing
            case IsAmong(number, values, wanted):
                numbers = self.number(number)
                among = np.isin(numbers, values)
                return among if wanted else ~among & ~np.isnan(numbers)
            case Holds("!=", left, right):
                one, other = self.number(left), self.number(right)
                return (one < other) | (one > other)
            case Holds(op, left, right):
                return _COMPARE[op](self.number(left), self.number(right))

    def number(self, number: Number) -> Numbers:
        known = self._numbers.get(number)
        if known is None:
            known = self._numbers[number] = self._number(number)
        return known

    def _number(self, number: Number) -> Numbers:
        match number:
            case Column(at):
                return np.ascontiguousarray(self._columns[:, at])
            case Constant(value):
                return np.array([value])  # every row's, by broadcasting
            case Sign("abs", inner):
                return np.abs(self.number(inner))
            case Sign(_, inner):
                return -self.number(inner)
            case Default(inner, value):
                numbers = self.number(inner)
                return np.where(np.isnan(numbers), value, numbers)
            case Arithmetic("/", left, right):
                one, other = np.broadcast_arrays(self.number(left), self.number(right))
                quotient: Numbers = np.full(len(one), np.nan)
                np.divide(one, other, out=quotient, where=other != 0)
                return quotient
            case Arithmetic(op, left, right):
                return _COMPUTE[op](self.number(left), self.number(right))


_COMPARE: dict[str, Callable[[Numbers, Numbers], Bools]] = {
    "==": np.equal,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
}
_COMPUTE: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}
