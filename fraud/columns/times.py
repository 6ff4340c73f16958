"""How one time of a table's column is read: text of many notations, counts, and local times as instants.

Training reads its files with these functions, and the service the rows that callers send.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from typing import Literal
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
from numpy.typing import NDArray

from fraud.columns.values import NO_NUMBER, NumberForm, number_of
from fraud.forms import Value

UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
END_MS = 7_258_118_400_000
"""2200-01-01: numbers beyond it count something else than their unit says."""
FIRST_YEAR, LAST_YEAR = 1900, 2300
"""Between them every time can be moved between zones; all that count lie well within."""
NO_MONTH = "must be a whole number of months"
MAX_TEXT = 100
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_DAY = timedelta(days=1)
_ISO = re.compile(
    r"([0-9]{4})(-?)([0-9]{2})\2([0-9]{2})"
    r"(?:(?:T|\s+)([0-9]{1,2})(?::?([0-9]{2})(?::?([0-9]{2})(?:[.,]([0-9]+))?)?)?"
    r"\s*(?:(Z)|([+-])([0-9]{2})(?::?([0-9]{2}))?)?)?",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"%[HIMSXcp]")
_LONG_FRACTION = re.compile(r"([.,][0-9]{6})[0-9]+")

Unit = Literal["s", "ms", "m", "h", "d", "month"]


class TimeForm(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a column writes times; without options, as RFC 3339 with a zone.

    Attributes
    ----------
    unit, start_ms
        The column counts such units from a moment, ms since the epoch.
    timezone : str, optional
        IANA name of the zone of times without one.
    format : str, optional
        A pattern of `datetime.strptime` for text that is not ISO 8601.
    ambiguous, nonexistent
        What a local time means that comes twice or never as the clock is moved.
    is_dates : bool
        Whether every time of the column was a date or midnight: each then means the first instant of its day.
    """

    unit: Unit | None = None
    start_ms: int = 0
    timezone: str | None = None
    format: str | None = None
    ambiguous: Literal["refuse", "earlier", "later"] = "refuse"
    nonexistent: Literal["refuse", "shift"] = "refuse"
    is_dates: bool = False

    @property
    def rule(self) -> str:
        """What text must be."""
        return f"must be a time like {self.format}" if self.format else "must be a time such as 2025-01-31T12:30:00Z"

    @property
    def range_rule(self) -> str:
        return f"must be a time from 1970 to 2199{f' with unit: {self.unit}' if self.unit else ''}"


def check_format(pattern: str) -> None:
    """Raise ValueError if a pattern has a directive that `datetime.strptime` does not know."""
    try:
        datetime.strptime("", pattern)
    except ValueError as error:
        if "directive" in str(error) or "stray" in str(error):
            raise ValueError(f"{pattern!r} is no pattern of times: {error}") from None
    except re.error:
        raise ValueError(f"{pattern!r} is no pattern of times: a directive comes twice") from None


def check_form(form: TimeForm) -> None:
    """Raise ValueError if times cannot be read in this form: an unknown zone or pattern, a start out of range."""
    if form.format is not None:
        if len(form.format) > MAX_TEXT:
            raise ValueError(f"a pattern of {len(form.format)} characters")
        check_format(form.format)
    if form.timezone is not None:
        try:
            _zone(form.timezone)
        except (KeyError, ValueError, OSError):  # OSError: the name is a folder of the zone database
            raise ValueError(f"{form.timezone[:MAX_TEXT]!r} is no IANA time zone that this machine knows") from None
    if not -END_MS <= form.start_ms <= END_MS:
        raise ValueError(f"a count from {form.start_ms} ms")


def time_of(value: Value, form: TimeForm, numbers: NumberForm | None = None) -> int | None:
    """Return a time in ms since the epoch, a part of a millisecond dropped; None where there is no value.

    Raises
    ------
    ValueError
        States the rule that the value breaks.

    Examples
    --------
    >>> time_of("31.01.2025 12:30", TimeForm(format="%d.%m.%Y %H:%M", timezone="Europe/Berlin"))
    1738323000000
    """
    if form.unit is not None:
        count = number_of(value, numbers)
        if count is None:
            return None
        if form.unit == "month" and count % 1:
            raise ValueError(NO_MONTH)
        ms = int(counted_ms(np.array([count]), form)[0])
    else:
        if value is None or (isinstance(value, str) and value.strip() in NO_NUMBER):
            return None
        moment, is_date = moment_of(value, form)
        if moment.tzinfo is None:
            if form.timezone is None:
                raise ValueError("must be a time with a zone, such as 2025-01-31T12:30:00Z")
            ms = instant_ms(moment, form, is_date=is_date or form.is_dates)
        elif form.timezone is not None:
            raise ValueError(f"carries its own zone; the times of this column are those of {form.timezone}")
        else:
            ms = since_epoch(moment)
    if not 0 <= ms < END_MS:
        raise ValueError(form.range_rule)
    return ms


def says_instant(value: Value) -> bool:
    """Return whether a value is ISO 8601 with a zone."""
    try:
        return moment_of(value, TimeForm())[0].tzinfo is not None
    except ValueError:
        return False


def counted_ms(counts: NDArray[np.float64], form: TimeForm) -> NDArray[np.float64]:
    """Return counts of a unit as whole ms since the epoch, (n,) float64, NaN where missing.

    Times out of range come back as -1 or `END_MS`.
    """
    if form.unit == "month":
        start = np.datetime64(form.start_ms, "ms")
        months = start.astype("datetime64[M]") + np.nan_to_num(np.clip(counts, -600, 3000)).astype(np.int64)
        ms = (months.astype("datetime64[ms]") + (start - start.astype("datetime64[M]"))).astype(np.float64)
        ms = np.where(np.isnan(counts), np.nan, ms)
    else:
        ms = counts * UNIT_MS[form.unit or "ms"] + form.start_ms
    whole: NDArray[np.float64] = np.rint(np.clip(ms, -1, END_MS))
    return whole


def moment_of(value: Value, form: TimeForm) -> tuple[datetime, bool]:
    """Return what text says, with or without a zone, and whether it is a date without a time of day.

    Raises
    ------
    ValueError
        It is not a time of this form.
    """
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(form.rule)
    text = value.strip()
    try:
        return _iso(text) if form.format is None else _formatted(text, form.format)
    except (ValueError, OverflowError):
        raise ValueError(form.rule) from None


def _iso(text: str) -> tuple[datetime, bool]:
    match = _ISO.fullmatch(text)
    if match is None or text.isdigit():
        raise ValueError(text)
    year, _, month, day, hour, minute, second, fraction, utc, sign, zone_hours, zone_minutes = match.groups()
    date = datetime(int(year), int(month), int(day))
    if hour is None:
        return date, True
    microsecond = int((fraction or "0")[:6].ljust(6, "0"))
    moment = date.replace(hour=int(hour), minute=int(minute or 0), second=int(second or 0), microsecond=microsecond)
    if utc:
        return moment.replace(tzinfo=UTC), False
    if zone_hours is None:
        return moment, False
    offset = timedelta(hours=int(zone_hours), minutes=int(zone_minutes or 0))
    return moment.replace(tzinfo=timezone(-offset if sign == "-" else offset)), False


def _formatted(text: str, pattern: str) -> tuple[datetime, bool]:
    if "%f" in pattern:
        text = _LONG_FRACTION.sub(r"\1", text)
    moment = datetime.strptime(text, pattern)
    if "%Z" in pattern and moment.tzinfo is None:
        if re.search(r"\b(?:UTC|GMT)\b", text, re.IGNORECASE) is None:
            raise ValueError(text)  # %Z knows no other zone but that of this machine
        moment = moment.replace(tzinfo=UTC)
    return moment, _CLOCK.search(pattern) is None


def instant_ms(naive: datetime, form: TimeForm, *, is_date: bool, day_end: bool = False) -> int:
    """Return a local time of the form's zone as ms since the epoch.

    A date is the first instant of its day, whatever the clock does at midnight, or with `day_end` the last one.

    Raises
    ------
    ValueError
        The local time comes twice or never, and the form does not say what it means then.
    """
    zone, naive = _zone(form.timezone or "UTC"), _with_room(naive)
    if is_date:
        day = datetime(naive.year, naive.month, naive.day)
        return _first_instant(day + _DAY, zone) - 1 if day_end else _first_instant(day, zone)
    first, second = naive.replace(tzinfo=zone), naive.replace(tzinfo=zone, fold=1)
    if first.utcoffset() == second.utcoffset():
        return since_epoch(first)
    is_twice = first.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == naive
    if is_twice and form.ambiguous != "refuse":
        return since_epoch(first if form.ambiguous == "earlier" else second)
    if not is_twice and form.nonexistent == "shift":
        return _end_of_gap(naive, zone)
    raise ValueError(one_instant(form))


def _first_instant(midnight: datetime, zone: ZoneInfo) -> int:
    first = midnight.replace(tzinfo=zone)
    exists = first.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == midnight
    return since_epoch(first) if exists else _end_of_gap(midnight, zone)


def _end_of_gap(naive: datetime, zone: ZoneInfo) -> int:
    """Return the instant at which the clock skips a local time: the first one with the later offset."""
    later = naive.replace(tzinfo=zone, fold=1)
    before, after = since_epoch(later), since_epoch(naive.replace(tzinfo=zone))
    offset = (_EPOCH + after * _MILLISECOND).astimezone(zone).utcoffset()
    while after - before > 1:
        middle = (before + after) // 2
        if (_EPOCH + middle * _MILLISECOND).astimezone(zone).utcoffset() == offset:
            after = middle
        else:
            before = middle
    return after


def since_epoch(moment: datetime) -> int:
    """Return ms since the epoch; the difference of two times of one zone would ignore its offsets."""
    return (_with_room(moment).astimezone(UTC) - _EPOCH) // _MILLISECOND


def _with_room(moment: datetime) -> datetime:
    """Return a time that can be moved between zones: one far out of range becomes another that is."""
    if FIRST_YEAR <= moment.year <= LAST_YEAR:
        return moment
    return datetime(FIRST_YEAR if moment.year < FIRST_YEAR else LAST_YEAR, 1, 1, tzinfo=moment.tzinfo)


_zone = cache(ZoneInfo)


def one_instant(form: TimeForm) -> str:
    """Return the rule that local times break which come twice or never."""
    return f"must name one instant of {form.timezone}; as its clock is moved, some hours come twice or never"
