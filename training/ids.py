"""Ids and categories: columns as canonical text."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from fraud.columns.values import text_of
from fraud.forms import Value
from fraud.schema import MAX_ID_LENGTH
from training.columns import Reader, is_null
from training.mapping_parts import CategoricalColumn, TextColumn

_WHOLE_DIGITS = {16: 11, 32: 24, 64: 53}
"""Bits of a float → the power of two from which on it skips whole numbers."""


def text(reader: Reader, column: str, role: str) -> pa.Array:
    """Column as large_string, null where missing; whole numbers are their digits, as `fraud.columns` reads them."""
    values = reader.values(column)
    if pa.types.is_floating(values.type):
        return _of_floats(reader, values, column, role)
    try:
        found = pc.cast(values, pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        reader.reject(column, role, f"holds {values.type} values, which cannot be read as text")
        return pa.nulls(len(values), pa.large_string())
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        return found
    may_be_number = pc.or_(pc.match_substring(found, "."), pc.match_substring(found, "+"))
    results, codes = reader.read_each(column, role, pc.if_else(may_be_number, found, None), _one_id)
    return pc.coalesce(pa.array(results, pa.large_string()).take(pa.array(codes % len(results))), found)


def _one_id(value: Value) -> str | None:
    try:
        return text_of(value)
    except ValueError:
        raise ValueError(
            "is in scientific notation, which drops digits and makes one of many; write all digits "
            "(in a spreadsheet, format the column as text before saving)"
        ) from None


def _of_floats(reader: Reader, values: pa.Array, column: str, role: str) -> pa.Array:
    values = pc.if_else(pc.is_nan(values), None, values)
    power = _WHOLE_DIGITS[values.type.bit_width]
    large = pc.fill_null(pc.greater_equal(pc.abs(values), 2.0**power), False).to_numpy(zero_copy_only=False)
    if large.any():
        rule = (
            f"holds decimal numbers (float{values.type.bit_width}) at or above 2**{power}, where these skip whole "
            "numbers and make one id of many; store it as text or int64"
        )
        reader.refuse(column, role, rule, large)
        return pa.nulls(len(values), pa.large_string())
    try:
        return pc.cast(pc.cast(values, pa.int64()), pa.large_string())
    except pa.ArrowInvalid:
        reader.reject(column, role, "holds decimal numbers where text or whole numbers belong")
        return pa.nulls(len(values), pa.large_string())


def joined(reader: Reader, spec: TextColumn, role: str) -> str:
    """Return the name of a column that holds the text of `spec`; several columns become one, with a name of its own.

    A missing part is empty; if all are missing, the value is missing.
    """
    if spec.columns is None or spec.name in reader.table.column_names:
        return spec.name
    parts = [text(reader, column, role) for column in spec.columns]
    whole = pc.binary_join_element_wise(
        *(pc.fill_null(part, "") for part in parts), pa.scalar(spec.join, pa.large_string())
    )
    missing = np.logical_and.reduce([is_null(part) for part in parts])
    reader.table = reader.table.append_column(spec.name, pc.if_else(pa.array(missing), None, whole))
    return spec.name


def ids(reader: Reader, spec: TextColumn, role: str) -> tuple[pa.Array, str]:
    """Ids as large_string, each of 1 to 128 characters, and the name of their column."""
    before = len(reader.problems)
    column = joined(reader, spec, role)
    found = text(reader, column, role)
    if len(reader.problems) == before:
        length = pc.fill_null(pc.utf8_length(found), 0).to_numpy(zero_copy_only=False)
        reader.refuse(
            column,
            role,
            f"must be 1 to {MAX_ID_LENGTH} characters",
            (length == 0) | (length > MAX_ID_LENGTH),
            lambda row: f"{length[row]} characters" if length[row] else "empty",
        )
    return found, column


def categorical(reader: Reader, column: str, role: str, options: CategoricalColumn | None = None) -> pd.Categorical:
    """Categories in the order of `options`, else sorted; empty text is missing where that is allowed."""
    options = options or CategoricalColumn(column=column, missing="allowed")
    found_text = text(reader, column, role)
    found_text = pc.if_else(pc.equal(found_text, ""), None, found_text)
    if options.missing == "refuse":
        reader.refuse(column, role, "must not be missing", is_null(found_text), lambda row: "missing")
    found = encode(found_text)
    if options.categories is None:
        return found
    known = list(options.categories)
    position = pd.Index(known).get_indexer(found.categories)
    codes = np.where(found.codes < 0, -1, np.append(position, -1)[found.codes])
    if options.unknown == "refuse":
        unknown = (codes < 0) & (found.codes >= 0)
        reader.refuse(column, role, f"must be one of {', '.join(map(repr, known))}", unknown)
    return pd.Categorical.from_codes(codes, categories=pd.Index(known, dtype="str"))


def encode(found: pa.Array) -> pd.Categorical:
    """Strings as a Categorical with sorted categories, -1 where null."""
    encoded = pc.dictionary_encode(found)
    order = pc.array_sort_indices(encoded.dictionary)
    rank = np.full(len(order) + 1, -1, dtype=np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    codes = rank[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]
    return pd.Categorical.from_codes(codes, categories=pd.Index(encoded.dictionary.take(order).tolist(), dtype="str"))
