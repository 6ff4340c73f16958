"""The simulator: the same bytes for the same seed, the advertised world, and fraud that needs history to be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fraud.errors import DataError
from fraud.simulation.simulate import Simulated, simulate_features, simulate_transactions
from fraud.simulation.typologies import TYPOLOGIES
from training.data import dataset_digest, load_features, load_transactions
from training.mapping import Mapping

EXAMPLES = Path(__file__).parent.parent / "examples"
CUSTOMERS, DAYS = 400, 60


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    return simulate_transactions(CUSTOMERS, DAYS, 3, out=tmp_path_factory.mktemp("simulated") / "t.parquet")


@pytest.fixture(scope="module")
def table(simulated: Simulated) -> pd.DataFrame:
    return pd.read_parquet(simulated.path)


@pytest.mark.parametrize("name", ["again.parquet", "again.csv"])
def test_same_seed_same_bytes(tmp_path: Path, name: str) -> None:
    digests = []
    for seed in (1, 1, 2):
        simulate_transactions(20, 10, seed, out=tmp_path / name)
        digests.append(dataset_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]


def test_csv_and_parquet_load_as_the_same_table(tmp_path: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    tables = []
    for name in ("t.parquet", "t.csv"):
        simulate_transactions(20, 30, 1, out=tmp_path / name)
        tables.append(load_transactions(tmp_path / name, mapping))
    pd.testing.assert_frame_equal(tables[0], tables[1])


def test_size_and_fraud(simulated: Simulated, table: pd.DataFrame) -> None:
    assert simulated.rows == len(table)
    assert 1.6 < len(table) / (CUSTOMERS * DAYS) < 2.2
    assert table["merchant_id"].nunique() <= 2 * CUSTOMERS
    assert 0.005 < table["is_fraud"].mean() < 0.01
    assert simulated.fraud_rows == table["is_fraud"].sum()
    counts = table["typology"].value_counts().to_dict()
    assert {name: counts[name] for name in TYPOLOGIES} == simulated.typologies
    assert min(simulated.typologies.values()) > 10
    assert (table["typology"].notna() == (table["is_fraud"] == 1)).all()


def test_labels_arrive_days_after_the_fraud(table: pd.DataFrame) -> None:
    fraud = table[table["is_fraud"] == 1]
    assert table.loc[table["is_fraud"] == 0, "label_time"].isna().all()
    delay = (fraud["label_time"] - fraud["event_time"]).dt.total_seconds() / 86_400
    assert delay.min() > 0
    assert 1 < delay.median() < 7
    assert (fraud["label_time"] >= fraud["arrival_time"]).all()


def test_rows_stand_in_order_of_arrival_and_some_come_late(table: pd.DataFrame) -> None:
    assert table["arrival_time"].is_monotonic_increasing
    late = table["arrival_time"] > table["event_time"]
    assert 0.003 < late.mean() < 0.03
    assert set(table.loc[late, "channel"]) <= {"chip", "contactless"}


def test_online_purchases_have_devices_and_no_place_of_the_merchant(table: pd.DataFrame) -> None:
    online = table["channel"].isin(["online", "app"])
    assert (table["device_id"].notna() == online).all()
    assert (table["merchant_latitude"].isna() == online).all()
    assert (table["amount"] >= 0.5).all()


def test_genuine_customers_have_habits(table: pd.DataFrame) -> None:
    genuine = table[table["is_fraud"] == 0]
    again = genuine.duplicated(["customer_id", "merchant_id"]).mean()
    assert again > 0.4
    log_amount = np.log(genuine["amount"]) - np.log(
        genuine.groupby("category", observed=True)["amount"].transform("median")
    )
    between = log_amount.groupby(genuine["customer_id"]).mean().std()
    assert 0.35 < between < 0.6


def test_each_typology_looks_as_it_is_described(table: pd.DataFrame) -> None:
    kind = {name: table[table["typology"] == name] for name in TYPOLOGIES}
    genuine = table[table["is_fraud"] == 0]
    spending = genuine.groupby("customer_id")["amount"].median()
    assert (kind["card_testing"]["amount"] <= 5).mean() > 0.7
    takeover = kind["account_takeover"]
    assert (takeover["amount"] / spending.reindex(takeover["customer_id"]).to_numpy()).median() > 3
    assert (kind["new_device_night"]["event_time"].dt.hour < 7).all()
    assert not kind["new_device_night"]["device_id"].isin(genuine["device_id"]).any()
    assert kind["stolen_card_burst"].groupby("customer_id").size().mean() > 3
    busiest = kind["compromised_merchant"].groupby("merchant_id").size()
    assert busiest.max() >= 10
    home = genuine.groupby("customer_id")[["latitude", "longitude"]].median()
    travel = kind["impossible_travel"]
    there = home.reindex(travel["customer_id"]).to_numpy()
    assert (np.abs(travel[["latitude", "longitude"]].to_numpy() - there).sum(axis=1) > 0.5).mean() > 0.95


def test_the_shipped_mapping_fits(simulated: Simulated) -> None:
    loaded = load_transactions(simulated.path, Mapping.from_yaml(EXAMPLES / "simulated.yaml"))
    assert len(loaded) == simulated.rows
    assert loaded["processing_time_ms"].is_monotonic_increasing
    assert (loaded["label"] == 1).sum() == simulated.fraud_rows
    assert "typology" not in loaded.columns


def test_features(tmp_path: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "features.yaml")
    path = tmp_path / "applications.parquet"
    simulated = simulate_features(4000, 1, out=path)
    table = load_features(path, mapping)
    assert len(mapping.further()) == 15
    assert len(table) == simulated.rows == 4000
    assert 0.02 < table["label"].mean() < 0.04
    assert table["email_domain_category"].cat.categories.tolist()[0] == "free"
    assert table["event_time_ms"].is_monotonic_increasing
    digest = dataset_digest(path)
    simulate_features(4000, 1, out=path)
    assert dataset_digest(path) == digest
    simulate_features(4000, 1, out=tmp_path / "applications.csv")
    pd.testing.assert_frame_equal(load_features(tmp_path / "applications.csv", mapping), table)


def test_arguments_out_of_range(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    with pytest.raises(DataError, match=r"^customers must be 10 or more; got 3$"):
        simulate_transactions(3, 10, 1, out=out)
    with pytest.raises(DataError, match=r"^merchants must be 12 or more; got 5$"):
        simulate_transactions(10, 10, 1, merchants=5, out=out)
    with pytest.raises(DataError, match=r"^days must be 7 or more; got 1$"):
        simulate_transactions(10, 1, 1, out=out)
    with pytest.raises(DataError, match=r"^fraud_rate must be above 0 and below 0\.5; got 0\.9$"):
        simulate_transactions(10, 10, 1, out=out, fraud_rate=0.9)
    with pytest.raises(DataError, match=r"^rows must be 100 or more; got 5$"):
        simulate_features(5, 1, out=out)
    with pytest.raises(DataError, match=r"^t\.xlsx: the simulator writes \.parquet or \.csv$"):
        simulate_features(500, 1, out=tmp_path / "t.xlsx")
