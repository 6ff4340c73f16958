"""The parts of a mapping: how one column, or a group of columns, is read."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from fraud.columns.times import UNIT_MS, TimeForm, check_format
from fraud.columns.values import NumberForm
from fraud.currencies import MAX_MINOR_DIGITS, iso_minor_digits
from fraud.errors import DataError
from fraud.forms import id_text
from fraud.refusals import closest


def parse_duration_ms(text: str) -> int:
    """Milliseconds of a duration such as ``7d``, ``12h``, ``30m``, ``0s``.

    Raises
    ------
    DataError
        When `text` is no whole number followed by one of the units ms, s, m, h, d, w.

    Examples
    --------
    >>> parse_duration_ms("7d")
    604800000
    """
    match = re.fullmatch(r"(\d{1,9})(ms|s|m|h|d|w)", str(text).strip())
    if match is None:
        raise DataError(f"{text!r} is not a duration; write a whole number and a unit, such as 7d, 12h, 30m or 0s")
    return int(match[1]) * UNIT_MS[match[2]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest of `known`, or an empty string."""
    folded = {name.casefold(): name for name in known}
    near = closest(word.casefold(), folded)
    return f"; did you mean {folded[near]!r}?" if near else ""


def _words(value: Any) -> Any:
    """Refuse values that YAML does not read as text: an unquoted Yes, No, on or off is a boolean."""
    for word in value if isinstance(value, list) else []:
        if isinstance(word, bool):
            raise ValueError(f"YAML reads a bare Yes, No, on or off as {word}; put the word in quotes")
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_words), Field(strict=False)]
MissingValues = Annotated[tuple[str | int | float, ...], BeforeValidator(_words), Field(strict=False)]
"""The values that mean missing, besides an empty field: text, or a number in any notation."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Columns(Part):
    """One column, or several whose texts are joined; in YAML a plain name stands for one column."""

    column: str | None = None
    columns: tuple[str, ...] | None = Field(default=None, strict=False, min_length=2)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.column is None) == (self.columns is None):
            raise ValueError("give column, or columns to be joined")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the file, in the order in which they are joined."""
        return (self.column,) if self.column is not None else self.columns or ()

    @property
    def name(self) -> str:
        """What messages call the column."""
        return " + ".join(self.names)


class TextColumn(_Columns):
    """An id or another text."""

    join: str = "-"
    """The separator between the texts of several columns."""


class LabelColumn(Part):
    column: str
    positive: Words | None = None
    """The texts that mean fraud, beside those that every flag knows."""
    negative: Words | None = None
    """The texts that mean legitimate."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value


def unknown_currency(code: str) -> str:
    """Return the error for a code that is not in ISO 4217, with the remedy."""
    return (
        f"{code!r} is no code of ISO 4217; say how many decimal places its amounts have: "
        f"currency: {{minor_digits: {{{code}: 2}}}}"
    )


class CurrencyColumn(Part):
    """The currency of the amounts: a column, or one for the whole table."""

    column: str | None = None
    constant: str | None = None
    minor_digits: dict[str, int] = Field(default_factory=dict)
    """Decimal places of currencies that ISO 4217 does not list, such as ``{BTC: 8}``."""
    typical: dict[str, float] = Field(default_factory=dict)
    """Typical amounts; of the others, the median of the training window is taken."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.column is None) == (self.constant is None):
            raise ValueError("give column, or constant: EUR where all amounts are in one currency")
        for code, digits in self.minor_digits.items():
            if not 0 <= digits <= MAX_MINOR_DIGITS:
                raise ValueError(f"minor_digits of {code}: {digits} is not within 0 and {MAX_MINOR_DIGITS}")
        for code in ([] if self.constant is None else [self.constant]) + list(self.typical):
            if code not in self.minor_digits and iso_minor_digits(code) is None:
                raise ValueError(unknown_currency(code))
        for code, amount in self.typical.items():
            if not 0 < amount < float("inf"):
                raise ValueError(f"typical amount of {code}: {amount:g} is not above zero")
        return self


class TimeColumn(_Columns):
    """A column of times; a plain column name stands for RFC 3339 text with a zone. Several are joined by a space."""

    unit: Literal["s", "ms", "m", "h", "d", "month"] | None = None
    """The column counts such units since the epoch, or since `start`."""
    start: str | None = None
    """What the count begins at: RFC 3339 with a zone, or a date (midnight UTC)."""
    timezone: str | None = None
    """IANA name of the zone in which times without an offset are meant."""
    format: str | None = None
    """A strptime pattern for text that is not ISO 8601."""
    ambiguous: Literal["refuse", "earlier", "later"] = "refuse"
    """Which instant a local time names that comes twice, as the clock is put back."""
    nonexistent: Literal["refuse", "shift"] = "refuse"
    """What a local time is that is skipped as the clock is put forward: an error, or the next instant there is."""

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ZoneInfo(value)
            except (KeyError, ValueError, OSError):  # OSError: the name is a folder of the zone database
                raise ValueError(f"{value!r} is not an IANA time zone such as UTC or Europe/Berlin") from None
        return value

    @field_validator("format")
    @classmethod
    def _known_directives(cls, value: str | None) -> str | None:
        if value is not None:
            check_format(value)
        return value

    @field_validator("start", mode="before")
    @classmethod
    def _start(cls, value: Any) -> Any:
        """YAML has times of its own; a plain date is midnight UTC."""
        if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
            return f"{value.isoformat()}T00:00:00+00:00"
        if isinstance(value, dt.datetime):
            value = value.isoformat()
        if isinstance(value, str):
            try:
                found = dt.datetime.fromisoformat(value if "T" in value or ":" in value else f"{value}T00:00:00Z")
            except ValueError:
                raise ValueError(f"{value!r} is no time; write 2025-01-31 or 2025-01-31T12:30:00Z") from None
            if found.tzinfo is None:
                raise ValueError(f"{value!r} has no zone; write it as 2025-01-31T12:30:00Z")
            return found.isoformat()
        return value

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.unit is not None and (self.timezone is not None or self.format is not None):
            raise ValueError("unit is for epoch numbers, which have no timezone and no format")
        if self.unit is not None and self.columns is not None:
            raise ValueError("unit is for one column of numbers")
        if self.start is not None and self.unit is None:
            raise ValueError("start needs unit: what the column counts since then")
        if self.unit == "month" and self.start is None:
            raise ValueError("unit: month needs start")
        if self.timezone is None and (self.ambiguous, self.nonexistent) != ("refuse", "refuse"):
            raise ValueError("ambiguous and nonexistent are for local times: give their timezone")
        return self

    @property
    def start_ms(self) -> int:
        """Where the count begins, ms since the epoch."""
        if self.start is None:
            return 0
        return (dt.datetime.fromisoformat(self.start) - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(
            milliseconds=1
        )

    def form(self, *, is_dates: bool = False) -> TimeForm:
        """Return how one time is read; `is_dates` says that every time of the column is a date or midnight."""
        return TimeForm(
            self.unit, self.start_ms, self.timezone, self.format, self.ambiguous, self.nonexistent, is_dates
        )


class NumberFormat(Part):
    """How the numbers of a text file are written."""

    decimal: str = Field(default=".", min_length=1, max_length=1)
    thousands: str | None = Field(default=None, min_length=1, max_length=1)
    sign: str | None = Field(default=None, min_length=1)
    """A currency or unit sign before or after a number, such as ``$``."""

    @property
    def form(self) -> NumberForm:
        return NumberForm(self.decimal, self.thousands, self.sign)

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.decimal == self.thousands:
            raise ValueError(f"decimal and thousands are both {self.decimal!r}")
        return self


class NumericColumn(Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"
    missing_values: MissingValues = ()
    minimum: float | None = None
    maximum: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class BooleanColumn(Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"
    missing_values: MissingValues = ()
    positive: Words | None = None
    """The texts that mean true, beside those that every flag knows."""
    negative: Words | None = None


class CategoricalColumn(Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"
    missing_values: MissingValues = ()
    categories: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """The allowed values in order, whole numbers as digits; left out, those the data shows."""
    unknown: Literal["refuse", "missing"] = "refuse"
    """What a value outside `categories` is: an error, or a missing value."""

    @field_validator("categories")
    @classmethod
    def _one_text_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """``5411.0`` and ``5411`` are one category, as in a column of them."""
        return None if value is None else tuple(dict.fromkeys(id_text(word) for word in value))
