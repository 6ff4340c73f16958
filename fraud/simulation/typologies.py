"""Fraud typologies of the simulation: each draws campaigns against simulated customers and merchants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fraud.simulation.world import (
    APP,
    CATEGORIES,
    CHIP,
    CONTACTLESS,
    CONTACTLESS_LIMIT,
    DAY_MS,
    HOUR_MS,
    ONLINE,
    Columns,
    Floats,
    Ints,
    World,
    complete,
    genuine_times_ms,
)

MINUTE_MS = 60_000
_EASY_TO_SELL = ("grocery", "fuel", "electronics", "clothing", "jewellery")
_EASY_TO_SELL_ONLINE = ("electronics", "clothing", "digital", "travel", "entertainment")


@dataclass(frozen=True)
class Typology:
    """A kind of fraud.

    Parameters
    ----------
    share : float
        Share of all fraudulent transactions.
    size : float
        Mean number of transactions in a campaign.
    report_days : float
        Median days until the victim's complaint, and with it the label, arrives.
    draw : callable
        Draws a number of campaigns; returns the columns of `complete` and the campaign of each row.
    """

    share: float
    size: float
    report_days: float
    draw: Callable[[np.random.Generator, World, Columns, int], Columns]


def fraudulent_transactions(rng: np.random.Generator, world: World, genuine: Columns, fraud_rate: float) -> Columns:
    """All campaigns of all typologies.

    Returns
    -------
    dict of arrays (n,)
        The columns of `complete`, with ``typology`` (1-based, in the order of `TYPOLOGIES`) and ``label_time_ms``.
    """
    wanted = fraud_rate * len(genuine["customer"])
    parts: list[Columns] = []
    for number, typology in enumerate(TYPOLOGIES.values(), start=1):
        campaigns = max(1, round(wanted * typology.share / typology.size))
        part = typology.draw(rng, world, genuine, campaigns)
        campaign = part.pop("campaign")
        delay_ms = typology.report_days * DAY_MS * np.exp(rng.normal(0, 0.7, int(campaign.max()) + 1))
        last_ms = np.zeros(len(delay_ms), dtype=np.int64)
        np.maximum.at(last_ms, campaign, part["time_ms"])
        reported = last_ms + np.clip(delay_ms, HOUR_MS, 45 * DAY_MS).astype(np.int64)
        part["typology"] = np.full(len(campaign), number, dtype=np.int64)
        part["label_time_ms"] = reported[campaign]
        within = part["time_ms"] < world.end_ms
        parts.append({name: column[within] for name, column in part.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stolen_card_burst(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """A card is taken and used in shops nearby until it is blocked."""
    anchor = _anchors(rng, genuine, campaigns, card_present=True)
    campaign, step = _steps(rng.integers(3, 9, campaigns))
    customer = genuine["customer"][anchor][campaign]
    begin = genuine["time_ms"][anchor] + rng.integers(10 * MINUTE_MS, 6 * HOUR_MS, campaigns)
    gap = rng.exponential(25 * MINUTE_MS, len(campaign)) + 2 * MINUTE_MS
    place = world.city[customer]
    merchant = world.merchants.pick(place, _categories(rng, _EASY_TO_SELL, len(campaign)), rng.random(len(campaign)))
    columns = complete(rng, world, customer, merchant, begin[campaign] + _elapsed(gap, step), place)
    no_pin = (columns["device"] < 0) & (rng.random(len(campaign)) < 0.6)
    limited = CONTACTLESS_LIMIT * rng.uniform(0.5, 1.0, len(campaign))
    columns["amount"] = np.round(np.where(no_pin, limited, columns["amount"] * rng.uniform(0.8, 2.2, len(campaign))), 2)
    columns["channel"] = np.where(no_pin, CONTACTLESS, columns["channel"])
    return columns | {"campaign": campaign}


def _compromised_merchant(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """For some weeks a merchant's terminal charges cards that were copied there."""
    anchor = rng.integers(0, len(genuine["customer"]), campaigns)
    merchant = genuine["merchant"][anchor]
    span = rng.uniform(10, 28, campaigns)
    begin = rng.uniform(0, np.maximum(world.days - span, 1.0), campaigns)
    of_merchant, _ = _steps(rng.integers(14, 41, campaigns))
    n = len(of_merchant)
    donor = rng.integers(0, len(genuine["customer"]), n)  # the busier a customer, the likelier a victim
    customer = genuine["customer"][donor]
    day = np.floor(begin[of_merchant] + rng.random(n) * span[of_merchant])
    time_ms = genuine_times_ms(rng, world, customer, np.minimum(day, world.days - 1))
    merchant = merchant[of_merchant]
    place = world.city[customer]
    columns = complete(rng, world, customer, merchant, time_ms, place)
    columns["amount"] = np.round(columns["amount"] * rng.uniform(0.9, 1.9, n), 2)
    return columns | {"campaign": np.arange(n)}  # each victim complains alone


def _account_takeover(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """Stolen credentials buy expensive goods online for some days."""
    columns = _online_campaign(rng, world, genuine, rng.integers(3, 8, campaigns), gap_ms=9 * HOUR_MS, hijacked=0.4)
    columns["amount"] = _inflated(rng, columns["amount"], 2.0, 6.0)
    return columns


def _card_testing(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """Many tiny charges at one shop show which card works; half of the cards are then used."""
    sizes = rng.integers(4, 11, campaigns)
    columns = _online_campaign(rng, world, genuine, sizes, gap_ms=50_000, hijacked=0.0)
    campaign = columns["campaign"]
    n_shops = max(2, len(world.merchants.category) // 250)
    digital = np.full(n_shops, CATEGORIES.index("digital"))
    shops = world.merchants.pick(np.full(n_shops, len(world.city_latitude)), digital, rng.random(n_shops))
    last = np.append(campaign[1:] != campaign[:-1], True)
    cash_out = last & (rng.random(campaigns) < 0.5)[campaign]
    tiny = np.round(rng.uniform(0.5, 5.0, len(campaign)), 2)
    columns["merchant"] = np.where(cash_out, columns["merchant"], shops[rng.integers(0, n_shops, campaigns)][campaign])
    columns["amount"] = np.where(cash_out, _inflated(rng, columns["amount"], 2.0, 6.0), tiny)
    columns["time_ms"] = columns["time_ms"] + cash_out * rng.integers(HOUR_MS // 2, DAY_MS, len(campaign))
    return columns


def _impossible_travel(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """A cloned card pays in another city soon after its owner paid at home."""
    anchor = _anchors(rng, genuine, campaigns, card_present=True)
    campaign, step = _steps(rng.integers(1, 4, campaigns))
    n_cities = len(world.city_latitude)
    customer = genuine["customer"][anchor][campaign]
    away = (world.city[genuine["customer"][anchor]] + rng.integers(1, n_cities, campaigns)) % n_cities
    begin = genuine["time_ms"][anchor] + rng.integers(10 * MINUTE_MS, 3 * HOUR_MS, campaigns)
    gap = rng.exponential(40 * MINUTE_MS, len(campaign)) + MINUTE_MS
    categories = _categories(rng, _EASY_TO_SELL, len(campaign))
    merchant = world.merchants.pick(away[campaign], categories, rng.random(len(campaign)))
    columns = complete(rng, world, customer, merchant, begin[campaign] + _elapsed(gap, step), away[campaign])
    columns["amount"] = _inflated(rng, columns["amount"], 0.9, 2.0)
    columns["channel"] = np.where(columns["channel"] == CONTACTLESS, CHIP, columns["channel"])
    return columns | {"campaign": campaign}


def _new_device_night(rng: np.random.Generator, world: World, genuine: Columns, campaigns: int) -> Columns:
    """Purchases from a device never seen, while the customer sleeps."""
    columns = _online_campaign(rng, world, genuine, rng.integers(1, 4, campaigns), gap_ms=25 * MINUTE_MS, hijacked=0.0)
    columns["amount"] = _inflated(rng, columns["amount"], 1.0, 2.5)
    day_ms = columns["time_ms"] - columns["time_ms"] % DAY_MS
    first = day_ms + rng.integers(0, 5 * HOUR_MS, campaigns)[columns["campaign"]]
    columns["time_ms"] = first + columns["time_ms"] % HOUR_MS
    return columns


TYPOLOGIES = {
    "stolen_card_burst": Typology(0.20, 5.5, 1.5, _stolen_card_burst),
    "compromised_merchant": Typology(0.20, 27.0, 5.0, _compromised_merchant),
    "account_takeover": Typology(0.20, 5.0, 3.0, _account_takeover),
    "card_testing": Typology(0.14, 7.0, 4.0, _card_testing),
    "impossible_travel": Typology(0.12, 2.0, 2.0, _impossible_travel),
    "new_device_night": Typology(0.14, 2.0, 3.0, _new_device_night),
}


def _online_campaign(
    rng: np.random.Generator, world: World, genuine: Columns, sizes: Ints, gap_ms: float, hijacked: float
) -> Columns:
    """Purchases online from the fraudster's device, or through the customer's own in the share `hijacked`."""
    campaigns = len(sizes)
    anchor = _anchors(rng, genuine, campaigns, card_present=False)
    campaign, step = _steps(sizes)
    n = len(campaign)
    customer = genuine["customer"][anchor][campaign]
    time_ms = genuine["time_ms"][anchor] + rng.integers(HOUR_MS, 4 * DAY_MS, campaigns)
    online = np.full(n, len(world.city_latitude))
    merchant = world.merchants.pick(online, _categories(rng, _EASY_TO_SELL_ONLINE, n), rng.random(n))
    n_cities = len(world.city_latitude)
    nearby = rng.random(campaigns) < 0.45  # through a proxy in the victim's own city
    hideout = np.where(nearby, world.city[genuine["customer"][anchor]], rng.integers(0, n_cities, campaigns))
    elapsed = _elapsed(rng.exponential(gap_ms, n) + 5_000, step)
    columns = complete(rng, world, customer, merchant, time_ms[campaign] + elapsed, hideout[campaign])
    own = (rng.random(campaigns) < hijacked)[campaign]
    first_device = 2 * 64 * world.n_customers
    reused = max(1, int(campaigns * 0.6))  # a fraudster's device serves more than one victim
    device = first_device + rng.integers(0, reused, campaigns) + rng.integers(0, 2**30)
    columns["device"] = np.where(own, columns["device"], device[campaign])
    columns["channel"] = np.where(rng.random(n) < 0.7, ONLINE, APP)
    columns["authenticated"] = rng.random(n) < 0.4
    return columns | {"campaign": campaign}


def _anchors(rng: np.random.Generator, genuine: Columns, campaigns: int, card_present: bool) -> Ints:
    """Genuine transactions after which a campaign begins, so that its victim is a customer with a history."""
    usable = np.flatnonzero((genuine["device"] < 0) == card_present)
    return usable[rng.integers(0, len(usable), campaigns)]


def _steps(sizes: Ints) -> tuple[Ints, Ints]:
    """Number of the campaign, and number within it, of each transaction."""
    campaign = np.repeat(np.arange(len(sizes)), sizes)
    return campaign, np.arange(len(campaign)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _elapsed(gap: Floats, step: Ints) -> Ints:
    """Milliseconds since the first transaction of each campaign, from the gap before each transaction."""
    total = np.cumsum(gap)
    first = np.maximum.accumulate(np.where(step == 0, np.arange(len(step)), 0))
    return (total - total[first]).astype(np.int64)


def _inflated(rng: np.random.Generator, amount: Floats, low: float, high: float) -> Floats:
    return np.round(amount * rng.uniform(low, high, len(amount)), 2)


def _categories(rng: np.random.Generator, names: tuple[str, ...], n: int) -> Ints:
    return np.array([CATEGORIES.index(name) for name in names])[rng.integers(0, len(names), n)]
