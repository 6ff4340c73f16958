"""Seeded traffic as a payments backend sends it: skewed customers with habits, fraud by typology, retries, mistakes."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from fraud.schema import MAX_ID_LENGTH, Feature, FeatureSpec

CATEGORIES = (
    "grocery", "restaurant", "fuel", "transport", "clothing", "electronics", "home", "health", "entertainment",
    "digital", "travel", "jewellery",
)  # fmt: skip
CHANNELS = ("chip", "contactless", "online", "app")
CARD_TYPES = ("debit", "credit", "prepaid")
Instance = dict[str, Any]


@dataclass(frozen=True)
class Mix:
    """What traffic is made of; shares are of all requests."""

    customers: int = 20_000
    merchants: int = 2_000
    rows: int = 1
    """Instances of a request."""
    explain_share: float = 1.0
    """Requests to /explain, the others to /predict."""
    fraud_share: float = 0.01
    retry_share: float = 0.02
    """Requests sent a second time, with the same transaction ids."""
    bad_share: float = 0.01
    """Requests that break the contract and must be refused."""


class Request(NamedTuple):
    path: str
    body: bytes
    kind: str
    expected_status: int = 200
    transaction_ids: tuple[str, ...] = ()
    comes_again: bool = False


class Customer:
    """The habits of one customer, drawn from the seed and their number alone."""

    def __init__(self, seed: int, number: int) -> None:
        draw = random.Random(f"{seed}/customer/{number}")
        self.id = f"customer-{number}"
        self.log_amount = draw.gauss(3.2, 0.7)
        self.deviation = draw.uniform(0.3, 0.8)
        self.latitude = draw.uniform(36.0, 58.0)
        self.longitude = draw.uniform(-8.0, 24.0)
        self.merchants = [int(draw.paretovariate(0.6)) for _ in range(12)]
        self.device = f"device-{number}"
        self.card_type = draw.choice(CARD_TYPES)
        self.account_age_days = draw.randrange(3000)


class Traffic:
    """The requests of one stream, the same for the same seed, stream and mix.

    Parameters
    ----------
    spec : FeatureSpec, optional
        The served model's `features.json`, for the columns it asks of the request besides a transaction's own.
        Without it, those of the simulated transactions are sent.
    run : str
        Part of every transaction id: two runs of one seed must not look like retries of one another.
    """

    def __init__(self, mix: Mix, seed: int, stream: int = 0, spec: FeatureSpec | None = None, run: str = "0") -> None:
        self.mix = mix
        self._draw = random.Random(f"{seed}/traffic/{stream}")
        self._prefix = f"load-{run}-{stream}"
        self._count = itertools.count()
        self._spec = spec
        self._columns = [f for f in spec.requested if f.name not in ("category", "channel")] if spec else []
        self._coded = {f.name: f.categories for f in spec.requested if f.categories} if spec else {}
        self._popularity = list(itertools.accumulate(1 / rank**1.05 for rank in range(1, mix.customers + 1)))
        self._customer: Callable[[int], Customer] = lru_cache(100_000)(lambda number: Customer(seed, number))
        self._planned: list[tuple[int, int, str, Instance]] = []
        self._again: list[tuple[int, Request]] = []
        self._requests = 0

    def next(self, now_s: float) -> Request:
        """The request to send at a time, s since the epoch."""
        self._requests += 1
        if self._again and self._again[0][0] <= self._requests:
            return heapq.heappop(self._again)[1]
        draw, mix = self._draw, self.mix
        path = "/explain" if draw.random() < mix.explain_share else "/predict"
        kinds, instances = zip(*(self._instance() for _ in range(mix.rows)), strict=True)
        for instance in instances:
            instance["transaction_id"] = f"{self._prefix}-{next(self._count)}"
            if self._transactions:
                instance["event_time"] = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
        if draw.random() < mix.bad_share:
            return self._bad(path, list(instances))
        comes_again = draw.random() < mix.retry_share
        kind = next((k for k in kinds if k != "ordinary"), "ordinary")
        ids = tuple(instance["transaction_id"] for instance in instances)
        request = Request(path, msgspec.json.encode({"instances": instances}), kind, 200, ids, comes_again)
        if comes_again:
            heapq.heappush(self._again, (self._requests + draw.randint(1, 100), request._replace(kind="retry")))
        return request

    @property
    def _transactions(self) -> bool:
        return self._spec is None or self._spec.kind == "transaction"

    def _instance(self) -> tuple[str, Instance]:
        if not self._transactions:
            return "ordinary", self._asked({})
        if self._planned and self._planned[0][0] <= self._requests:
            _, _, kind, instance = heapq.heappop(self._planned)
            return kind, instance
        # an episode is some seven transactions
        if self._draw.random() < self.mix.fraud_share / 7:
            self._plan(self._draw.choice(TYPOLOGIES))
        return "ordinary", self._purchase(self._someone())

    def _someone(self) -> Customer:
        """A customer; the first ones buy far more often than the last."""
        return self._customer(bisect(self._popularity, self._draw.random() * self._popularity[-1]))

    def _purchase(self, customer: Customer, **changes: Any) -> Instance:
        """What this customer does on an ordinary day, with some of it changed."""
        draw = self._draw
        merchant = draw.choice(customer.merchants) if draw.random() < 0.8 else int(draw.paretovariate(0.6))
        instance: Instance = {
            "customer_id": customer.id,
            "merchant_id": f"merchant-{merchant % self.mix.merchants}",
            "amount": round(math.exp(draw.gauss(customer.log_amount, customer.deviation)), 2) + 0.01,
            "category": self._one_of("category", CATEGORIES, merchant),
            "channel": self._one_of("channel", CHANNELS),
            "device_id": customer.device,
            "latitude": round(customer.latitude + draw.gauss(0, 0.05), 5),
            "longitude": round(customer.longitude + draw.gauss(0, 0.05), 5),
            "merchant_latitude": round(customer.latitude + draw.gauss(0, 0.2), 5),
            "merchant_longitude": round(customer.longitude + draw.gauss(0, 0.2), 5),
        }
        if self._spec is None:
            instance["account_age_days"] = customer.account_age_days
            instance["strong_authentication"] = draw.random() < 0.3
            instance["card_type"] = customer.card_type
        return self._asked(instance | changes)

    def _one_of(self, name: str, default: tuple[str, ...], number: int | None = None) -> str:
        choices = self._coded.get(name) or default
        return choices[number % len(choices)] if number is not None else self._draw.choice(choices)

    def _asked(self, instance: Instance) -> Instance:
        """Add the columns that the model asks for besides the transaction's own."""
        for feature in self._columns:
            if feature.name not in instance:
                instance[feature.name] = self._value(feature)
        return instance

    def _value(self, feature: Feature) -> float | bool | str:
        draw = self._draw
        if feature.type == "boolean":
            return draw.random() < 0.3
        if feature.type == "categorical":
            return draw.choice(feature.categories)
        low = 0.0 if feature.minimum is None else feature.minimum
        high = low + 100.0 if feature.maximum is None else feature.maximum
        return round(draw.triangular(low, high, low + (high - low) / 4), 6)

    def _plan(self, typology: str) -> None:
        """Spread the transactions of one fraud over the requests that follow."""
        draw, victim, at = self._draw, self._someone(), self._requests
        thief = f"device-x{draw.getrandbits(32):08x}"
        usual = math.exp(victim.log_amount)
        purchases: list[Instance]
        match typology:
            case "card_testing":
                purchases = [
                    self._purchase(victim, amount=round(draw.uniform(0.5, 2.0), 2), device_id=thief)
                    for _ in range(draw.randint(6, 12))
                ]
            case "stolen_card":
                purchases = [
                    self._purchase(victim, amount=round(usual * draw.uniform(1, 3) * (1 + i), 2))
                    for i in range(draw.randint(4, 8))
                ]
            case "account_takeover":
                purchases = [
                    self._purchase(victim, amount=round(usual * draw.uniform(6, 12), 2), device_id=thief)
                    for _ in range(draw.randint(3, 6))
                ]
            case "compromised_merchant":
                merchant = f"merchant-{draw.randrange(self.mix.merchants)}"
                purchases = [
                    self._purchase(victim := self._someone(), merchant_id=merchant, amount=round(usual * 2, 2))
                    for _ in range(draw.randint(6, 12))
                ]
            case _:
                far = (victim.longitude + 90.0) % 180.0
                purchases = [self._purchase(victim), self._purchase(victim, latitude=-30.0, longitude=far)]
        for purchase in purchases:
            at += draw.randint(1, 20)
            heapq.heappush(self._planned, (at, draw.getrandbits(32), typology, purchase))

    def _bad(self, path: str, instances: list[Instance]) -> Request:
        """A request as a broken caller sends it; each must be refused as a whole."""
        mistake = self._draw.choice(MISTAKES)
        body: Any = {"instances": instances}
        match mistake:
            case "broken_json":
                return Request(path, msgspec.json.encode(body)[:-2], f"bad: {mistake}", 400)
            case "no_instances":
                body = {"instances": []}
            case "instances_no_list":
                body = {"instances": {"0": instances[0]}}
            case "long_id":
                for instance in instances:
                    instance["transaction_id"] += "x" * MAX_ID_LENGTH
            case "zero_amount":
                self._spoil(instances, "amount", 0)
            case "text_for_number":
                self._spoil(instances, "amount", "12,50")
            case "no_zone":
                self._spoil(instances, "event_time", "2026-01-31T12:30:00")
        return Request(path, msgspec.json.encode(body), f"bad: {mistake}", 422)

    def _spoil(self, instances: list[Instance], name: str, value: Any) -> None:
        if not self._transactions:
            name, value = self._columns[0].name, {"neither": "number nor text"}
        for instance in instances:
            instance[name] = value


TYPOLOGIES = ("card_testing", "stolen_card", "account_takeover", "compromised_merchant", "impossible_travel")
MISTAKES = (
    "broken_json",
    "no_instances",
    "instances_no_list",
    "long_id",
    "zero_amount",
    "text_for_number",
    "no_zone",
)
