"""Labels that are corrected, taken back and told twice: the histories follow the one that stands, to the byte."""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud.decisions.labels import Label, known_since, label_in_effect
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError
from fraud.features.featurizer import Featurizer
from fraud.history.updates import minor_units
from fraud.schema import Feature, FeatureSpec
from fraud.stores import labelling
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import States, Store
from fraud.stores.states import apply_transactions
from tests.tiny import AMOUNT_QUANTILES, START_MS
from training.backfill import states_of
from training.replay import arrays_of, replay

DAY_MS = 86_400_000
N = 8
runs = itertools.count()


def table_of(run: str, n: int = N) -> pd.DataFrame:
    """A canonical table of two customers and two merchants, the last transaction without one."""
    rng = np.random.default_rng(5)
    merchants = [f"{run}m{i % 2}" for i in range(n - 1)] + [None]
    return pd.DataFrame(
        {
            "transaction_id": [f"{run}t{i}" for i in range(n)],
            "event_time_ms": START_MS + np.cumsum(rng.integers(0, DAY_MS, n)),
            "amount": [10.0, 20.0, 20.0, 5.0, *rng.uniform(1, 99, n - 4)],
            "customer_id": pd.Categorical([f"{run}c{i // 2 % 2}" for i in range(n)]),
            "merchant_id": pd.Categorical(merchants),
            "label": 0,
            "label_time_ms": 0,
        }
    ).assign(processing_time_ms=lambda table: table["event_time_ms"])


def rows_of(table: pd.DataFrame) -> list[Any]:
    return [*table.itertuples()]


def records_of(table: pd.DataFrame) -> list[DecisionRecord]:
    return [
        DecisionRecord(
            *(row.transaction_id, b"", "m", "sha256:0", b"", 0.0, 0.5, False, "low", "approve", []),
            event_time_ms=row.event_time_ms,
            processing_time_ms=row.processing_time_ms,
            request_id="",
            customer_id=str(row.customer_id),
            merchant_id=None if pd.isna(row.merchant_id) else str(row.merchant_id),
            amount=row.amount,
        )
        for row in rows_of(table)
    ]


async def record(store: Store, table: pd.DataFrame) -> None:
    await store.record(records_of(table), arrays_of(table).transactions)


async def assert_follows(store: Store, states: States) -> None:
    """The store's states are those of the offline replay."""
    recalled = await store.recall([], [*states.customer_ids], [*states.merchant_ids])
    assert recalled.histories.customers.tobytes() == states.customers.tobytes()
    assert recalled.histories.merchants.tobytes() == states.merchants.tobytes()


labels_of_one = st.tuples(
    st.integers(0, N - 1),
    st.sampled_from([True, True, False, None]),
    st.integers(-2, 45),  # the day it becomes known, some before the event
    st.integers(0, 3),  # when it arrives
)


@pytest.fixture
def store_and_runner(opened: Callable[[], Store]) -> Any:
    runner = asyncio.Runner()
    store = opened()
    yield store, runner
    runner.run(store.close())
    runner.close()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(told=st.lists(labels_of_one, max_size=14), random=st.randoms(use_true_random=False))
def test_in_any_order_states_are_those_of_the_offline_replay(
    store_and_runner: tuple[Store, asyncio.Runner], told: list[Any], random: Any
) -> None:
    store, runner = store_and_runner
    table = table_of(f"p{next(runs)}-{id(store)}-")
    names = table["transaction_id"].tolist()
    labels = [Label(names[i], is_fraud, START_MS + day * DAY_MS, at) for i, is_fraud, day, at in told]

    async def tell() -> None:
        await record(store, table)
        arriving = [*labels, *labels[:3]]  # some of them twice
        random.shuffle(arriving)
        for some in (arriving[:4], arriving[4:5], arriving[5:]):
            await store.apply_labels(some)
        await assert_follows(store, states_of(table, 2**62, labels=labels))
        for name in names:
            kept = await store.labels(name)
            assert {label.order for label in kept} == {label.order for label in labels if label.transaction_id == name}

    runner.run(tell())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(told=st.lists(labels_of_one, max_size=14))
def test_what_the_replay_ends_with_is_what_stands(told: list[Any]) -> None:
    """Against a plain computation: each transaction's label that stands, told alone."""
    table = table_of("")
    labels = [Label(f"t{i}", is_fraud, START_MS + day * DAY_MS, at) for i, is_fraud, day, at in told]
    of_each = [[label for label in labels if label.transaction_id == name] for name in table["transaction_id"]]
    replayed = states_of(table, 2**62, labels=labels)
    for row, stands in zip(rows_of(table), map(label_in_effect, of_each), strict=True):
        assert (known_since([x for x in labels if x.transaction_id == row.transaction_id]) is not None) == bool(
            stands and stands.is_fraud
        )
    known = [known_since(some) for some in of_each]
    frauds = [
        (row.event_time_ms, row.amount, str(row.customer_id), max(since, row.event_time_ms))
        for row, since in zip(rows_of(table), known, strict=True)
        if since is not None
    ]
    for name, state in zip(replayed.customer_ids, replayed.customers, strict=True):
        own = [fraud for fraud in frauds if fraud[2] == name]
        assert state["fraud_count"] == len(own)
        assert state["day_fraud"].sum() == sum(time // DAY_MS > state["last_day"] - 38 for time, *_ in own)
        assert state["day_label"].sum() == sum(since // DAY_MS > state["last_day"] - 38 for *_, since in own)
        latest = max(((time, round(amount * 100)) for time, amount, *_ in own), default=(-(2**63), 0))
        assert (state["last_fraud_time"], state["last_fraud_amount"]) == latest
    assert len(replayed.frauds) == len(frauds)


def test_features_follow_a_correction_as_in_the_replay(tmp_path: Path) -> None:
    """A fraud that is taken back counts until then, and no longer: the walk tells each label at its time."""
    table = table_of("")
    at = table["event_time_ms"].tolist()
    labels = [Label("t0", True, at[2]), Label("t0", None, at[5]), Label("t4", True, at[5])]
    spec = FeatureSpec("transaction", (Feature("merchant_fraud_count_lifetime", "history"),))
    X = replay(table, Featurizer(spec, AMOUNT_QUANTILES), slice(None), labels=labels)
    assert X[:7, 0].tolist() == [0, 0, 1, 0, 1, 0, 1]  # t0 and t4 are of the even merchant, as t6 is


@pytest.mark.parametrize(
    ("second", "outcomes"),
    [
        (Label("t1", False, START_MS + 5), ["applied", "applied"]),
        (Label("t1", None, START_MS + 5), ["applied", "applied"]),
        (Label("t1", True, START_MS + 5), ["applied", "known"]),
        (Label("t1", False, START_MS), ["applied", "superseded"]),
        (Label("t1", False, START_MS + 1, 9), ["applied", "applied"]),
        (Label("nobody's", False, START_MS), ["applied", "unknown"]),
    ],
)
def test_what_becomes_of_a_label(tmp_path: Path, second: Label, outcomes: list[str]) -> None:
    async def run() -> None:
        store = open_store("sqlite:", StoreOptions(tmp_path, durable=False))
        await record(store, table_of(""))
        assert await store.apply_labels([Label("t1", True, START_MS + 1), second]) == outcomes
        assert (await store.apply_labels([second]))[0] in ("known", "unknown", "superseded")
        await store.close()

    asyncio.run(run())


def test_a_reset_customer_is_not_told_what_was_forgotten(opened: Callable[[], Store]) -> None:
    async def run() -> None:
        store = opened()
        table = table_of(f"r{next(runs)}-{id(store)}-")
        await record(store, table)
        name = table["transaction_id"][0]
        await store.apply_labels([Label(name, True, START_MS)])
        await store.reset(str(table["customer_id"][0]))
        assert await store.apply_labels([Label(name, False, START_MS + 1)]) == ["applied"]
        recalled = await store.recall([], [str(table["customer_id"][0])], [str(table["merchant_id"][0])])
        assert recalled.histories.customers["fraud_count"].tolist() == [0]
        assert recalled.histories.merchants["fraud_count"].tolist() == [0]
        await store.close()

    asyncio.run(run())


def test_decisions_of_features_models_are_labelled(opened: Callable[[], Store]) -> None:
    async def run() -> None:
        store = opened()
        name = f"application-{id(store)}-{next(runs)}"
        decided = DecisionRecord(name, b"", "loans", "sha256:0", b"", 0, 0.5, False, "low", "approve", [], 0, 1, "")
        await store.record([decided], None)
        assert await store.apply_labels([Label(name, True, START_MS)]) == ["unknown"]  # a transaction with a history
        label = Label(name, True, START_MS, 7, "case", "ann", model="loans")
        assert await store.apply_labels([label, label]) == ["applied", "known"]
        assert await store.labels(decided.key) == [label]
        await store.close()

    asyncio.run(run())


def test_frauds_of_a_backfill_are_known_when_the_last_one_is_taken_back(opened: Callable[[], Store]) -> None:
    async def run() -> None:
        store = opened()
        table = table_of(f"b{next(runs)}-{id(store)}-")
        past, rest = table[:4].copy(), table[4:]
        for column in ("customer_id", "merchant_id"):
            past[column] = past[column].cat.remove_unused_categories()
        names = table["transaction_id"].tolist()
        frauds = [Label(names[i], True, START_MS + 9 * DAY_MS, i) for i in range(6)]
        back = [Label(names[i], False, START_MS + 20 * DAY_MS) for i in (5, 4)]
        await store.backfill(states_of(past, 2**62, labels=frauds[:4]))
        await record(store, rest)
        assert await store.apply_labels([*frauds[4:], *back]) == ["applied"] * 4
        await assert_follows(store, states_of(table, 2**62, labels=[*frauds, *back]))
        await store.close()

    asyncio.run(run())


def test_a_state_of_a_later_release_concerns_its_customer_alone(tmp_path: Path) -> None:
    """It is scored as nobody's, its bytes stay as they are, and the rest of the batch knows nothing of it."""
    later = b"\x09 of a later release"
    table = table_of("")

    def stored() -> bytes:
        with closing(sqlite3.connect(tmp_path / "history.db")) as db:
            return bytes(db.execute("SELECT state FROM customers WHERE id = 'c0'").fetchone()[0])

    async def run() -> None:
        store = open_store("sqlite:", StoreOptions(tmp_path, durable=False))
        await record(store, table[:3])
        await store.expire(0)  # what changes states brings them up to date first
        with closing(sqlite3.connect(tmp_path / "history.db")) as db, db:
            db.execute("UPDATE customers SET state = ? WHERE id = 'c0'", (later,))
        recalled = await store.recall([], ["c1", "c0"], ["m0", "m1"])
        assert recalled.histories.customers["count"].tolist() == [1, 0]
        assert recalled.is_unread("c0", "m0")
        assert not recalled.is_unread("c1", "m1")
        await record(store, table[3:])
        assert await store.apply_labels([Label("t0", True, START_MS)]) == ["applied"]
        assert await store.expire(2**62) == 3  # those it can read
        assert stored() == later
        with pytest.raises(StoreError, match="a stored state has version 9 and 20 bytes; this release reads"):
            await store.profile("c0")
        await store.close()

    asyncio.run(run())


def test_a_store_in_use_waits_for_no_compiler(tmp_path: Path) -> None:
    """Its calls have a budget of two seconds, and a first label compiled for four."""
    own = [kernel for kernel in vars(labelling).values() if getattr(kernel, "__module__", "") == labelling.__name__]
    kernels = [kernel for kernel in own if hasattr(kernel, "signatures")] + [apply_transactions, minor_units]
    assert len(kernels) == 7

    async def run() -> None:
        store = open_store("sqlite:", StoreOptions(tmp_path, durable=False))
        compiled = [list(kernel.signatures) for kernel in kernels]
        assert all(compiled)
        await record(store, table_of(""))
        labels = [Label("t1", True, START_MS + 1), Label("t2", True, START_MS + 2), Label("t1", None, START_MS + 3)]
        assert await store.apply_labels(labels) == ["applied"] * 3
        await store.close()
        assert [list(kernel.signatures) for kernel in kernels] == compiled

    asyncio.run(run())
