"""What the drift tests say of a model's traffic: events, and the state of each channel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import date, timedelta

import msgspec
import numpy as np

from fraud.errors import DataError
from fraud.monitoring.counts import MISSING, Counts, Layout, Series, psi
from fraud.monitoring.fitting import LEAST_WEEKS, fit_channels
from fraud.monitoring.hours import WEEK, hours_from
from fraud.monitoring.sequential import REFERENCE_WEEKS, Watched, events_of, new_state, watch

WAS_SHORT = "the reference has {} weeks; the rate of false alarms was measured with {}: no promise is made yet"


class DriftEvent(msgspec.Struct, frozen=True):
    """Alarms within 24 hours of each other.

    Attributes
    ----------
    first, last : str
        The hours in which they were raised, ISO 8601, UTC.
    channels : list of str
        What changed, the strongest first.
    tests : list of str
        ``fast``, ``slow`` or both.
    """

    first: str
    last: str
    channels: list[str]
    tests: list[str]


class Drift(msgspec.Struct, frozen=True):
    """Drift of one model's traffic.

    Attributes
    ----------
    reference_from, watched_from, until : str
        ISO 8601, UTC.
    is_provisional : bool
        Whether the reference is too short for the promise of one false alarm a quarter.
    events : list of DriftEvent
    channels : int
    not_watched : list of str
        Channels that the reference says too little of, or that are constant there.
    psi : dict of str to float
        Of the last seven days against the reference, with missing values as one bin. Shown only: it raises no alarm.
    remarks : list of str
    """

    reference_from: str
    watched_from: str
    until: str
    is_provisional: bool
    events: list[DriftEvent]
    channels: int
    not_watched: list[str]
    psi: dict[str, float]
    remarks: list[str]


def reference_weeks_of(first_hour: int, until_hour: int) -> int:
    """Return how many weeks are the reference: the first 26, or fewer of a short record, of which one is watched.

    Raises
    ------
    DataError
        There are not even five weeks.
    """
    weeks = (until_hour - ((first_hour - 96 + WEEK - 1) // WEEK * WEEK + 96)) // WEEK
    if weeks <= LEAST_WEEKS:
        raise DataError(
            f"{max(0, weeks)} whole weeks of decisions are counted; at least {LEAST_WEEKS + 1} are needed: "
            f"{LEAST_WEEKS} as reference and one to watch"
        )
    return min(REFERENCE_WEEKS, weeks - 1)


def judge(
    layout: Layout, counts: Mapping[int, Counts], series: Series, reference_weeks: int, holidays: Collection[date]
) -> Drift:
    """Return what the tests say of a series whose first weeks are the reference."""
    n_hours = series.y.shape[1]
    start = reference_weeks * WEEK
    hours = hours_from(series.first, n_hours, holidays)
    channels = fit_channels(series.y[:, :start], series.n[:, :start], hours.part(0, start), series.kinds)
    watched = watch(channels, new_state(channels), series.y[:, start:], series.n[:, start:], hours.part(start))
    remarks = []
    if reference_weeks < REFERENCE_WEEKS:
        remarks.append(WAS_SHORT.format(reference_weeks, REFERENCE_WEEKS))
    if not holidays:
        remarks.append("no holidays are listed: a holiday will look like drift; give them with --holidays")
    empty = int((series.n[0, start:] == 0).sum())
    if empty:
        remarks.append(f"{empty} of the watched hours had no decisions and were not judged")
    return Drift(
        _time(series, 0),
        _time(series, start),
        _time(series, n_hours),
        reference_weeks < REFERENCE_WEEKS,
        [_event(series, watched, start, *event) for event in events_of(watched)],
        len(series.names),
        [name for name, is_watched in zip(series.names, channels.is_watched, strict=True) if not is_watched],
        _psi(layout, counts, series, start),
        remarks,
    )


def _event(series: Series, watched: Watched, start: int, first: int, last: int, channels: list[int]) -> DriftEvent:
    tests = {name for name, strength in watched._asdict().items() if (strength[channels, first : last + 1] >= 0).any()}
    begun, ended = _time(series, start + first), _time(series, start + last)
    return DriftEvent(begun, ended, [series.names[c] for c in channels], sorted(tests))


def _time(series: Series, hour: int) -> str:
    return (series.first + timedelta(hours=hour)).isoformat(timespec="minutes")


def _psi(layout: Layout, counts: Mapping[int, Counts], series: Series, start: int) -> dict[str, float]:
    first = int(series.first.timestamp()) // 3600
    nothing = np.zeros((len(layout.names), MISSING + 1), np.int64)
    until = first + series.y.shape[1]
    before = sum((counts[h] for h in range(first, first + start) if h in counts), nothing)
    lately = sum((counts[h] for h in range(until - WEEK, until) if h in counts), nothing)
    if not lately[0].sum():
        return {}
    return {name: psi(before[j].astype(float), lately[j].astype(float)) for j, name in enumerate(layout.names)}
