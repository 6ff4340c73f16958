"""The columns of one table as Arrow holds them, and the problems found in them.

`training.ids`, `training.numbers` and `training.times` read them; every refusal names the column, the rows and the
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fraud.errors import DataError
from fraud.forms import id_text
from training.mapping_parts import NumberFormat

ROWS_SHOWN = 5
NO_NUMBER = pa.array(["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N"], pa.large_string())
"""Texts that stand for no value in columns of numbers, times and flags."""

Bools = NDArray[np.bool_]


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
    numbers : NumberFormat, optional
        How numbers are written in columns of text.
    """

    source: str
    table: pa.Table
    files: Sequence[tuple[str, int]]
    missing_values: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    numbers: NumberFormat | None = None

    def __post_init__(self) -> None:
        self.problems: list[str] = []
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

    def cell(self, column: str, row: int) -> object:
        """Return a row's value, for a message."""
        value = self.table.column(column)[row].as_py()
        return str(value) if not isinstance(value, str | int | float | bool | None) else value


def _without(values: pa.Array, missing: Sequence[str | int | float]) -> pa.Array:
    if is_text(values.type):
        trimmed = pc.replace_substring_regex(pc.utf8_trim_whitespace(values), r"^([+-]?\d+)\.0+$", r"\1")
        words = pa.array([id_text(m) if isinstance(m, float) and m.is_integer() else str(m) for m in missing])
        return pc.if_else(pc.is_in(trimmed, pc.cast(words, trimmed.type)), None, values)
    numbers = [float(m) for m in missing if not isinstance(m, str)]
    if not numbers or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return values
    found = pc.is_in(pc.cast(values, pa.float64(), safe=False), pa.array(numbers, pa.float64()))
    return pc.if_else(found, None, values)


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_null(values: pa.Array) -> Bools:
    missing: Bools = pc.is_null(values).to_numpy(zero_copy_only=False)
    return missing
