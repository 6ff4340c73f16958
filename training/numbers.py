"""Numbers and flags: columns as float64 and int8, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from training.columns import NO_NUMBER, Reader, is_null, is_text
from training.mapping_parts import BooleanColumn, NumberFormat, NumericColumn

Floats = NDArray[np.float64]
_POSITIVE = ("true", "t", "1", "1.0", "yes", "y")
_NEGATIVE = ("false", "f", "0", "0.0", "no", "n")


def number(reader: Reader, column: str, role: str) -> Floats:
    """Column as float64, NaN where missing; infinite values and text that is no number are refused."""
    values = reader.values(column)
    if is_text(values.type):
        text = pc.utf8_trim_whitespace(pc.cast(values, pa.large_string()))
        text = pc.if_else(pc.is_in(text, NO_NUMBER), None, text)
        plain = text if reader.numbers is None else _plain(text, reader.numbers)
        try:
            found = _float64(pc.cast(plain, pa.float64()))
        except pa.ArrowInvalid:
            found = pd.to_numeric(plain.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
            rule = "must be a number" + ("" if reader.numbers is None else f" such as {_example(reader.numbers)}")
            reader.refuse(column, role, rule, np.isnan(found) & ~is_null(text))
    elif pa.types.is_temporal(values.type):
        reader.reject(column, role, f"holds times ({values.type}), not numbers")
        found = np.full(len(values), np.nan)
    else:
        try:
            found = _float64(pc.cast(values, pa.float64(), safe=False))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            reader.reject(column, role, f"holds {values.type} values, not numbers")
            found = np.full(len(values), np.nan)
    reader.refuse(column, role, "must be finite", np.isinf(found))
    return found


def _plain(text: pa.Array, form: NumberFormat) -> pa.Array:
    """Rewrite formatted numbers as plain digits with a decimal point; text in another format becomes invalid."""
    decimal, thousands = re.escape(form.decimal), re.escape(form.thousands or "")
    grouped = rf"\d{{1,3}}(?:{thousands}\d{{3}})+|" if form.thousands else ""
    sign = rf"(?:{re.escape(form.sign)})?" if form.sign else ""
    pattern = rf"^[+-]?\s*{sign}\s*[+-]?(?:{grouped}\d+)?(?:{decimal}\d+)?(?:[eE][+-]?\d+)?\s*{sign}$"
    fits = pc.match_substring_regex(text, pattern)
    if form.sign:
        text = pc.replace_substring(text, form.sign, "")
    text = pc.replace_substring_regex(text, r"\s", "")
    if form.thousands:
        text = pc.replace_substring(text, form.thousands, "")
    return pc.if_else(fits, pc.replace_substring(text, form.decimal, "."), "no number")


def _example(form: NumberFormat) -> str:
    return f"{form.sign or ''}1{form.thousands or ''}234{form.decimal}56"


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
    if is_text(values.type):
        text = pc.utf8_lower(pc.utf8_trim_whitespace(pc.cast(values, pa.large_string())))
        true = [*_POSITIVE, *(word.lower() for word in positive or ())]
        false = [*_NEGATIVE, *(word.lower() for word in negative or ())]
        word = pc.index_in(text, pa.array([*true, *false], pa.large_string()))
        missing = pc.or_kleene(pc.is_null(text), pc.is_in(text, pc.utf8_lower(NO_NUMBER)))
        position = pc.fill_null(word, -1).to_numpy(zero_copy_only=False)
        found = np.where(position < 0, -1, (position < len(true)).astype(np.int8)).astype(np.int8)
        reader.refuse(column, role, rule, (found < 0) & ~missing.to_numpy(zero_copy_only=False))
        return found
    numbers = number(reader, column, role)
    reader.refuse(column, role, rule, np.isfinite(numbers) & (numbers != 0) & (numbers != 1))
    return np.where(np.isnan(numbers), -1, numbers == 1).astype(np.int8)


def boolean(reader: Reader, column: str, role: str, options: BooleanColumn) -> pd.arrays.BooleanArray:
    """Nullable booleans."""
    before = len(reader.problems)
    found = flag(reader, column, role, "must be true or false", options.positive, options.negative)
    if options.missing == "refuse" and len(reader.problems) == before:
        reader.refuse(column, role, "must not be missing", found < 0, lambda row: "missing")
    return pd.arrays.BooleanArray(found == 1, found < 0)


def _float64(values: pa.Array) -> Floats:
    return np.asarray(pc.fill_null(values, np.nan).to_numpy(zero_copy_only=False), dtype=np.float64)
