"""The sequential tests: their run length, what they find, and inputs that must not break them."""

from __future__ import annotations

from datetime import UTC, date, datetime

import numpy as np
import pytest

from fraud.checks.drift import BUDGET_A_YEAR, Year, delay, upper_rate, year
from fraud.monitoring.fitting import _highest, _penalty, fit_channels
from fraud.monitoring.hours import WEEK, hours_from
from fraud.monitoring.sequential import (
    BETS,
    ChannelKind,
    Channels,
    Watched,
    events_of,
    fast_threshold,
    new_state,
    watch,
)

MONDAY = datetime(2024, 1, 1, tzinfo=UTC)


def drawn(n_channels: int, n_hours: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = rng.poisson(2000, (n_channels, n_hours)).astype(float)
    return rng.normal(size=size.shape) / np.sqrt(size), size


def fitted(y: np.ndarray, n: np.ndarray, weeks: int, kinds: list[ChannelKind] | None = None) -> Channels:
    hours = hours_from(MONDAY, weeks * WEEK)
    return fit_channels(y[:, : weeks * WEEK], n[:, : weeks * WEEK], hours, kinds or ["location"] * len(y))


def test_hours_know_weekdays_month_ends_and_holidays() -> None:
    hours = hours_from(datetime(2024, 1, 30, 22, tzinfo=UTC), 80, {date(2024, 2, 1)})
    assert hours.of_week[0] == 24 + 22  # a Tuesday
    assert hours.is_month_end[:50].all()  # 30th, 31st and 1st; the 2nd begins after 50 hours
    assert not hours.is_month_end[50]
    assert hours.is_holiday.nonzero()[0].tolist() == list(range(26, 50))
    assert hours.is_muted.nonzero()[0].tolist() == list(range(26, 56))
    assert hours.of_week[26] == 6 * 24


def test_wealth_crosses_its_threshold_no_oftener_than_it_promises() -> None:
    """On independent innovations the mean run length is at least the threshold, here 200 hours."""
    rng = np.random.default_rng(2)
    penalty = np.maximum(BETS**2 / 2, BETS**2 / 2)
    limit, runs = np.log(200.0), []
    for _ in range(1500):
        u = rng.normal(size=6000)
        low, high = 1, len(u)
        if _highest(u, penalty, BETS) < limit:
            runs.append(len(u))
            continue
        while low < high:  # the highest so far only grows
            middle = (low + high) // 2
            low, high = (low, middle) if _highest(u[:middle], penalty, BETS) >= limit else (middle + 1, high)
        runs.append(low)
    assert np.mean(runs) >= 200 * 0.95


def test_hour_by_hour_is_as_all_at_once() -> None:
    y, n = drawn(4, 10 * WEEK)
    y[1, 9 * WEEK + 5 :] += 0.5
    n[2, 8 * WEEK + 7] = 0
    y[2, 8 * WEEK + 7] = np.nan
    channels = fitted(y, n, 8, ["location", "spread", "share", "rare"])
    hours = hours_from(MONDAY, 10 * WEEK, {date(2024, 2, 28)}).part(8 * WEEK, 10 * WEEK)
    y, n = y[:, 8 * WEEK :], n[:, 8 * WEEK :]
    whole = watch(channels, new_state(channels), y, n, hours)
    state = new_state(channels)
    steps = [watch(channels, state, y[:, t : t + 1], n[:, t : t + 1], hours.part(t, t + 1)) for t in range(2 * WEEK)]
    for name in ("fast", "slow"):
        np.testing.assert_array_equal(np.hstack([getattr(step, name) for step in steps]), getattr(whole, name))
    (event, *_) = events_of(whole)
    assert event[0] - (WEEK + 5) <= 3
    assert event[2] == [1]


def test_the_order_of_channels_changes_nothing() -> None:
    y, n = drawn(6, 10 * WEEK, 5)
    y[3, 9 * WEEK :] += 0.2
    order = np.array([4, 3, 1, 0, 5, 2])
    hours = hours_from(MONDAY, 10 * WEEK).part(8 * WEEK, 10 * WEEK)
    found = []
    for rows in (np.arange(6), order):
        channels = fitted(y[rows], n[rows], 8)
        found.append(watch(channels, new_state(channels), y[rows, 8 * WEEK :], n[rows, 8 * WEEK :], hours))
    np.testing.assert_array_equal(found[0].fast[order], found[1].fast)


def test_channels_that_cannot_be_judged_are_not_watched() -> None:
    y, n = drawn(6, 8 * WEEK, 3)
    y[0] = 0.25  # constant
    y[1], n[1] = np.nan, 0.0  # never any traffic
    n[2, : 7 * WEEK] = 0.0  # one week of traffic
    y[2, : 7 * WEEK] = np.nan
    n[3, 100:200] = 0.0  # a gap
    y[3, 100:200] = np.nan
    n[4, ::3] = 1.0
    channels = fitted(y, n, 8)
    assert channels.is_watched.tolist() == [False, False, False, True, True, True]
    for name, column in zip(Channels._fields, channels, strict=True):
        assert not np.isnan(column).any(), name
    hours = hours_from(MONDAY, WEEK)
    jumped = y[:, :WEEK] + 3.0
    judged = watch(channels, new_state(channels), jumped, n[:, :WEEK], hours)
    assert (judged.fast[:3] == -np.inf).all()
    assert (judged.fast[3:].max(axis=1) >= 0).all()
    assert np.isfinite(judged.fast[3:]).all()


def test_no_single_hour_alarms_and_a_channel_begins_again_after_an_alarm() -> None:
    y, n = drawn(1, 12 * WEEK, 4)
    channels = fitted(np.repeat(y, 410, 0), np.repeat(n, 410, 0), 8)
    y, n = np.repeat(y, 410, 0)[:, 8 * WEEK :], np.repeat(n, 410, 0)[:, 8 * WEEK :]
    y[:, 300] = 50.0
    hours = hours_from(MONDAY, 4 * WEEK)
    watched = watch(channels, new_state(channels), y, n, hours)
    assert watched.fast.max() < 0
    y[0, 400:] += 1.0
    fast = watch(channels, new_state(channels), y, n, hours).fast[0]
    at = int(np.flatnonzero(fast >= 0)[0])
    assert 400 < at <= 403
    assert fast[at + 1] + fast_threshold(410) < 5 * 3 + 1  # from nothing again


def test_alarms_within_a_day_are_one_event() -> None:
    fast = np.full((3, 200), -1.0)
    fast[0, 10], fast[2, 10], fast[1, 30], fast[1, 60] = 1.0, 2.0, 0.5, 0.5
    watched = Watched(fast, np.full_like(fast, -np.inf))
    assert events_of(watched) == [(10, 30, [2, 0, 1]), (60, 60, [1])]


def test_bets_that_would_fail_on_rare_shares_are_not_made() -> None:
    u = np.random.default_rng(1).normal(size=4000)
    assert np.isinf(_penalty(u, 0.15, "rare")[-2:]).all()
    assert np.isfinite(_penalty(u, 0.15, "share")).all()


@pytest.mark.parametrize("volume", [50_000, 1_000_000])
def test_a_few_years_keep_the_budget_and_gross_breaks_are_found_within_four_hours(volume: int) -> None:
    """`fraud verify drift` in small; its interval at this size is wide, so the rate itself is held to the budget."""
    found = [year(volume, seed) for seed in (1, 2, 3)]
    assert sum(one.events for one in found) / 3 <= BUDGET_A_YEAR
    assert {delay(volume, 9, name) <= 4 for name in ("0.5 sd in one feature", "20% nulls in one feature")} == {True}


def test_the_measurement_fails_without_calendar_or_dispersion() -> None:
    for found in (year(1_000_000, 1, calendar=False), year(1_000_000, 1, dispersion=False)):
        assert isinstance(found, Year)
        assert upper_rate(found.events, 1) > BUDGET_A_YEAR
        assert found.events > BUDGET_A_YEAR


def test_the_interval_of_a_count() -> None:
    assert upper_rate(0, 1) == pytest.approx(3.689, abs=1e-3)
    assert upper_rate(100, 50) == pytest.approx(2.4325, abs=1e-3)
