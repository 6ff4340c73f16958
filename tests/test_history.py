"""The engine against the naive oracle, and what its states promise: order, size, encoding."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fraud.errors import StoreError
from fraud.features.featurizer import HISTORY_FEATURES, Featurizer
from fraud.history.encoding import decode, encode
from fraud.history.frauds import apply_labels
from fraud.history.state import (
    CATEGORY_SLOTS,
    CUSTOMER,
    DAYS,
    MARK_FRAUD,
    MERCHANT,
    MERCHANT_RING,
    MERCHANT_SLOTS,
    RING,
    TRANSACTION,
    new_states,
    token,
)
from fraud.history.updates import minor_units
from fraud.schema import Feature, FeatureSpec
from fraud.stores.states import apply_transactions
from tests.oracle import DAY, Event, Oracle

START = 1_767_225_600_000
QUANTILES = [float(q) for q in np.geomspace(1.0, 500.0, 100)]
SPEC = FeatureSpec("transaction", tuple(Feature(name, "history") for name in HISTORY_FEATURES))
FEATURIZER = Featurizer(SPEC, QUANTILES)


def without_collisions(prefix: str, n: int, *slots_of: Any) -> list[str]:
    """Names that share no slot of a sketch, where the sketch is exact."""
    names: list[str] = []
    taken: set[int] = set()
    for i in itertools.count():
        slots = {slot_of(token(f"{prefix}{i}")) for slot_of in slots_of}
        if not slots & taken:
            names.append(f"{prefix}{i}")
            taken |= slots
            if len(names) == n:
                return names
    raise AssertionError


MERCHANTS = without_collisions("m", 4, lambda t: t % MERCHANT_SLOTS, lambda t: (t >> 16) % MERCHANT_SLOTS)
CATEGORIES = without_collisions("cat", 3, lambda t: t % CATEGORY_SLOTS)
MINUTE = 60_000


@dataclass(frozen=True)
class Arrival:
    """An event with the time it arrives and, if it is a fraud, when that becomes known."""

    event: Event
    processing_time: int
    label_time: int | None = None


degrees = st.integers(-400, 400).map(lambda eighths: eighths / 8)  # exact in the 32 bits of a state
amounts = st.one_of(st.sampled_from([5.0, 9.99, 10.0, 100.0]), st.integers(1, 2_000_000).map(lambda minor: minor / 100))


@st.composite
def arrivals(draw: st.DrawFn, most: int, lateness: int, step: int) -> list[Arrival]:
    """A stream in the order of arrival, up to `step` ms apart, each up to `lateness` ms after it happened."""
    stream = []
    now = START + 40 * DAY
    for i in range(draw(st.integers(1, most))):
        now += draw(st.sampled_from([0, 1000, 20 * MINUTE, step // 3, step]))
        event = Event(
            id=f"t{i}",
            time=now - (draw(st.integers(0, lateness)) if lateness and draw(st.booleans()) else 0),
            amount=draw(amounts),
            customer=draw(st.sampled_from(["anna", "ben"])),
            merchant=draw(st.sampled_from([*MERCHANTS, None])),
            category=draw(st.sampled_from([*CATEGORIES, None])),
            device=draw(st.sampled_from(["phone", "laptop", None])),
            latitude=draw(st.one_of(st.just(math.nan), degrees)),
            longitude=draw(degrees),
            merchant_latitude=draw(st.one_of(st.just(math.nan), degrees)),
            merchant_longitude=draw(degrees),
        )
        label_time = event.time + draw(st.integers(0, 4 * DAY)) if draw(st.integers(0, 4)) == 0 else None
        stream.append(Arrival(event, now, label_time))
    return stream


def by_oracle(stream: list[Arrival]) -> list[dict[str, float]]:
    oracle = Oracle(QUANTILES)
    waiting = sorted([a for a in stream if a.label_time is not None], key=lambda a: a.label_time or 0)
    rows = []
    for arrival in stream:
        while waiting and (waiting[0].label_time or 0) <= arrival.processing_time:
            fraud = waiting.pop(0)
            oracle.mark_fraud(fraud.event, fraud.label_time or 0)
        rows.append(oracle.features(arrival.event))
        oracle.tell(arrival.event)
    return rows


def records_of(events: list[Event]) -> Any:
    return np.array(
        [
            (
                e.time,
                e.amount,
                e.latitude,
                e.longitude,
                e.merchant_latitude,
                e.merchant_longitude,
                token(e.id),
                token(e.customer),
                token(e.merchant),
                token(e.category),
                token(e.device),
            )
            for e in events
        ],
        TRANSACTION,
    )


def places_of(names: list[str | None]) -> tuple[int, Any]:
    known = {name: i for i, name in enumerate(dict.fromkeys(n for n in names if n is not None))}
    return len(known), np.array([-1 if n is None else known[n] for n in names], np.int64)


def by_engine(stream: list[Arrival]) -> Any:
    events = [a.event for a in stream]
    n_customers, customer_of = places_of([e.customer for e in events])
    n_merchants, merchant_of = places_of([e.merchant for e in events])
    frauds = sorted((a.label_time, i) for i, a in enumerate(stream) if a.label_time is not None)
    X = np.empty((len(stream), len(HISTORY_FEATURES)))
    FEATURIZER.walk(
        new_states(CUSTOMER, n_customers),
        new_states(MERCHANT, n_merchants),
        records_of(events),
        customer_of,
        merchant_of,
        np.arange(len(stream)),
        X,
        np.array([a.processing_time for a in stream], np.int64),
        np.array([i for _, i in frauds], np.int64),
        np.array([at for at, _ in frauds], np.int64),
    )
    return X


def assert_equal_rows(stream: list[Arrival]) -> None:
    X, expected = by_engine(stream), by_oracle(stream)
    for i, row in enumerate(expected):
        assert row.keys() == HISTORY_FEATURES.keys()
        for j, name in enumerate(HISTORY_FEATURES):
            near = 2e-3 if name.endswith("_km") else 0.2 if name.endswith("_kmh") else 0.0  # metres are rounded
            assert X[i, j] == pytest.approx(row[name], rel=1e-9, abs=near or 1e-9, nan_ok=True), (i, name)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(arrivals(most=60, lateness=0, step=9 * 60 * MINUTE))
def test_engine_equals_oracle_in_order(stream: list[Arrival]) -> None:
    """Streams longer than the rings, over up to three weeks."""
    assert_equal_rows(stream)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(arrivals(most=MERCHANT_RING, lateness=5 * DAY, step=3 * DAY))
def test_engine_equals_oracle_out_of_order(stream: list[Arrival]) -> None:
    """Arrivals up to five days late, in streams that the rings hold, over up to seven weeks."""
    assert_equal_rows(stream)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(arrivals(most=120, lateness=MINUTE, step=MINUTE), st.integers(1, RING))
def test_engine_equals_oracle_in_a_burst(stream: list[Arrival], n_days: int) -> None:
    """A card tested a hundred times in an hour: more than the ring in every window, order shuffled in a minute."""
    one = [replace(a, event=replace(a.event, customer="anna", merchant=MERCHANTS[0])) for a in stream]
    X, expected = by_engine(one), by_oracle(one)
    for name in ("customer_count_30d", "customer_count_7d", "merchant_count_1h", "merchant_count_30d"):
        j = list(HISTORY_FEATURES).index(name)
        assert X[:, j].tolist() == [row[name] for row in expected], name


def test_the_oracle_is_not_the_engine() -> None:
    """The comparison notices a wrong value of any feature."""
    rng = np.random.default_rng(3)
    stream = [
        Arrival(Event(f"t{i}", START + i * 3_700_000, float(rng.integers(1, 500)), "anna", MERCHANTS[i % 2], "cat0"), 0)
        for i in range(40)
    ]
    stream = [replace(a, processing_time=a.event.time) for a in stream]
    assert_equal_rows(stream)
    wrong = [
        replace(a, event=replace(a.event, amount=a.event.amount + 0.01)) if i == 20 else a for i, a in enumerate(stream)
    ]
    X, expected = by_engine(wrong), by_oracle(stream)
    j = list(HISTORY_FEATURES).index("customer_amount_mean_30d")
    assert X[20, j] == expected[20]["customer_amount_mean_30d"]
    assert X[21, j] != expected[21]["customer_amount_mean_30d"]


def told(stream: list[Arrival]) -> tuple[bytes, bytes]:
    """The states of one customer and one merchant who were told a stream, and all its frauds."""
    customers, merchants = new_states(CUSTOMER, 1), new_states(MERCHANT, 1)
    zeros = np.zeros(len(stream), np.int64)
    apply_transactions(customers, merchants, zeros, zeros, records_of([a.event for a in stream]))
    of = np.array([i for i, a in enumerate(stream) if a.label_time is not None], np.int64)
    label_times = np.array([a.label_time for a in stream if a.label_time is not None], np.int64)
    does, in_effect = np.full(len(of), MARK_FRAUD, np.int64), np.zeros(len(of), np.uint8)
    transactions = records_of([a.event for a in stream])
    apply_labels(customers, merchants, transactions, zeros, zeros, of, label_times, does, in_effect, 0, len(of))
    return customers.tobytes(), merchants.tobytes()


@settings(derandomize=True, max_examples=150, deadline=None)
@given(arrivals(most=60, lateness=20 * DAY, step=5 * DAY), st.randoms(use_true_random=False))
def test_a_state_depends_on_what_it_was_told_and_not_on_the_order(stream: list[Arrival], random: Any) -> None:
    shuffled = list(stream)
    random.shuffle(shuffled)
    assert told(shuffled) == told(stream)


def test_a_transaction_without_merchant_knows_nothing_of_another_one() -> None:
    """Even right after a late one, whose merchant had to be wound back."""
    late = [
        Arrival(Event("z", START - DAY, 10.0, "anna", MERCHANTS[0]), START),
        Arrival(Event("a", START + DAY, 10.0, "anna", MERCHANTS[0]), START + DAY),
        Arrival(Event("b", START, 10.0, "anna", MERCHANTS[0]), START + DAY),
        Arrival(Event("c", START + DAY, 10.0, "anna", None), START + DAY),
    ]
    j = list(HISTORY_FEATURES).index("merchant_age_days")
    assert math.isnan(by_engine(late)[3, j])
    assert_equal_rows(late)


def test_a_customer_who_was_away_is_not_seen_through_old_days() -> None:
    """Days older than the ring of days are gone, not counted as new ones."""
    gap = (DAYS + 3) * DAY
    stream = [
        Arrival(Event(f"t{i}", START + (i // 5) * gap + i * MINUTE, 10.0 + i, "anna", MERCHANTS[0]), START + 3 * gap)
        for i in range(15)
    ]
    assert_equal_rows(stream)


def test_states_are_bounded() -> None:
    assert CUSTOMER.itemsize < 2000
    assert MERCHANT.itemsize < 2000
    many = [
        Arrival(Event(f"t{i}", START + i * MINUTE, 1e9, "anna", MERCHANTS[0], CATEGORIES[0]), 0) for i in range(70_000)
    ]
    customer, merchant = told(many)
    assert len(customer) == CUSTOMER.itemsize
    c = np.frombuffer(customer, CUSTOMER)[0]
    assert c["count"] == 70_000
    assert c["category_count"].max() == 65_535  # counters stop, they do not wrap
    assert c["merchant_count"].max() == 255
    assert np.frombuffer(merchant, MERCHANT)["count"] == 70_000


def test_counts_of_frauds_stop_where_their_counters_end() -> None:
    event = Event("a", START, 10.0, "anna", MERCHANTS[0])
    customer, merchant = told([Arrival(event, START, START)] * 300)
    assert np.frombuffer(customer, CUSTOMER)["day_fraud"].max() == 255
    assert np.frombuffer(merchant, MERCHANT)["day_fraud"].max() == 300
    assert np.frombuffer(customer, CUSTOMER)["fraud_count"] == 300


def test_an_encoded_state_says_its_version() -> None:
    stream = [Arrival(Event("a", START, 10.0, "anna", MERCHANTS[0]), START)]
    state = np.frombuffer(told(stream)[0], CUSTOMER)
    blob = encode(state[0])
    assert decode([blob, None], CUSTOMER).tobytes() == state.tobytes() + new_states(CUSTOMER, 1).tobytes()
    for broken in (b"\x63" + blob[1:], blob[:-1]):
        with pytest.raises(StoreError, match="a stored state has version"):
            decode([broken], CUSTOMER)


@pytest.mark.parametrize(
    ("amount", "kept"),
    [
        *((1e-300, 1), (0.004, 1), (0.015, 2), (48.2, 4820), (42_949_672.94, 4_294_967_294)),
        *((amount, 4_294_967_295) for amount in (42_949_672.95, 1e15, 9.3e16, 1e17, 1.7e308)),
    ],
)
def test_an_amount_beyond_what_states_keep_is_the_largest_they_keep(amount: float, kept: int) -> None:
    assert minor_units(amount) == cast(Any, minor_units).py_func(amount) == kept
