"""The hours that are watched: their place in the week, month's end and holidays."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

HOUR_MS = 3_600_000
WEEK = 168
MUTED_AFTER = 6
"""Hours after a holiday in which nothing is judged: the way back to the usual is no change."""
_SUNDAY = 6


class Hours(NamedTuple):
    """Consecutive hours, UTC, n of them.

    Attributes
    ----------
    of_week : (n,) int64
        0 is Monday's first; a holiday has Sunday's.
    is_month_end : (n,) bool
        The last two days of a month and the first.
    is_holiday, is_muted : (n,) bool
        Listed days; these and the hours after them.
    """

    of_week: Ints
    is_month_end: Bools
    is_holiday: Bools
    is_muted: Bools

    def part(self, start: int, stop: int | None = None) -> Hours:
        return Hours._make(column[start:stop] for column in self)


def hours_from(first: datetime, n: int, holidays: Collection[date] = ()) -> Hours:
    """Return `n` hours from a time on; `holidays` are days, UTC."""
    start = first.astimezone(UTC)
    days = np.arange(start.hour, start.hour + n) // 24
    before = [start.date() + timedelta(days=int(day)) for day in range(-1, int(days[-1]) + 1)]
    weekday = np.array([_SUNDAY if day in holidays else day.weekday() for day in before])
    month_end = np.array([(day + timedelta(days=2)).day <= 3 for day in before])
    holiday = np.array([day in holidays for day in before])
    hour = np.arange(start.hour, start.hour + n) % 24
    at = days + 1
    is_holiday = holiday[at]
    return Hours(
        weekday[at] * 24 + hour,
        month_end[at],
        is_holiday,
        is_holiday | (holiday[at - 1] & (hour < MUTED_AFTER)),
    )
