"""Years of hourly traffic without drift, harder than the project's simulator: nothing in them is independent.

Seasons wander, rates are overdispersed and follow the hour before, customers come in bursts, a month has an end, there
are holidays, traffic grows. Means of values are drawn from their normal limit, shares and volumes as counts.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from fraud.monitoring.hours import WEEK, Hours, hours_from
from fraud.monitoring.sequential import ChannelKind

Floats: TypeAlias = NDArray[np.float64]
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
REFERENCE_HOURS, YEAR_HOURS = 26 * WEEK, 52 * WEEK
HOLIDAYS_A_YEAR = 10
NUMBERS, CATEGORIES, VOLUMES = 80, 15, 5
VALUES = 9
"""Of a category: the eight largest and all others."""


class World(NamedTuple):
    """A reference of 26 weeks and the year after it.

    Attributes
    ----------
    y, n : (n_channels, n_hours) float64
    kinds : list of ChannelKind
    hours : Hours
        With the holidays; `unlisted` are the same without.
    unlisted : Hours
    """

    y: Floats
    n: Floats
    kinds: list[ChannelKind]
    hours: Hours
    unlisted: Hours


class Onset(NamedTuple):
    """A change in one feature from one hour on: what is added to true values in its channels.

    `location`, `spread` in standard deviations, `missing` and `new` as shares; `weeks` is how long it takes to come.
    """

    hour: int
    location: float = 0.0
    spread: float = 0.0
    missing: float = 0.0
    new: float = 0.0
    weeks: float = 0.0


def world(
    decisions_a_day: int, seed: int, onset: Onset | None = None, numbers: int = NUMBERS, categories: int = CATEGORIES
) -> World:
    """Draw a world; the onset, if there is one, is in the first number, or the first category where it is `new`."""
    rng = np.random.default_rng(seed)
    n_hours = REFERENCE_HOURS + YEAR_HOURS
    holidays = _holidays(rng)
    hours, unlisted = hours_from(FIRST, n_hours, holidays), hours_from(FIRST, n_hours)
    volume = _volume(rng, decisions_a_day, hours)
    ramp = np.zeros(n_hours)
    if onset is not None:
        since = np.arange(n_hours) - onset.hour
        ramp = np.where(since < 0, 0.0, np.minimum(1.0, (since + 1) / (onset.weeks * WEEK)) if onset.weeks else 1.0)
    of = onset or Onset(0)
    y: list[Floats] = []
    sizes: list[Floats] = []
    kinds: list[ChannelKind] = []

    def add(kind: ChannelKind, values: Floats, size: Floats) -> None:
        kinds.append(kind)
        y.append(np.where(size > 0, values, np.nan))
        sizes.append(size)

    for i in range(numbers):
        mine = ramp * (i == 0)
        factor = float(rng.uniform(1, 4))  # of the variance: customers' transactions are alike
        burst = _bursts(rng, volume)
        location = _mean(rng, hours, scale=1.0) + burst * rng.normal(0, 1.5) + mine * of.location
        add("location", location + rng.normal(size=n_hours) * np.sqrt(factor / volume), volume)
        spread = _mean(rng, hours, scale=0.7) + burst * rng.normal(0, 1.0) + mine * of.spread
        add("spread", spread + rng.normal(size=n_hours) * np.sqrt(factor / volume), volume)
        add("rare", _share(rng, _rate(rng, hours, rng.uniform(0.001, 0.05)), volume, mine * of.missing), volume)
    for i in range(categories):
        weights = np.sort(rng.dirichlet(np.full(VALUES, 1.5)))[::-1]
        mine = ramp * (i == 0)
        for weight in weights:
            share = _rate(rng, hours, float(weight)) * (1 - mine * of.new)
            add("share", _share(rng, np.minimum(share + 0.3 * _bursts(rng, volume), 0.98), volume, 0.0), volume)
        add("rare", _share(rng, _rate(rng, hours, rng.uniform(0.0005, 0.01)), volume, mine * of.new), volume)
        add("rare", _share(rng, _rate(rng, hours, rng.uniform(0.001, 0.02)), volume, 0.0), volume)
    parts = rng.dirichlet(np.full(VOLUMES - 1, 5.0)) if VOLUMES > 1 else ()
    add("volume", np.log(volume), volume)
    for part in parts:
        size = np.maximum(rng.poisson(volume * part * np.exp(_mean(rng, hours, scale=0.5))), 1).astype(np.float64)
        add("volume", np.log(size), size)
    return World(np.array(y), np.array(sizes), kinds, hours, unlisted)


def _holidays(rng: np.random.Generator) -> set[date]:
    days = (REFERENCE_HOURS + YEAR_HOURS) // 24
    n = HOLIDAYS_A_YEAR * days // 364
    return {FIRST.date() + timedelta(days=int(day)) for day in rng.choice(np.arange(5, days), n, replace=False)}


def _wander(rng: np.random.Generator, n: int, hours: float) -> Floats:
    """Return a stationary AR(1) of variance 1 that forgets in about so many hours."""
    rho = float(np.exp(-1 / hours))
    found: Floats = lfilter([np.sqrt(1 - rho * rho)], [1, -rho], rng.normal(size=n), zi=[rho * rng.normal()])[0]
    return found


def _profile(rng: np.random.Generator, hours: Hours) -> Floats:
    """Return a profile of the week whose variance is about 1, and that wanders; a holiday has Sunday's."""
    t = hours.of_week
    phase = rng.uniform(0, 2 * np.pi, 3)
    daily = np.cos(2 * np.pi * t / 24 + phase[0]) + 0.4 * np.cos(4 * np.pi * t / 24 + phase[1])
    weekend = (t >= 120) * (rng.normal() + rng.normal() * np.cos(2 * np.pi * t / 24 + phase[2]))
    strength = 1 + 0.02 * _wander(rng, len(t), 8 * WEEK)
    found: Floats = (daily + weekend) * strength
    return found


def _mean(rng: np.random.Generator, hours: Hours, scale: float) -> Floats:
    """Return the wandering mean of a number, in its standard deviations times `scale`."""
    n = len(hours.of_week)
    year = 2 * np.pi * np.arange(n) / (365.25 * 24) + rng.uniform(0, 2 * np.pi)
    parts = (
        rng.uniform(0.0, 0.25) * _profile(rng, hours),
        np.exp(rng.uniform(np.log(0.003), np.log(0.03))) * _wander(rng, n, float(rng.uniform(1, 8))),
        rng.uniform(0.0, 0.02) * _wander(rng, n, 24.0),
        rng.uniform(0.0, 0.04) * _wander(rng, n, float(rng.uniform(3, 8)) * WEEK),
        rng.uniform(0.0, 0.05) * np.cos(year),
        rng.normal(0, 0.08) * hours.is_month_end,
        rng.normal(0, 0.05) * hours.is_holiday,
    )
    found: Floats = scale * np.sum(parts, axis=0)
    return found


def _rate(rng: np.random.Generator, hours: Hours, p: float) -> Floats:
    """Return a wandering share: its log-odds wander as a mean does."""
    odds = p / (1 - p) * np.exp(_mean(rng, hours, scale=1.0))
    found: Floats = odds / (1 + odds)
    return found


def _share(rng: np.random.Generator, p: Floats, n: Floats, added: Floats | float) -> Floats:
    """Draw counts of a share, more dispersed than a binomial, and return their stabilised square root."""
    p = np.minimum(p + (1 - p) * added, 1.0)
    factor = rng.uniform(1, 3)  # transactions of one customer count together
    units = np.maximum(n / factor, 1).astype(np.int64)
    x = rng.binomial(units, p) * (n / units)
    found: Floats = 2 * np.sqrt((x + 0.375) / n)
    return found


def _bursts(rng: np.random.Generator, volume: Floats) -> Floats:
    """Return the share of each hour's traffic that is one customer's burst."""
    n = len(volume)
    size = np.where(rng.random(n) < 1 / 200, rng.pareto(1.5, n) * 5 + 5, 0.0)
    found: Floats = np.minimum(size / volume, 0.1)
    return found


def _volume(rng: np.random.Generator, decisions_a_day: int, hours: Hours) -> Floats:
    n = len(hours.of_week)
    growth = rng.uniform(-0.1, 0.5) * np.arange(n) / (365.25 * 24)
    log = (
        0.5 * np.cos(2 * np.pi * (hours.of_week % 24 - 15) / 24)
        - 0.25 * (hours.of_week >= 120)
        + 0.15 * hours.is_month_end
        - 0.1 * hours.is_holiday
        + growth
        + 0.04 * _wander(rng, n, 4.0)
        + 0.05 * _wander(rng, n, 3 * WEEK)
    )
    found: Floats = np.maximum(
        rng.poisson(decisions_a_day / 24 * np.exp(log - log[:REFERENCE_HOURS].mean())), 1
    ).astype(np.float64)
    return found
