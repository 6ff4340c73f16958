"""How one value of a table's column is read: as text, a number or a flag.

Training reads its files with these functions, and the service the rows that callers send. A `ValueError` says which
rule the value breaks, such as ``must be a number``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from functools import cache

import msgspec

from fraud.forms import Value, id_text, one_text

NO_NUMBER = frozenset(("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N"))
"""Texts that stand for no value in columns of numbers, times and flags."""
PLAIN_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
POSITIVE = frozenset(("true", "t", "1", "1.0", "yes", "y"))
NEGATIVE = frozenset(("false", "f", "0", "0.0", "no", "n"))
NOT_FINITE = "must be finite"
NO_FLAG = "must be true or false"
_plain = re.compile(PLAIN_NUMBER).fullmatch
_infinite = re.compile(r"[+-]?inf(?:inity)?", re.IGNORECASE).fullmatch


class NumberForm(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How numbers are written in text: the decimal and thousands separators, and a sign before or after a number."""

    decimal: str = "."
    thousands: str | None = None
    sign: str | None = None

    @property
    def example(self) -> str:
        return f"{self.sign or ''}1{self.thousands or ''}234{self.decimal}56"

    def plain(self, text: str) -> str:
        """Return a number with a decimal point and digits alone; empty text if `text` has another form."""
        if _pattern(self).fullmatch(text) is None:
            return ""
        text = re.sub(r"\s", "", text.replace(self.sign, "") if self.sign else text)
        return (text.replace(self.thousands, "") if self.thousands else text).replace(self.decimal, ".")


@cache
def _pattern(form: NumberForm) -> re.Pattern[str]:
    decimal, thousands = re.escape(form.decimal), re.escape(form.thousands or "")
    grouped = rf"[0-9]{{1,3}}(?:{thousands}[0-9]{{3}})+|" if form.thousands else ""
    sign = rf"(?:{re.escape(form.sign)})?" if form.sign else ""
    number = rf"(?:{grouped}[0-9]+)?(?:{decimal}[0-9]+)?(?:[eE][+-]?[0-9]+)?"
    return re.compile(rf"[+-]?\s*{sign}\s*[+-]?{number}\s*{sign}")


def number_of(value: Value, form: NumberForm | None = None) -> float | None:
    """Return a finite number, or None where there is no value; `form` is how text writes numbers.

    Examples
    --------
    >>> number_of("1.234,50 €", NumberForm(",", ".", "€")), number_of(7), number_of("N/A")
    (1234.5, 7.0, None)
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        if text in NO_NUMBER:
            return None
        text = text if form is None else form.plain(text)
        if _plain(text) is None:
            raise ValueError(NOT_FINITE if _infinite(text) else no_number(form))
        found = float(text)
    elif isinstance(value, int | float):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
    else:
        raise ValueError(no_number(form))
    if math.isinf(found):
        raise ValueError(NOT_FINITE)
    return None if math.isnan(found) else found


def no_number(form: NumberForm | None) -> str:
    """Return the rule that text breaks which is no number."""
    return "must be a number" if form is None else f"must be a number such as {form.example}"


def text_of(value: Value) -> str | None:
    """Return the text of an id or category: a whole number is its digits, a flag ``true`` or ``false``.

    Raises
    ------
    ValueError
        The value could stand for several ids; see `fraud.forms.id_text`.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ValueError("must be text or a whole number")
    return id_text(value)


def flag_of(value: Value, positive: Collection[str] = (), negative: Collection[str] = ()) -> bool | None:
    """Return a flag, or None where there is no value.

    Text is 1, 0, true, false, t, f, yes, no, y or n in any case, or one of the words, which are in lower case.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int | float):
        word = whole(value)
    elif isinstance(value, str):
        word = value.strip().lower()
    else:
        raise ValueError(NO_FLAG)
    if word in POSITIVE:
        return True
    if word in NEGATIVE:
        return False
    if word in positive or word in negative:
        return word in positive
    if isinstance(value, str) and word in _NO_FLAG:
        return None
    raise ValueError(NO_FLAG)


_NO_FLAG = frozenset(word.lower() for word in NO_NUMBER)


def whole(value: float) -> str:
    """Return a number as text, a whole one as its digits."""
    return str(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)


def missing_words(values: Iterable[str | int | float]) -> frozenset[str]:
    """Return the values that mean missing, for `is_missing`."""
    return frozenset(_word(value) for value in values)


def is_missing(value: Value, words: frozenset[str]) -> bool:
    """Return whether a value is one of those that mean missing: ``-1``, ``-1.0`` and ``"-1"`` are the same.

    Examples
    --------
    >>> [is_missing(value, missing_words([-1])) for value in (-1, -1.0, " -1.00", "1", None, True)]
    [True, True, True, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return _word(value) in words


def _word(value: str | int | float) -> str:
    if isinstance(value, str):
        return one_text(value.strip()) or ""
    return whole(value) if math.isfinite(value) else repr(value)
