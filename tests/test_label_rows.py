"""Several label rows of one transaction in a table: the latest stands, and the history is told each at its time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud.decisions.labels import Label, known_since, label_in_effect
from fraud.errors import DataError
from fraud.features.featurizer import Featurizer
from fraud.schema import Feature, FeatureSpec
from fraud.stores.protocol import Store
from tests.test_corrected_labels import DAY_MS, assert_follows, record, runs, store_and_runner, table_of
from tests.tiny import AMOUNT_QUANTILES
from training.backfill import states_of
from training.data import load_features, load_transactions
from training.mapping import Mapping
from training.replay import replay

assert store_and_runner
N = 7
MAPPING: dict[str, Any] = {
    "event_time": {"column": "when", "unit": "ms"},
    "transaction_id": "id",
    "customer_id": "card",
    "merchant_id": "shop",
    "amount": "amt",
    "label": "fraud",
    "label_time": {"column": "known", "unit": "ms"},
    "label_delay": "30d",
}
SPEC = FeatureSpec(
    "transaction",
    tuple(
        Feature(name, "history")
        for name in ("merchant_fraud_count_lifetime", "customer_fraud_count_lifetime", "merchant_fraud_label_count_7d")
    ),
)


def csv_of(path: Path, table: pd.DataFrame, said: Sequence[tuple[int, bool | None, int]]) -> list[Label]:
    """Write a transaction a row, and one for each further label; return the labels as they would be told."""
    lines: list[str] = []
    labels: list[Label] = []
    names, times = table["transaction_id"].tolist(), table["event_time_ms"].tolist()

    def add(i: int, fraud: str, known: str) -> None:
        row: Any = table.iloc[i]
        amount = float(row["amount"])
        lines.append(f"{names[i]},{times[i]},{row['customer_id']},{row['merchant_id']},{amount!r},{fraud},{known}")

    for at, (i, is_fraud, days) in enumerate(said):
        known_ms = times[i] + days * DAY_MS
        add(i, "" if is_fraud is None else str(int(is_fraud)), str(known_ms))
        labels.append(Label(names[i], is_fraud, known_ms, at))
    for i in sorted({*range(N)} - {i for i, *_ in said}):
        add(i, "", "")
    path.write_text("\n".join(["id,when,card,shop,amt,fraud,known", *lines]) + "\n")
    return labels


said_of_one = st.tuples(st.integers(0, N - 1), st.sampled_from([True, True, False, None]), st.integers(0, 12))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(said_of_one, max_size=14), random=st.randoms(use_true_random=False))
def test_the_replay_of_a_table_is_what_telling_its_labels_gives(
    store_and_runner: tuple[Store, asyncio.Runner], tmp_path: Path, said: list[Any], random: Any
) -> None:
    store, runner = store_and_runner
    table = table_of(f"l{next(runs)}-{id(store)}-").iloc[:N]
    labels = csv_of(tmp_path / "t.csv", table, said)
    loaded = load_transactions(tmp_path / "t.csv", Mapping.model_validate(MAPPING), labelled=False)
    assert loaded["transaction_id"].tolist() == table["transaction_id"].tolist()
    for row in loaded.itertuples():
        own = [label for label in labels if label.transaction_id == row.transaction_id]
        stands = label_in_effect(own)
        assert row.label == (-1 if stands is None or stands.is_fraud is None else int(stands.is_fraud))
        if row.label == 1:
            assert row.label_time_ms == known_since(own)

    features = Featurizer(SPEC, AMOUNT_QUANTILES)
    told = replay(table, features, slice(None), labels=labels)
    assert replay(loaded, features, slice(None)).tobytes() == told.tobytes()

    async def tell() -> None:
        await record(store, table)
        arriving = random.sample(labels, len(labels))
        for some in (arriving[:3], arriving[3:]):
            await store.apply_labels(some)
        await assert_follows(store, states_of(loaded, 2**62))

    runner.run(tell())


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        load()
    return caught.value.message


def test_rows_that_differ_in_anything_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "id,when,card,shop,amt,fraud,known\n"
        "t1,1767225600000,c,m,10.0,1,1767312000000\n"
        "t2,1767225600001,c,m,10.0,1,1767312000000\n"
        "t1,1767225600000,c,m,10.0,0,1767398400000\n"
        "t2,1767225600001,c,m,10.5,0,1767398400000\n"
    )
    assert refusal(lambda: load_transactions(path, Mapping.model_validate(MAPPING), labelled=False)) == (
        "t.csv: column 'id' (transaction_id) must be different in each row, but for rows that differ in label and "
        "label_time alone; 1 of 3 rows breaks this: row 4 ('t2', as in row 2)"
    )
    path.write_text(path.read_text().replace("1767398400000", "1767139200000").replace("10.5", "10.0"))
    assert refusal(lambda: load_transactions(path, Mapping.model_validate(MAPPING), labelled=False)) == (
        "t.csv: column 'known' (label_time) must not be before the event_time; 2 of 4 rows break this: "
        "row 3 ('1767139200000'), row 4 ('1767139200000')"
    )


def test_a_row_that_says_nothing_takes_nothing_back(tmp_path: Path) -> None:
    """As where an export without labels, and a later one with them, are read together."""
    (tmp_path / "a.csv").write_text("id,when,card,shop,amt,fraud,known\nt1,1767225600000,c,m,10.0,,\n")
    (tmp_path / "b.csv").write_text("id,when,card,shop,amt,fraud,known\nt1,1767225600000,c,m,10.0,1,1767312000000\n")
    table = load_transactions(tmp_path, Mapping.model_validate(MAPPING), labelled=False)
    assert table[["label", "label_time_ms"]].to_numpy().tolist() == [[1, 1767312000000]]


def test_a_table_of_features_trains_on_the_label_that_stands(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text(
        "id,when,x,fraud,known\n"
        "a,1767225600000,1,1,1767312000000\n"
        "b,1767225600001,,0,1767312000000\n"
        "a,1767225600000,1,0,1767398400000\n"
        "b,1767225600001,,1,1767398400000\n"
    )
    mapping = Mapping.model_validate(
        {
            "kind": "features",
            "numeric": {"x": {"missing": "allowed"}},
            **{k: v for k, v in MAPPING.items() if k in ("event_time", "transaction_id", "label", "label_time")},
        }
    )
    with caplog.at_level(logging.INFO, "training"):
        table = load_features(tmp_path / "t.csv", mapping)
    assert table["label"].tolist() == [0, 1]
    assert table["label_time_ms"].tolist() == [1767398400000] * 2
    assert np.array_equal(table["x"], [1.0, np.nan], equal_nan=True)
    assert "t.csv: 2 rows are further labels of transactions; of each the latest label is in effect" in caplog.text
