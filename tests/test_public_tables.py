"""Five public tables, as their files are shaped, train from their example mappings with one command each.

The tables are made here, small and with invented values: their columns, notations and peculiarities are what counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from fraud.cli.main import main
from fraud.decisions.record import fingerprint
from fraud.features.featurizer import Histories
from fraud.models.scorer import Scorer
from tests.conftest import EXAMPLES
from tests.table_rows import expect_the_same_rows, rows_of_file
from training.data import Mapping, load_table
from training.proposal import propose
from training.replay import instances_of

RNG = np.random.default_rng


def sparkov(folder: Path) -> str:
    """The generator's output: a file a profile and part of the customers, fields separated by `|`."""
    rng, n = RNG(1), 1500
    for part in range(6):
        start = np.sort(rng.integers(1_704_067_200, 1_704_067_200 + 60 * 86_400, n))
        fraud = rng.random(n) < 0.05
        pd.DataFrame(
            {
                "ssn": "900-00-0000",
                "cc_num": 4_000_000_000_000_000 + part * 10 + rng.integers(0, 10, n),
                "first": "Ann",
                "city": "Ames",
                "state": rng.choice(["IA", "OH"], n),
                "lat": 42.0,
                "long": -93.6,
                "city_pop": rng.integers(100, 90_000, n),
                "job": rng.choice(["Nurse", "Pilot"], n),
                "dob": "1980-01-01",
                "trans_num": [f"{part:02x}{i:030x}" for i in range(n)],
                "trans_date": "2024-01-01",
                "trans_time": "00:00:00",
                "unix_time": start,
                "category": rng.choice(["grocery_pos", "shopping_net"], n),
                "amt": np.round(rng.lognormal(3 + 2 * fraud, 1), 2).clip(0.01),
                "is_fraud": fraud.astype(int),
                "merchant": rng.choice([f"fraud_Shop {i}" for i in range(30)], n),
                "merch_lat": 42.1,
                "merch_long": -93.5,
            }
        ).to_csv(folder / f"adults_{part}-{part + 9}.csv", sep="|", index=False)
    return str(folder / "adults_*.csv")


def paysim(folder: Path) -> str:
    rng, n = RNG(2), 6000
    fraud = rng.random(n) < 0.04
    amount = np.round(rng.lognormal(9 + 2 * fraud, 1), 2)
    amount[7] = 0
    before = np.round(rng.lognormal(10, 1, n), 2)
    table = pd.DataFrame(
        {
            "step": np.sort(rng.integers(1, 744, n)),
            "type": np.where(fraud, "TRANSFER", rng.choice(["PAYMENT", "CASH_OUT", "TRANSFER"], n)),
            "amount": amount,
            "nameOrig": [f"C{i}" for i in rng.integers(0, 4000, n)],
            "oldbalanceOrg": before,
            "newbalanceOrig": (before - amount).clip(0),
            "nameDest": [f"M{i}" for i in rng.integers(0, 300, n)],
            "oldbalanceDest": 0.0,
            "newbalanceDest": amount,
            "isFraud": fraud.astype(int),
            "isFlaggedFraud": 0,
        }
    )
    table.to_csv(folder / "paysim.csv", index=False)
    return str(folder / "paysim.csv")


def tabformer(folder: Path) -> str:
    rng, n = RNG(3), 6000
    when = pd.date_range("2019-09-20", "2019-12-20", periods=n).floor("min")
    fraud = rng.random(n) < 0.05
    amounts = np.round(rng.lognormal(3 + 2 * fraud, 1), 2)
    refund = rng.random(n) < 0.03
    table = pd.DataFrame(
        {
            "User": rng.integers(0, 60, n),
            "Card": rng.integers(0, 3, n),
            "Year": when.year,
            "Month": when.month,
            "Day": when.day,
            "Time": when.strftime("%H:%M"),
            "Amount": [f"${'-' if back else ''}{amount:.2f}" for amount, back in zip(amounts, refund, strict=True)],
            "Use Chip": rng.choice(["Swipe Transaction", "Chip Transaction", "Online Transaction"], n),
            "Merchant Name": rng.choice(RNG(4).integers(-(2**63), 2**63 - 1, 40), n),
            "Merchant City": "La Verne",
            "Merchant State": rng.choice(np.array(["CA", "NY", None], object), n),
            "Zip": 91750.0,
            "MCC": rng.choice([5300, 5411, 4829], n),
            "Errors?": rng.choice(np.array([None, "Bad PIN", "Insufficient Balance"], object), n, p=[0.9, 0.05, 0.05]),
            "Is Fraud?": np.where(fraud, "Yes", "No"),
        }
    )
    assert ((table["Month"] == 11) & (table["Day"] == 3) & table["Time"].str.startswith("01:")).any()  # comes twice
    table.to_csv(folder / "card_transaction.v1.csv", index=False)
    return str(folder / "card_transaction.v1.csv")


def ieee_cis(folder: Path) -> str:
    rng, n = RNG(5), 3000
    fraud = rng.random(n) < 0.08

    def holed(values: Any) -> Any:
        return np.where(rng.random(n) < 0.3, np.nan, values)

    columns: dict[str, Any] = {
        "TransactionID": np.arange(2_987_000, 2_987_000 + n),
        "isFraud": fraud.astype(int),
        "TransactionDT": np.sort(rng.integers(86_400, 86_400 + 60 * 86_400, n)),
        "TransactionAmt": np.round(rng.lognormal(4 + fraud, 1), 3),
        "ProductCD": rng.choice(["W", "C", "H"], n),
        "card1": rng.integers(1000, 1200, n),
        "card2": holed(rng.integers(100, 120, n)),
        "card3": 150.0,
        "card4": rng.choice(np.array(["visa", "mastercard", None], object), n),
        "card5": 226.0,
        "card6": rng.choice(["debit", "credit"], n),
        "addr1": holed(rng.integers(100, 400, n)),
        "addr2": 87.0,
        "dist1": holed(rng.integers(0, 900, n)),
        "dist2": np.nan,
        "P_emaildomain": rng.choice(np.array(["gmail.com", "yahoo.com", None], object), n),
        "R_emaildomain": rng.choice(np.array(["gmail.com", None], object), n),
    }
    columns |= {f"C{i}": rng.integers(0, 9, n).astype(float) for i in range(1, 15)}
    columns |= {f"D{i}": holed(rng.integers(0, 500, n)) for i in range(1, 16)}
    columns |= {f"M{i}": rng.choice(np.array(["T", "F", None], object), n) for i in range(1, 10)}
    columns |= {f"V{i}": holed(rng.integers(0, 5, n)) for i in range(1, 340)}
    assert len(columns) == 394
    pd.DataFrame(columns).to_csv(folder / "train_transaction.csv", index=False)
    return str(folder / "train_transaction.csv")


def baf(folder: Path) -> str:
    rng, n = RNG(6), 4000
    fraud = rng.random(n) < 0.04

    def months(high: int) -> Any:
        return np.where(rng.random(n) < 0.4, -1, rng.integers(0, high, n))

    def flag(share: float) -> Any:
        return (rng.random(n) < share).astype(int)

    pd.DataFrame(
        {
            "fraud_bool": fraud.astype(int),
            "income": rng.integers(1, 10, n) / 10,
            "name_email_similarity": rng.random(n),
            "prev_address_months_count": months(380),
            "current_address_months_count": months(420),
            "customer_age": rng.integers(1, 10, n) * 10,
            "days_since_request": rng.exponential(1, n),
            "intended_balcon_amount": rng.normal(10, 20, n),
            "payment_type": rng.choice(["AA", "AB", "AC"], n),
            "zip_count_4w": rng.integers(1, 6000, n),
            "velocity_6h": rng.normal(5000, 3000, n),
            "velocity_24h": rng.normal(4000, 1000, n),
            "velocity_4w": rng.normal(4000, 900, n),
            "bank_branch_count_8w": rng.integers(0, 2000, n),
            "date_of_birth_distinct_emails_4w": rng.integers(0, 30, n),
            "employment_status": rng.choice(["CA", "CB"], n),
            "credit_risk_score": rng.integers(-170, 390, n) + 60 * fraud,
            "email_is_free": flag(0.5),
            "housing_status": rng.choice(["BA", "BB"], n),
            "phone_home_valid": flag(0.4),
            "phone_mobile_valid": flag(0.9),
            "bank_months_count": months(32),
            "has_other_cards": flag(0.2),
            "proposed_credit_limit": rng.choice([200.0, 500.0, 1500.0], n),
            "foreign_request": flag(0.03),
            "source": rng.choice(["INTERNET", "TELEAPP"], n, p=[0.9, 0.1]),
            "session_length_in_minutes": rng.exponential(7, n),
            "device_os": rng.choice(["linux", "windows", "other"], n),
            "keep_alive_session": flag(0.6),
            "device_distinct_emails_8w": rng.choice([-1, 0, 1, 2], n),
            "device_fraud_count": 0,
            "month": np.sort(rng.integers(0, 8, n)),
        }
    ).to_csv(folder / "Base.csv", index=False)
    return str(folder / "Base.csv")


TABLES: dict[str, Callable[[Path], str]] = {
    "sparkov": sparkov,
    "paysim": paysim,
    "tabformer": tabformer,
    "ieee_cis": ieee_cis,
    "baf": baf,
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", TABLES)
def test_a_public_table_trains_from_its_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bento"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ("-d", TABLES[name](tmp_path), "-m", EXAMPLES / f"{name}.yaml", "--config", EXAMPLES / "quick.yaml")
    assert run("train", *given, "--runs", tmp_path / "runs") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "run.json").read_text())["metrics"]["average_precision"]["value"] > 0.05
    expect_rows_of_the_file_read_alike(folder / "bundle", given[1], Mapping.from_yaml(given[3]))


def expect_rows_of_the_file_read_alike(bundle: Path, files: str, mapping: Mapping) -> None:
    """Send rows of the file to its model as they are; features and probabilities are those of training's reader."""
    scorer = Scorer.load(bundle)
    table = load_table(files, mapping)
    spec = scorer.spec
    for feature in spec.requested:
        if feature.type == "categorical" and feature.unknown == "refuse":
            table = table[table[feature.name].isin(feature.categories) | table[feature.name].isna()]
    table = table.head(700)
    sent = {}
    for number, row in enumerate(rows_of_file(files), 1):
        name = {} if mapping.transaction_id is not None else {"transaction_id": f"row-{number}"}
        column = None if mapping.transaction_id is None else mapping.transaction_id.name
        sent[name.get("transaction_id") or row[column or ""]] = row | name
    quantiles = scorer.bundle.preprocessor.amount_quantiles
    X, rows = expect_the_same_rows(table, spec, [sent[name] for name in table["transaction_id"]], quantiles)
    own = [scorer.decoder.decode(instance, "$") for instance in instances_of(table, spec)]
    again = (
        scorer.featurizer.ready(own) if spec.kind == "features" else scorer.featurizer.advance(own, Histories.new(own))
    )
    np.testing.assert_array_equal(scorer.score(again).decision_score, scorer.score(X).decision_score)
    if mapping.currency is None:  # which the file does not hold
        assert [fingerprint(row) for row in own] == [fingerprint(row) for row in rows]


def test_what_the_examples_make_of_their_tables(tmp_path: Path) -> None:
    loaded = {
        name: load_table(make(tmp_path), Mapping.from_yaml(EXAMPLES / f"{name}.yaml")) for name, make in TABLES.items()
    }
    assert len(loaded["sparkov"]) == 6 * 1500
    assert loaded["paysim"].attrs["dropped_zero_amounts"] == 1
    assert pd.Timestamp(int(loaded["paysim"]["event_time_ms"].max()), unit="ms").strftime("%Y-%m") == "2024-01"
    assert "newbalanceOrig" not in loaded["paysim"].columns
    tabformer_ = loaded["tabformer"]
    assert tabformer_.attrs["dropped_negative_amounts"] > 100
    assert tabformer_["customer_id"].cat.categories[:3].tolist() == ["0-0", "0-1", "0-2"]
    assert (tabformer_["merchant_id"].astype(str).str.len() > 15).any()
    ieee = loaded["ieee_cis"]
    assert sum(column.startswith("V") for column in ieee.columns) == 339
    assert len(ieee.columns) == 8 + 339 + 14 + 15 + 2 + 9 + 4  # roles, V, C, D, dist, M, others
    assert any(customer.endswith("-") for customer in ieee["customer_id"].cat.categories)
    assert np.isnan(loaded["baf"]["prev_address_months_count"]).mean() > 0.3
    assert loaded["baf"]["event_time_ms"].nunique() == 8


@pytest.mark.parametrize("name", TABLES)
def test_what_inspect_proposes_loads(name: str, tmp_path: Path) -> None:
    files = TABLES[name](tmp_path)
    text = propose(files)
    (tmp_path / "proposed.yaml").write_text(text, encoding="utf-8")
    mapping = Mapping.from_yaml(tmp_path / "proposed.yaml")
    example = Mapping.from_yaml(EXAMPLES / f"{name}.yaml")
    assert mapping.kind == example.kind
    assert mapping.label == example.label
    assert len(load_table(files, mapping)) > 1000
    for role in ("customer_id", "merchant_id", "amount", "transaction_id"):
        if name != "ieee_cis":
            assert getattr(mapping, role) == getattr(example, role), role
    assert "isFlaggedFraud" not in yaml.safe_dump(mapping.model_dump())


def test_inspect_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tabformer(tmp_path)
    assert run("inspect", files) == 0
    shown = capsys.readouterr().out
    for line in (
        "event_time: {columns: [Year, Month, Day, Time], format: '%Y %m %d %H:%M', timezone: UTC} "
        "# where did the clock stand?",
        "customer_id: {columns: [User, Card]} # or the user alone",
        "numbers: {sign: $} # of every column of numbers",
        "label_delay: 7d # after how long is a fraud known?",
    ):
        assert line in shown.splitlines()
    out = tmp_path / "mine.yaml"
    assert run("inspect", files, "--out", out) == 0
    assert out.read_text() == shown
    assert run("inspect", files, "--out", out) == 1
    assert f"error: {out} is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "t.csv: cannot be read as CSV: Empty CSV file"),
        (b"a,b\n", "t.csv: the file has no rows"),
        (b"shop,amount\nCaf\xe9,1\n", "t.csv: column 'shop' is not UTF-8; 1 of 1 rows breaks this: row 1"),
        (b'a,b\n1,"x\n' + b"2,y\n" * 9, None),
        (b"label\n0\n1\n", "t.csv: no mapping can be proposed: no features; list them under"),
    ],
)
def test_inspect_says_what_it_cannot_read(
    content: bytes, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert run("inspect", tmp_path / "t.csv") == (1 if said else 0)
    assert (said or "") in capsys.readouterr().err


def test_inspect_leaves_out_what_is_no_feature(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"when": ["2025-01-01", "2025-01-02", "2025-01-05"], "amt": [1.5, 2, 9], "user": ["a", "b", "a"]}
    )
    table["lat"], table["n"], table["tags"], table["dispute_code"] = 1.0, [7, 8, 9], [["x"], [], ["y"]], "z"
    table.to_parquet(tmp_path / "t.parquet")
    lines = propose(tmp_path / "t.parquet").splitlines()
    for line in ("# n: does it count the rows?", "# dispute_code: does it leak the label?"):
        assert line in lines
    assert "# label: which column says what was fraud?" in lines
    table.drop(columns="tags").to_csv(tmp_path / "t.csv")
    assert "# a column without a name" in propose(tmp_path / "t.csv").splitlines()
