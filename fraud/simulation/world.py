"""The simulated world: cities, merchants and customers with habits, and the genuine transactions they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Columns = dict[str, NDArray[Any]]

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
CHANNELS = ("chip", "contactless", "online", "app")
CHIP, CONTACTLESS, ONLINE, APP = range(4)
CARD_TYPES = ("debit", "credit", "prepaid")
CONTACTLESS_LIMIT = 50.0

# name, share of transactions, share of them online, median amount, deviation of the log amount
_CATEGORIES = (
    ("grocery", 0.24, 0.05, 28.0, 0.70),
    ("restaurant", 0.14, 0.03, 22.0, 0.60),
    ("fuel", 0.09, 0.00, 42.0, 0.35),
    ("transport", 0.10, 0.35, 7.0, 0.70),
    ("clothing", 0.07, 0.45, 48.0, 0.70),
    ("electronics", 0.04, 0.55, 110.0, 0.95),
    ("home", 0.05, 0.35, 55.0, 0.90),
    ("health", 0.07, 0.10, 24.0, 0.70),
    ("entertainment", 0.07, 0.50, 18.0, 0.80),
    ("digital", 0.09, 1.00, 8.0, 0.75),
    ("travel", 0.03, 0.90, 190.0, 0.90),
    ("jewellery", 0.01, 0.20, 160.0, 0.90),
)
CATEGORIES = tuple(row[0] for row in _CATEGORIES)
SHARE, ONLINE_SHARE, MEDIAN_AMOUNT, LOG_DEVIATION = np.array([row[1:] for row in _CATEGORIES]).T
N_CATEGORIES = len(CATEGORIES)

_FAVOURITES = 3
_PEAK_HOURS = np.array([8.5, 13.0, 18.8, 21.0])
_PEAK_WIDTHS = np.array([1.2, 1.6, 2.2, 1.8])


@dataclass(frozen=True)
class Merchants:
    """Sorted by place and category; `start` and `count`, both (n_places, n_categories), find them.

    The last place is online.
    """

    category: Ints
    latitude: Floats
    longitude: Floats
    start: Ints
    count: Ints

    def pick(self, place: Ints, category: Ints, u: Floats) -> Ints:
        """The merchant at quantile `u` of its place and category, popular ones first; online where there is none."""
        online = self.start.shape[0] - 1
        place = np.where(self.count[place, category] == 0, online, place)
        count = self.count[place, category]
        return self.start[place, category] + (u**1.7 * count).astype(np.int64)


@dataclass(frozen=True)
class World:
    days: int
    start_ms: int
    city_latitude: Floats
    city_longitude: Floats
    merchants: Merchants
    city: Ints
    latitude: Floats
    longitude: Floats
    opened_day: Floats
    """Day of the simulation on which the account was opened; below zero for an old one."""
    rate: Floats
    """Transactions a day."""
    spending: Floats
    """Shift of the customer's log amounts."""
    category_quantiles: Floats
    online_factor: Floats
    app_share: Floats
    peak_quantiles: Floats
    hour_shift: Floats
    weekend_pull: Floats
    device_life_days: Floats
    second_device_share: Floats
    card_type: Ints

    @property
    def end_ms(self) -> int:
        return self.start_ms + self.days * DAY_MS

    @property
    def n_customers(self) -> int:
        return len(self.city)


def make_world(rng: np.random.Generator, customers: int, n_merchants: int, days: int, start_ms: int) -> World:
    n_cities = max(3, customers // 400)
    weights: Floats = np.arange(1, n_cities + 1).astype(np.float64) ** -0.7
    weights /= weights.sum()
    latitude, longitude = rng.uniform(42, 54, n_cities), rng.uniform(-4, 20, n_cities)
    city = rng.choice(n_cities, customers, p=weights)
    tastes = SHARE * rng.gamma(3.0, 1.0, (customers, N_CATEGORIES))
    peaks = np.array([1.0, 2.0, 3.0, 1.0]) * rng.gamma(2.0, 1.0, (customers, 4))
    newcomer = rng.random(customers) < 0.2
    night_worker = rng.random(customers) < 0.05
    return World(
        days=days,
        start_ms=start_ms,
        city_latitude=latitude,
        city_longitude=longitude,
        merchants=_make_merchants(rng, n_merchants, weights, latitude, longitude),
        city=city,
        latitude=latitude[city] + rng.normal(0, 0.07, customers),
        longitude=longitude[city] + rng.normal(0, 0.09, customers),
        opened_day=np.where(newcomer, rng.uniform(0, 0.8 * days, customers), -rng.exponential(900, customers)),
        rate=rng.gamma(4.0, 2.07 / 4.0, customers),
        spending=rng.normal(0, 0.45, customers),
        category_quantiles=_quantiles(tastes),
        online_factor=np.exp(rng.normal(0, 0.5, customers)),
        app_share=rng.beta(2, 2, customers),
        peak_quantiles=_quantiles(peaks),
        hour_shift=rng.normal(0, 1.3, customers) + 9.0 * night_worker,
        weekend_pull=rng.uniform(0, 0.3, customers),
        device_life_days=rng.uniform(100, 500, customers),
        second_device_share=np.where(rng.random(customers) < 0.35, 0.25, 0.0),
        card_type=rng.choice(len(CARD_TYPES), customers, p=[0.6, 0.33, 0.07]),
    )


def _make_merchants(
    rng: np.random.Generator, n: int, city_weights: Floats, city_latitude: Floats, city_longitude: Floats
) -> Merchants:
    n_cities = len(city_weights)
    online = rng.random(n) < 0.2
    online[: min(n, N_CATEGORIES)] = True
    weights = np.where(online[:, None], SHARE * (ONLINE_SHARE + 0.01), SHARE * (1.0 - ONLINE_SHARE))
    category = choose(_quantiles(weights), np.arange(n), rng.random(n))
    category[: min(n, N_CATEGORIES)] = np.arange(min(n, N_CATEGORIES))  # each category can be bought online
    place = np.where(online, n_cities, rng.choice(n_cities, n, p=city_weights))
    order = np.lexsort((category, place))
    category, place = category[order], place[order]
    count = np.bincount(place * N_CATEGORIES + category, minlength=(n_cities + 1) * N_CATEGORIES)
    where = np.minimum(place, n_cities - 1)
    nowhere = np.where(place == n_cities, np.nan, 0.0)
    return Merchants(
        category=category,
        latitude=city_latitude[where] + rng.normal(0, 0.06, n) + nowhere,
        longitude=city_longitude[where] + rng.normal(0, 0.08, n) + nowhere,
        start=(np.cumsum(count) - count).reshape(n_cities + 1, N_CATEGORIES),
        count=count.reshape(n_cities + 1, N_CATEGORIES),
    )


def genuine_transactions(rng: np.random.Generator, world: World) -> Columns:
    """Genuine transactions of all customers, sorted by customer and time; see `complete` for the columns."""
    opened = np.maximum(world.opened_day, 0.0)
    customer = np.repeat(np.arange(world.n_customers), rng.poisson(world.rate * (world.days - opened)))
    n = len(customer)
    day = opened[customer] + rng.random(n) * (world.days - opened[customer])
    time_ms = genuine_times_ms(rng, world, customer, np.floor(day))
    order = np.lexsort((time_ms, customer))
    time_ms = time_ms[order]
    follows = np.flatnonzero((rng.random(n) < 0.06) & (customer == np.roll(customer, 1)))
    follows = follows[follows > 0]
    sprees = time_ms[follows - 1] + rng.integers(60_000, 45 * 60_000, len(follows))
    time_ms[follows] = np.minimum(sprees, world.end_ms - 1)
    time_ms = time_ms[np.lexsort((time_ms, customer))]

    category = choose(world.category_quantiles, customer, rng.random(n))
    online = rng.random(n) < np.minimum(ONLINE_SHARE[category] * world.online_factor[customer], 1.0)
    place = places(rng, world, customer, time_ms)
    n_places = len(world.city_latitude)
    favourite = (_FAVOURITES * rng.random(n) ** 1.6).astype(np.int64)
    habit = _fixed_quantile(customer, category, favourite)
    u = np.where((rng.random(n) < 0.7) & (online | (place == world.city[customer])), habit, rng.random(n))
    merchant = world.merchants.pick(np.where(online, n_places, place), category, u)
    return complete(rng, world, customer, merchant, time_ms, place)


def complete(
    rng: np.random.Generator, world: World, customer: Ints, merchant: Ints, time_ms: Ints, place: Ints
) -> Columns:
    """Complete genuine transactions, given customer, place and time.

    Returns
    -------
    dict of arrays (n,)
        customer, merchant, time_ms, amount, channel, device, latitude, longitude, authenticated.
    """
    n = len(customer)
    category = world.merchants.category[merchant]
    log_amount = np.log(MEDIAN_AMOUNT[category]) + world.spending[customer]
    amount = np.exp(log_amount + LOG_DEVIATION[category] * rng.normal(0, 1, n))
    amount = np.where(rng.random(n) < 0.012, amount * rng.uniform(3, 9, n), amount)
    amount = np.maximum(np.round(amount, 2), 0.5)
    online = np.isnan(world.merchants.latitude[merchant])
    touch = (amount <= CONTACTLESS_LIMIT) & (rng.random(n) < 0.75)
    in_app = rng.random(n) < world.app_share[customer]
    channel = np.where(online, np.where(in_app, APP, ONLINE), np.where(touch, CONTACTLESS, CHIP))
    days = (time_ms - world.start_ms) / DAY_MS
    generation = np.floor(days / world.device_life_days[customer] + _fixed_quantile(customer, 0, 7)).astype(np.int64)
    second = rng.random(n) < world.second_device_share[customer]
    device = np.where(online, (customer * 64 + generation) * 2 + second, -1)
    at_home = place == world.city[customer]
    latitude = np.where(at_home, world.latitude[customer], world.city_latitude[place]) + rng.normal(0, 0.03, n)
    longitude = np.where(at_home, world.longitude[customer], world.city_longitude[place]) + rng.normal(0, 0.04, n)
    unknown = np.where(online & (rng.random(n) < 0.08), np.nan, 0.0)
    return {
        "customer": customer,
        "merchant": merchant,
        "time_ms": time_ms,
        "amount": amount,
        "channel": channel,
        "device": device,
        "latitude": np.where(online, latitude, world.merchants.latitude[merchant]) + unknown,
        "longitude": np.where(online, longitude, world.merchants.longitude[merchant]) + unknown,
        "authenticated": rng.random(n) < np.array([0.92, 0.04, 0.60, 0.80])[channel],
    }


def genuine_times_ms(rng: np.random.Generator, world: World, customer: Ints, day: Floats) -> Ints:
    """A time on `day` (or the weekend beside it) at one of the customer's usual hours."""
    n = len(customer)
    weekday = (day + (world.start_ms // DAY_MS + 3)) % 7  # day 0 of the epoch was a Thursday
    saturday = day + (5 - weekday) + rng.integers(0, 2, n)
    pulled = (weekday < 5) & (saturday < world.days) & (rng.random(n) < world.weekend_pull[customer])
    day = np.where(pulled, saturday, day)
    peak = choose(world.peak_quantiles, customer, rng.random(n))
    hour = rng.normal(_PEAK_HOURS[peak] + world.hour_shift[customer], _PEAK_WIDTHS[peak])
    hour = np.where(rng.random(n) < 0.03, rng.uniform(0, 24, n), hour) % 24
    time_ms = world.start_ms + (day * DAY_MS + hour * HOUR_MS).astype(np.int64)
    return np.minimum(time_ms, world.end_ms - 1)


def places(rng: np.random.Generator, world: World, customer: Ints, time_ms: Ints) -> Ints:
    """City where the customer is: at home, or on one of some journeys of 2 to 10 days."""
    place = world.city[customer].copy()
    n_cities = len(world.city_latitude)
    for _ in range(max(1, world.days // 90)):
        traveller = rng.random(world.n_customers) < 0.6
        begin = world.start_ms + (rng.random(world.n_customers) * world.days * DAY_MS).astype(np.int64)
        end = begin + (rng.uniform(2, 10, world.n_customers) * DAY_MS).astype(np.int64)
        goal = rng.integers(0, n_cities, world.n_customers)
        away = traveller[customer] & (time_ms >= begin[customer]) & (time_ms < end[customer])
        place[away] = goal[customer[away]]
    return place


def choose(quantiles: Floats, row: Ints, u: Floats) -> Ints:
    """Index drawn by `u` from the distribution in `quantiles[row]`; a column at a time, to stay lean."""
    chosen = np.zeros(len(row), dtype=np.int64)
    for column in range(quantiles.shape[1] - 1):
        chosen += u > quantiles[row, column]
    return chosen


def _quantiles(weights: Floats) -> Floats:
    quantiles: Floats = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    return quantiles


def _fixed_quantile(customer: Ints, a: Ints | int, b: Ints | int) -> Floats:
    """A deterministic number in [0, 1) from the arguments: a habit that needs no table."""
    with np.errstate(over="ignore"):
        mixed = customer * np.int64(0x9E3779B1) + a * np.int64(0x85EBCA77) + b * np.int64(0xC2B2AE3D)
        mixed = (mixed ^ (mixed >> 29)) * np.int64(0x1B873593)
        mixed = (mixed ^ (mixed >> 27)) * np.int64(0x2545F491)
    return ((mixed >> 11) & 0xFFFFFFFF).astype(np.float64) / 2.0**32
