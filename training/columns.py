"""The columns of one table as Arrow holds them, and the problems found in them.

`training.ids`, `training.numbers` and `training.times` read them; every refusal names the column, the rows and the
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fraud.columns import values as column_values
from fraud.columns.values import NumberForm, is_missing, missing_words
from fraud.errors import DataError
from fraud.forms import Value

ROWS_SHOWN = 5
NO_NUMBER = pa.array(sorted(column_values.NO_NUMBER), pa.large_string())

Bools = NDArray[np.bool_]
T = TypeVar("T")


@dataclass
class Reader:
    """The columns of one table.

    Problems are collected, so that one run reports all of them; `finish` raises them.

    Parameters
    ----------
    source : str
        The table's name in messages: its file name.
    table : pyarrow.Table
    files : sequence of (str, int)
        The files of the table in order, each with its number of rows.
    missing_values : mapping of str to sequence
        By column, the values that mean missing, besides an empty field.
    numbers : NumberForm, optional
        How numbers are written in columns of text.
    nulls : tuple of str
        Texts that are empty fields of these files.

    Attributes
    ----------
    dates : set of str
        Roles whose times were found to be dates or midnights, all of them.
    """

    source: str
    table: pa.Table
    files: Sequence[tuple[str, int]]
    missing_values: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    numbers: NumberForm | None = None
    nulls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.problems: list[str] = []
        self.dates: set[str] = set()
        self.rows: NDArray[np.int64] = np.arange(1, self.table.num_rows + 1, dtype=np.int64)
        """Where each row stood among the rows of all files; the first is 1."""
        self._ends = np.cumsum([n for _, n in self.files])

    def finish(self) -> None:
        """Raise a DataError with every problem found so far, if there is any."""
        if self.problems:
            raise DataError("\n".join(self.problems))

    def keep(self, wanted: Bools) -> None:
        """Drop the other rows; the rest keep their row numbers."""
        self.table = self.table.filter(pa.array(wanted))
        self.rows = self.rows[wanted]

    def take(self, rows: NDArray[np.int64]) -> None:
        """Leave these rows, in this order; they keep their numbers."""
        self.table = self.table.take(pa.array(rows))
        self.rows = self.rows[rows]

    def place(self, row: int) -> str:
        """Return a row's name in messages: its number in its file."""
        number = int(self.rows[row])
        if len(self.files) == 1:
            return f"row {number}"
        at = int(np.searchsorted(self._ends, number))
        return f"row {number - (int(self._ends[at - 1]) if at else 0)} of {self.files[at][0]}"

    def refuse(self, column: str, role: str, rule: str, bad: Bools, shown: Callable[[int], str] | None = None) -> None:
        """Add the problem that rows where `bad` is true break `rule`; `shown` returns a row's content."""
        where = np.flatnonzero(bad)
        if len(where) == 0:
            return
        show = shown or (lambda row: repr(self.cell(column, row)))
        listed = ", ".join(f"{self.place(row)} ({show(int(row))})" for row in where[:ROWS_SHOWN])
        self.problems.append(
            f"{self.source}: column {column!r} ({role}) {rule}; {len(where):,} of {len(bad):,} rows "
            f"{'breaks' if len(where) == 1 else 'break'} this: {listed}{', …' if len(where) > ROWS_SHOWN else ''}"
        )

    def reject(self, column: str, role: str, rule: str) -> None:
        """Add a problem of the whole column."""
        self.problems.append(f"{self.source}: column {column!r} ({role}) {rule}")

    def values(self, column: str) -> pa.Array:
        """Return a column as one array, null where a value is missing."""
        values = self.table.column(column).combine_chunks()
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if pa.types.is_null(values.type):
            values = pc.cast(values, pa.large_string())
        missing = self.missing_values.get(column, ())
        return _without(values, missing) if missing else values

    def read_each(
        self, column: str, role: str, values: pa.Array, read: Callable[[Value], T | None]
    ) -> tuple[list[T | None], NDArray[np.int64]]:
        """Read a column value by value, each distinct one once, with a function that the service reads rows with.

        Returns
        -------
        results : list
            Of the distinct values, and at the end None for a missing one.
        codes : (n,) int64
            The place of each row's result; -1, the last, for a missing value and one that is refused.
        """
        distinct, codes = _distinct(values)
        results: list[T | None] = []
        broken: dict[str, list[int]] = {}
        for i, value in enumerate(distinct):
            try:
                results.append(read(value))
            except ValueError as error:
                results.append(None)
                broken.setdefault(str(error), []).append(i)
        for rule, bad in broken.items():
            self.refuse(column, role, rule, np.isin(codes, bad))
        return [*results, None], codes

    def cell(self, column: str, row: int) -> object:
        """Return a row's value, for a message."""
        value = self.table.column(column)[row].as_py()
        return str(value) if not isinstance(value, str | int | float | bool | None) else value


def _without(values: pa.Array, missing: Sequence[str | int | float]) -> pa.Array:
    if not (is_text(values.type) or pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return values
    words = missing_words(missing)
    distinct, codes = _distinct(values)
    found = np.array([*(is_missing(value, words) for value in distinct), False])
    return pc.if_else(pa.array(found[codes]), None, values)


def _distinct(values: pa.Array) -> tuple[list[Value], NDArray[np.int64]]:
    """Return the distinct values of a column, and the place of each row's; -1 where it is missing."""
    encoded = values.dictionary_encode()
    codes: NDArray[np.int64] = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return encoded.dictionary.to_pylist(), codes


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_null(values: pa.Array) -> Bools:
    missing: Bools = pc.is_null(values).to_numpy(zero_copy_only=False)
    return missing
