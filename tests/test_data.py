"""Every table and mapping that cannot be used is refused with the column, the rows and the count."""

# ruff: noqa: E501 (each message stands on its line, as a user reads it)

from __future__ import annotations

import datetime as dt
import gzip
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fraud.errors import DataError
from training.data import dataset_digest, load_features, load_transactions
from training.mapping import Mapping
from training.mapping_parts import (
    BooleanColumn,
    CurrencyColumn,
    LabelColumn,
    NumberFormat,
    TextColumn,
    TimeColumn,
    parse_duration_ms,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
DAY_MS = 86_400_000

ROLES: dict[str, Any] = {
    "event_time": "when",
    "transaction_id": "id",
    "customer_id": "card",
    "merchant_id": "shop",
    "amount": "amt",
    "label": "fraud",
    "label_delay": "7d",
}
HEADER = "id,when,card,shop,amt,fraud"
ROWS: tuple[str, ...] = (
    "t1,2025-01-01T00:00:00Z,007,Acme,10.5,0",
    "t2,2025-01-01T00:00:01Z,008,Acme,20,1",
    "t3,2025-01-01T01:00:02+01:00,007,Zoo,30,0",
    "t4,2025-01-01T00:00:03.5Z,009,Acme,40,",
)


def rows_with(number: int, column: str, value: str, rows: tuple[str, ...] = ROWS) -> tuple[str, ...]:
    """`rows` with one field replaced; row 1 is the first."""
    changed = list(rows)
    fields = changed[number - 1].split(",")
    fields[HEADER.split(",").index(column)] = value
    changed[number - 1] = ",".join(fields)
    return tuple(changed)


def csv(folder: Path, rows: tuple[str, ...] = ROWS, header: str = HEADER, name: str = "sales.csv") -> Path:
    path = folder / name
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def mapping(**changes: Any) -> Mapping:
    roles = {role: value for role, value in (ROLES | changes).items() if value is not None}
    return Mapping.model_validate(roles)


def refusal(path: Path, given: Mapping, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_transactions(path, given, **options)
    return caught.value.message


def test_canonical_table(tmp_path: Path) -> None:
    table = load_transactions(csv(tmp_path), mapping())
    first = 1_735_689_600_000
    assert table.columns.tolist() == [
        *("transaction_id", "event_time_ms", "processing_time_ms", "customer_id", "merchant_id", "amount"),
        *("label", "label_time_ms"),
    ]
    assert table["transaction_id"].tolist() == ["t1", "t2", "t3", "t4"]
    assert table["event_time_ms"].tolist() == [first, first + 1000, first + 2000, first + 3500]
    assert table["processing_time_ms"].tolist() == table["event_time_ms"].tolist()
    assert table["customer_id"].tolist() == ["007", "008", "007", "009"]
    assert table["merchant_id"].cat.categories.tolist() == ["Acme", "Zoo"]
    assert table["amount"].tolist() == [10.5, 20.0, 30.0, 40.0]
    assert table["label"].tolist() == [0, 1, 0, -1]
    assert (table["label_time_ms"] - table["event_time_ms"]).tolist() == [7 * DAY_MS] * 4
    kinds = {name: str(kind) for name, kind in table.dtypes.items()}
    assert kinds["event_time_ms"] == kinds["label_time_ms"] == "int64"
    assert kinds["amount"] == "float64"
    assert kinds["label"] == "int8"
    assert kinds["customer_id"] == "category"
    assert all(isinstance(name, str) for name in table["customer_id"].cat.categories)


def test_csv_gzip_and_parquet_give_the_same_table(tmp_path: Path) -> None:
    path = csv(tmp_path)
    (tmp_path / "sales.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    frame = pd.read_csv(path, dtype={"card": str})
    frame["shop"] = frame["shop"].astype("category")
    frame["when"] = pd.to_datetime(frame["when"], format="ISO8601", utc=True)
    frame.to_parquet(tmp_path / "sales.parquet")
    expected = load_transactions(path, mapping())
    for name in ("sales.csv.gz", "sales.parquet"):
        pd.testing.assert_frame_equal(load_transactions(tmp_path / name, mapping()), expected)


def test_rows_are_sorted_by_arrival_then_by_file_order(tmp_path: Path) -> None:
    header = f"{HEADER},seen"
    seen = ("2025-01-02T00:00:00Z", "2025-01-01T12:00:00Z", "2025-01-02T00:00:00Z", "2025-01-01T00:00:04Z")
    rows = tuple(f"{row},{at}" for row, at in zip(ROWS, seen, strict=True))
    table = load_transactions(csv(tmp_path, rows, header), mapping(processing_time="seen"))
    assert table["transaction_id"].tolist() == ["t4", "t2", "t1", "t3"]
    assert table.index.tolist() == [0, 1, 2, 3]


def test_row_numbers_become_ids(tmp_path: Path) -> None:
    table = load_transactions(csv(tmp_path), mapping(transaction_id=None))
    assert table["transaction_id"].tolist() == ["row-1", "row-2", "row-3", "row-4"]


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        (["1735689600", "1735689601", "1735689602", "1735689603.5"], {"unit": "s"}),
        (["1735689600000", "1735689601000", "1735689602000", "1735689603500"], {"unit": "ms"}),
        (["2025-01-01 01:00:00", "2025-01-01 01:00:01", "2025-01-01 01:00:02", "2025-01-01 01:00:03.500"],
         {"timezone": "Europe/Berlin"}),
        (["2024-12-31 19:00:00-05", "2025-01-01 00:00:01+00", "2025-01-01 01:00:02+0100", "2025-01-01 00:00:03.5Z"], {}),
        (["01.01.2025 00:00:00.0", "01.01.2025 00:00:01.0", "01.01.2025 00:00:02.0", "01.01.2025 00:00:03.5"],
         {"timezone": "UTC", "format": "%d.%m.%Y %H:%M:%S.%f"}),
    ],
)  # fmt: skip
def test_each_way_to_write_a_time(tmp_path: Path, values: list[str], spec: dict[str, str]) -> None:
    rows = ROWS
    for number, value in enumerate(values, start=1):
        rows = rows_with(number, "when", value, rows)
    table = load_transactions(csv(tmp_path, rows), mapping(event_time={"column": "when", **spec}))
    assert (table["event_time_ms"] - 1_735_689_600_000).tolist() == [0, 1000, 2000, 3500]


@pytest.mark.parametrize(
    ("times", "spec"),
    [
        (pa.array([1_735_689_600, 1_735_689_601], pa.int64()), {"unit": "s"}),
        (pa.array([dt.datetime(2025, 1, 1), dt.datetime(2025, 1, 1, 0, 0, 1)]), {"timezone": "UTC"}),
        (pa.array([1_735_689_600_000_000_000, 1_735_689_601_000_000_000], pa.timestamp("ns", "Asia/Tokyo")), {}),
    ],
)
def test_times_of_parquet(tmp_path: Path, times: pa.Array, spec: dict[str, str]) -> None:
    table = pa.table(
        {"when": times, "card": [5, 6], "amt": pa.array([1, 2], pa.decimal128(9, 2)), "fraud": [True, False]}
    )
    pq.write_table(table, tmp_path / "sales.parquet")
    given = mapping(event_time={"column": "when", **spec}, transaction_id=None, merchant_id=None)
    loaded = load_transactions(tmp_path / "sales.parquet", given)
    assert (loaded["event_time_ms"] - 1_735_689_600_000).tolist() == [0, 1000]
    assert loaded["customer_id"].tolist() == ["5", "6"]
    assert loaded["amount"].tolist() == [1.0, 2.0]
    assert loaded["label"].tolist() == [1, 0]


ZONE_HINT = "{column: when, timezone: UTC}"
UNIT_HINT = "{column: when, unit: s} or unit: ms"
BAD_ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "amount of zero": (rows_with(2, "amt", "0"), {}, "column 'amt' (amount) must be a number above zero; 1 of 4 rows breaks this: row 2 ('0')"),
    "negative amount": (rows_with(3, "amt", "-1.5", rows_with(2, "amt", "-7")), {}, "column 'amt' (amount) must be a number above zero; 2 of 4 rows break this: row 2 ('-7'), row 3 ('-1.5')"),
    "missing amount": (rows_with(4, "amt", ""), {}, "column 'amt' (amount) must be a number above zero; 1 of 4 rows breaks this: row 4 (None)"),
    "infinite amount": (rows_with(1, "amt", "inf"), {}, "column 'amt' (amount) must be finite; 1 of 4 rows breaks this: row 1 ('inf')"),
    "amount that is no number": (rows_with(3, "amt", "12 EUR"), {}, "column 'amt' (amount) must be a number; 1 of 4 rows breaks this: row 3 ('12 EUR')"),
    "duplicate id": (rows_with(4, "id", "t1", rows_with(3, "id", "t1")), {}, "column 'id' (transaction_id) must be different in each row; 2 of 4 rows break this: row 3 ('t1', as in row 1), row 4 ('t1', as in row 1)"),
    "empty id": (rows_with(2, "card", ""), {}, "column 'card' (customer_id) must be 1 to 128 characters; 1 of 4 rows breaks this: row 2 (empty)"),
    "long id": (rows_with(2, "shop", "x" * 129), {}, "column 'shop' (merchant_id) must be 1 to 128 characters; 1 of 4 rows breaks this: row 2 (129 characters)"),
    "label of 2": (rows_with(1, "fraud", "2"), {}, "column 'fraud' (label) must be 0 or 1, or empty where it is unknown; 1 of 4 rows breaks this: row 1 ('2')"),
    "no fraud at all": (rows_with(2, "fraud", "0"), {}, "column 'fraud' (label) has no row with label 1 (fraud); a model needs both"),
    "unparsable time": (rows_with(2, "when", "2025-13-01T00:00:00Z"), {}, "column 'when' (event_time) must be a time such as 2025-01-31T12:30:00Z; 1 of 4 rows breaks this: row 2 ('2025-13-01T00:00:00Z')"),
    "missing time": (rows_with(3, "when", ""), {}, "column 'when' (event_time) must not be missing; 1 of 4 rows breaks this: row 3 (missing)"),
    "mixed zones": (rows_with(4, "when", "2025-01-01T00:00:03"), {}, "column 'when' (event_time) mixes times with a zone and times without one; it must hold one kind; 1 of 4 rows breaks this: row 4 ('2025-01-01T00:00:03')"),
    "zone given twice": (ROWS, {"event_time": {"column": "when", "timezone": "UTC"}}, "column 'when' (event_time) carries its own zone; remove timezone: UTC"),
    "text for epoch": (ROWS[:1], {"event_time": {"column": "when", "unit": "s"}, "label": None, "label_delay": None}, "column 'when' (event_time) must be a number; 1 of 1 rows breaks this: row 1 ('2025-01-01T00:00:00Z')"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(tmp_path: Path, case: str) -> None:
    rows, changes, message = BAD_ROWS[case]
    labelled = changes.get("label", "fraud") is not None
    assert refusal(csv(tmp_path, rows), mapping(**changes), labelled=labelled) == f"sales.csv: {message}"


def test_naive_times_need_a_timezone(tmp_path: Path) -> None:
    rows = tuple(row.replace("Z,", ",").replace("+01:00", "") for row in ROWS)
    assert refusal(csv(tmp_path, rows), mapping()) == (
        f"sales.csv: column 'when' (event_time) has times without a zone; say where the clock stood: {ZONE_HINT}; "
        "4 of 4 rows break this: row 1 ('2025-01-01T00:00:00'), row 2 ('2025-01-01T00:00:01'), "
        "row 3 ('2025-01-01T01:00:02'), row 4 ('2025-01-01T00:00:03.5')"
    )


def test_numbers_need_a_unit_and_the_right_one(tmp_path: Path) -> None:
    rows = ROWS
    for number in range(1, 5):
        rows = rows_with(number, "when", f"173568960000{number}", rows)
    path = csv(tmp_path, rows)
    assert refusal(path, mapping()) == (
        f"sales.csv: column 'when' (event_time) holds numbers; say what they count since the epoch: {UNIT_HINT}"
    )
    assert refusal(path, mapping(event_time={"column": "when", "unit": "s"})) == (
        "sales.csv: column 'when' (event_time) must be a time from 1970 to 2199 with unit: s; 4 of 4 rows break this: "
        "row 1 ('1735689600001'), row 2 ('1735689600002'), row 3 ('1735689600003'), row 4 ('1735689600004')"
    )


@pytest.mark.parametrize("local", ["2025-03-30 02:30:00", "2025-10-26 02:30:00"])
def test_local_hours_that_do_not_exist_or_come_twice(tmp_path: Path, local: str) -> None:
    rows = tuple(row.replace("Z,", ",").replace("+01:00", "") for row in rows_with(2, "when", local))
    given = mapping(event_time={"column": "when", "timezone": "Europe/Berlin"})
    assert refusal(csv(tmp_path, rows), given) == (
        "sales.csv: column 'when' (event_time) must name one instant of Europe/Berlin; as its clock is moved, "
        f"some hours come twice or never; 1 of 4 rows breaks this: row 2 ('{local}')"
    )


def test_label_time(tmp_path: Path) -> None:
    header = f"{HEADER},known"
    known = ("", "2025-01-03T00:00:00Z", "2025-01-04T00:00:00Z", "")
    rows = tuple(f"{row},{at}" for row, at in zip(ROWS, known, strict=True))
    path = csv(tmp_path, rows, header)
    table = load_transactions(path, mapping(label_time="known"))
    days = ((table["label_time_ms"] - table["event_time_ms"]) / DAY_MS).round(2)
    assert days.tolist() == [7.0, 2.0, 3.0, 7.0]
    assert refusal(path, mapping(label_time="known", label_delay=None)) == (
        "sales.csv: column 'known' (label_time) must be given where there is a label, as the mapping has no "
        "label_delay; 1 of 4 rows breaks this: row 1 (missing)"
    )
    early = csv(tmp_path, (rows[0], rows[1].replace("2025-01-03", "2024-12-03"), *rows[2:]), header)
    assert refusal(early, mapping(label_time="known")) == (
        "sales.csv: column 'known' (label_time) must not be before the event_time; "
        "1 of 4 rows breaks this: row 2 ('2024-12-03T00:00:00Z')"
    )


def test_label_times_of_which_none_is_known_yet(tmp_path: Path) -> None:
    path = csv(tmp_path, tuple(f"{row}," for row in ROWS), f"{HEADER},known")
    table = load_transactions(path, mapping(label_time="known"))
    assert (table["label_time_ms"] - table["event_time_ms"]).tolist() == [7 * DAY_MS] * 4


def test_all_problems_are_told_at_once_and_long_lists_are_cut(tmp_path: Path) -> None:
    rows = tuple(f"t{n},2025-01-01T00:00:00Z,,Acme,-{n},0" for n in range(1, 8)) + ROWS[1:2]
    assert refusal(csv(tmp_path, rows), mapping(transaction_id=None)).split("\n") == [
        "sales.csv: column 'card' (customer_id) must be 1 to 128 characters; 7 of 8 rows break this: "
        "row 1 (empty), row 2 (empty), row 3 (empty), row 4 (empty), row 5 (empty), …",
        "sales.csv: column 'amt' (amount) must be a number above zero; 7 of 8 rows break this: "
        "row 1 ('-1'), row 2 ('-2'), row 3 ('-3'), row 4 ('-4'), row 5 ('-5'), …",
    ]


def test_zero_amounts_are_dropped_only_when_asked_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = csv(tmp_path, rows_with(1, "amt", "0.00"))
    with caplog.at_level(logging.WARNING):
        table = load_transactions(path, mapping(on_zero_amount="drop", transaction_id=None))
    assert table["transaction_id"].tolist() == ["row-2", "row-3", "row-4"]
    assert table.attrs["dropped_zero_amounts"] == 1
    assert caplog.messages == ["sales.csv: left out 1 rows with an amount of zero (on_zero_amount: drop)"]
    path = csv(tmp_path, rows_with(3, "amt", "-1", rows_with(1, "amt", "0")))
    assert refusal(path, mapping(on_zero_amount="drop")) == (
        "sales.csv: column 'amt' (amount) must be a number above zero; 1 of 3 rows breaks this: row 3 ('-1')"
    )


def test_unlabelled_tables_can_be_scored(tmp_path: Path) -> None:
    rows = tuple(row.rsplit(",", 1)[0] for row in ROWS)
    path = csv(tmp_path, rows, HEADER.removesuffix(",fraud"))
    table = load_transactions(path, mapping(), labelled=False)
    assert table["label"].tolist() == [-1] * 4
    assert refusal(path, mapping()) == (
        "sales.csv: column 'fraud' (label) is not in the file\n"
        "sales.csv: columns of the file: id, when, card, shop, amt"
    )
    assert refusal(path, mapping(label=None, label_delay=None)) == (
        "role 'label' is missing from the mapping; training and evaluation need it, except with --detector isolation-forest"
    )


def test_columns_that_are_not_in_the_file(tmp_path: Path) -> None:
    assert refusal(csv(tmp_path), mapping(amount="Amount", merchant_id="shopp", customer_id="who")) == (
        "sales.csv: column 'who' (customer_id) is not in the file\n"
        "sales.csv: column 'shopp' (merchant_id) is not in the file; did you mean 'shop'?\n"
        "sales.csv: column 'Amount' (amount) is not in the file; did you mean 'amt'?\n"
        "sales.csv: columns of the file: id, when, card, shop, amt, fraud"
    )
    twice = csv(tmp_path, tuple(f"{row},9" for row in ROWS), f"{HEADER},amt")
    assert refusal(twice, mapping()).startswith("sales.csv: column 'amt' (amount) is in the file 2 times\n")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    given = mapping()
    assert refusal(tmp_path / "none.csv", given) == "none.csv: no such file"
    assert refusal(tmp_path, given) == (
        f"{tmp_path.name}: the folder has no file that ends in .parquet, .pq, .csv, .csv.gz, .csv.zst, .csv.bz2"
    )
    (tmp_path / "sales.xlsx").write_bytes(b"PK")
    assert refusal(tmp_path / "sales.xlsx", given) == (
        "sales.xlsx: unknown file type; give one of .parquet, .pq, .csv, .csv.gz, .csv.zst, .csv.bz2"
    )
    (tmp_path / "sales.csv").write_bytes(b"")
    assert refusal(tmp_path / "sales.csv", given) == "sales.csv: cannot be read as CSV: Empty CSV file"
    assert refusal(csv(tmp_path, ()), given) == "sales.csv: the file has no rows"
    (tmp_path / "sales.parquet").write_bytes(b"no parquet at all")
    assert refusal(tmp_path / "sales.parquet", given).startswith("sales.parquet: cannot be read as Parquet: ")
    broken = csv(tmp_path, (ROWS[0], "t2,only,three", *ROWS[2:], "a,b,c,d,e,f,g"))
    assert refusal(broken, given) == (
        "sales.csv: each row must have 6 fields, as the header has; 2 break this: row 2 has 3, row 5 has 7"
    )


def test_another_delimiter(tmp_path: Path) -> None:
    path = csv(tmp_path, tuple(row.replace(",", ";") for row in ROWS), HEADER.replace(",", ";"))
    assert len(load_transactions(path, mapping(delimiter=";"))) == 4
    assert len(load_transactions(path, mapping())) == 4
    assert refusal(path, mapping(delimiter=",")).endswith("columns of the file: id;when;card;shop;amt;fraud")


POSITIONS = {f"{prefix}{axis}": f"{prefix}{axis}" for prefix in ("", "merchant_") for axis in ("latitude", "longitude")}


def test_optional_roles_and_further_columns(tmp_path: Path) -> None:
    header = f"{HEADER},kind,device,latitude,longitude,merchant_latitude,merchant_longitude,age,vip,mcc"
    extra = ("food,d1,50.1,8.6,50.2,8.7,33,true,5411", ",,,,,,,,", "NA,d1,1,2,3,4,44,0,0742", "food,d2,1,2,3,4,,1,5411")
    rows = tuple(f"{row},{more}" for row, more in zip(ROWS, extra, strict=True))
    given = mapping(
        category="kind",
        device_id="device",
        **POSITIONS,
        numeric={"age": {"missing": "allowed"}},
        boolean={"is_vip": {"column": "vip", "missing": "allowed"}},
        categorical={"mcc": {"missing": "allowed"}},
    )
    table = load_transactions(csv(tmp_path, rows, header), given)
    assert table["category"].cat.categories.tolist() == ["NA", "food"]
    assert table["category"].cat.codes.tolist() == [1, -1, 0, 1]
    assert table["device_id"].isna().tolist() == [False, True, False, False]
    np.testing.assert_array_equal(table["latitude"], [50.1, np.nan, 1, 1])
    np.testing.assert_array_equal(table["age"], [33, np.nan, 44, np.nan])
    assert table["is_vip"].tolist() == [True, pd.NA, False, True]
    assert table["mcc"].cat.categories.tolist() == ["0742", "5411"]
    path = csv(tmp_path, (rows[0].replace("50.1", "95"), *rows[1:]), header)
    assert refusal(path, given) == (
        "sales.csv: column 'latitude' (latitude) must be within -90 and 90 degrees; "
        "1 of 4 rows breaks this: row 1 ('95')"
    )
    strict = given.model_copy(update={"numeric": mapping(numeric=["age"]).numeric})
    assert refusal(csv(tmp_path, rows, header), strict) == (
        "sales.csv: column 'age' (numeric age) must not be missing; 2 of 4 rows break this: "
        "row 2 (missing), row 4 (missing)"
    )


FEATURES = {
    "kind": "features",
    "label": "y",
    "numeric": {"income": {"minimum": 0, "maximum": 1000, "missing": "allowed"}},
    "boolean": ["phone"],
    "categorical": {"domain": {"categories": ["free", "corporate"]}},
}


def features_refusal(folder: Path, rows: tuple[str, ...], given: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        load_features(csv(folder, rows, "income,phone,domain,y"), Mapping.model_validate(given))
    return caught.value.message


def test_features_keep_their_order_and_their_options(tmp_path: Path) -> None:
    path = csv(tmp_path, ("5,true,free,0", ",false,corporate,1", "7.5,1,free,1"), "income,phone,domain,y")
    table = load_features(path, Mapping.model_validate(FEATURES))
    assert table.columns.tolist() == ["transaction_id", "label", "income", "phone", "domain"]
    np.testing.assert_array_equal(table["income"], [5, np.nan, 7.5])
    assert table["phone"].tolist() == [True, False, True]
    assert table["domain"].cat.categories.tolist() == ["free", "corporate"]
    assert table["label"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("-3,1,free,0", "column 'income' (numeric income) must be 0 or above; 1 of 2 rows breaks this: row 2 ('-3')"),
        (
            "1e4,1,free,0",
            "column 'income' (numeric income) must be 1000 or below; 1 of 2 rows breaks this: row 2 ('1e4')",
        ),
        (
            "3,maybe,free,0",
            "column 'phone' (boolean phone) must be true or false; 1 of 2 rows breaks this: row 2 ('maybe')",
        ),
        ("3,,free,0", "column 'phone' (boolean phone) must not be missing; 1 of 2 rows breaks this: row 2 (missing)"),
        (
            "3,1,,0",
            "column 'domain' (categorical domain) must not be missing; 1 of 2 rows breaks this: row 2 (missing)",
        ),
        (
            "3,1,fre,0",
            "column 'domain' (categorical domain) must be one of 'free', 'corporate'; 1 of 2 rows breaks this: row 2 ('fre')",
        ),
    ],
)
def test_features_that_break_their_specification(tmp_path: Path, row: str, message: str) -> None:
    assert features_refusal(tmp_path, ("5,true,free,1", row), FEATURES) == f"sales.csv: {message}"


def test_unknown_categories_can_be_read_as_missing(tmp_path: Path) -> None:
    given = FEATURES | {"categorical": {"domain": {"categories": ["free"], "unknown": "missing"}}}
    path = csv(tmp_path, ("5,true,free,0", "6,false,other,1"), "income,phone,domain,y")
    table = load_features(path, Mapping.model_validate(given))
    assert table["domain"].cat.codes.tolist() == [0, -1]


def test_a_mapping_of_the_other_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^the mapping says kind: transaction; this needs kind: features$"):
        load_features(csv(tmp_path), mapping())


def test_dataset_digest(tmp_path: Path) -> None:
    path = csv(tmp_path)
    assert dataset_digest(path) == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_handbook_example(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "TRANSACTION_ID": [0, 1, 2],
            "TX_DATETIME": pd.to_datetime(["2018-04-01 00:00:31", "2018-04-01 00:02:10", "2018-04-01 00:07:56"]),
            "CUSTOMER_ID": [596, 4961, 596],
            "TERMINAL_ID": [3156, 3412, 1365],
            "TX_AMOUNT": [57.16, 0.0, 146.0],
            "TX_TIME_SECONDS": [31, 130, 476],
            "TX_TIME_DAYS": [0, 0, 0],
            "TX_FRAUD": [0, 0, 1],
            "TX_FRAUD_SCENARIO": [0, 0, 1],
        }
    )
    frame.to_parquet(tmp_path / "handbook.parquet")
    table = load_transactions(tmp_path / "handbook.parquet", Mapping.from_yaml(EXAMPLES / "handbook.yaml"))
    assert table["transaction_id"].tolist() == ["0", "2"]
    assert table["customer_id"].tolist() == ["596", "596"]
    assert table["merchant_id"].cat.categories.tolist() == ["1365", "3156"]
    assert table["event_time_ms"].tolist() == [1_522_540_831_000, 1_522_541_276_000]
    assert table.attrs["dropped_zero_amounts"] == 1


# ---- the mapping itself

BAD_MAPPINGS = {
    "unknown key": ("custmer_id: card\ncustomer_id: card", ["unknown key 'custmer_id'; did you mean 'customer_id'?"]),
    "unknown option": ("numeric: {age: {mising: allowed}}", ["unknown key 'numeric.age.mising'; did you mean 'missing'?"]),
    "missing roles": ("label: y\nlabel_delay: 7d", [
        "role 'event_time' is missing", "role 'customer_id' is missing", "role 'amount' is missing",
    ]),
    "no label time": ("event_time: t\ncustomer_id: c\namount: a\nlabel: y", [
        "when is a label known? give label_time (a column) or label_delay (such as 7d), or both",
    ]),
    "delay without a unit": ("label_delay: '7'", [
        "label_delay: '7' is not a duration; write a whole number and a unit, such as 7d, 12h, 30m or 0s",
    ]),
    "unknown zone": ("event_time: {column: t, timezone: Europe/Berln}", [
        "event_time.timezone: 'Europe/Berln' is not an IANA time zone such as UTC or Europe/Berlin",
    ]),
    "unit and zone": ("event_time: {column: t, timezone: UTC, unit: s}", [
        "event_time: unit is for epoch numbers, which have no timezone and no format",
    ]),
    "wrong unit": ("event_time: {column: t, unit: sec}", ["event_time.unit: input should be 's', 'ms', 'm', 'h', 'd' or 'month' (got 'sec')"]),
    "one coordinate": ("event_time: t\ncustomer_id: c\namount: a\nlatitude: x", ["latitude and longitude come together"]),
    "strict of no role": ("event_time: t\ncustomer_id: c\namount: a\nmerchant_id: m\nstrict: [device]", [
        "strict: 'device' is none of the text roles mapped here (merchant_id)",
    ]),
    "column with two roles": ("event_time: t\ncustomer_id: c\namount: a\nnumeric: [a]", [
        "column 'a' plays two roles, amount and numeric a",
    ]),
    "name of a role": ("event_time: t\ncustomer_id: c\namount: a\nnumeric: [channel]", [
        "numeric 'channel' has the name of a role; rename it, such as my_channel: {column: channel}",
    ]),
    "name of a history feature": ("event_time: t\ncustomer_id: c\namount: a\nnumeric: [hour]", [
        "numeric 'hour' has the name of a history feature; rename it, such as my_hour: {column: hour}",
    ]),
    "name listed twice": ("kind: features\nnumeric: [x]\nboolean: {x: {column: z}}", [
        "'x' is listed under numeric and under boolean",
    ]),
    "role of the other kind": ("kind: features\namount: a\nnumeric: [x]", [
        "role 'amount' is for kind: transaction; list it under numeric or categorical",
    ]),
    "no features": ("kind: features\nlabel: y", ["no features; list them under numeric, boolean and categorical"]),
    "options in a list": ("numeric: [{age: {}}]", [
        "numeric: a list holds column names alone; for options write {name: {missing: allowed}}",
    ]),
    "bounds": ("numeric: {age: {minimum: 5, maximum: 1}}", ["numeric.age: minimum 5.0 is above maximum 1.0"]),
    "no mapping": ("- a", ["a mapping has lines like 'amount: amt', a role and its column"]),
    "no YAML": ("a: [", [
        "the mapping is not YAML: while parsing a flow node expected the node content, but found '<stream end>' "
        'in "<unicode string>", line 1, column 5: a: [ ^',
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPPINGS)
def test_bad_mappings(tmp_path: Path, case: str) -> None:
    text, lines = BAD_MAPPINGS[case]
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        Mapping.from_yaml(path)
    assert caught.value.message.split("\n") == [f"my.yaml: {line}" for line in lines]


def test_mapping_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^my\.yaml: the mapping cannot be read: No such file or directory$"):
        Mapping.from_yaml(tmp_path / "my.yaml")


@pytest.mark.parametrize(("text", "expected"), [("7d", 7 * DAY_MS), ("12h", DAY_MS // 2), ("0s", 0), ("5ms", 5)])
def test_durations(text: str, expected: int) -> None:
    assert parse_duration_ms(text) == expected


# ---- the documentation


def documentation() -> str:
    return (EXAMPLES.parent / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_key_and_every_refusal_is_documented() -> None:
    text = documentation()
    keys = set(Mapping.model_fields) | {"column", "missing", "minimum", "maximum", "categories", "unknown"}
    keys |= {
        name
        for part in (TextColumn, TimeColumn, LabelColumn, NumberFormat, BooleanColumn, CurrencyColumn)
        for name in part.model_fields
    }
    assert [key for key in sorted(keys) if f"`{key}`" not in text and f"{key}:" not in text] == []
    messages = [f"sales.csv: {message}" for *_, message in BAD_ROWS.values()]
    messages += [f"my.yaml: {line}" for _, lines in BAD_MAPPINGS.values() for line in lines]
    assert [message for message in messages if message not in text] == []


def test_documented_mappings_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", documentation(), re.DOTALL)
    assert len(blocks) == 8
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        Mapping.from_yaml(path)
    (tmp_path / "first.yaml").write_text(blocks[0], encoding="utf-8")
    assert len(load_transactions(csv(tmp_path), Mapping.from_yaml(tmp_path / "first.yaml"))) == 4


@pytest.mark.parametrize(
    "name", ["simulated", "features", "sparkov", "handbook", "paysim", "tabformer", "ieee_cis", "baf"]
)
def test_shipped_mappings_are_valid(name: str) -> None:
    assert Mapping.from_yaml(EXAMPLES / f"{name}.yaml").label is not None


def test_what_a_row_is_has_one_word_and_its_earlier_plural_is_taken(tmp_path: Path) -> None:
    text = (EXAMPLES / "simulated.yaml").read_text()
    (tmp_path / "plural.yaml").write_text(text.replace("kind: transaction\n", "kind: transactions\n"))
    plural = Mapping.from_yaml(tmp_path / "plural.yaml")
    assert plural == Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    assert plural.kind == "transaction"
    (tmp_path / "other.yaml").write_text(text.replace("kind: transaction\n", "kind: payments\n"))
    with pytest.raises(DataError, match="'transaction' or 'features'"):
        Mapping.from_yaml(tmp_path / "other.yaml")
