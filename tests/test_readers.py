"""What was written is what is read: dialects, encodings, several files, and the texts of what cannot be read."""

# ruff: noqa: E501 (each message stands on its line, as a user reads it)

from __future__ import annotations

import csv
import gzip
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud.errors import DataError
from fraud.forms import id_text
from training.csv_files import CsvFile, Dialect
from training.data import dataset_digest, load_transactions
from training.files import Given
from training.mapping import Mapping

DAY_MS = 86_400_000
HEADER = ("id", "when", "card", "shop", "amt", "fraud")
ROLES: dict[str, Any] = {
    "event_time": "when",
    "transaction_id": "id",
    "customer_id": "card",
    "merchant_id": "shop",
    "amount": "amt",
    "label": "fraud",
    "label_delay": "7d",
}


def mapping(**changes: Any) -> Mapping:
    return Mapping.model_validate({role: value for role, value in (ROLES | changes).items() if value is not None})


def rows_of(**columns: Any) -> pd.DataFrame:
    """Four good rows, some columns replaced by a list or by one value for all."""
    table = pd.DataFrame(
        {
            "id": ["t1", "t2", "t3", "t4"],
            "when": [f"2025-02-03T10:00:0{i}Z" for i in range(4)],
            "card": ["c1", "c2", "c1", "c3"],
            "shop": "Acme",
            "amt": ["10.5", "20", "30", "40"],
            "fraud": ["0", "1", "0", "0"],
        }
    )
    return table.assign(**columns)


def written(folder: Path, name: str = "sales.csv", **columns: Any) -> Path:
    path = folder / name
    table = rows_of(**columns)
    if name.endswith(".parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    return path


def refusal(path: Any, mapped: Mapping) -> str:
    with pytest.raises(DataError) as caught:
        load_transactions(path, mapped)
    return caught.value.message


# ---- CSV: what was written is what is read

FIELDS = st.text(st.sampled_from('ab,;"\\\r\n é€\t|'), max_size=12)
TABLES = st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=12)
READING = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_back(path: Path, dialect: Dialect, block_bytes: int) -> list[tuple[str, ...]]:
    table = CsvFile.open(path, dialect, ["x", "y", "z"]).read(["x", "y", "z"], block_bytes)
    return [tuple("" if value is None else value for value in row.values()) for row in table.to_pylist()]


@READING
@given(table=TABLES, block_bytes=st.integers(24, 200), ending=st.sampled_from(["\r\n", "\n"]))
def test_what_the_csv_module_writes(
    tmp_path: Path, table: list[tuple[str, ...]], block_bytes: int, ending: str
) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator=ending)
        out.writerows([("x", "y", "z"), *table])
    assert read_back(path, Dialect(escape='"'), block_bytes) == table


@READING
@given(table=TABLES, block_bytes=st.integers(24, 200), delimiter=st.sampled_from(",;|\t"))
def test_what_the_csv_module_writes_with_backslashes(
    tmp_path: Path, table: list[tuple[str, ...]], block_bytes: int, delimiter: str
) -> None:
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\")
        out.writerows([("x", "y", "z"), *table])
    assert read_back(path, Dialect(escape="\\"), block_bytes) == table


@READING
@given(table=TABLES, block_bytes=st.integers(24, 200), encoding=st.sampled_from(["utf-8-sig", "utf-16", "cp1252"]))
def test_what_pandas_writes_in_other_encodings(
    tmp_path: Path, table: list[tuple[str, ...]], block_bytes: int, encoding: str
) -> None:
    path = tmp_path / "t.csv.gz"
    frame = pd.DataFrame(table, columns=["x", "y", "z"])
    frame.to_csv(path, index=False, encoding=encoding, quoting=csv.QUOTE_ALL, compression="gzip")
    stated = None if encoding == "utf-16" else encoding  # a byte order mark says it
    assert read_back(path, Dialect(escape='"', encoding=stated), block_bytes) == table


@READING
@given(table=TABLES, block_bytes=st.integers(24, 200))
def test_what_pyarrow_writes(tmp_path: Path, table: list[tuple[str, ...]], block_bytes: int) -> None:
    path = tmp_path / "t.csv"
    pyarrow.csv.write_csv(pa.table(dict(zip("xyz", map(list, zip(*table, strict=True)), strict=True))), path)
    assert read_back(path, Dialect(escape='"'), block_bytes) == table


def test_a_quoted_line_end_where_arrow_cuts_the_file(tmp_path: Path) -> None:
    first = b"id,when,card,shop,amt,fraud\r\n"
    filler = b't1,2025-02-03T10:00:00Z,c1,"' + b"x" * 965 + b'",1,0\r\n'  # 1,000 bytes
    rows = first + filler * 1048
    rows += b't2,2025-02-03T10:00:00Z,c1,"'
    shop = b"y" * (2**20 - 1 - len(rows)) + b"\r\nz"
    rows += shop + b'",1,1\r\n'
    assert rows[2**20 - 1 : 2**20 + 1] == b"\r\n"
    (tmp_path / "sales.csv").write_bytes(rows)
    table = CsvFile.open(tmp_path / "sales.csv", Dialect(), HEADER).read(HEADER)
    assert table["shop"].to_pylist() == ["x" * 965] * 1048 + [shop.decode()]


def test_a_row_longer_than_a_block(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,y\n" + "a" * 300 + ",1\nb,2\n")
    assert CsvFile.open(tmp_path / "t.csv", Dialect(), "xy").read(["x", "y"], 64)["y"].to_pylist() == ["1", "2"]


def test_backslashes_before_quotes_are_no_guess(tmp_path: Path) -> None:
    text = 'id,when,card,shop,amt,fraud\nt1,2025-02-03T10:00:00Z,c1,Acme,1,0\nt2,2025-02-03T10:00:00Z,c1,"Joe\\"s Diner",1,1\n'
    path = tmp_path / "sales.csv"
    path.write_text(text)
    assert refusal(path, mapping()) == (
        "sales.csv: row 2, column 'shop' goes on after its closing quote; if a backslash before a quote escapes it, "
        "write escape: '\\' into the mapping, otherwise double a quote that belongs to a field"
    )
    assert load_transactions(path, mapping(escape="\\"))["merchant_id"].tolist() == ["Acme", 'Joe"s Diner']
    path.write_text(text.replace('Joe\\"s', 'Joe"s'))
    assert refusal(path, mapping()).endswith("closing quote; double a quote that belongs to a field")
    path.write_text(text.replace('"Joe\\"s Diner"', '"C:\\"'))
    assert load_transactions(path, mapping())["merchant_id"].tolist() == ["Acme", "C:\\"]


def test_a_null_of_a_file_with_escapes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('x,y\n\\N,"\\N"\n"a\\",\\N,b",\\N\n')
    table = CsvFile.open(tmp_path / "t.csv", Dialect(escape="\\"), "xy").read(["x", "y"])
    assert table.to_pydict() == {"x": [None, 'a",N,b'], "y": ["N", None]}


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    lines = [
        "t1,2025-02-03T10:00:00Z,c1,Acme,1,0",
        't2,2025-02-03T10:00:00Z,c1,"Acme,1,1',
        "t3,2025-02-03T10:00:00Z,c1,Acme,1,0",
    ]
    (tmp_path / "sales.csv").write_text("\n".join([",".join(HEADER), *lines]) + "\n")
    assert refusal(tmp_path / "sales.csv", mapping()) == (
        "sales.csv: row 2, column 'shop' has a quote that is never closed; double a quote that belongs to a field"
    )


def test_a_quote_that_is_never_closed_in_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('x,y\n1,2\n"3,4\n' + "5,6\n" * 100)
    with pytest.raises(DataError, match=r"^t.csv: row 2, column 'x' has a quote that is never closed"):
        CsvFile.open(tmp_path / "t.csv", Dialect(), "xy").read(["x", "y"], 64)


def test_a_quoted_newline_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "sales.csv").write_text(
        ",".join(HEADER)
        + '\nt1,2025-02-03T10:00:00Z,c1,"A\nc\nme",1,0\nt2,2025-02-03T10:00:00Z,c1\nt3,x,y,"a\nb",1,0,9\n'
    )
    assert refusal(tmp_path / "sales.csv", mapping()) == (
        "sales.csv: each row must have 6 fields, as the header has; 2 break this: row 2 has 3, row 3 has 7"
    )


# ---- encodings


def test_cp1252_is_told_with_row_column_and_advice(tmp_path: Path) -> None:
    path = tmp_path / "sales.csv"
    rows_of(shop=["Acme", "Café", "Müller", "Acme"]).to_csv(path, index=False, encoding="cp1252")
    assert refusal(path, mapping()) == (
        "sales.csv: column 'shop' is not UTF-8; 2 of 4 rows break this: row 2 (b'Caf\\xe9'), row 3 (b'M\\xfcller'); "
        "save the file as UTF-8, or write its encoding into the mapping: encoding: cp1252 would read 'Café'"
    )
    assert load_transactions(path, mapping(encoding="cp1252"))["merchant_id"].tolist() == [
        "Acme",
        "Café",
        "Müller",
        "Acme",
    ]
    rows_of().rename(columns={"shop": "café"}).to_csv(path, index=False, encoding="cp1252")
    assert refusal(path, mapping(merchant_id="café")).startswith(
        "sales.csv: the header is not UTF-8 (b'id,when,card,caf\\xe9'); save"
    )


def test_utf_16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sales.csv"
    rows_of(shop="Café").to_csv(path, index=False, encoding="utf-16", sep="\t")
    with caplog.at_level(logging.WARNING):
        assert load_transactions(path, mapping())["merchant_id"].tolist() == ["Café"] * 4
    assert caplog.messages == [
        "sales.csv: is UTF-16-LE, as its byte order mark says",
        "sales.csv: the fields are separated by '\\t'",
    ]
    rows_of(shop="Café").to_csv(path, index=False, encoding="utf-16-le")
    assert refusal(path, mapping()) == (
        "sales.csv: has zero bytes, as UTF-16 has; write encoding: utf-16-le into the mapping, or save it as UTF-8"
    )
    assert len(load_transactions(path, mapping(encoding="utf-16-le"))) == 4


# ---- dates and times


@pytest.mark.parametrize("kind", ["sales.csv", "sales.parquet"])
def test_plain_dates_are_days_of_their_zone(tmp_path: Path, kind: str) -> None:
    days = ["2025-02-03", "2025-02-04", "2025-03-30", "2025-03-31"]
    values = pd.to_datetime(pd.Series(days)).dt.date if kind.endswith("parquet") else days
    path = written(tmp_path, kind, when=values)
    table = load_transactions(path, mapping(event_time={"column": "when", "timezone": "Europe/Berlin"}))
    expected = pd.to_datetime(pd.Series(days)).dt.tz_localize("Europe/Berlin").dt.tz_convert("UTC")
    assert pd.to_datetime(table["event_time_ms"], unit="ms", utc=True).tolist() == expected.tolist()
    assert refusal(path, mapping()).startswith(
        f"{kind}: column 'when' (event_time) has times without a zone; say where"
    )


@pytest.mark.parametrize("kind", ["text", "text of midnights", "date", "midnights"])
def test_a_label_dated_on_the_day_of_the_event_is_known_at_its_end(tmp_path: Path, kind: str) -> None:
    known = pd.Series(["2025-02-03", "2025-02-04", None, "2025-02-05"])
    midnights = known + " 00:00:00"
    values = {
        "text": known,
        "text of midnights": midnights,
        "date": pd.to_datetime(known).dt.date,
        "midnights": pd.to_datetime(known),
    }[kind]
    path = written(tmp_path, "sales.csv" if kind.startswith("text") else "sales.parquet", known=values)
    table = load_transactions(path, mapping(label_time={"column": "known", "timezone": "Europe/Berlin"}))
    ends = pd.to_datetime(table["label_time_ms"], unit="ms", utc=True).dt.tz_convert("Europe/Berlin")
    assert [str(end) for end in ends] == [
        "2025-02-03 23:59:59.999000+01:00",
        "2025-02-04 23:59:59.999000+01:00",
        "2025-02-10 11:00:02+01:00",
        "2025-02-05 23:59:59.999000+01:00",
    ]
    path = written(tmp_path, known="2025-02-02")
    assert "must not be before the event_time; 4 of 4 rows" in refusal(
        path, mapping(label_time={"column": "known", "timezone": "UTC"})
    )


def test_local_times_that_come_twice_or_never_by_option(tmp_path: Path) -> None:
    path = written(
        tmp_path, when=["2025-10-26 02:30:00", "2025-03-30 02:30:00", "2025-01-01 00:00:00", "2025-07-01 00:00:00"]
    )
    found = {}
    for ambiguous in ("earlier", "later"):
        time = {"column": "when", "timezone": "Europe/Berlin", "ambiguous": ambiguous, "nonexistent": "shift"}
        table = load_transactions(path, mapping(event_time=time)).set_index("transaction_id")
        found[ambiguous] = pd.to_datetime(table["event_time_ms"], unit="ms")
    assert [str(found[which]["t1"]) for which in ("earlier", "later")] == ["2025-10-26 00:30:00", "2025-10-26 01:30:00"]
    assert str(found["later"]["t2"]) == "2025-03-30 01:00:00"
    assert "must name one instant of Europe/Berlin" in refusal(
        path, mapping(event_time={"column": "when", "timezone": "Europe/Berlin", "ambiguous": "later"})
    )


@pytest.mark.parametrize("unit", ["ms", "s", "m", "h", "d"])
def test_numbers_that_count_something_else_than_the_unit_says(tmp_path: Path, unit: str) -> None:
    """Hours since 1970 read as seconds lie in January 1970, and so does a count from another start."""
    hours = [1_738_576_800 // 3600 + i for i in range(4)]
    if unit == "h":
        table = load_transactions(written(tmp_path, when=hours), mapping(event_time={"column": "when", "unit": "h"}))
        assert str(pd.to_datetime(table["event_time_ms"].iloc[1], unit="ms")) == "2025-02-03 11:00:00"
        hours = [1, 2, 3, 4]
    message = refusal(written(tmp_path, when=hours), mapping(event_time={"column": "when", "unit": unit}))
    if unit == "d":
        assert "must be a time from 1970 to 2199 with unit: d" in message
    else:
        assert f"it counts no {unit} since 1970; write the unit that it counts" in message


def test_times_of_parquet_that_were_made_in_a_wrong_unit(tmp_path: Path) -> None:
    path = written(
        tmp_path, "sales.parquet", when=pd.to_datetime([1_738_576_800 + i for i in range(4)], unit="us", utc=True)
    )
    assert refusal(path, mapping()) == (
        "sales.parquet: column 'when' (event_time) lies before 1980 in every row (the latest is 1970-01-01T00:28:58Z): "
        "these times were made from numbers in a wrong unit"
    )


@pytest.mark.parametrize(
    ("unit", "counts", "expected"),
    [
        (
            "h",
            [1, 2, 26, 743],
            ["2024-01-01 01:00:00", "2024-01-01 02:00:00", "2024-01-02 02:00:00", "2024-01-31 23:00:00"],
        ),
        ("month", [0, 1, 1, 13], ["2024-01-01", "2024-02-01", "2024-02-01", "2025-02-01"]),
    ],
)
def test_a_count_from_a_start(tmp_path: Path, unit: str, counts: list[int], expected: list[str]) -> None:
    time = {"column": "when", "unit": unit, "start": "2024-01-01"}
    table = load_transactions(written(tmp_path, when=counts), mapping(event_time=time))
    assert pd.to_datetime(table["event_time_ms"], unit="ms").tolist() == pd.to_datetime(expected).tolist()


def test_numbers_are_no_years(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, when=[2024, 2025, 2025, 2025]), mapping())
    assert message.startswith("sales.csv: column 'when' (event_time) holds numbers; say what they count")


# ---- ids


def test_ids_in_scientific_notation_are_refused(tmp_path: Path) -> None:
    cards = ["4.53202E+15", "4.53202E+15", "c.1e5", "4E+15"]
    assert refusal(written(tmp_path, card=cards), mapping()) == (
        "sales.csv: column 'card' (customer_id) is in scientific notation, which drops digits and makes one of many; "
        "write all digits (in a spreadsheet, format the column as text before saving); 3 of 4 rows break this: "
        "row 1 ('4.53202E+15'), row 2 ('4.53202E+15'), row 4 ('4E+15')"
    )


@pytest.mark.parametrize(("dtype", "power"), [("float64", 53), ("float32", 24)])
def test_float_ids_that_skip_whole_numbers_are_refused(tmp_path: Path, dtype: str, power: int) -> None:
    cards = pd.Series([2.0**power, 1.0, 2.0, 2.0**power + 2], dtype=dtype)
    assert f"column 'card' (customer_id) holds decimal numbers ({dtype}) at or above 2**{power}" in refusal(
        written(tmp_path, "sales.parquet", card=cards), mapping()
    )
    small = load_transactions(written(tmp_path, "sales.parquet", card=cards.clip(upper=2.0**power - 1)), mapping())
    assert set(small["customer_id"]) == {"1", "2", str(2**power - 1)}


NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1)


@READING
@given(numbers=st.lists(NUMBERS, min_size=4, max_size=4))
def test_an_integral_id_has_one_text_in_every_file(tmp_path: Path, numbers: list[int]) -> None:
    texts = [id_text(number) for number in numbers]
    assert [id_text(float(number)) for number in numbers] == texts
    ways: dict[str, Any] = {
        "text.csv": [f"{number}.0" for number in numbers],
        "plain.csv": numbers,
        "float.parquet": pd.Series(numbers, dtype="float64"),
        "int.parquet": numbers,
        "text.parquet": [f"{number}.00" for number in numbers],
    }
    for name, cards in ways.items():
        table = load_transactions(
            written(tmp_path, name, card=cards, shop=cards), mapping(category="shop", merchant_id=None)
        )
        by_id = table.set_index("transaction_id").loc[["t1", "t2", "t3", "t4"]]
        assert by_id["customer_id"].tolist() == texts, name
        assert by_id["category"].tolist() == texts, name


# ---- several files


def test_several_files_are_one_table(tmp_path: Path) -> None:
    a = written(tmp_path, "a.csv")
    b = written(tmp_path, "b.csv", id=["u1", "u2", "u3", "u4"])
    one = tmp_path / "one.csv"
    pd.concat([pd.read_csv(a), pd.read_csv(b)]).to_csv(one, index=False)
    expected = load_transactions(one, mapping())
    one.unlink()
    ways: list[Given] = [[a, b], tmp_path, str(tmp_path / "*.csv"), [a, str(tmp_path / "b*")]]
    for meant in ways:
        pd.testing.assert_frame_equal(load_transactions(meant, mapping()), expected)
        assert dataset_digest(meant) == dataset_digest([a, b])
    assert dataset_digest([b, a]) != dataset_digest([a, b])
    assert load_transactions([a, b], mapping(transaction_id=None))["transaction_id"].nunique() == 8


def test_problems_of_several_files_name_the_file(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.csv"), written(tmp_path, "b.csv", amt=["1", "2", "-3", "4"])
    assert refusal([a, b], mapping()) == (
        "a.csv and 1 more: column 'id' (transaction_id) must be different in each row; 4 of 8 rows break this: "
        "row 1 of b.csv ('t1', as in row 1 of a.csv), row 2 of b.csv ('t2', as in row 2 of a.csv), "
        "row 3 of b.csv ('t3', as in row 3 of a.csv), row 4 of b.csv ('t4', as in row 4 of a.csv)\n"
        "a.csv and 1 more: column 'amt' (amount) must be a number above zero; 1 of 8 rows breaks this: row 3 of b.csv ('-3')"
    )
    c = tmp_path / "c.csv"
    rows_of().drop(columns="shop").to_csv(c, index=False)
    assert refusal([a, c], mapping()).startswith("c.csv: column 'shop' (merchant_id) is not in the file\n")
    assert refusal(tmp_path / "x*.csv", mapping()) == "x*.csv: no such file"


def test_a_column_of_another_type_in_the_next_file(tmp_path: Path) -> None:
    large = 2**53 + 1
    a = written(tmp_path, "a.parquet", card=[large, 2, 3, 4])
    b = written(tmp_path, "b.parquet", id=list("wxyz"), card=[1.0, 2.0, np.nan, 4.0])
    assert refusal([a, b], mapping()) == (
        "a.parquet: column 'card' does not hold the same in every file (int64, double); store it as one type"
    )
    a = written(tmp_path, "a.parquet", card=[1, 2, 3, 4], amt=[1, 2, 3, 4])
    b = written(tmp_path, "b.parquet", id=list("wxyz"), card=[1, 2, 3, 4], amt=[1.5, 2, 3, 4])
    assert sorted(load_transactions([a, b], mapping())["amount"])[:2] == [1.0, 1.5]
    b = written(tmp_path, "b.parquet", id=list("wxyz"), card=list("wxyz"), amt=[1, 2, 3, 4])
    assert "column 'card' does not hold the same in every file (int64, large_string)" in refusal([a, b], mapping())


# ---- numbers, flags, missing values, joined columns, patterns


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    german = mapping(numbers={"decimal": ",", "thousands": ".", "sign": "€"}, on_negative_amount="absolute")
    path = written(tmp_path, amt=["1.234,50 €", "-7", "€ 0,5", "12.345.678,9"])
    assert load_transactions(path, german)["amount"].tolist() == [1234.5, 7.0, 0.5, 12_345_678.9]
    for bad in ("1.5", "1,2,3", "12.34,5", "$5", "1.234.5", "x"):
        path = written(tmp_path, amt=["1,5", bad, "2", "3"])
        assert refusal(path, german) == (
            f"sales.csv: column 'amt' (amount) must be a number such as €1.234,56; 1 of 4 rows breaks this: row 2 ({bad!r})"
        )


def test_refunds_by_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, amt=["$134.09", "$20", "$-77.00", "-$0.00"])
    dollars = {"sign": "$"}
    assert "must be a number above zero; 2 of 4 rows" in refusal(path, mapping(numbers=dollars))
    with caplog.at_level(logging.WARNING):
        table = load_transactions(path, mapping(numbers=dollars, on_negative_amount="drop", on_zero_amount="drop"))
    assert table["amount"].tolist() == [134.09, 20.0]
    assert caplog.messages == [
        "sales.csv: left out 1 rows with an amount of zero (on_zero_amount: drop)",
        "sales.csv: left out 1 rows with an amount below zero (on_negative_amount: drop)",
    ]
    assert (table.attrs["dropped_zero_amounts"], table.attrs["dropped_negative_amounts"]) == (1, 1)


def test_flags_as_words(tmp_path: Path) -> None:
    path = written(tmp_path, fraud=["No", "Yes", "", "no"])
    assert load_transactions(path, mapping())["label"].tolist() == [0, 1, -1, 0]
    path = written(tmp_path, fraud=["settled", "Chargeback", "", "SETTLED"])
    words = {"column": "fraud", "positive": ["chargeback"], "negative": ["settled"]}
    assert load_transactions(path, mapping(label=words))["label"].tolist() == [0, 1, -1, 0]


@pytest.mark.parametrize("kind", ["sales.csv", "sales.parquet"])
def test_missing_values(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, months=[-1, 3, -1, 12], score=[-1, 2, 3, 4], os=["?", "x", "-1", "y"])
    table = load_transactions(
        path,
        mapping(
            missing_values=["?"],
            numeric={"months": {"missing_values": [-1], "missing": "allowed"}, "score": {}},
            categorical={"os": {"missing": "allowed"}},
        ),
    )
    np.testing.assert_array_equal(table["months"], [np.nan, 3, np.nan, 12])
    assert table["score"].tolist() == [-1, 2, 3, 4]
    assert table["os"].cat.categories.tolist() == ["-1", "x", "y"]


def test_joined_columns(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "sales.parquet",
        user=[0, 0, 1, 1],
        card=[0.0, 1.0, np.nan, 1.0],
        year=2002,
        month=9,
        day=[1, 1, 2, 2],
        clock=["06:21", "06:42", "06:22", "17:45"],
    )
    table = load_transactions(
        path,
        mapping(
            customer_id={"columns": ["user", "card"]},
            event_time={"columns": ["year", "month", "day", "clock"], "format": "%Y %m %d %H:%M", "timezone": "UTC"},
            categorical={"card": {"missing": "allowed"}},
        ),
    )
    assert table["customer_id"].tolist() == ["0-0", "0-1", "1-", "1-1"]
    assert pd.to_datetime(table["event_time_ms"].iloc[0], unit="ms") == pd.Timestamp("2002-09-01 06:21")
    assert table["card"].cat.categories.tolist() == ["0", "1"]


def test_patterns_take_the_columns_that_play_no_other_role(tmp_path: Path) -> None:
    path = written(tmp_path, V1=[1, 2, 3, 4], V2=["", 2, 3, 4], V10="a", C1=1)
    mapped = mapping(numeric={"V*": {"missing": "allowed"}, "C1": {}}, categorical=["V10"])
    assert load_transactions(path, mapped).columns.tolist()[-4:] == ["V1", "V2", "C1", "V10"]
    assert refusal(path, mapping(numeric=["V*", "*1*"])).startswith(
        "sales.csv: column 'V1' is matched by 'V*' and by '*1*'"
    )
    assert refusal(path, mapping(numeric=["X*"])) == "sales.csv: numeric 'X*' matches no column"
    with pytest.raises(ValueError, match=r"takes every column, the label's too"):
        mapping(numeric=["*"])


def test_compressed_files_are_read_as_the_plain_one(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "sales.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    pd.testing.assert_frame_equal(
        load_transactions(tmp_path / "sales.csv.gz", mapping()), load_transactions(path, mapping())
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(rows_of()), buffer)
    (tmp_path / "sales.pq").write_bytes(buffer.getvalue())
    pd.testing.assert_frame_equal(
        load_transactions(tmp_path / "sales.pq", mapping()), load_transactions(path, mapping())
    )
