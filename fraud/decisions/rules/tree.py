"""Checked expressions: trees over numbers alone, without places, so that equal parts are equal keys.

A condition is true, false or missing. Missing is one value for all types, NaN in a column:

- arithmetic, a comparison or ``in`` with a missing operand is missing, and so is a division by zero;
- ``&&``, ``||`` and ``!`` follow Kleene: false && missing is false, true || missing is true, !missing is missing;
- only ``missing(x)`` and ``default(x, constant)`` turn it into something else.

A rule fires only when its condition is definitely true. So nothing here can fail: the language is total.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Operator = Literal["+", "-", "*", "/", "min", "max"]
Comparator = Literal["==", "!=", "<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Column:
    """The value of a column."""

    at: int


@dataclass(frozen=True, slots=True)
class Constant:
    value: float


@dataclass(frozen=True, slots=True)
class Sign:
    """The negative, or the absolute value."""

    op: Literal["negative", "abs"]
    of: Number


@dataclass(frozen=True, slots=True)
class Arithmetic:
    op: Operator
    left: Number
    right: Number


@dataclass(frozen=True, slots=True)
class Default:
    """A number, or a constant where it is missing."""

    of: Number
    value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    op: Comparator
    left: Number
    right: Number


@dataclass(frozen=True, slots=True)
class Among:
    """Whether a number is one of some constants."""

    of: Number
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    of: Number


@dataclass(frozen=True, slots=True)
class Truth:
    value: bool


@dataclass(frozen=True, slots=True)
class Not:
    of: Condition


@dataclass(frozen=True, slots=True)
class Join:
    op: Literal["&&", "||"]
    left: Condition
    right: Condition


@dataclass(frozen=True, slots=True)
class DefaultFlag:
    """A condition, or a constant where it is missing."""

    of: Condition
    value: bool


Number: TypeAlias = Column | Constant | Sign | Arithmetic | Default
Condition: TypeAlias = Comparison | Among | Missing | Truth | Not | Join | DefaultFlag


@dataclass(frozen=True, slots=True)
class All:
    """In the two-valued form: every part holds."""

    parts: tuple[Definite, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """In the two-valued form: a part holds."""

    parts: tuple[Definite, ...]


@dataclass(frozen=True, slots=True)
class Holds:
    """In the two-valued form: a comparison is definitely true."""

    op: Comparator
    left: Number
    right: Number


@dataclass(frozen=True, slots=True)
class IsAmong:
    """In the two-valued form: a number is definitely one of some constants, or definitely none of them."""

    of: Number
    values: tuple[float, ...]
    wanted: bool


@dataclass(frozen=True, slots=True)
class IsMissing:
    of: Number
    wanted: bool


@dataclass(frozen=True, slots=True)
class Otherwise:
    """In the two-valued form: not."""

    of: Definite


Definite: TypeAlias = All | Some | Holds | IsAmong | IsMissing | Otherwise | Truth
"""Whether a condition definitely has a value: true or false, never missing."""

_OPPOSITE: dict[Comparator, Comparator] = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def definitely(condition: Condition, wanted: bool = True) -> Definite:
    """Return the two-valued form of "the condition definitely is `wanted`".

    Missing is never computed: ``!`` swaps what is wanted, De Morgan swaps && and ||, and a comparison turns into its
    opposite, which NaN fails as well.
    """
    match condition:
        case Truth(value):
            return Truth(value == wanted)
        case Not(inner):
            return definitely(inner, not wanted)
        case Join(op, left, right):
            kind = All if (op == "&&") == wanted else Some
            parts: list[Definite] = []
            for part in (definitely(left, wanted), definitely(right, wanted)):
                parts += part.parts if isinstance(part, kind) else [part]
            return kind(tuple(parts))
        case DefaultFlag(inner, value):
            return definitely(inner, wanted) if value != wanted else Otherwise(definitely(inner, not wanted))
        case Missing(number):
            return IsMissing(number, wanted)
        case Among(number, values):
            return IsAmong(number, values, wanted)
        case Comparison(comparator, left, right):
            return Holds(comparator if wanted else _OPPOSITE[comparator], left, right)
