"""Warnings about a rule set that could serve but is likely not meant so."""

from __future__ import annotations

import math

from fraud.decisions.rules.sets import Rules
from fraud.decisions.rules.tree import (
    Among,
    Arithmetic,
    Column,
    Comparison,
    Condition,
    Constant,
    Default,
    DefaultFlag,
    Join,
    Missing,
    Not,
    Number,
    Truth,
)

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


def warnings_of(rules: Rules) -> list[str]:
    """Return what is odd about a set: rules that can never fire, that always fire, or that are the same.

    Whether a rule can fire is told from the bounds that the model's specification states of each column; what two
    conditions on the same column say together is not looked at.
    """
    told: list[str] = []
    first: dict[Condition, str] = {}
    for rule, condition in zip(rules.rules, rules.conditions, strict=True):
        can_hold, can_fail = _possible(condition, rules.bounds)
        if not can_hold:
            told.append(f"rule {rule.id} can never fire: the model's specification excludes it")
        elif not can_fail:
            told.append(f"rule {rule.id} fires on every transaction that has the values it reads")
        same = first.setdefault(condition, rule.id)
        if same != rule.id:
            told.append(f"rules {same} and {rule.id} have the same condition")
    return told


def _possible(condition: Condition, bounds: list[Interval]) -> tuple[bool, bool]:
    """Return whether a condition can be true, and whether it can be false."""
    match condition:
        case Truth(value):
            return value, not value
        case Missing():
            return True, True
        case Not(inner):
            can_hold, can_fail = _possible(inner, bounds)
            return can_fail, can_hold
        case DefaultFlag(inner, value):
            can_hold, can_fail = _possible(inner, bounds)
            return can_hold or value, can_fail or not value
        case Join(op, left, right):
            (hold, fail), (other_hold, other_fail) = _possible(left, bounds), _possible(right, bounds)
            if op == "&&":
                return hold and other_hold, fail or other_fail
            return hold or other_hold, fail and other_fail
        case Among(number, values):
            low, high = _interval(number, bounds)
            return any(low <= value <= high for value in values), low < high or low not in values
        case Comparison(op, left, right):
            return _compared(op, _interval(left, bounds), _interval(right, bounds))


def _compared(op: str, left: Interval, right: Interval) -> tuple[bool, bool]:
    (low, high), (least, most) = left, right
    match op:
        case "<":
            return low < most, high >= least
        case "<=":
            return low <= most, high > least
        case ">" | ">=":
            return _compared("<" if op == ">" else "<=", right, left)
    can_be_equal = low <= most and least <= high
    can_differ = not low == high == least == most
    return (can_be_equal, can_differ) if op == "==" else (can_differ, can_be_equal)


def _interval(number: Number, bounds: list[Interval]) -> Interval:
    match number:
        case Constant(value):
            return value, value
        case Column(at) if at < len(bounds):
            return bounds[at]
        case Default(inner, value):
            low, high = _interval(inner, bounds)
            return min(low, value), max(high, value)
        case Arithmetic("+", left, right):
            (low, high), (least, most) = _interval(left, bounds), _interval(right, bounds)
            return low + least, high + most
        case Arithmetic("-", left, right):
            (low, high), (least, most) = _interval(left, bounds), _interval(right, bounds)
            return low - most, high - least
        case _:
            return EVERYTHING
