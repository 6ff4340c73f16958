"""Numbers and flags: columns as float64 and int8, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fraud.columns.values import NOT_FINITE, flag_of, number_of
from fraud.forms import Value
from training.columns import Reader, is_text
from training.mapping_parts import BooleanColumn, NumericColumn

Floats = NDArray[np.float64]
_DIGITS = r"^-?[0-9]+(\.[0-9]+)?$"
"""Numbers that Arrow reads as Python does, and many times faster."""


def number(reader: Reader, column: str, role: str) -> Floats:
    """Column as float64, NaN where missing; infinite values and text that is no number are refused."""
    values = reader.values(column)
    if pa.types.is_decimal(values.type):
        values = pc.cast(values, pa.large_string())
    if is_text(values.type):
        return _of_text(reader, values, column, role)
    if pa.types.is_temporal(values.type):
        reader.reject(column, role, f"holds times ({values.type}), not numbers")
        return np.full(len(values), np.nan)
    try:
        found = _float64(pc.cast(values, pa.float64(), safe=False))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        reader.reject(column, role, f"holds {values.type} values, not numbers")
        return np.full(len(values), np.nan)
    reader.refuse(column, role, NOT_FINITE, np.isinf(found))
    return found


def _of_text(reader: Reader, values: pa.Array, column: str, role: str) -> Floats:
    text = pc.cast(values, pa.large_string())
    plain = pc.fill_null(pc.match_substring_regex(text, _DIGITS), False)
    if reader.numbers is not None:
        plain = pa.array(np.zeros(len(text), bool))
    found = _float64(pc.cast(pc.if_else(plain, text, None), pa.float64()))
    reader.refuse(column, role, NOT_FINITE, np.isinf(found))
    if not pc.all(plain).as_py():
        results, codes = reader.read_each(
            column, role, pc.if_else(plain, None, text), lambda value: number_of(value, reader.numbers)
        )
        others = np.array([np.nan if result is None else result for result in results])[codes]
        found = np.where(np.isnan(found), others, found)
    return found


def numeric(reader: Reader, column: str, role: str, options: NumericColumn) -> Floats:
    """`number` within the bounds of `options`."""
    before = len(reader.problems)
    found = number(reader, column, role)
    if options.missing == "refuse" and len(reader.problems) == before:
        reader.refuse(column, role, "must not be missing", np.isnan(found), lambda row: "missing")
    if options.minimum is not None:
        reader.refuse(column, role, f"must be {options.minimum:g} or above", found < options.minimum)
    if options.maximum is not None:
        reader.refuse(column, role, f"must be {options.maximum:g} or below", found > options.maximum)
    return found


def flag(
    reader: Reader,
    column: str,
    role: str,
    rule: str,
    positive: Sequence[str] | None = None,
    negative: Sequence[str] | None = None,
) -> NDArray[np.int8]:
    """1, 0, or -1 where missing; `rule` is the message for a row that is not a flag.

    Text may be 1, 0, true, false, t, f, yes, no, y or n in any case, and what `positive` and `negative` list.
    """
    values = reader.values(column)
    if not (is_text(values.type) or pa.types.is_boolean(values.type) or pa.types.is_integer(values.type)):
        found = number(reader, column, role)
        values = pa.array(np.where(np.isinf(found), np.nan, found), from_pandas=True)
    words = [frozenset(word.lower() for word in given or ()) for given in (positive, negative)]

    def read(value: Value) -> bool | None:
        try:
            return flag_of(value, *words)
        except ValueError:
            raise ValueError(rule) from None

    results, codes = reader.read_each(column, role, values, read)
    return np.array([-1 if result is None else result for result in results], np.int8)[codes]


def boolean(reader: Reader, column: str, role: str, options: BooleanColumn) -> pd.arrays.BooleanArray:
    """Nullable booleans."""
    before = len(reader.problems)
    found = flag(reader, column, role, "must be true or false", options.positive, options.negative)
    if options.missing == "refuse" and len(reader.problems) == before:
        reader.refuse(column, role, "must not be missing", found < 0, lambda row: "missing")
    return pd.arrays.BooleanArray(found == 1, found < 0)


def _float64(values: pa.Array) -> Floats:
    return np.asarray(pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)
