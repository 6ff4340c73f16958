"""Tests for change that may be looked at every hour for ever, with one false-alarm budget over all channels.

A channel is one number an hour: the mean of a feature's normal scores, a share, the volume. The fast test bets on its
innovations: what is left after the hour of the week, the end of the month, a level that follows slowly, and the
dependence on the hour and the day before. The wealth of eight bets is added up as in Shiryaev and Roberts' detector,
which raises false alarms at most once in as many hours as its threshold, on average, however often it is looked at
(Shin, Ramdas, Rinaldo: E-detectors, 2023). The slow test compares each week with the reference.

The guarantee needs innovations whose mean is 0 given the past. With seasons that are learnt this is nearly so; a
tolerance and a factor of safety pay for the rest, and `fraud verify drift` measures what comes of it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fraud.compiling import compiled
from fraud.monitoring.hours import Hours

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
ChannelKind = Literal["location", "spread", "share", "rare", "volume"]
"""`rare` is a share of missing or new values."""

BETS = np.array([0.4, -0.4, 0.8, -0.8, 1.6, -1.6, 3.0, -3.0])
SLOW_BETS = np.array([0.5, 1.0, 2.0])
SAFETY = 4.0
FAST_SHARE, SLOW_SHARE = 0.8, 0.2
"""Of the budget."""
HOURS_A_QUARTER, WEEKS_A_QUARTER = 2190.0, 13.0
REFERENCE_WEEKS = 26
"""The shortest reference with which the budget was measured to hold."""
EVENT_HOURS = 24


class Channels(NamedTuple):
    """What the reference says of each channel, n of them; arrays, so that a file can hold it.

    Attributes
    ----------
    season : (n, 168) float64
        Value by hour of the week; `month_end` is added at the end of a month.
    level, gain : (n,)
        The slow level after the reference, and how quickly it follows.
    variance_per, variance : (n,)
        The innovation's variance with n decisions is variance_per / n + variance.
    lag_hour, lag_day, scale : (n,)
        Dependence of standardised innovations on the hour and the day before, and their deviation after it.
    penalty : (n, 8)
        What each bet costs an hour; infinite where the bet is not made.
    base, spread, tolerance : (n,)
        The reference's weekly mean, the deviation between weeks, and what is no change; `spread` is infinite where
        the slow test is off.
    is_watched : (n,) bool
    """

    season: Floats
    month_end: Floats
    level: Floats
    gain: Floats
    variance_per: Floats
    variance: Floats
    lag_hour: Floats
    lag_day: Floats
    scale: Floats
    penalty: Floats
    base: Floats
    spread: Floats
    tolerance: Floats
    is_watched: Bools


class State(NamedTuple):
    """What is remembered from hour to hour.

    Attributes
    ----------
    season : (n, 168) float64
    level : (n,)
    past : (n, 24)
        Standardised innovations of the last day, in a ring.
    wealth : (n, 8)
        Logarithms.
    slow : (n, 3)
        Logarithms.
    week : (n, 2)
        Sum and number of this week's values.
    hour : (1,) int64
        Hours seen.
    """

    season: Floats
    level: Floats
    past: Floats
    wealth: Floats
    slow: Floats
    week: Floats
    hour: NDArray[np.int64]


class Watched(NamedTuple):
    """What the tests said of some hours: log of the evidence over the threshold, above 0 an alarm, (n_channels, n)."""

    fast: Floats
    slow: Floats


def new_state(channels: Channels) -> State:
    """Return the state after the reference; the first hour to come is a Monday's first."""
    n = len(channels.level)
    return State(
        channels.season.copy(),
        channels.level.copy(),
        np.zeros((n, 24)),
        np.full((n, len(BETS)), -np.inf),
        np.full((n, len(SLOW_BETS)), -np.inf),
        np.zeros((n, 2)),
        np.zeros(1, np.int64),
    )


def watch(channels: Channels, state: State, y: Floats, n: Floats, hours: Hours) -> Watched:
    """Judge the hours that follow, and advance the state; in one call or in many, the result is the same."""
    n_channels = len(channels.level)
    fast, slow = np.full(y.shape, -np.inf), np.full(y.shape, -np.inf)
    thresholds = fast_threshold(n_channels), slow_threshold(n_channels)
    _watch(*channels, *state[:-1], int(state.hour[0]), y, n, *hours, BETS, SLOW_BETS, *thresholds, fast, slow)
    state.hour[0] += y.shape[1]
    return Watched(fast, slow)


def fast_threshold(n_channels: int) -> float:
    """Return the log of the evidence at which a channel alarms, for one false alarm a quarter over all channels."""
    return float(np.log(SAFETY * n_channels * HOURS_A_QUARTER / FAST_SHARE))


def slow_threshold(n_channels: int) -> float:
    return float(np.log(WEEKS_A_QUARTER / SLOW_SHARE * n_channels))


def events_of(watched: Watched) -> list[tuple[int, int, list[int]]]:
    """Return alarms as events: first hour, last hour, and channels by strength; alarms within 24 h are one event."""
    strength = np.maximum(watched.fast, watched.slow)
    events: list[tuple[int, int, list[int]]] = []
    for hour in np.flatnonzero((strength >= 0).any(axis=0)).tolist():
        first = hour
        begun: list[int] = []
        if events and hour - events[-1][1] <= EVENT_HOURS:
            first, _, begun = events.pop()
        here = np.flatnonzero(strength[:, hour] >= 0)
        new = [int(c) for c in here[np.argsort(-strength[here, hour], kind="stable")] if int(c) not in begun]
        events.append((first, hour, begun + new))
    return events


@compiled
def _watch(
    season0: Any, month_end: Any, level0: Any, gain: Any, variance_per: Any, variance: Any, lag_hour: Any,
    lag_day: Any, scale: Any, penalty: Any, base: Any, spread: Any, tolerance: Any, is_watched: Any,
    season: Any, level: Any, past: Any, wealth: Any, slow_wealth: Any, week: Any, seen: Any,
    y: Any, n: Any, of_week: Any, is_month_end: Any, is_holiday: Any, is_muted: Any, bets: Any, slow_bets: Any,
    fast_limit: Any, slow_limit: Any, fast: Any, slow: Any,
) -> Any:  # fmt: skip
    for c in range(y.shape[0]):
        if not is_watched[c]:
            continue
        for t in range(y.shape[1]):
            hour = seen + t
            h = of_week[t]
            u = 0.0
            z = 0.0
            if np.isfinite(y[c, t]) and n[c, t] > 0:
                shift = month_end[c] if is_month_end[t] else 0.0
                e = y[c, t] - season[c, h] - shift - level[c]
                sigma = np.sqrt(variance_per[c] / n[c, t] + variance[c])
                z = e / sigma
                bounded = min(3.0, max(-3.0, z)) * sigma
                if not is_muted[t]:
                    u = z - lag_hour[c] * past[c, (hour - 1) % 24] - lag_day[c] * past[c, hour % 24]
                    u = min(5.0, max(-5.0, u / scale[c]))
                    season[c, h] += 0.06 * bounded
                    week[c, 0] += y[c, t] - season0[c, h] - shift
                    week[c, 1] += 1
                if not is_holiday[t]:
                    level[c] += gain[c] * bounded
            past[c, hour % 24] = 0.0 if is_muted[t] else min(5.0, max(-5.0, z))
            total = 0.0
            for k in range(len(bets)):
                if np.isfinite(penalty[c, k]):
                    wealth[c, k] = np.log1p(np.exp(min(wealth[c, k], 600.0))) + bets[k] * u - penalty[c, k]
                    total += np.exp(min(wealth[c, k], 600.0))
            fast[c, t] = np.log(total / len(bets)) - fast_limit
            if fast[c, t] >= 0:
                wealth[c, :] = -np.inf
            if hour % 168 == 167:
                if week[c, 1] >= 84 and np.isfinite(spread[c]):
                    d = abs(week[c, 0] / week[c, 1] - base[c]) - tolerance[c]
                    z = min(6.0, max(-6.0, d / spread[c]))
                    total = 0.0
                    for k in range(len(slow_bets)):
                        gained = slow_bets[k] * z - slow_bets[k] ** 2 / 2
                        slow_wealth[c, k] = np.log1p(np.exp(min(slow_wealth[c, k], 600.0))) + gained
                        total += np.exp(min(slow_wealth[c, k], 600.0))
                    slow[c, t] = np.log(total / len(slow_bets)) - slow_limit
                    if slow[c, t] >= 0:
                        slow_wealth[c, :] = -np.inf
                week[c, :] = 0.0
