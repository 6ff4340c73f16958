"""The mapping file, which states the roles of a table's columns; checked before any row is read."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from fraud.errors import DataError
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.schema import POSITION_ROLES, TEXT_ROLES, Kind
from training.mapping_parts import (
    BooleanColumn,
    CategoricalColumn,
    CurrencyColumn,
    LabelColumn,
    MissingValues,
    NumberFormat,
    NumericColumn,
    Part,
    TextColumn,
    TimeColumn,
    did_you_mean,
    parse_duration_ms,
)

TRANSACTION_ROLES = (
    *("customer_id", "merchant_id", "amount", "currency", "category", "channel", "device_id"),
    *POSITION_ROLES,
)
STAKE = "stake"
"""The role of the money at stake in a row of ready features."""
TIME_ROLES = ("event_time", "processing_time", "label_time")
ROLES = ("transaction_id", *TIME_ROLES, *TRANSACTION_ROLES, "label")
_TEXT_ROLES = ("transaction_id", "customer_id", "merchant_id", "category", "channel", "device_id")
EVERY_LABEL = "every_label"
"""The column of a canonical table with all labels of the transactions that have several."""
_RESERVED = {
    "features": {"transaction_id", "label", STAKE, *TIME_ROLES, *(f"{role}_ms" for role in TIME_ROLES)},
    "transaction": {*ROLES, EVERY_LABEL, *(f"{role}_ms" for role in TIME_ROLES)},
}


class Mapping(Part):
    """Which columns of a table play which role.

    Each role names a column of the file. `numeric`, `boolean` and `categorical` name further columns (for
    ``kind: features`` all the features), as a list of names or as ``name: {column: ..., missing: ...}``.
    """

    kind: Kind = "transaction"
    delimiter: str | None = Field(default=None, pattern=r"^[\x01-\x7f]$")
    """What separates the fields of a CSV file; left out, the one of ``, ; | `` and tab that shows the columns."""
    encoding: str | None = None
    """The encoding of CSV files, such as ``cp1252``; left out, UTF-8, or UTF-16 where its byte order mark says so."""
    escape: str | None = Field(default=None, pattern=r"^[\x01-\x7f]$")
    """What takes the meaning from the next character of a CSV field: a backslash; ``"`` says that none does."""
    missing_values: MissingValues = ()
    """The values that mean missing in every column, besides an empty field."""
    numbers: NumberFormat | None = None
    """How numbers are written in columns of text; left out, with a decimal point and digits alone."""
    event_time: TimeColumn | None = None
    processing_time: TimeColumn | None = None
    label_time: TimeColumn | None = None
    transaction_id: TextColumn | None = None
    customer_id: TextColumn | None = None
    merchant_id: TextColumn | None = None
    amount: str | None = None
    currency: CurrencyColumn | None = None
    category: TextColumn | None = None
    channel: TextColumn | None = None
    device_id: TextColumn | None = None
    latitude: str | None = None
    longitude: str | None = None
    merchant_latitude: str | None = None
    merchant_longitude: str | None = None
    label: LabelColumn | None = None
    label_delay: str | None = None
    """How long after the event a label is known where `label_time` does not say, such as ``7d``."""
    stake: str | float | None = None
    """The money at stake in a row of ready features: a column, which may be a feature too, or one number for all."""
    on_zero_amount: Literal["refuse", "drop"] = "refuse"
    """Whether a row with an amount of exactly zero is an error, or left out and counted."""
    on_negative_amount: Literal["refuse", "drop", "absolute"] = "refuse"
    """Whether a row with an amount below zero, a refund, is an error, left out and counted, or one without its sign."""
    strict: bool | list[str] = False
    """Text roles that every request must carry, with a value that training knew: all (true), or those listed."""
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

    @field_validator("kind", mode="before")
    @classmethod
    def _as_it_was_spelled(cls, kind: object) -> object:
        """Accept the plural too, as earlier releases spelled it."""
        return "transaction" if kind == "transactions" else kind

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str | None) -> str | None:
        try:
            return None if value is None else codecs.lookup(value).name
        except LookupError:
            raise ValueError(f"{value!r} is no encoding; write one such as utf-8, cp1252 or utf-16") from None

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
        if self.kind == "transaction":
            needed = ("event_time", "customer_id", "amount")
            problems += [f"role {role!r} is missing" for role in needed if getattr(self, role) is None]
            if self.stake is not None:
                problems.append("role 'stake' is for kind: features; the stake of a transaction is its amount")
            if self.label is not None and self.label_time is None and self.label_delay is None:
                problems.append(
                    "when is a label known? give label_time (a column) or label_delay (such as 7d), or both"
                )
        else:
            misplaced = [role for role in (*TRANSACTION_ROLES, "processing_time") if getattr(self, role) is not None]
            problems += [
                f"role {role!r} is for kind: transaction; list it under numeric or categorical" for role in misplaced
            ]
            if not self.further():
                problems.append("no features; list them under numeric, boolean and categorical")
            if self.label_time is not None and self.event_time is None:
                problems.append("label_time needs event_time")
        if isinstance(self.stake, float) and not 0 < self.stake < float("inf"):
            problems.append(f"stake: {self.stake:g} is not a sum of money above zero")
        if self.label is None and (self.label_time is not None or self.label_delay is not None):
            problems.append("label_time and label_delay need a label")
        if not isinstance(self.strict, bool):
            problems += [
                f"strict: {role!r} is none of the text roles mapped here ({', '.join(self.text_roles()) or 'none'})"
                for role in self.strict
                if role not in self.text_roles()
            ]
        for prefix in ("", "merchant_"):
            pair = (f"{prefix}latitude", f"{prefix}longitude")
            if len({getattr(self, role) is None for role in pair}) == 2:
                problems.append(f"{pair[0]} and {pair[1]} come together")
        names: dict[str, str] = {}
        for group, name, _ in self.further():
            if (what := self._taken_name(name)) is not None:
                problems.append(f"{group} {name!r} has the name of {what}; {_renaming(name)}")
            if name in names:
                problems.append(f"{name!r} is listed under {names[name]} and under {group}")
            names[name] = group
        for group, name, _ in self.further():
            if name.strip("*") == "":
                problems.append(
                    f"{group} {name!r} takes every column, the label's too; name what its columns begin with"
                )
        columns: dict[str, str] = {}
        for role, names_ in self.columns().items():
            if len(names_) > 1:
                continue  # a part of a joined text may be a feature as well
            if names_[0] in columns and role != STAKE:
                problems.append(f"column {names_[0]!r} plays two roles, {columns[names_[0]]} and {role}")
            columns[names_[0]] = role
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def label_delay_ms(self) -> int | None:
        return None if self.label_delay is None else parse_duration_ms(self.label_delay)

    def text_roles(self) -> list[str]:
        """The optional roles of text that have a column."""
        return [role for role in TEXT_ROLES if getattr(self, role) is not None]

    def is_strict(self, role: str) -> bool:
        """Whether every request must carry a text role, with a value that training knew."""
        return self.strict if isinstance(self.strict, bool) else role in self.strict

    def further(self) -> list[tuple[str, str, FurtherColumn]]:
        """(group, name, options) of every further column, in the order of the mapping; a pattern is one of them."""
        return [
            *(("numeric", name, numeric) for name, numeric in self.numeric.items()),
            *(("boolean", name, boolean) for name, boolean in self.boolean.items()),
            *(("categorical", name, categorical) for name, categorical in self.categorical.items()),
        ]

    def columns(self) -> dict[str, tuple[str, ...]]:
        """Role (or ``numeric x`` for a further column) → its column of the file, or those that are joined for it."""
        found: dict[str, tuple[str, ...]] = {}
        for role in ROLES:
            match getattr(self, role):
                case TimeColumn() | TextColumn() as several:
                    found[role] = several.names
                case LabelColumn() | CurrencyColumn() as part:
                    if part.column is not None:
                        found[role] = (part.column,)
                case str() as column:
                    found[role] = (column,)
        found |= {f"{group} {name}": (options.column,) for group, name, options in self.further()}
        return found | {STAKE: (self.stake,)} if isinstance(self.stake, str) else found

    def expanded(self, present: Iterable[str]) -> Self:
        """Return the mapping with each pattern, such as ``V*``, replaced by the columns of a file that it matches.

        Columns that play another role or are listed by name are not matched.

        Raises
        ------
        DataError
            A pattern matches no column, or a column is matched by two patterns or has a name that is not free.
        """
        if not any(_is_pattern(name) for _, name, _ in self.further()):
            return self
        taken = {names[0] for role, names in self.columns().items() if len(names) == 1 and role != STAKE}
        free = [column for column in present if column not in taken]
        matched: dict[str, str] = {}
        problems: list[str] = []
        groups: dict[str, dict[str, FurtherColumn]] = {"numeric": {}, "boolean": {}, "categorical": {}}
        for group, name, options in self.further():
            if not _is_pattern(name):
                groups[group][name] = options
                continue
            columns = [column for column in free if _matches(name, column)]
            if not columns:
                problems.append(f"{group} {name!r} matches no column")
            for column in columns:
                if column in matched:
                    problems.append(f"column {column!r} is matched by {matched[column]!r} and by {name!r}")
                elif (what := self._taken_name(column)) is not None:
                    problems.append(f"{group} {name!r} matches {column!r}, the name of {what}; {_renaming(column)}")
                matched[column] = name
                groups[group][column] = options.model_copy(update={"column": column})
        if problems:
            raise DataError("\n".join(problems))
        return self.model_copy(update=groups)

    def _taken_name(self, name: str) -> str | None:
        if name in _RESERVED[self.kind]:
            return "a role"
        return "a history feature" if self.kind == "transaction" and name in HISTORY_FEATURES else None


FurtherColumn = NumericColumn | BooleanColumn | CategoricalColumn


def _is_pattern(name: str) -> bool:
    return "*" in name


def _matches(pattern: str, column: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), column, re.DOTALL) is not None


def _renaming(name: str) -> str:
    return f"rename it, such as my_{name}: {{column: {name}}}"


def _lines(error: ValidationError) -> list[str]:
    """One line a problem, in terms of the mapping instead of pydantic's."""
    parts: dict[str, type[BaseModel]] = {
        **dict.fromkeys(TIME_ROLES, TimeColumn),
        **dict.fromkeys(_TEXT_ROLES, TextColumn),
        "label": LabelColumn,
        "currency": CurrencyColumn,
        "numbers": NumberFormat,
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
