"""What a bundle says of the table that trained it, so that the service reads rows with its names and value forms."""

from __future__ import annotations

import msgspec
import pandas as pd
import pyarrow as pa

from fraud.columns.table import Column, Table
from fraud.schema import POSITION_ROLES, TEXT_ROLES
from training.columns import Reader
from training.mapping import Mapping
from training.mapping_parts import BooleanColumn, CategoricalColumn, NumericColumn, TextColumn, TimeColumn

TRAINED_TABLE = "trained_table"
"""Where a canonical table has its `Table`, among the attributes of the frame."""


def trained_table(table: pd.DataFrame) -> Table | msgspec.UnsetType:
    """Return what a canonical table says of its file; unset for a table that was not read from one."""
    found: Table | msgspec.UnsetType = table.attrs.get(TRAINED_TABLE, msgspec.UNSET)
    return found


def table_of(reader: Reader, mapping: Mapping) -> Table:
    """Return the columns of a table that has been read, with every option of the mapping that says how they are.

    What a label, an arrival time or the stake is, no request carries.
    """
    missing = tuple(mapping.missing_values)
    columns: list[Column] = []
    if mapping.kind == "transaction":
        assert mapping.event_time is not None
        columns.append(_time(reader, mapping.event_time, missing))
    for role in ("transaction_id", "customer_id", *TEXT_ROLES):
        spec: TextColumn | None = getattr(mapping, role)
        if spec is not None:
            join = spec.join if spec.columns else ""
            columns.append(Column(role, spec.names, "text", join, missing))
    if mapping.amount is not None:
        absolute = mapping.on_negative_amount == "absolute"
        columns.append(Column("amount", (mapping.amount,), "number", missing_values=missing, is_absolute=absolute))
    if mapping.currency is not None and mapping.currency.column is not None:
        columns.append(Column("currency", (mapping.currency.column,), "text", missing_values=missing))
    for role in POSITION_ROLES:
        if (column := getattr(mapping, role)) is not None:
            columns.append(Column(role, (column,), "number", missing_values=missing))
    for _, name, options in mapping.expanded(reader.table.column_names).further():
        own = missing + options.missing_values
        match options:
            case NumericColumn():
                columns.append(Column(name, (options.column,), "number", missing_values=own))
            case CategoricalColumn():
                columns.append(Column(name, (options.column,), "text", missing_values=own))
            case BooleanColumn(positive=positive, negative=negative):
                true, false = (tuple(word.lower() for word in given or ()) for given in (positive, negative))
                columns.append(Column(name, (options.column,), "flag", "", own, true, false))
    return Table(tuple(columns), reader.nulls, reader.numbers)


def _time(reader: Reader, spec: TimeColumn, missing: tuple[str | int | float, ...]) -> Column:
    form = spec.form(is_dates="event_time" in reader.dates)
    kind = reader.table.schema.field(spec.names[0]).type
    if len(spec.names) == 1 and pa.types.is_temporal(kind):  # its rows write ISO 8601, whatever pattern was given
        form = msgspec.structs.replace(form, format=None)
    return Column("event_time", spec.names, "time", " " if spec.columns else "", missing, time=form)
