"""The columns of the table that trained a model, and rows that arrive with its column names and value forms.

A bundle carries the roles and options of its mapping (`Table`). `TableReader` turns a row of the table into the JSON of
the same row under the product's own names, which is then read like every other row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal, NamedTuple

import msgspec

from fraud.columns.times import TimeForm, says_instant, time_of
from fraud.columns.values import NumberForm, flag_of, is_missing, missing_words, number_of, text_of
from fraud.errors import InvalidRequest
from fraud.forms import Value
from fraud.refusals import listed, shown

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Own = str | float | bool | None
"""A value in the product's own form."""


class Column(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where the table has one role or feature, and how it is read.

    Attributes
    ----------
    field : str
        The role or feature: its name in a row under the product's own names.
    columns : tuple of str
        The table's column, or those whose texts are joined.
    reads : str
        As what the value is read.
    join : str
        What stands between joined texts.
    missing_values : tuple
        Values that mean missing.
    positive, negative : tuple of str
        Words for true and false, in lower case.
    time : TimeForm, optional
        For times.
    is_absolute : bool
        Whether the sign of a number is dropped.
    """

    field: str
    columns: tuple[str, ...]
    reads: Literal["text", "number", "flag", "time"]
    join: str = ""
    missing_values: tuple[str | int | float, ...] = ()
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    time: TimeForm | None = None
    is_absolute: bool = False


class Table(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The table that trained a model: its columns, the texts that are empty fields, and how text writes numbers."""

    columns: tuple[Column, ...]
    nulls: tuple[str, ...] = ()
    numbers: NumberForm | None = None


class TableReader:
    """Recognizes rows of a table by their names, and reads them.

    Parameters
    ----------
    table : Table
    fields : collection of str
        The names that rows under the product's own names may have.
    required : collection of str
        Those that they must have.

    Attributes
    ----------
    names : list of str
        The columns that every row of the table has.
    conflicts : list of (str, callable)
        Fields of which a value in the product's own form may mean something else in the table, as the name is the
        same, and whether a value does.
    """

    def __init__(self, table: Table, fields: Collection[str], required: Collection[str]) -> None:
        self._columns = table.columns
        mapped = {column.field for column in table.columns}
        columns = {name for column in table.columns for name in column.columns}
        self.names = [name for column in table.columns if column.field in required for name in column.columns]
        self._own_names = (mapped & {*fields}) - columns
        self._table_names = columns - {*fields}
        self._consumed = columns | {*fields} & mapped
        self._nulls = frozenset(table.nulls)
        self._required_own = self._own_names & {*required}
        self._readings = [
            _Reading(
                column, missing_words(column.missing_values), _reader(column, table.numbers), column.field in required
            )
            for column in table.columns
        ]
        self.conflicts = [] if self._required_own else self._conflicting()

    def columns_of(self, field: str) -> tuple[str, ...]:
        """Return the columns that make a field; none if the table lacks it."""
        return next((column.columns for column in self._columns if column.field == field), ())

    def takes(self, arrived: Mapping[str, msgspec.Raw]) -> bool:
        """Return whether a row has the table's names. Where its names are both, its values are the table's."""
        if self._table_names.isdisjoint(arrived):
            return self._own_names.isdisjoint(arrived)
        return not self._required_own or not self._required_own <= arrived.keys()

    def own_row(self, said: bytes, path: str) -> bytes:
        """Return a row of the table as the JSON of the same row under the product's own names.

        Fields that the table's mapping does not take are kept, and so is a value under the product's own name where the
        row lacks the column.

        Raises
        ------
        InvalidRequest
            A value breaks the rule of its column, or one that must be there is missing.
        """
        try:
            arrived = _decode_row(said)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"an instance must be a JSON object of finite values: {error}", path) from None
        own: dict[str, Value] = {}
        for reading in self._readings:
            field, columns = reading.column.field, reading.column.columns
            value: Value
            if field in self._own_names and field in arrived and arrived.keys().isdisjoint(columns):
                value = arrived[field]
            else:
                value = self._value(reading, arrived, path)
            if value is not None:
                own[field] = value
            elif reading.is_required:
                raise self._missing(reading.column, arrived, path)
        for name, value in arrived.items():
            if name not in self._consumed:
                own[name] = value
        return msgspec.json.encode(own)

    def place(self, path: str, field_path: str | None) -> str | None:
        """Return where the table has the field that an error names."""
        for reading in self._readings:
            if field_path == f"{path}.{reading.column.field}":
                return f"{path}.{reading.column.columns[0]}"
        return field_path

    def _value(self, reading: _Reading, arrived: Mapping[str, Value], path: str) -> Own:
        column = reading.column
        value = arrived.get(column.columns[0])
        try:
            if len(column.columns) > 1:
                value = self._joined(reading, arrived)
            elif self._stands_for_nothing(reading, value):
                return None
            return reading.read(value)
        except ValueError as error:
            what = shown(msgspec.json.encode(value).decode())
            raise InvalidRequest(f"{error}; {what} arrived", f"{path}.{column.columns[0]}") from None

    def _joined(self, reading: _Reading, arrived: Mapping[str, Value]) -> str | None:
        parts = [arrived.get(name) for name in reading.column.columns]
        texts = [None if self._stands_for_nothing(reading, part) else text_of(part) for part in parts]
        return None if texts.count(None) == len(texts) else reading.column.join.join([text or "" for text in texts])

    def _missing(self, column: Column, arrived: Mapping[str, Value], path: str) -> InvalidRequest:
        absent = [name for name in self.names if name not in arrived]
        if {*column.columns} <= {*absent}:
            return InvalidRequest(f"missing {listed(absent)}, of a row with the table's column names", path)
        return InvalidRequest(f"must not be missing ({column.field})", f"{path}.{column.columns[0]}")

    def _stands_for_nothing(self, reading: _Reading, value: Value) -> bool:
        return (isinstance(value, str) and value in self._nulls) or (
            bool(reading.missing) and is_missing(value, reading.missing)
        )

    def _conflicting(self) -> list[tuple[str, Callable[[Value], bool]]]:
        found: list[tuple[str, Callable[[Value], bool]]] = []
        for reading in self._readings:
            column = reading.column
            if column.columns != (column.field,):
                continue
            if column.time is not None and column.time.format is not None:
                found.append((column.field, lambda _: True))
            elif reading.missing or (self._nulls and column.reads == "text"):
                found.append((column.field, partial(self._stands_for_nothing, reading)))
        return found


class _Reading(NamedTuple):
    column: Column
    missing: frozenset[str]
    read: Callable[[Value], Own]
    is_required: bool


def _reader(column: Column, numbers: NumberForm | None) -> Callable[[Value], Own]:
    """Return what reads a column's value into the product's own form."""
    match column.reads:
        case "text":
            return text_of
        case "flag":
            return partial(flag_of, positive=frozenset(column.positive), negative=frozenset(column.negative))
        case "number":
            return partial(_absolute if column.is_absolute else number_of, form=numbers)
        case "time":
            form = column.time or TimeForm()
            has_own_name = column.columns == (column.field,) and form.format is None
            return partial(_time, form=form, numbers=numbers, has_own_name=has_own_name)


def _absolute(value: Value, form: NumberForm | None) -> float | None:
    number = number_of(value, form)
    return None if number is None else abs(number)


def _time(value: Value, form: TimeForm, numbers: NumberForm | None, has_own_name: bool) -> str | None:
    """Return a time as RFC 3339, which is taken as it is under the product's own name."""
    if has_own_name and says_instant(value):
        form = TimeForm()
    ms = time_of(value, form, numbers)
    return None if ms is None else (_EPOCH + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds")


_decode_row: Callable[[bytes], dict[str, Value]] = msgspec.json.Decoder(dict).decode
