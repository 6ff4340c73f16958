"""Times: columns of many notations as milliseconds since the epoch."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fraud.columns.times import END_MS, NO_MONTH, counted_ms, instant_ms, moment_of, since_epoch
from training import ids, numbers
from training.columns import NO_NUMBER, Reader, is_text
from training.mapping_parts import TextColumn, TimeColumn

MISSING_MS = np.iinfo(np.int64).min
_EARLY_MS = 315_532_800_000  # 1980-01-01: a table that is older as a whole is read in a wrong unit
_INSTANT = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$"
"""RFC 3339 as Arrow reads it, many times faster than Python, and alike."""
_EPOCH = datetime(1970, 1, 1)
Milliseconds = NDArray[np.int64]
Said = tuple[datetime, bool]
"""A time as text says it, and whether it is a date."""


def time_ms(
    reader: Reader, spec: TimeColumn, role: str, *, missing: bool = False, day_end: bool = False
) -> Milliseconds:
    """Milliseconds since the epoch, int64.

    Parameters
    ----------
    reader : Reader
    spec : TimeColumn
    role : str
    missing : bool
        Whether rows may be empty; they come back as `MISSING_MS`.
    day_end : bool
        Whether a date without a time of day means its last millisecond, rather than its first. A column of times
        without a zone that are all midnight is one of dates.
    """
    before = len(reader.problems)
    column = ids.joined(reader, TextColumn(columns=spec.columns, join=" "), role) if spec.columns else spec.name
    values = reader.values(column)
    if spec.unit is not None:
        times = _counted_ms(reader, values, spec, role)
    elif pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
        times = _stamps_ms(reader, values, spec, role, day_end)
    elif is_text(values.type):
        text = pc.utf8_trim_whitespace(pc.cast(values, pa.large_string()))
        times = _parsed_ms(reader, pc.if_else(pc.is_in(text, NO_NUMBER), None, text), spec, role, day_end)
    else:
        reader.reject(column, role, _needs_unit(column))
        times = np.zeros(len(values), dtype=np.int64)
    if len(reader.problems) == before:
        given = times != MISSING_MS
        reader.refuse(column, role, spec.form().range_rule, given & ((times < 0) | (times >= END_MS)))
        if not missing:
            reader.refuse(column, role, "must not be missing", ~given, lambda row: "missing")
        if given.any() and (times[given] < _EARLY_MS).all() and len(reader.problems) == before:
            reader.reject(column, role, _too_early(spec, int(times[given].max())))
    return times


def _counted_ms(reader: Reader, values: pa.Array, spec: TimeColumn, role: str) -> Milliseconds:
    if pa.types.is_temporal(values.type):
        reader.reject(spec.name, role, f"holds times ({values.type}), not epoch numbers; remove unit: {spec.unit}")
        return np.zeros(len(values), dtype=np.int64)
    count = numbers.number(reader, spec.name, role)
    if spec.unit == "month":
        reader.refuse(spec.name, role, NO_MONTH, np.isfinite(count) & (count % 1 != 0))
    milliseconds = counted_ms(count, spec.form())
    return np.where(np.isnan(milliseconds), MISSING_MS, np.nan_to_num(milliseconds).astype(np.int64))


def _stamps_ms(reader: Reader, values: pa.Array, spec: TimeColumn, role: str, day_end: bool) -> Milliseconds:
    """Times of Parquet: instants where they carry a zone, otherwise local times."""
    zone = values.type.tz if pa.types.is_timestamp(values.type) else None
    stamps = pc.cast(values, pa.timestamp("us", tz=zone), safe=False)
    microseconds = pc.cast(stamps, pa.int64())
    if zone is None:
        is_date = pa.types.is_date(values.type)
        results: list[Said | None] = []
        distinct = microseconds.dictionary_encode()
        for value in distinct.dictionary.to_pylist():
            results.append((_EPOCH + timedelta(microseconds=value), is_date))
        codes = pc.fill_null(distinct.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return _localized_ms(reader, [*results, None], codes, spec, role, day_end)
    if spec.timezone is not None:
        reader.reject(spec.name, role, f"carries its own zone; remove timezone: {spec.timezone}")
    return _whole_ms(microseconds)


def _parsed_ms(reader: Reader, text: pa.Array, spec: TimeColumn, role: str, day_end: bool) -> Milliseconds:
    column = spec.name
    if spec.format is None and text.null_count < len(text):
        if pc.all(pc.match_substring_regex(text, r"^[0-9]+(\.[0-9]+)?$")).as_py():
            reader.reject(column, role, _needs_unit(column))
            return np.zeros(len(text), dtype=np.int64)
        if spec.timezone is None and pc.all(pc.match_substring_regex(text, _INSTANT)).as_py():
            try:
                return _whole_ms(pc.cast(pc.cast(text, pa.timestamp("us", tz="UTC")), pa.int64()))
            except pa.ArrowInvalid:
                pass  # read value by value below, which says which is none
    form = spec.form()
    results, codes = reader.read_each(column, role, text, lambda value: moment_of(value, form))
    is_zoned = np.array([said is not None and said[0].tzinfo is not None for said in results])[codes]
    is_naive = np.array([said is not None and said[0].tzinfo is None for said in results])[codes]
    if is_zoned.any() and is_naive.any():
        reader.refuse(column, role, "mixes times with a zone and times without one; it must hold one kind", is_naive)
        return np.zeros(len(text), dtype=np.int64)
    if not is_zoned.any():
        return _localized_ms(reader, results, codes, spec, role, day_end)
    if spec.timezone is not None:
        reader.reject(column, role, f"carries its own zone; remove timezone: {spec.timezone}")
    return np.array([MISSING_MS if said is None else since_epoch(said[0]) for said in results])[codes]


def _localized_ms(
    reader: Reader,
    results: list[Said | None],
    codes: NDArray[np.int64],
    spec: TimeColumn,
    role: str,
    day_end: bool,
) -> Milliseconds:
    """Local times as instants."""
    said = [one for one in results if one is not None]
    if said and all(is_date or naive.time() == datetime.min.time() for naive, is_date in said):
        reader.dates.add(role)
    if spec.timezone is None:
        given = np.array([one is not None for one in results])[codes]
        where = f"say where the clock stood: {{column: {spec.name}, timezone: UTC}}"
        reader.refuse(spec.name, role, f"has times without a zone; {where}", given)
        return np.full(len(codes), MISSING_MS)
    form = spec.form(is_dates=role in reader.dates)
    instants: list[int] = []
    broken: dict[str, list[int]] = {}
    for i, one in enumerate(results):
        instants.append(MISSING_MS)
        if one is not None:
            try:
                instants[i] = instant_ms(one[0], form, is_date=one[1] or form.is_dates, day_end=day_end)
            except ValueError as error:
                broken.setdefault(str(error), []).append(i)
    for rule, bad in broken.items():
        reader.refuse(spec.name, role, rule, np.isin(codes, bad))
    return np.array(instants)[codes]


def _needs_unit(column: str) -> str:
    return f"holds numbers; say what they count since the epoch: {{column: {column}, unit: s}} or unit: ms"


def _too_early(spec: TimeColumn, latest_ms: int) -> str:
    latest = np.datetime_as_string(np.datetime64(latest_ms, "ms"), unit="s")
    found = f"lies before 1980 in every row (the latest is {latest}Z)"
    if spec.unit is None:
        return f"{found}: these times were made from numbers in a wrong unit"
    return (
        f"{found}: it counts no {spec.unit} since 1970; write the unit that it counts, and where it counts from "
        f"another moment, that: {{column: {spec.name}, unit: h, start: 2025-01-31}}"
    )


def _whole_ms(microseconds: pa.Array) -> Milliseconds:
    """Whole milliseconds, a part of one dropped; `MISSING_MS` where null."""
    stamps = pc.fill_null(microseconds, MISSING_MS).to_numpy(zero_copy_only=False)
    return np.where(stamps == MISSING_MS, MISSING_MS, stamps // 1_000)
