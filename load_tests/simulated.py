"""The transactions of a small simulated world: customers' habits and every kind of fraud, to send again and again."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fraud.simulation.typologies import TYPOLOGIES, fraudulent_transactions
from fraud.simulation.world import CARD_TYPES, CATEGORIES, CHANNELS, Columns, genuine_transactions, make_world

Instance = dict[str, Any]

CUSTOMERS, DAYS = 1_000, 30
FRAUD_RATE = 0.02


class Pool:
    """Simulated transactions as request instances without id, time and customer, which are added when sent.

    Attributes
    ----------
    purchases : list of list of dict
        The genuine transactions of each of `CUSTOMERS` customers, in the order of time.
    campaigns : dict of list of list of (int, dict)
        By kind of fraud: campaigns, each its transactions in the order of time with their victims' numbers.
    """

    def __init__(self, seed: int, merchants: int) -> None:
        rng = np.random.default_rng(seed)
        self._world = make_world(rng, CUSTOMERS, max(merchants, len(CATEGORIES)), DAYS, 0)
        genuine = genuine_transactions(rng, self._world)
        fraudulent = fraudulent_transactions(rng, self._world, genuine, FRAUD_RATE)
        self.purchases: list[list[Instance]] = [[] for _ in range(CUSTOMERS)]
        for customer, instance in zip(genuine["customer"].tolist(), self._instances(genuine), strict=True):
            self.purchases[customer].append(instance)
        self.campaigns = self._campaigns(fraudulent)

    @property
    def campaign_size(self) -> float:
        """Mean number of transactions in a campaign, each kind of fraud counted alike."""
        return float(np.mean([np.mean([len(c) for c in campaigns]) for campaigns in self.campaigns.values()]))

    def _campaigns(self, columns: Columns) -> dict[str, list[list[tuple[int, Instance]]]]:
        """Frauds with one victim and one report are a campaign; those of a copied card, with one merchant."""
        names = list(TYPOLOGIES)
        copied = columns["typology"] == 1 + names.index("compromised_merchant")
        with_whom = np.where(copied, columns["merchant"], columns["customer"])
        reported = np.where(copied, 0, columns["label_time_ms"])
        order = np.lexsort((columns["time_ms"], reported, with_whom, columns["typology"]))
        instances, victims = self._instances(columns), columns["customer"].tolist()
        found: dict[tuple[int, int, int], list[tuple[int, Instance]]] = {}
        for i in order.tolist():
            key = (int(columns["typology"][i]), int(with_whom[i]), int(reported[i]))
            found.setdefault(key, []).append((victims[i], instances[i]))
        campaigns: dict[str, list[list[tuple[int, Instance]]]] = {name: [] for name in names}
        for (typology, _, _), campaign in found.items():
            campaigns[names[typology - 1]].append(campaign)
        return campaigns

    def _instances(self, columns: Columns) -> list[Instance]:
        """Rows as a caller sends them; a missing device or position is filled with the customer's own."""
        world, customer, merchant = self._world, columns["customer"], columns["merchant"]
        shop_latitude, shop_longitude = world.merchants.latitude[merchant], world.merchants.longitude[merchant]
        age_days = np.maximum(columns["time_ms"] / 86_400_000 - world.opened_day[customer], 0).astype(int)
        positions = (
            ("latitude", columns["latitude"], world.latitude),
            ("longitude", columns["longitude"], world.longitude),
            ("merchant_latitude", shop_latitude, world.latitude),
            ("merchant_longitude", shop_longitude, world.longitude),
        )
        values = {
            "merchant_id": [f"merchant-{m}" for m in merchant.tolist()],
            "amount": columns["amount"].tolist(),
            "category": [CATEGORIES[c] for c in world.merchants.category[merchant].tolist()],
            "channel": [CHANNELS[c] for c in columns["channel"].tolist()],
            "device_id": [f"device-{d}" if d >= 0 else "" for d in columns["device"].tolist()],
            **{
                name: np.round(np.where(np.isnan(where), home[customer], where), 5).tolist()
                for name, where, home in positions
            },
            "account_age_days": age_days.tolist(),
            "strong_authentication": columns["authenticated"].tolist(),
            "card_type": [CARD_TYPES[c] for c in world.card_type[customer].tolist()],
        }
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


@lru_cache(4)
def pool_of(seed: int, merchants: int) -> Pool:
    """Return the pool of a seed, made once for all streams of a process."""
    return Pool(seed, merchants)
