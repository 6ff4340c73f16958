"""Seeded traffic like a payments backend's: skewed customers with habits, fraud by typology, retries, mistakes."""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from fraud.schema import MAX_ID_LENGTH, TRANSACTION_FIELDS, Feature, FeatureSpec
from fraud.simulation.typologies import TYPOLOGIES
from load_tests.simulated import CUSTOMERS, Instance, pool_of


@dataclass(frozen=True)
class Mix:
    """The mix of the traffic; shares are of all requests."""

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
        self._sent = {*TRANSACTION_FIELDS, *(f.name for f in spec.requested)} if spec else None
        self._popularity = list(itertools.accumulate(1 / rank**1.05 for rank in range(1, mix.customers + 1)))
        self._pool = pool_of(seed, mix.merchants)
        self._campaign_share = mix.fraud_share / self._pool.campaign_size
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
        if self._draw.random() < self._campaign_share:
            self._plan(self._draw.choice(list(TYPOLOGIES)))
        number = bisect(self._popularity, self._draw.random() * self._popularity[-1])  # the first ones buy most
        purchases = self._pool.purchases[number % CUSTOMERS]
        return "ordinary", self._of(number, self._draw.choice(purchases)) if purchases else self._instance()[1]

    def _of(self, number: int, simulated: Instance) -> Instance:
        """A simulated transaction as one of a customer of this traffic, in the categories that the model knows."""
        instance = simulated | {"customer_id": f"customer-{number}"}
        instance["device_id"] = simulated["device_id"] or f"device-of-{number}"
        for name in ("category", "channel"):
            known = self._coded.get(name)
            if known and instance[name] not in known:
                instance[name] = known[number % len(known)]
        if self._sent is not None:
            instance = {name: value for name, value in instance.items() if name in self._sent}
        return self._asked(instance)

    def _asked(self, instance: Instance) -> Instance:
        """Add the columns that the model asks for besides the transaction's own."""
        for feature in self._columns:
            known = feature.type != "categorical" or instance.get(feature.name) in feature.categories
            if feature.name not in instance or not known:
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
        """Spread the transactions of one campaign over the requests that follow."""
        draw, at = self._draw, self._requests
        copies = max(1, self.mix.customers // CUSTOMERS)
        copy = CUSTOMERS * draw.randrange(copies)
        for victim, fraud in draw.choice(self._pool.campaigns[typology]):
            at += draw.randint(1, 20)
            purchase = self._of((victim + copy) % self.mix.customers, fraud)
            heapq.heappush(self._planned, (at, draw.getrandbits(32), typology, purchase))

    def _bad(self, path: str, instances: list[Instance]) -> Request:
        """A request of a faulty caller; it must be refused as a whole."""
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


MISTAKES = (
    "broken_json",
    "no_instances",
    "instances_no_list",
    "long_id",
    "zero_amount",
    "text_for_number",
    "no_zone",
)
