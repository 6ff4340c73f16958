"""A user's table of transactions, or of ready features, as the canonical table; an invalid table is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping as Dict
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from fraud.errors import DataError
from fraud.schema import POSITION_ROLES
from training import ids, numbers, times
from training.columns import Reader
from training.csv_files import Dialect
from training.currencies import minor_digits_of
from training.files import Files, Given
from training.labels import fold_labels, read_labels
from training.mapping import EVERY_LABEL, STAKE, Mapping
from training.mapping_parts import (
    BooleanColumn,
    CategoricalColumn,
    CurrencyColumn,
    NumericColumn,
    did_you_mean,
    parse_duration_ms,
    unknown_currency,
)
from training.trained_table import TRAINED_TABLE, table_of

__all__ = [
    "Files",
    "Mapping",
    "dataset_digest",
    "load_features",
    "load_table",
    "load_transactions",
    "parse_duration_ms",
]

LARGE = 60_000
"""From about here on, a customer's amounts fall into one bin of the history's histogram."""
SMALLEST, LARGEST = 0.01, (2**32 - 1) / 100
"""The least and the greatest amount that a history keeps."""
_logger = logging.getLogger(__name__)


def load_table(path: Given, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of the mapping's kind.

    Parameters
    ----------
    path : path of a CSV or Parquet file, a folder, a pattern such as ``data/*.csv``, or several of these
        Several files are one table: their rows follow one another.
    mapping : Mapping
    labelled : bool
        Whether labels are needed. False also takes a mapping or a file without them; each label is then -1.

    Raises
    ------
    DataError
        Names column, rows and count of everything that breaks the contract.
    """
    return (load_features if mapping.kind == "features" else load_transactions)(path, mapping, labelled=labelled)


def load_transactions(path: Given, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of transactions, in the order in which they arrived; see `load_table`.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``processing_time_ms``, rows of equal time in file order. Columns: ``transaction_id`` (str),
        ``event_time_ms`` and ``processing_time_ms`` (int64, UTC), ``customer_id``, ``merchant_id`` (Categorical of
        str), ``amount`` (float64), ``currency``, ``category``, ``channel``, ``device_id`` (Categorical of
        str), the positions in degrees (float64, NaN where missing), ``label`` (int8: 1, 0, -1 unknown),
        ``label_time_ms`` (int64; without meaning where the label is unknown), then the further columns (float64,
        boolean, Categorical of str). Where transactions have several label rows, ``every_label`` too: lists of
        (label, time in ms), see `training.labels.fold_labels`. Optional roles that the mapping leaves out have no
        column.
        ``attrs["trained_table"]`` says how the file's columns are read, for the bundle;
        ``attrs["dropped_zero_amounts"]`` and ``attrs["dropped_negative_amounts"]`` count the rows that were left out.
    """
    _expect_kind(mapping, "transaction")
    reader = _open(path, mapping, labelled)
    assert mapping.amount is not None
    assert mapping.event_time is not None
    dropped = _drop_amounts(reader, mapping)
    every_label = fold_labels(reader, mapping)
    event_time_ms = times.time_ms(reader, mapping.event_time, "event_time")
    arrival = mapping.processing_time
    frame: dict[str, Any] = {
        "transaction_id": _transaction_ids(reader, mapping),
        "event_time_ms": event_time_ms,
        "processing_time_ms": event_time_ms if arrival is None else times.time_ms(reader, arrival, "processing_time"),
    }
    for role in ("customer_id", "merchant_id"):
        if (text := getattr(mapping, role)) is not None:
            frame[role] = ids.encode(ids.ids(reader, text, role)[0])
    before = len(reader.problems)
    amount = numbers.number(reader, mapping.amount, "amount")
    if mapping.on_negative_amount == "absolute":
        amount = np.abs(amount)
    if len(reader.problems) == before:
        reader.refuse(mapping.amount, "amount", "must be a number above zero", np.isnan(amount) | (amount <= 0))
    frame["amount"] = amount
    if mapping.currency is not None:
        frame["currency"] = _currencies(reader, mapping.currency)
    for role in ("category", "channel", "device_id"):
        if (text := getattr(mapping, role)) is not None:
            frame[role] = ids.categorical(reader, ids.joined(reader, text, role), role)
    for role in POSITION_ROLES:
        if (column := getattr(mapping, role)) is not None:
            degrees = numbers.number(reader, column, role)
            limit = 90 if role.endswith("latitude") else 180
            reader.refuse(column, role, f"must be within -{limit} and {limit} degrees", np.abs(degrees) > limit)
            frame[role] = degrees
    labels = read_labels(reader, mapping, labelled, event_time_ms)
    frame |= {"label": labels.label, "label_time_ms": labels.time_ms}
    if every_label is not None:
        frame[EVERY_LABEL] = every_label
    frame |= _further(reader, mapping)
    reader.finish()
    for option, count in dropped.items():
        what = "of zero" if option == "on_zero_amount" else "below zero"
        _logger.warning("%s: left out %s rows with an amount %s (%s: drop)", reader.source, f"{count:,}", what, option)
    if mapping.currency is None:
        _warn_of_amounts_off_scale(reader.source, mapping.amount, amount)
    table = _sorted(frame, frame["processing_time_ms"])
    table.attrs[TRAINED_TABLE] = table_of(reader, mapping)
    table.attrs["dropped_zero_amounts"] = dropped.get("on_zero_amount", 0)
    table.attrs["dropped_negative_amounts"] = dropped.get("on_negative_amount", 0)
    return table


def load_features(path: Given, mapping: Mapping, *, labelled: bool = True) -> pd.DataFrame:
    """The canonical table of ready features; see `load_table`.

    Returns
    -------
    pandas.DataFrame
        Sorted by ``event_time_ms``, or in file order where the mapping has no event_time. Columns:
        ``transaction_id`` (str); ``event_time_ms`` and ``label_time_ms`` (int64, only with an event_time);
        ``label`` (int8: 1, 0, -1 unknown); then the features in the order of the mapping (float64, boolean,
        Categorical of str; missing where the mapping allows it); ``stake`` (float64) where the mapping names one.
        ``attrs["trained_table"]`` says how the file's columns are read, for the bundle.
    """
    _expect_kind(mapping, "features")
    reader = _open(path, mapping, labelled)
    fold_labels(reader, mapping)
    frame: dict[str, Any] = {"transaction_id": _transaction_ids(reader, mapping)}
    order = np.arange(reader.table.num_rows, dtype=np.int64)
    if mapping.event_time is not None:
        order = frame["event_time_ms"] = times.time_ms(reader, mapping.event_time, "event_time")
    labels = read_labels(reader, mapping, labelled, order)
    frame["label"] = labels.label
    if mapping.event_time is not None:
        frame["label_time_ms"] = labels.time_ms
    frame |= _further(reader, mapping) | _stake(reader, mapping)
    reader.finish()
    table = _sorted(frame, order)
    table.attrs[TRAINED_TABLE] = table_of(reader, mapping)
    return table


def _stake(reader: Reader, mapping: Mapping) -> dict[str, NDArray[np.float64]]:
    """Money at stake in each row; None if the mapping names no stake, or the file to score has no such column."""
    stake = mapping.stake
    if isinstance(stake, float):
        return {STAKE: np.full(reader.table.num_rows, stake)}
    if stake is None or stake not in reader.table.column_names:
        return {}
    before = len(reader.problems)
    money = numbers.number(reader, stake, STAKE)
    if len(reader.problems) == before:
        reader.refuse(stake, STAKE, "must be a sum of money, zero or above", ~(money >= 0))
    return {STAKE: money}


def dataset_digest(path: Given) -> str:
    """Return what identifies a table's files, as `training.files.Files.digest` has it."""
    return Files.find(path).digest()


def _expect_kind(mapping: Mapping, kind: str) -> None:
    if mapping.kind != kind:
        raise DataError(f"the mapping says kind: {mapping.kind}; this needs kind: {kind}")


def _open(given: Given, mapping: Mapping, labelled: bool) -> Reader:
    files = Files.find(given)
    if labelled and mapping.label is None:
        raise DataError(
            "role 'label' is missing from the mapping; training and evaluation need it, "
            "except with --detector isolation-forest"
        )
    wanted = [column for columns in mapping.columns().values() for column in columns]
    dialect = Dialect(mapping.delimiter, mapping.encoding, mapping.escape)
    table, counts = files.read(
        wanted, lambda name, present: _present_columns(name, mapping, present, labelled), dialect
    )
    names = [path.name for path in files.paths]
    missing: dict[str, tuple[str | int | float, ...]] = dict.fromkeys(table.column_names, mapping.missing_values)
    for _, _, options in mapping.expanded(table.column_names).further():
        if options.column in missing:
            missing[options.column] += options.missing_values
    numbers = None if mapping.numbers is None else mapping.numbers.form
    return Reader(files.name, table, list(zip(names, counts, strict=True)), missing, numbers, files.nulls)


def _present_columns(source: str, mapping: Mapping, present: list[str], labelled: bool) -> list[str]:
    """The columns to read; a label's may be absent where labels are not needed."""
    try:
        wanted = mapping.expanded(present).columns()
    except DataError as error:
        raise DataError("\n".join(f"{source}: {line}" for line in error.message.split("\n"))) from None
    roles = [
        (role, column)
        for role, columns in wanted.items()
        for column in columns
        if labelled or column in present or role not in ("label", "label_time", STAKE)
    ]
    problems = [
        f"{source}: column {column!r} ({role}) is not in the file{did_you_mean(column, present)}"
        for role, column in roles
        if column not in present
    ]
    problems += [
        f"{source}: column {column!r} ({role}) is in the file {present.count(column)} times"
        for role, column in roles
        if present.count(column) > 1
    ]
    if problems:
        listed = ", ".join(present[:40]) + (", …" if len(present) > 40 else "")
        raise DataError("\n".join([*problems, f"{source}: columns of the file: {listed}"]))
    return list(dict.fromkeys(column for _, column in roles))


def _warn_of_amounts_off_scale(source: str, column: str, amounts: NDArray[np.float64]) -> None:
    """Warn that a table's amounts are outside the range that histories can resolve, which suits euros."""
    large, lost = float(np.mean(amounts > LARGE)), int(np.sum((amounts < SMALLEST / 2) | (amounts > LARGEST)))
    if large > 0.05 or lost:
        _logger.warning(
            "%s: column %r (amount): %s of the amounts are above %s, and %s below %s or above %s, which histories do "
            "not tell apart; name their currency: currency: {constant: VND}",
            *(source, column, f"{large:.0%}", f"{LARGE:,}", f"{lost:,}", SMALLEST, f"{LARGEST:,.0f}"),
        )


def _currencies(reader: Reader, spec: CurrencyColumn) -> pd.Categorical:
    if spec.column is None:
        return ids.encode(pa.repeat(pa.scalar(spec.constant, pa.large_string()), reader.table.num_rows))
    options = CategoricalColumn(column=spec.column, missing="refuse")
    found = ids.categorical(reader, spec.column, "currency", options)
    known = np.array([*(minor_digits_of(str(code), spec) is not None for code in found.categories), True])
    unknown = ~known[found.codes]
    if unknown.any():
        rule = unknown_currency(str(found[int(np.flatnonzero(unknown)[0])]))
        reader.refuse(spec.column, "currency", f"holds other codes: {rule}", unknown)
    return found


def _drop_amounts(reader: Reader, mapping: Mapping) -> Dict[str, int]:
    """Leave out the rows whose amount the mapping wants dropped; returns how many, by option."""
    assert mapping.amount is not None
    dropped = {}
    for option, does_drop in (("on_zero_amount", np.equal), ("on_negative_amount", np.less)):
        if getattr(mapping, option) != "drop":
            continue
        found = does_drop(numbers.number(reader, mapping.amount, "amount"), 0)
        reader.problems.clear()  # the amounts are read again, and judged, without those rows
        if found.all():
            what = "zero" if option == "on_zero_amount" else "below zero"
            raise DataError(f"{reader.source}: column {mapping.amount!r} (amount) is {what} in every row")
        if found.any():
            reader.keep(~found)
            dropped[option] = int(found.sum())
    return dropped


def _transaction_ids(reader: Reader, mapping: Mapping) -> pd.Series[str]:
    spec = mapping.transaction_id
    if spec is None:
        return pd.Series([f"row-{row}" for row in reader.rows], dtype="str")
    text, column = ids.ids(reader, spec, "transaction_id")
    names: pd.Series[str] = text.to_pandas()
    repeated = (names.duplicated() & names.notna()).to_numpy()
    if repeated.any():
        again = reversed(np.flatnonzero(names.isin(names[repeated])))
        first = {names.iloc[row]: reader.place(row) for row in again}
        reader.refuse(
            column,
            "transaction_id",
            "must be different in each row"
            + (", but for rows that differ in label and label_time alone" if mapping.label_time is not None else ""),
            repeated,
            lambda row: f"{names.iloc[row]!r}, as in {first[names.iloc[row]]}",
        )
    return names


def _further(reader: Reader, mapping: Mapping) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for group, name, options in mapping.expanded(reader.table.column_names).further():
        role = f"{group} {name}"
        match options:
            case NumericColumn():
                columns[name] = numbers.numeric(reader, options.column, role, options)
            case BooleanColumn():
                columns[name] = numbers.boolean(reader, options.column, role, options)
            case CategoricalColumn():
                columns[name] = ids.categorical(reader, options.column, role, options)
    return columns


def _sorted(columns: dict[str, Any], key: NDArray[np.int64]) -> pd.DataFrame:
    frame = pd.DataFrame(columns, copy=False)
    if np.all(key[1:] >= key[:-1]):
        return frame
    return frame.iloc[np.argsort(key, kind="stable")].reset_index(drop=True)
