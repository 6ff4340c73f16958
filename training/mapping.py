"""What the columns of a user's table mean: the mapping file, checked before any row is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fraud.errors import DataError
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.refusals import closest

_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}

POSITION_ROLES = ("latitude", "longitude", "merchant_latitude", "merchant_longitude")
TRANSACTION_ROLES = ("customer_id", "merchant_id", "amount", "category", "channel", "device_id", *POSITION_ROLES)
TIME_ROLES = ("event_time", "processing_time", "label_time")
ROLES = ("transaction_id", *TIME_ROLES, *TRANSACTION_ROLES, "label")
_RESERVED = {
    "features": {"transaction_id", "label", *TIME_ROLES, *(f"{role}_ms" for role in TIME_ROLES)},
    "transactions": {*ROLES, *(f"{role}_ms" for role in TIME_ROLES)},
}


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
    return int(match[1]) * _UNIT_MS[match[2]]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest of `known`, or an empty string."""
    folded = {name.casefold(): name for name in known}
    near = closest(word.casefold(), folded)
    return f"; did you mean {folded[near]!r}?" if near else ""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TimeColumn(_Part):
    """A column of times; in YAML a plain column name stands for RFC 3339 text with a zone."""

    column: str
    unit: Literal["s", "ms"] | None = None
    """The column counts seconds or milliseconds since the epoch."""
    timezone: str | None = None
    """IANA name of the zone in which times without an offset are meant."""
    format: str | None = None
    """A strptime pattern for text that is not ISO 8601."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ZoneInfo(value)
            except (KeyError, ValueError, OSError):  # OSError: the name is a folder of the zone database
                raise ValueError(f"{value!r} is not an IANA time zone such as UTC or Europe/Berlin") from None
        return value

    @model_validator(mode="after")
    def _one_reading(self) -> Self:
        if self.unit is not None and (self.timezone is not None or self.format is not None):
            raise ValueError("unit is for epoch numbers, which have no timezone and no format")
        return self


class NumericColumn(_Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"
    minimum: float | None = None
    maximum: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum {self.minimum} is above maximum {self.maximum}")
        return self


class BooleanColumn(_Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"


class CategoricalColumn(_Part):
    column: str = ""
    missing: Literal["refuse", "allowed"] = "refuse"
    categories: tuple[str, ...] | None = Field(default=None, strict=False, min_length=1)
    """The allowed values in order; left out, those the data shows."""
    unknown: Literal["refuse", "missing"] = "refuse"
    """What a value outside `categories` is: an error, or a missing value."""


class Mapping(_Part):
    """Which columns of a table play which role.

    Each role names a column of the file. `numeric`, `boolean` and `categorical` name further columns (for
    ``kind: features`` all the features), as a list of names or as ``name: {column: ..., missing: ...}``.
    """

    kind: Literal["transactions", "features"] = "transactions"
    delimiter: str = Field(default=",", min_length=1, max_length=1)
    """What separates the fields of a CSV file."""
    event_time: TimeColumn | None = None
    processing_time: TimeColumn | None = None
    label_time: TimeColumn | None = None
    transaction_id: str | None = None
    customer_id: str | None = None
    merchant_id: str | None = None
    amount: str | None = None
    category: str | None = None
    channel: str | None = None
    device_id: str | None = None
    latitude: str | None = None
    longitude: str | None = None
    merchant_latitude: str | None = None
    merchant_longitude: str | None = None
    label: str | None = None
    label_delay: str | None = None
    """How long after the event a label is known where `label_time` does not say, such as ``7d``."""
    on_zero_amount: Literal["refuse", "drop"] = "refuse"
    """Whether a row with an amount of exactly zero is an error, or left out and counted."""
    numeric: dict[str, NumericColumn] = Field(default_factory=dict)
    boolean: dict[str, BooleanColumn] = Field(default_factory=dict)
    categorical: dict[str, CategoricalColumn] = Field(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read and check a mapping file.

        Raises
        ------
        DataError
            Naming every key that is unknown, missing or wrong.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path.name}: the mapping cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: the mapping is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise DataError(f"{path.name}: a mapping has lines like 'amount: amt', a role and its column")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DataError("\n".join(f"{path.name}: {line}" for line in _lines(error))) from error

    @field_validator("numeric", "boolean", "categorical", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A list of names, or a map of name to options, becomes name → options with the column filled in."""
        entries: dict[Any, Any]
        if isinstance(value, list):
            if not all(isinstance(name, str) for name in value):
                raise ValueError("a list holds column names alone; for options write {name: {missing: allowed}}")
            entries = {name: {} for name in value}
        elif isinstance(value, dict):
            entries = {name: {} if options is None else options for name, options in value.items()}
        else:
            return value
        return {
            name: {"column": name, **options} if isinstance(options, dict) else options
            for name, options in entries.items()
        }

    @field_validator("label_delay")
    @classmethod
    def _duration(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_duration_ms(value)
            except DataError as error:
                raise ValueError(error.message) from error
        return value

    @model_validator(mode="after")
    def _roles_fit_the_kind(self) -> Self:
        problems: list[str] = []
        if self.kind == "transactions":
            needed = ("event_time", "customer_id", "amount")
            problems += [f"role {role!r} is missing" for role in needed if getattr(self, role) is None]
            if self.label is not None and self.label_time is None and self.label_delay is None:
                problems.append(
                    "when is a label known? give label_time (a column) or label_delay (such as 7d), or both"
                )
        else:
            misplaced = [role for role in (*TRANSACTION_ROLES, "processing_time") if getattr(self, role) is not None]
            problems += [
                f"role {role!r} is for kind: transactions; list it under numeric or categorical" for role in misplaced
            ]
            if not self.further():
                problems.append("no features; list them under numeric, boolean and categorical")
            if self.label_time is not None and self.event_time is None:
                problems.append("label_time needs event_time")
        if self.label is None and (self.label_time is not None or self.label_delay is not None):
            problems.append("label_time and label_delay need a label")
        for prefix in ("", "merchant_"):
            pair = (f"{prefix}latitude", f"{prefix}longitude")
            if len({getattr(self, role) is None for role in pair}) == 2:
                problems.append(f"{pair[0]} and {pair[1]} come together")
        names: dict[str, str] = {}
        for group, name, _ in self.further():
            if name in _RESERVED[self.kind]:
                problems.append(f"{group} {name!r} has the name of a role; {_renaming(name)}")
            elif self.kind == "transactions" and name in HISTORY_FEATURES:
                problems.append(f"{group} {name!r} has the name of a history feature; {_renaming(name)}")
            if name in names:
                problems.append(f"{name!r} is listed under {names[name]} and under {group}")
            names[name] = group
        columns: dict[str, str] = {}
        for role, column in self.columns().items():
            if column in columns:
                problems.append(f"column {column!r} plays two roles, {columns[column]} and {role}")
            columns[column] = role
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def label_delay_ms(self) -> int | None:
        return None if self.label_delay is None else parse_duration_ms(self.label_delay)

    def further(self) -> list[tuple[str, str, NumericColumn | BooleanColumn | CategoricalColumn]]:
        """(group, name, options) of every further column, in the order of the mapping."""
        return [
            *(("numeric", name, numeric) for name, numeric in self.numeric.items()),
            *(("boolean", name, boolean) for name, boolean in self.boolean.items()),
            *(("categorical", name, categorical) for name, categorical in self.categorical.items()),
        ]

    def columns(self) -> dict[str, str]:
        """Role (or ``numeric x`` for a further column) → column of the file."""
        found: dict[str, str] = {}
        for role in ROLES:
            value = getattr(self, role)
            if value is not None:
                found[role] = value.column if isinstance(value, TimeColumn) else value
        found |= {f"{group} {name}": options.column for group, name, options in self.further()}
        return found


def _renaming(name: str) -> str:
    return f"rename it, such as my_{name}: {{column: {name}}}"


def _lines(error: ValidationError) -> list[str]:
    """One line a problem, in the words of a mapping instead of pydantic's."""
    parts: dict[str, type[BaseModel]] = {
        **dict.fromkeys(TIME_ROLES, TimeColumn),
        "numeric": NumericColumn,
        "boolean": BooleanColumn,
        "categorical": CategoricalColumn,
    }
    lines: list[str] = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        place = ".".join(where)
        if problem["type"] == "extra_forbidden":
            known = (parts[where[0]] if len(where) > 1 else Mapping).model_fields
            lines.append(f"unknown key {place!r}{did_you_mean(where[-1], known)}")
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            lines += [f"{place}: {line}" if place else line for line in text.split("\n")]
        else:
            arrived = problem["input"]
            shown = f" (got {arrived!r})" if isinstance(arrived, (str, int, float, bool)) else ""
            lines.append(f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}{shown}")
    return lines
