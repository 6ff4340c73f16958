"""A user's table of transactions, or of ready features, as the canonical table; a bad one never gets further."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fraud.errors import DataError
from training.columns import MISSING_MS, Reader, encode
from training.mapping import POSITION_ROLES, Mapping, did_you_mean, parse_duration_ms

__all__ = ["Mapping", "dataset_digest", "load_features", "load_table", "load_transactions", "parse_duration_ms"]

_CSV = (".csv", ".csv.gz", ".csv.zst", ".csv.bz2")
_PARQUET = (".parquet", ".pq")
_logger = logging.getLogger(__name__)


def load_table(path: str | Path, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of the mapping's kind.

    Parameters
    ----------
    path : path of a CSV or Parquet file
    mapping : Mapping
    labelled : bool
        Whether labels are needed. False also takes a mapping or a file without them; each label is then -1.

    Raises
    ------
    DataError
        With the column, the rows and the count of everything that breaks the contract.
    """
    return (load_features if mapping.kind == "features" else load_transactions)(path, mapping, labelled=labelled)


def load_transactions(path: str | Path, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of transactions, in the order in which they arrived; see `load_table`.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``processing_time_ms``, rows of equal time in file order. Columns: ``transaction_id`` (str),
        ``event_time_ms`` and ``processing_time_ms`` (int64, UTC), ``customer_id``, ``merchant_id`` (Categorical of
        str), ``amount`` (float64), ``category``, ``channel``, ``device_id`` (Categorical of str), the positions
        in degrees (float64, NaN where missing), ``label`` (int8: 1, 0, -1 unknown), ``label_time_ms`` (int64;
        without meaning where the label is unknown), then the further columns (float64, boolean, Categorical of
        str). Optional roles that the mapping leaves out have no column. ``attrs["dropped_zero_amounts"]`` counts
        the rows that ``on_zero_amount: drop`` left out.
    """
    _expect_kind(mapping, "transactions")
    reader = _open(Path(path), mapping, labelled)
    assert mapping.amount is not None
    assert mapping.event_time is not None
    dropped = _drop_zero_amounts(reader, mapping.amount) if mapping.on_zero_amount == "drop" else 0
    event_time_ms = reader.time_ms(mapping.event_time, "event_time")
    arrival = mapping.processing_time
    frame: dict[str, Any] = {
        "transaction_id": _transaction_ids(reader, mapping.transaction_id),
        "event_time_ms": event_time_ms,
        "processing_time_ms": event_time_ms if arrival is None else reader.time_ms(arrival, "processing_time"),
    }
    for role in ("customer_id", "merchant_id"):
        if (column := getattr(mapping, role)) is not None:
            frame[role] = encode(reader.ids(column, role))
    before = len(reader.problems)
    frame["amount"] = amount = reader.number(mapping.amount, "amount")
    if len(reader.problems) == before:
        reader.refuse(mapping.amount, "amount", "must be a number above zero", np.isnan(amount) | (amount <= 0))
    for role in ("category", "channel", "device_id"):
        if (column := getattr(mapping, role)) is not None:
            frame[role] = reader.categorical(column, role)
    for role in POSITION_ROLES:
        if (column := getattr(mapping, role)) is not None:
            degrees = reader.number(column, role)
            limit = 90 if role.endswith("latitude") else 180
            reader.refuse(column, role, f"must be within -{limit} and {limit} degrees", np.abs(degrees) > limit)
            frame[role] = degrees
    frame |= _labels(reader, mapping, labelled, event_time_ms)
    frame |= _further(reader, mapping)
    reader.finish()
    if dropped:
        _logger.warning(
            "%s: left out %s rows with an amount of zero (on_zero_amount: drop)", reader.source, f"{dropped:,}"
        )
    table = _sorted(frame, frame["processing_time_ms"])
    table.attrs["dropped_zero_amounts"] = dropped
    return table


def load_features(path: str | Path, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of ready features; see `load_table`.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``event_time_ms``, or in file order where the mapping has no event_time. Columns:
        ``transaction_id`` (str); ``event_time_ms`` and ``label_time_ms`` (int64, only with an event_time);
        ``label`` (int8: 1, 0, -1 unknown); then the features in the order of the mapping (float64, boolean,
        Categorical of str; missing where the mapping allows it).
    """
    _expect_kind(mapping, "features")
    reader = _open(Path(path), mapping, labelled)
    frame: dict[str, Any] = {"transaction_id": _transaction_ids(reader, mapping.transaction_id)}
    order = np.arange(reader.table.num_rows, dtype=np.int64)
    if mapping.event_time is not None:
        order = frame["event_time_ms"] = reader.time_ms(mapping.event_time, "event_time")
    labels = _labels(reader, mapping, labelled, order)
    if mapping.event_time is None:
        del labels["label_time_ms"]
    frame |= labels | _further(reader, mapping)
    reader.finish()
    return _sorted(frame, order)


def dataset_digest(path: str | Path) -> str:
    """``sha256:`` and the hexadecimal SHA-256 of the file's bytes."""
    with Path(path).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _expect_kind(mapping: Mapping, kind: str) -> None:
    if mapping.kind != kind:
        raise DataError(f"the mapping says kind: {mapping.kind}; this needs kind: {kind}")


def _open(path: Path, mapping: Mapping, labelled: bool) -> Reader:
    if not path.is_file():
        raise DataError(f"{path.name}: {'is a folder; give one file' if path.is_dir() else 'no such file'}")
    name = path.name.lower()
    if not name.endswith(_CSV + _PARQUET):
        raise DataError(f"{path.name}: unknown file type; give one of {', '.join((*_PARQUET, *_CSV))}")
    if labelled and mapping.label is None:
        raise DataError("role 'label' is missing from the mapping; training and evaluation need it")
    is_csv = name.endswith(_CSV)
    try:
        present = _csv_header(path, mapping.delimiter) if is_csv else pq.read_schema(path).names
        wanted = _present_columns(path.name, mapping, present, labelled)
        table = _read_csv(path, mapping.delimiter, wanted) if is_csv else pq.read_table(path, columns=wanted)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: cannot be read as {'CSV' if is_csv else 'Parquet'}: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"{path.name}: the file has no rows")
    return Reader(path.name, table, np.arange(1, table.num_rows + 1, dtype=np.int64))


def _present_columns(source: str, mapping: Mapping, present: list[str], labelled: bool) -> list[str]:
    """The columns to read; a label's may be absent where labels are not needed."""
    columns = mapping.columns()
    if not labelled:
        columns = {
            role: column for role, column in columns.items() if column in present or role not in ("label", "label_time")
        }
    problems = [
        f"{source}: column {column!r} ({role}) is not in the file{did_you_mean(column, present)}"
        for role, column in columns.items()
        if column not in present
    ]
    problems += [
        f"{source}: column {column!r} ({role}) is in the file {present.count(column)} times"
        for role, column in columns.items()
        if present.count(column) > 1
    ]
    if problems:
        listed = ", ".join(present[:40]) + (", …" if len(present) > 40 else "")
        raise DataError("\n".join([*problems, f"{source}: columns of the file: {listed}"]))
    return list(columns.values())


def _csv_header(path: Path, delimiter: str) -> list[str]:
    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=_skip)
    with pyarrow.csv.open_csv(path, parse_options=parsing) as stream:
        names: list[str] = stream.schema.names
    return names


def _read_csv(path: Path, delimiter: str, columns: list[str]) -> pa.Table:
    """Every column as text, so that an id keeps its zeros and a bad value can be shown as it stands."""
    broken: list[Any] = []

    def note(row: Any) -> str:
        broken.append(row)
        return "skip"

    def read(use_threads: bool) -> pa.Table:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(use_threads=use_threads),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=columns,
                column_types=dict.fromkeys(columns, pa.large_string()),
                strings_can_be_null=True,
                null_values=["", "NULL", "\\N"],
            ),
        )

    table = read(use_threads=True)
    if broken:
        broken.clear()
        read(use_threads=False)  # only a single thread knows the numbers of rows
        first = ", ".join(f"row {row.number - 1} has {row.actual_columns}" for row in broken[:5])
        raise DataError(
            f"{path.name}: each row must have {broken[0].expected_columns} fields, as the header has; "
            f"{len(broken):,} {'breaks' if len(broken) == 1 else 'break'} this: {first}"
            f"{', …' if len(broken) > 5 else ''}"
        )
    return table


def _skip(_: Any) -> str:
    return "skip"


def _drop_zero_amounts(reader: Reader, column: str) -> int:
    """Leave the rows with an amount of exactly zero out of the reader's table; returns their number."""
    zero = reader.number(column, "amount") == 0
    reader.problems.clear()  # the amounts are read again, and judged, without those rows
    if zero.all():
        raise DataError(f"{reader.source}: column {column!r} (amount) is zero in every row")
    if zero.any():
        reader.table = reader.table.filter(pa.array(~zero))
        reader.rows = reader.rows[~zero]
    return int(zero.sum())


def _transaction_ids(reader: Reader, column: str | None) -> pd.Series[str]:
    if column is None:
        return pd.Series([f"row-{row}" for row in reader.rows], dtype="str")
    ids: pd.Series[str] = reader.ids(column, "transaction_id").to_pandas()
    repeated = (ids.duplicated() & ids.notna()).to_numpy()
    if repeated.any():
        first_rows = {ids.iloc[row]: reader.rows[row] for row in reversed(np.flatnonzero(ids.isin(ids[repeated])))}
        reader.refuse(
            column,
            "transaction_id",
            "must be different in each row",
            repeated,
            lambda row: f"{ids.iloc[row]!r}, as in row {first_rows[ids.iloc[row]]}",
        )
    return ids


def _labels(
    reader: Reader, mapping: Mapping, labelled: bool, event_time_ms: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    present = reader.table.column_names
    if mapping.label is None or mapping.label not in present:
        return {"label": np.full(len(event_time_ms), -1, dtype=np.int8), "label_time_ms": event_time_ms}
    before = len(reader.problems)
    label = reader.flag(mapping.label, "label", "must be 0 or 1, or empty where it is unknown")
    if labelled and len(reader.problems) == before:
        counts = {value: int((label == value).sum()) for value in (1, 0)}
        for value, what in ((1, "fraud"), (0, "legitimate")):
            if counts[value] == 0:
                reader.reject(mapping.label, "label", f"has no row with label {value} ({what}); a model needs both")
    label_time_ms = event_time_ms + (mapping.label_delay_ms or 0)
    if mapping.label_time is not None and mapping.label_time.column in present:
        column = mapping.label_time.column
        before = len(reader.problems)
        given_ms = reader.time_ms(mapping.label_time, "label_time", missing=True)
        given = given_ms != MISSING_MS
        if len(reader.problems) == before:
            early = given & (given_ms < event_time_ms)
            reader.refuse(column, "label_time", "must not be before the event_time", early)
            if mapping.label_delay is None:
                reader.refuse(
                    column,
                    "label_time",
                    "must be given where there is a label, as the mapping has no label_delay",
                    ~given & (label >= 0),
                    lambda row: "missing",
                )
        label_time_ms = np.where(given & (label >= 0), given_ms, label_time_ms)
    return {"label": label, "label_time_ms": label_time_ms}


def _further(reader: Reader, mapping: Mapping) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, numeric in mapping.numeric.items():
        columns[name] = reader.numeric(numeric.column, f"numeric {name}", numeric)
    for name, boolean in mapping.boolean.items():
        columns[name] = reader.boolean(boolean.column, f"boolean {name}", boolean)
    for name, categorical in mapping.categorical.items():
        columns[name] = reader.categorical(categorical.column, f"categorical {name}", categorical)
    return columns


def _sorted(columns: dict[str, Any], key: NDArray[np.int64]) -> pd.DataFrame:
    frame = pd.DataFrame(columns, copy=False)
    if np.all(key[1:] >= key[:-1]):
        return frame
    return frame.iloc[np.argsort(key, kind="stable")].reset_index(drop=True)
