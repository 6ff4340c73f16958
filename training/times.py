"""Times: columns of many notations as milliseconds since the epoch."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from training import ids, numbers
from training.columns import NO_NUMBER, Bools, Reader, is_null, is_text
from training.mapping_parts import TextColumn, TimeColumn

MISSING_MS = np.iinfo(np.int64).min
_EARLY_MS = 315_532_800_000  # 1980-01-01: a table that is older as a whole is read in a wrong unit
_END_MS = 7_258_118_400_000  # 2200-01-01: numbers beyond it count something else than the mapping says
_ZONE = r"[Tt\s]\d{1,2}(:?\d{2}){0,2}([.,]\d+)?\s*([zZ]|[+-]\d{2}(:?\d{2})?)$"
_DATE = r"^\d{4}-\d{2}-\d{2}$"
_CLOCK = re.compile(r"%[HIMSXcTRrs]")
_DAY_US = 86_400_000_000


def time_ms(
    reader: Reader, spec: TimeColumn, role: str, *, missing: bool = False, day_end: bool = False
) -> NDArray[np.int64]:
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
        rule = f"must be a time from 1970 to 2199{f' with unit: {spec.unit}' if spec.unit else ''}"
        reader.refuse(column, role, rule, given & ((times < 0) | (times >= _END_MS)))
        if not missing:
            reader.refuse(column, role, "must not be missing", ~given, lambda row: "missing")
        if given.any() and (times[given] < _EARLY_MS).all() and len(reader.problems) == before:
            reader.reject(column, role, _too_early(spec, int(times[given].max())))
    return times


def _counted_ms(reader: Reader, values: pa.Array, spec: TimeColumn, role: str) -> NDArray[np.int64]:
    if pa.types.is_temporal(values.type):
        reader.reject(spec.name, role, f"holds times ({values.type}), not epoch numbers; remove unit: {spec.unit}")
        return np.zeros(len(values), dtype=np.int64)
    count = numbers.number(reader, spec.name, role)
    if spec.unit == "month":
        reader.refuse(spec.name, role, "must be a whole number of months", np.isfinite(count) & (count % 1 != 0))
        start = np.datetime64(spec.start_ms, "ms")
        months = start.astype("datetime64[M]") + np.nan_to_num(np.clip(count, -600, 3000)).astype(np.int64)
        milliseconds = (months.astype("datetime64[ms]") + (start - start.astype("datetime64[M]"))).astype(np.float64)
        milliseconds = np.where(np.isnan(count), np.nan, milliseconds)
    else:
        milliseconds = count * spec.unit_ms + spec.start_ms
    whole = np.rint(np.clip(milliseconds, -1, _END_MS))
    return np.where(np.isnan(whole), MISSING_MS, np.nan_to_num(whole).astype(np.int64))


def _stamps_ms(reader: Reader, values: pa.Array, spec: TimeColumn, role: str, day_end: bool) -> NDArray[np.int64]:
    zone = values.type.tz if pa.types.is_timestamp(values.type) else None
    series = pd.Series(pc.cast(values, pa.timestamp("us", tz=zone), safe=False).to_pandas())
    if zone is None:
        dates = np.full(len(series), pa.types.is_date(values.type))
        return _localized_ms(reader, series, spec, role, dates, day_end)
    if spec.timezone is not None:
        reader.reject(spec.name, role, f"carries its own zone; remove timezone: {spec.timezone}")
    return _to_ms(series)


def _parsed_ms(reader: Reader, text: pa.Array, spec: TimeColumn, role: str, day_end: bool) -> NDArray[np.int64]:
    column = spec.name
    given = ~is_null(text)
    if spec.format is None and given.any() and pc.all(pc.match_substring_regex(text, r"^\d+(\.\d+)?$")).as_py():
        reader.reject(column, role, _needs_unit(column))
        return np.zeros(len(text), dtype=np.int64)
    if spec.format is not None:
        zoned = given & ("%z" in spec.format or "%Z" in spec.format)
        dates = given & (_CLOCK.search(spec.format) is None)
    else:
        zoned = _matches(text, _ZONE)
        dates = _matches(text, _DATE)
    naive = given & ~zoned
    if zoned.any() and naive.any():
        reader.refuse(column, role, "mixes times with a zone and times without one; it must hold one kind", naive)
        return np.zeros(len(text), dtype=np.int64)
    series = _stamps(text, spec, zoned=bool(zoned.any()))
    what = f"must be a time like {spec.format}" if spec.format else "must be a time such as 2025-01-31T12:30:00Z"
    reader.refuse(column, role, what, series.isna().to_numpy() & given)
    if not zoned.any():
        return _localized_ms(reader, series, spec, role, dates, day_end)
    if spec.timezone is not None:
        reader.reject(column, role, f"carries its own zone; remove timezone: {spec.timezone}")
    return _to_ms(series)


def _stamps(text: pa.Array, spec: TimeColumn, zoned: bool) -> pd.Series[Any]:
    """Timestamps, NaT where `text` is not a time; Arrow reads well-formed ISO 8601 many times faster than pandas."""
    if spec.format is None:
        try:
            stamps = pc.cast(text, pa.timestamp("ns", tz="UTC" if zoned else None))
            return pd.Series(stamps.to_pandas())
        except pa.ArrowInvalid:
            pass
    strings: pd.Series[str] = text.to_pandas()
    return pd.to_datetime(strings, format=spec.format or "ISO8601", utc=zoned, errors="coerce")


def _localized_ms(
    reader: Reader, naive: pd.Series[Any], spec: TimeColumn, role: str, dates: Bools, day_end: bool
) -> NDArray[np.int64]:
    """Local times as instants; `dates` marks the rows that name a whole day."""
    given = naive.notna().to_numpy()
    at_midnight = naive.to_numpy().astype("datetime64[us]").astype(np.int64) % _DAY_US == 0
    dates = given & (dates | at_midnight[given].all())
    if spec.timezone is None:
        where = f"say where the clock stood: {{column: {spec.name}, timezone: UTC}}"
        reader.refuse(spec.name, role, f"has times without a zone; {where}", given)
        return np.full(len(naive), MISSING_MS)
    zoned = naive.dt.tz_localize(
        spec.timezone,
        ambiguous="NaT" if spec.ambiguous == "refuse" else np.full(len(naive), spec.ambiguous == "earlier"),
        nonexistent="NaT" if spec.nonexistent == "refuse" else "shift_forward",
    )
    if dates.any():  # a day begins at its first instant, whatever the clock does at midnight
        days = (naive + pd.Timedelta(days=1)) if day_end else naive
        first = days.dt.tz_localize(spec.timezone, ambiguous=np.full(len(naive), True), nonexistent="shift_forward")
        zoned = zoned.where(~dates, first - pd.Timedelta(milliseconds=1) if day_end else first)
    rule = f"must name one instant of {spec.timezone}; as its clock is moved, some hours come twice or never"
    reader.refuse(spec.name, role, rule, zoned.isna().to_numpy() & given)
    return _to_ms(zoned)


def _matches(text: pa.Array, pattern: str) -> Bools:
    found: Bools = pc.fill_null(pc.match_substring_regex(text, pattern), False).to_numpy(zero_copy_only=False)
    return found


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


def _to_ms(series: pd.Series[Any]) -> NDArray[np.int64]:
    """Whole milliseconds, a part of one dropped; -2**63 for NaT."""
    utc = series.dt.tz_convert("UTC").dt.tz_localize(None)
    stamps = utc.to_numpy().astype("datetime64[us]").astype(np.int64)
    return np.where(stamps == MISSING_MS, MISSING_MS, stamps // 1_000)
