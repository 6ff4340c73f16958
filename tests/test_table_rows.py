"""A row of the table that trained a model may be sent as it is: every option of a mapping holds online as offline."""

# ruff: noqa: E501 (an option and its columns stand on one line)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fraud.columns.times import TimeForm, time_of
from fraud.errors import InvalidRequest
from fraud.models.bundle import canonical_json
from fraud.models.specification import expect_specification
from fraud.schema import FeatureSpec, Row, RowDecoder
from tests.table_rows import RowOfTable, expect_the_same_rows, rows_of_file
from tests.test_data import documentation
from training.data import Mapping, load_table
from training.mapping_parts import (
    BooleanColumn,
    CategoricalColumn,
    CurrencyColumn,
    LabelColumn,
    NumberFormat,
    NumericColumn,
    TextColumn,
    TimeColumn,
)
from training.replay import further_features, transaction_spec
from training.trained_table import trained_table

QUANTILES = np.geomspace(1, 500, 100).tolist()
BASE: dict[str, Any] = {"event_time": "when", "transaction_id": "id", "customer_id": "card", "amount": "amt"}
COLUMNS: dict[str, Any] = {
    "id": ["t1", "t2", "t3"],
    "when": ["2025-01-01T00:00:00Z", "2025-01-02T10:00:00.123456+01:00", "2025-01-03T00:00:00Z"],
    "card": ["007", "8.0", "c"],
    "amt": ["10.5", "20", " 3e1 "],
}


def spec_of(table: pd.DataFrame, mapping: Mapping) -> FeatureSpec:
    rows = slice(0, len(table))
    if mapping.kind == "transaction":
        return transaction_spec(table, mapping, rows)
    return FeatureSpec("features", tuple(further_features(table, mapping, rows)), table=trained_table(table))


def read(
    folder: Path, suffix: str, options: dict[str, Any], columns: dict[str, Any], *, may_be_own: bool = False
) -> tuple[FeatureSpec, list[Row]]:
    """Write a file, read it for training, and send its rows; all must be the same."""
    path = folder / f"table.{suffix}"
    frame = pd.DataFrame(columns)
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path, index=False)
    mapping = Mapping.model_validate(options)
    table = load_table(path, mapping, labelled=False)
    spec = spec_of(table, mapping)
    spec = msgspec.json.decode(canonical_json(spec), type=FeatureSpec)  # as a bundle carries it
    expect_specification(spec, Path("features.json"))
    by_id = {row[mapping.transaction_id.name if mapping.transaction_id else ""]: row for row in rows_of_file(path)}
    sent = [by_id[name] for name in table["transaction_id"]]
    return spec, expect_the_same_rows(table, spec, sent, QUANTILES, may_be_own=may_be_own)[1]


BERLIN = {"column": "when", "timezone": "Europe/Berlin"}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names alone": ({}, {}),
    "event_time.unit s": ({"event_time": {"column": "when", "unit": "s"}}, {"when": [1735689600, 1735689601, 1735689602]}),
    "event_time.unit of text": (
        {"event_time": {"column": "when", "unit": "ms"}},
        {"when": ["1735689600000", "1735689600001.4", "1.7356896e12"]},
    ),
    "event_time.start": (
        {"event_time": {"column": "when", "unit": "h", "start": "2024-01-01"}},
        {"when": [0.5, 3.25, 8000]},
    ),
    "event_time.unit month": (
        {"event_time": {"column": "when", "unit": "month", "start": "2024-01-31"}},
        {"when": [0, 1, 13]},
    ),
    "event_time.timezone": ({"event_time": BERLIN}, {"when": ["2025-07-01 10:00", "2025-01-01T10:00:00.5", "2025-07-02"]}),
    "event_time.ambiguous earlier": (
        {"event_time": BERLIN | {"ambiguous": "earlier"}},
        {"when": ["2025-10-26 02:30:00", "2025-10-26 03:30:00", "2025-10-26 01:00:00"]},
    ),
    "event_time.ambiguous later": (
        {"event_time": BERLIN | {"ambiguous": "later"}},
        {"when": ["2025-10-26 02:30:00", "2025-10-26 03:30:00", "2025-10-26 01:00:00"]},
    ),
    "event_time.nonexistent": (
        {"event_time": BERLIN | {"nonexistent": "shift"}},
        {"when": ["2025-03-30 02:30:00", "2025-03-30 03:30:00", "2025-03-30 01:00:00"]},
    ),
    "dates where a day has no midnight": (
        {"event_time": {"column": "when", "timezone": "America/Sao_Paulo"}},
        {"when": ["2017-10-15", "2017-10-16", "2017-10-17"]},
    ),
    "midnights where a day has none": (
        {"event_time": {"column": "when", "timezone": "America/Sao_Paulo"}},
        {"when": pd.to_datetime(["2017-10-15", "2017-10-16", "2017-10-17"])},
    ),
    "event_time.format": (
        {"event_time": BERLIN | {"format": "%d.%m.%Y %H:%M:%S.%f"}},
        {"when": ["31.01.2025 12:30:00.1234567", "01.02.2025 0:00:00.5", "31.01.2025 12:30:01.0"]},
    ),
    "event_time.format with a zone": (
        {"event_time": {"column": "when", "format": "%d/%b/%Y:%H:%M:%S %z"}},
        {"when": ["31/Jan/2025:12:30:00 +0100", "31/Jan/2025:12:30:00 -0500", "01/Feb/2025:00:00:00 +0000"]},
    ),
    "event_time.columns": (
        {"event_time": {"columns": ["y", "m", "when"], "format": "%Y %m %d", "timezone": "Asia/Tokyo"}},
        {"y": [2025, 2025, 2024], "m": [1, 2, 12], "when": [31, 1, 30]},
    ),
    "customer_id.columns": ({"customer_id": {"columns": ["card", "user"]}}, {"user": ["1.0", "", "NULL"]}),
    "customer_id.join": ({"customer_id": {"columns": ["card", "user"], "join": "/"}}, {"user": [1, 2, 3]}),
    "ids and codes as numbers": (
        {"merchant_id": "shop", "category": "code", "channel": "flagged", "device_id": "device"},
        {"shop": [7, 8, 9], "code": [5411.0, 5812.0, None], "flagged": [True, False, True], "device": [1, 2, 3]},
    ),
    "ids and codes as text": (
        {"merchant_id": "shop", "category": "code", "channel": "way", "device_id": "device"},
        {"shop": ["7.0", "07", "x"], "code": ["5411.0", "NULL", ""], "way": ["a+", "\\N", "b"], "device": ["", "d", "e"]},
    ),
    "numbers.decimal, thousands, sign": (
        {"numbers": {"decimal": ",", "thousands": ".", "sign": "€"}, "numeric": ["age"]},
        {"amt": ["1.234,50 €", "€ 0,5", "7"], "age": ["1,5", "2", "3.000"]},
    ),
    "on_negative_amount": ({"on_negative_amount": "absolute"}, {"amt": ["-7", "8", "-9.5"]}),
    "on_zero_amount": ({"on_zero_amount": "drop"}, {"amt": ["7", "0", "9.5"]}),
    "missing_values": (
        {"missing_values": ["?", -1], "device_id": "device", "numeric": {"age": {"missing": "allowed"}}},
        {"device": ["?", "-1", "x"], "age": ["-1.0", "?", "4"]},
    ),
    "missing_values of one column": (
        {"numeric": {"age": {"missing_values": [-1], "missing": "allowed"}}, "categorical": {"os": {"missing": "allowed", "missing_values": ["none"]}}},
        {"age": [-1.0, 0.1, 3], "os": ["none", "x", "y"]},
    ),
    "numeric.column, minimum, maximum, missing": (
        {"numeric": {"years": {"column": "age", "minimum": 0, "maximum": 120, "missing": "allowed"}}},
        {"age": ["N/A", "44", "1e1"]},
    ),
    "boolean.positive, negative": (
        {"boolean": {"chip": {"positive": ["Mit"], "negative": ["ohne"], "missing": "allowed"}, "pin": {}}},
        {"chip": ["mit", "OHNE", "NA"], "pin": ["Yes", "f", "1.0"]},
    ),
    "boolean as numbers": ({"boolean": ["chip", "pin"]}, {"chip": [1, 0, 1], "pin": [1.0, 0.0, 1.0]}),
    "categorical.categories, unknown": (
        {"categorical": {"kind": {"column": "os", "categories": ["5411", "b"], "unknown": "missing", "missing": "allowed"}}},
        {"os": ["5411.0", "b", "c"]},
    ),
    "patterns": ({"numeric": {"V*": {"missing": "allowed", "missing_values": [-9]}}}, {"V1": [1, -9, 3], "V2": [0.5, 1.5, -9]}),
    "currency.column, minor_digits, typical": (
        {"currency": {"column": "cur", "minor_digits": {"BTC": 8}, "typical": {"BTC": 0.001}}},
        {"cur": ["EUR", "BTC", "EUR"], "amt": ["10", "0.00234", "30"]},
    ),
    "currency.constant": ({"currency": {"constant": "VND"}}, {"amt": [100_000, 250_000, 7_000]}),
    "strict": ({"merchant_id": "shop", "strict": True}, {"shop": ["a", "b", "c"]}),
    "latitude, longitude, merchant_latitude, merchant_longitude": (
        {"latitude": "lat", "longitude": "lng", "merchant_latitude": "mlat", "merchant_longitude": "mlng"},
        {"lat": ["1.5", "", "-3"], "lng": [1, 2, 3], "mlat": [0.1, 0.2, 0.3], "mlng": ["", "", "179.9"]},
    ),
    "the product's own names": (
        {"event_time": "event_time", "transaction_id": "transaction_id", "customer_id": "customer_id", "amount": "amount",
         "device_id": "device_id", "missing_values": ["?"]},
        {"event_time": COLUMNS["when"], "transaction_id": COLUMNS["id"], "customer_id": [1, 2, 3], "amount": [1, 2, 3],
         "device_id": ["?", "?", "?"]},
    ),
    "ready features": (
        {"kind": "features", "event_time": None, "customer_id": None, "amount": None, "transaction_id": "id",
         "numeric": {"income": {"column": "amt"}}, "boolean": {"phone": {"column": "tel"}}},
        {"tel": ["yes", "no", "n"]},
    ),
}  # fmt: skip
OF_FILES_AND_LABELS = {
    *("kind", "delimiter", "encoding", "escape", "processing_time", "stake"),
    *("label", "label_time", "label_delay", "label.positive", "label.negative", "label.column"),
}
"""Options that say nothing of a row that a caller sends."""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_a_mapping_holds_online(name: str, suffix: str, tmp_path: Path) -> None:
    options, columns = OPTIONS[name]
    mapped = {key: value for key, value in (BASE | options).items() if value is not None}
    read(tmp_path, suffix, mapped, COLUMNS | columns)


def test_each_option_is_tried_or_says_nothing_of_a_row() -> None:
    parts: dict[str, type[BaseModel]] = {
        "event_time": TimeColumn,
        "label": LabelColumn,
        "currency": CurrencyColumn,
        "numbers": NumberFormat,
        "numeric": NumericColumn,
        "boolean": BooleanColumn,
        "categorical": CategoricalColumn,
        "customer_id": TextColumn,
    }
    options = {*Mapping.model_fields} | {f"{part}.{name}" for part, kind in parts.items() for name in kind.model_fields}
    used: set[str] = set()
    for mapped, _ in OPTIONS.values():
        for key, value in (BASE | mapped).items():
            used.add(key)
            names = (
                value.values() if key in ("numeric", "boolean", "categorical") and isinstance(value, dict) else [value]
            )
            used |= {f"{key}.{name}" for one in names if isinstance(one, dict) for name in one}
    used |= {"customer_id.column", "categorical.column", "boolean.missing_values"}  # as of every other column
    assert options - used - OF_FILES_AND_LABELS == set()
    text = documentation()
    section = text[text.index("### Rows as in your table") : text.index("### Currencies")]
    assert [
        key
        for key in {name.partition(".")[2] or name for name in used - OF_FILES_AND_LABELS}
        if f"`{key}`" not in section
    ] == []


RENAMED = BASE | {
    "event_time": {"column": "when", "unit": "s"},
    "device_id": "device",
    "numeric": {"age": {"column": "years", "missing_values": [-1], "missing": "allowed"}},
}
RENAMED_COLUMNS = COLUMNS | {
    "when": [1735689600, 1735689601, 1735689602],
    "device": ["a", "b", ""],
    "years": [-1, 30, 40],
}
OWN = {"transaction_id": "t1", "event_time": "2025-01-01T00:00:00Z", "customer_id": "007", "amount": 10.5, "age": -1}
OF_TABLE = {"id": "t1", "when": 1735689600, "card": "007", "amt": "10.5", "years": "-1", "device": "a"}


@pytest.fixture
def renamed(tmp_path: Path) -> RowDecoder:
    return RowDecoder(read(tmp_path, "csv", RENAMED, RENAMED_COLUMNS)[0])


def decoded(decoder: RowDecoder, row: RowOfTable) -> Row:
    return decoder.decode(json.dumps(row).encode(), "$.instances[2]")


def test_under_the_products_own_names_a_value_means_what_it_says(renamed: RowDecoder) -> None:
    own = decoded(renamed, OWN | {"device_id": "NULL"})
    assert own.reading is msgspec.UNSET
    assert own.values == (-1.0,)
    assert own.roles["device_id"] == "NULL"
    table = decoded(renamed, OF_TABLE | {"device": "NULL"})
    assert table.reading == "table"
    assert np.isnan(table.values[0])
    assert table.roles["device_id"] is None
    assert (table.event_time_ms, table.customer_id, table.amount) == (own.event_time_ms, "007", 10.5)


def test_what_is_recorded_of_a_row_of_the_table_has_the_products_own_names(renamed: RowDecoder) -> None:
    """Personal fields are replaced by their names, and a challenger of another table reads the row too."""
    row = decoded(renamed, OF_TABLE | {"note": {"a": 1}, "label": 0})
    assert json.loads(row.raw) == {
        "event_time": "2025-01-01T00:00:00.000+00:00",
        "transaction_id": "t1",
        "customer_id": "007",
        "device_id": "a",
        "amount": 10.5,
        "note": {"a": 1},
        "label": 0,
    }
    assert row.n_extra == 2
    again = renamed.decode(row.raw, "$")
    assert again.reading is msgspec.UNSET
    assert (again.values, again.roles, again.event_time_ms) == (row.values, row.roles, row.event_time_ms)


def test_names_may_be_mixed_where_the_table_lacks_one(tmp_path: Path) -> None:
    spec, _ = read(tmp_path, "csv", BASE, COLUMNS)
    table = spec.table
    assert table is not msgspec.UNSET
    without_id = msgspec.structs.replace(table, columns=tuple(c for c in table.columns if c.field != "transaction_id"))
    decoder = RowDecoder(msgspec.structs.replace(spec, table=without_id))
    row = {"when": "2025-01-01T00:00:00Z", "card": 7, "amt": 3}
    assert decoded(decoder, row | {"transaction_id": "t"}).transaction_id == "t"
    with pytest.raises(InvalidRequest, match=r"^missing transaction_id$"):
        decoded(decoder, row)
    assert decoded(RowDecoder(spec), row | {"transaction_id": "t"}).reading == "table"


@pytest.mark.parametrize(
    ("changes", "message", "path"),
    [
        ({"amt": "ten"}, 'must be a number; "ten" arrived', "amt"),
        ({"amt": "inf"}, 'must be finite; "inf" arrived', "amt"),
        ({"amt": None}, "must not be missing (amount)", "amt"),
        ({"amt": -3}, "Expected `float` > 0.0; -3.0 arrived", "amt"),
        ({"when": "2025-01-01"}, 'must be a number; "2025-01-01" arrived', "when"),
        ({"when": 1735689600000}, "must be a time from 1970 to 2199 with unit: s; 1735689600000 arrived", "when"),
        ({"card": "4.5E+15"}, "'4.5E+15' is in scientific notation, which drops digits of an id; send all its digits; \"4.5E+15\" arrived", "card"),
        ({"card": ["x"]}, 'must be text or a whole number; ["x"] arrived', "card"),
        ({"card": "x" * 129}, "Expected `str` of length <= 128; \"" + "x" * 59 + "… arrived", "card"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_by_its_column(renamed: RowDecoder, changes: RowOfTable, message: str, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decoded(renamed, OF_TABLE | changes)
    assert (caught.value.message, caught.value.path) == (message, f"$.instances[2].{path}")


def test_a_row_of_neither_names_gets_both(renamed: RowDecoder) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decoded(renamed, {"amount": 3, "customer": 7})
    assert caught.value.message == (
        "missing transaction_id, event_time, customer_id; did you mean 'customer_id' for 'customer'?; "
        "a row with the table's column names has when, id, card, amt"
    ) or caught.value.message.endswith("; a row with the table's column names has when, id, card, amt")
    with pytest.raises(InvalidRequest, match=r"^missing id, amt, of a row with the table's column names$"):
        decoded(renamed, {"when": 1735689600, "card": 7})


# ---- any table

SAME_NAMES = {name: name for name in ("event_time", "transaction_id", "customer_id", "amount", "device_id", "category")}
OTHER_NAMES = dict(zip(SAME_NAMES, ("when", "id", "card", "amt", "device", "code"), strict=True))
IDS = st.sampled_from(["007", "7", "7.0", "-3", "é x", "NULLS", "1e5", "a.b+c", " 1 "])
CODES = st.sampled_from(["5411", "5411.0", "x", "", "NULL", "\\N", "NA", "?", "-1", "true"])
AMOUNTS = st.floats(0.01, 1e6).map(lambda x: round(x, 2)).filter(lambda x: x > 0)
GERMAN = {"decimal": ",", "thousands": ".", "sign": "€"}
TIMES: list[tuple[dict[str, Any], Any]] = [
    ({}, st.datetimes(pd.Timestamp(1990, 1, 1), pd.Timestamp(2090, 1, 1)).map(lambda t: t.isoformat() + "+02:00")),
    ({"unit": "s"}, st.floats(1e9, 2e9).map(repr)),
    ({"unit": "d", "start": "2001-01-01T00:00:00.5+01:00"}, st.floats(0, 9999).map(repr)),
    ({"unit": "month", "start": "2001-01-31"}, st.integers(0, 999).map(str)),
    (
        {"timezone": "America/New_York", "ambiguous": "later", "nonexistent": "shift"},
        st.datetimes(pd.Timestamp(2024, 3, 10), pd.Timestamp(2024, 3, 11)).map(lambda t: t.isoformat(" ")),
    ),
    (
        {"timezone": "Australia/Lord_Howe", "format": "%d/%m/%y %H.%M", "ambiguous": "earlier", "nonexistent": "shift"},
        st.datetimes(pd.Timestamp(2024, 4, 6), pd.Timestamp(2024, 4, 8)).map(lambda t: t.strftime("%d/%m/%y %H.%M")),
    ),
]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_table_sent_row_by_row_is_what_training_read(tmp_path: Path, data: st.DataObject) -> None:
    names = data.draw(st.sampled_from([SAME_NAMES, OTHER_NAMES]))
    time, times = data.draw(st.sampled_from(TIMES))
    is_german = data.draw(st.booleans())
    n = data.draw(st.integers(1, 5))

    def column(values: Any) -> list[Any]:
        drawn: list[Any] = data.draw(st.lists(values, min_size=n, max_size=n))
        return drawn

    def written(number: float) -> str:
        return f"{number:,.2f} €".translate(str.maketrans(",.", ".,")) if is_german else repr(number)

    columns = {
        names["event_time"]: column(times),
        names["transaction_id"]: [f"t{i}" for i in range(n)],
        names["customer_id"]: column(IDS),
        names["amount"]: [written(amount) for amount in column(AMOUNTS)],
        names["device_id"]: column(CODES),
        names["category"]: column(CODES),
        "score": [written(number) if number is not None else "" for number in column(st.none() | AMOUNTS)],
        "chip": column(st.sampled_from(["yes", "No", "t", "0", "1.0", "Mit", "NA"])),
    }
    missing = data.draw(st.sampled_from([[], ["?"], [-1, "?"]]))
    options = {
        **names,
        "event_time": {"column": names["event_time"], **time},
        "missing_values": missing,
        "numeric": {data.draw(st.sampled_from(["score", "points"])): {"column": "score", "missing": "allowed"}},
        "boolean": {"chip": {"positive": ["mit"], "missing": "allowed"}},
        **({"numbers": GERMAN} if is_german else {}),
    }
    suffix = data.draw(st.sampled_from(["csv", "parquet"]))
    if is_german and "unit" in time:  # a count is a number of the file too
        columns[names["event_time"]] = [text.replace(".", ",") for text in columns[names["event_time"]]]
    read(tmp_path, suffix, options, columns, may_be_own=names is SAME_NAMES)


@pytest.mark.parametrize("zone", [None, "Europe/Berlin", "Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("text", ["0001-01-01T00:00:00", "9999-12-31T23:59:59", "0001-01-01", "9999-12-31"])
def test_a_time_at_an_end_of_the_calendar_is_out_of_range(text: str, zone: str | None) -> None:
    """Where no zone can move it: as a placeholder for none, or from a hostile caller."""
    texts = [text] if zone else [f"{text[:10]}T{text[11:] or '00:00:00'}{offset}" for offset in ("+14:00", "-14:00")]
    for one in texts:
        with pytest.raises(ValueError, match="must be a time from 1970 to 2199"):
            time_of(one, TimeForm(timezone=zone))
