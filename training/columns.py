"""From columns as files hold them to checked arrays; every refusal names the column, the rows and the count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fraud.errors import DataError
from training.mapping import BooleanColumn, CategoricalColumn, NumericColumn, TimeColumn

ID_MAX_CHARACTERS = 128
ROWS_SHOWN = 5
MISSING_MS = np.iinfo(np.int64).min
_END_MS = 7_258_118_400_000  # 2200-01-01: numbers beyond it count something else than the mapping says
_ZONE = r"\d{2}:?\d{2}.*([zZ]|[+-]\d{2}(:?\d{2})?)$"
_NO_NUMBER = pa.array(["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "\\N"], pa.large_string())

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass
class Reader:
    """The columns of one table.

    Problems are collected, so that one run over a file tells all of them; `finish` raises them.

    Parameters
    ----------
    source : str
        Name of the file, for messages.
    table : pyarrow.Table
    rows : numpy.ndarray of int64, (n_rows,)
        Where each row of `table` stood in the file; the first row of data is 1.
    """

    source: str
    table: pa.Table
    rows: NDArray[np.int64]

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    def finish(self) -> None:
        """Raise a DataError with every problem found so far, if there is any."""
        if self.problems:
            raise DataError("\n".join(self.problems))

    def refuse(self, column: str, role: str, rule: str, bad: Bools, shown: Callable[[int], str] | None = None) -> None:
        """Note that the rows where `bad` is true break `rule`; `shown` tells what a row holds."""
        where = np.flatnonzero(bad)
        if len(where) == 0:
            return
        show = shown or (lambda row: repr(self._cell(column, row)))
        listed = ", ".join(f"row {self.rows[row]} ({show(int(row))})" for row in where[:ROWS_SHOWN])
        self.problems.append(
            f"{self.source}: column {column!r} ({role}) {rule}; {len(where):,} of {len(bad):,} rows "
            f"{'breaks' if len(where) == 1 else 'break'} this: {listed}{', …' if len(where) > ROWS_SHOWN else ''}"
        )

    def reject(self, column: str, role: str, rule: str) -> None:
        """Note a problem of the whole column."""
        self.problems.append(f"{self.source}: column {column!r} ({role}) {rule}")

    def text(self, column: str, role: str) -> pa.Array:
        """Column as large_string, null where missing; whole numbers lose a decimal point (``5411.0`` is ``5411``)."""
        values = self._values(column)
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_nan(values), None, values)
            try:
                values = pc.cast(values, pa.int64())
            except pa.ArrowInvalid:
                self.reject(column, role, "holds decimal numbers where text or whole numbers belong")
        try:
            return pc.cast(values, pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            self.reject(column, role, f"holds {values.type} values, which cannot be read as text")
            return pa.nulls(len(values), pa.large_string())

    def ids(self, column: str, role: str) -> pa.Array:
        """Ids as large_string, each of 1 to 128 characters."""
        before = len(self.problems)
        text = self.text(column, role)
        if len(self.problems) == before:
            length = pc.fill_null(pc.utf8_length(text), 0).to_numpy(zero_copy_only=False)
            self.refuse(
                column,
                role,
                f"must be 1 to {ID_MAX_CHARACTERS} characters",
                (length == 0) | (length > ID_MAX_CHARACTERS),
                lambda row: f"{length[row]} characters" if length[row] else "empty",
            )
        return text

    def categorical(self, column: str, role: str, options: CategoricalColumn | None = None) -> pd.Categorical:
        """Categories in the order of `options`, else sorted; empty text is missing where that is allowed."""
        options = options or CategoricalColumn(column=column, missing="allowed")
        text = self.text(column, role)
        text = pc.if_else(pc.equal(text, ""), None, text)
        if options.missing == "refuse":
            self.refuse(column, role, "must not be missing", self._null(text), lambda row: "missing")
        found = encode(text)
        if options.categories is None:
            return found
        known = list(options.categories)
        position = pd.Index(known).get_indexer(found.categories)
        codes = np.where(found.codes < 0, -1, np.append(position, -1)[found.codes])
        if options.unknown == "refuse":
            unknown = (codes < 0) & (found.codes >= 0)
            self.refuse(column, role, f"must be one of {', '.join(map(repr, known))}", unknown)
        return pd.Categorical.from_codes(codes, categories=pd.Index(known, dtype="str"))

    def number(self, column: str, role: str) -> Floats:
        """Column as float64, NaN where missing; infinite values and text that is no number are refused."""
        values = self._values(column)
        if is_text(values.type):
            text = pc.utf8_trim_whitespace(pc.cast(values, pa.large_string()))
            text = pc.if_else(pc.is_in(text, _NO_NUMBER), None, text)
            try:
                number = _float64(pc.cast(text, pa.float64()))
            except pa.ArrowInvalid:
                as_text = text.to_pandas()
                number = pd.to_numeric(as_text, errors="coerce").to_numpy(dtype=np.float64)
                self.refuse(column, role, "must be a number", np.isnan(number) & ~self._null(text))
        elif pa.types.is_temporal(values.type):
            self.reject(column, role, f"holds times ({values.type}), not numbers")
            number = np.full(len(values), np.nan)
        else:
            try:
                number = _float64(pc.cast(values, pa.float64(), safe=False))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                self.reject(column, role, f"holds {values.type} values, not numbers")
                number = np.full(len(values), np.nan)
        self.refuse(column, role, "must be finite", np.isinf(number))
        return number

    def numeric(self, column: str, role: str, options: NumericColumn) -> Floats:
        """`number` within the bounds of `options`."""
        before = len(self.problems)
        number = self.number(column, role)
        if options.missing == "refuse" and len(self.problems) == before:
            self.refuse(column, role, "must not be missing", np.isnan(number), lambda row: "missing")
        if options.minimum is not None:
            self.refuse(column, role, f"must be {options.minimum:g} or above", number < options.minimum)
        if options.maximum is not None:
            self.refuse(column, role, f"must be {options.maximum:g} or below", number > options.maximum)
        return number

    def flag(self, column: str, role: str, rule: str) -> NDArray[np.int8]:
        """1, 0, or -1 where missing; `rule` says what a row must be that is none of 0, 1, true and false."""
        values = self._values(column)
        if is_text(values.type):
            text = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(values, pa.large_string())))
            words = pa.array(["true", "t", "1", "1.0", "false", "f", "0", "0.0"], pa.large_string())
            word = pc.index_in(text, words)
            missing = pc.or_kleene(pc.is_null(text), pc.is_in(text, pc.utf8_lower(_NO_NUMBER)))
            position = pc.fill_null(word, -1).to_numpy(zero_copy_only=False)
            found = np.where(position < 0, -1, (position < 4).astype(np.int8)).astype(np.int8)
            self.refuse(column, role, rule, (found < 0) & ~missing.to_numpy(zero_copy_only=False))
            return found
        number = self.number(column, role)
        self.refuse(column, role, rule, np.isfinite(number) & (number != 0) & (number != 1))
        return np.where(np.isnan(number), -1, number == 1).astype(np.int8)

    def boolean(self, column: str, role: str, options: BooleanColumn) -> pd.arrays.BooleanArray:
        """Nullable booleans."""
        before = len(self.problems)
        found = self.flag(column, role, "must be true or false")
        if options.missing == "refuse" and len(self.problems) == before:
            self.refuse(column, role, "must not be missing", found < 0, lambda row: "missing")
        return pd.arrays.BooleanArray(found == 1, found < 0)

    def time_ms(self, spec: TimeColumn, role: str, missing: bool = False) -> NDArray[np.int64]:
        """Milliseconds since the epoch, int64; `missing` allows empty rows, which come back as -2**63."""
        column, before = spec.column, len(self.problems)
        values = self._values(column)
        if spec.unit is not None:
            times = self._epoch_ms(values, spec, role)
        elif pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
            times = self._stamps_ms(values, spec, role)
        elif is_text(values.type):
            times = self._parsed_ms(pc.utf8_trim_whitespace(pc.cast(values, pa.large_string())), spec, role)
        else:
            self.reject(column, role, _needs_unit(column))
            times = np.zeros(len(values), dtype=np.int64)
        if len(self.problems) == before:
            rule = f"must be a time from 1970 to 2199{f' with unit: {spec.unit}' if spec.unit else ''}"
            self.refuse(column, role, rule, (times != MISSING_MS) & ((times < 0) | (times >= _END_MS)))
            if not missing:
                self.refuse(column, role, "must not be missing", times == MISSING_MS, lambda row: "missing")
        return times

    def _epoch_ms(self, values: pa.Array, spec: TimeColumn, role: str) -> NDArray[np.int64]:
        if pa.types.is_temporal(values.type):
            self.reject(spec.column, role, f"holds times ({values.type}), not epoch numbers; remove unit: {spec.unit}")
            return np.zeros(len(values), dtype=np.int64)
        milliseconds = self.number(spec.column, role) * (1_000 if spec.unit == "s" else 1)
        whole = np.rint(np.clip(milliseconds, -1, _END_MS))
        return np.where(np.isnan(whole), MISSING_MS, np.nan_to_num(whole).astype(np.int64))

    def _stamps_ms(self, values: pa.Array, spec: TimeColumn, role: str) -> NDArray[np.int64]:
        zone = values.type.tz if pa.types.is_timestamp(values.type) else None
        series = pd.Series(pc.cast(values, pa.timestamp("us", tz=zone), safe=False).to_pandas())
        if zone is None:
            return self._localized_ms(series, spec, role)
        if spec.timezone is not None:
            self.reject(spec.column, role, f"carries its own zone; remove timezone: {spec.timezone}")
        return _to_ms(series)

    def _parsed_ms(self, text: pa.Array, spec: TimeColumn, role: str) -> NDArray[np.int64]:
        column = spec.column
        text = pc.if_else(pc.is_in(text, _NO_NUMBER), None, text)
        given = ~self._null(text)
        if spec.format is None and given.any():
            numbers = pc.match_substring_regex(text, r"^\d{8,}(\.\d+)?$")
            if pc.all(numbers).as_py():
                self.reject(column, role, _needs_unit(column))
                return np.zeros(len(text), dtype=np.int64)
        if spec.format is not None:
            zoned = given & ("%z" in spec.format or "%Z" in spec.format)
        else:
            zoned = pc.fill_null(pc.match_substring_regex(text, _ZONE), False).to_numpy(zero_copy_only=False)
        naive = given & ~zoned
        if zoned.any() and naive.any():
            self.refuse(column, role, "mixes times with a zone and times without one; it must hold one kind", naive)
            return np.zeros(len(text), dtype=np.int64)
        series = self._stamps(text, spec, zoned=bool(zoned.any()))
        what = f"must be a time like {spec.format}" if spec.format else "must be a time such as 2025-01-31T12:30:00Z"
        self.refuse(column, role, what, series.isna().to_numpy() & given)
        if not zoned.any():
            return self._localized_ms(series, spec, role)
        if spec.timezone is not None:
            self.reject(column, role, f"carries its own zone; remove timezone: {spec.timezone}")
        return _to_ms(series)

    def _stamps(self, text: pa.Array, spec: TimeColumn, zoned: bool) -> pd.Series[Any]:
        """Timestamps, NaT where `text` is no time; arrow reads well-formed ISO 8601 many times faster than pandas."""
        if spec.format is None:
            try:
                stamps = pc.cast(text, pa.timestamp("ns", tz="UTC" if zoned else None))
                return pd.Series(stamps.to_pandas())
            except pa.ArrowInvalid:
                pass
        strings: pd.Series[str] = text.to_pandas()
        return pd.to_datetime(strings, format=spec.format or "ISO8601", utc=zoned, errors="coerce")

    def _localized_ms(self, naive: pd.Series[Any], spec: TimeColumn, role: str) -> NDArray[np.int64]:
        given = naive.notna().to_numpy()
        if spec.timezone is None:
            where = f"say where the clock stood: {{column: {spec.column}, timezone: UTC}}"
            self.refuse(spec.column, role, f"has times without a zone; {where}", given)
            return np.full(len(naive), MISSING_MS)
        zoned = naive.dt.tz_localize(spec.timezone, ambiguous="NaT", nonexistent="NaT")
        rule = f"must name one instant of {spec.timezone}; as its clock is moved, some hours come twice or never"
        self.refuse(spec.column, role, rule, zoned.isna().to_numpy() & given)
        return _to_ms(zoned)

    def _values(self, column: str) -> pa.Array:
        values = self.table.column(column).combine_chunks()
        if pa.types.is_dictionary(values.type):
            return values.dictionary_decode()
        return pc.cast(values, pa.large_string()) if pa.types.is_null(values.type) else values

    def _cell(self, column: str, row: int) -> object:
        value = self.table.column(column)[row].as_py()
        return str(value) if not isinstance(value, (str, int, float, bool, type(None))) else value

    @staticmethod
    def _null(values: pa.Array) -> Bools:
        missing: Bools = pc.is_null(values).to_numpy(zero_copy_only=False)
        return missing


def encode(text: pa.Array) -> pd.Categorical:
    """Strings as a Categorical with sorted categories, -1 where null."""
    encoded = pc.dictionary_encode(text)
    order = pc.array_sort_indices(encoded.dictionary)
    rank = np.full(len(order) + 1, -1, dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    codes = rank[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]
    return pd.Categorical.from_codes(codes, categories=pd.Index(encoded.dictionary.take(order).tolist(), dtype="str"))


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _needs_unit(column: str) -> str:
    return f"holds numbers; say what they count since the epoch: {{column: {column}, unit: s}} or unit: ms"


def _float64(values: pa.Array) -> Floats:
    return np.asarray(pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)


def _to_ms(series: pd.Series[Any]) -> NDArray[np.int64]:
    """Whole milliseconds, a part of one dropped; -2**63 for NaT."""
    utc = series.dt.tz_convert("UTC").dt.tz_localize(None)
    stamps = utc.to_numpy().astype("datetime64[us]").astype(np.int64)
    return np.where(stamps == MISSING_MS, MISSING_MS, stamps // 1_000)
