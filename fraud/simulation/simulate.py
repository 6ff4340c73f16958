"""Simulated data sets: card payments with labelled fraud, and a table of loan applications."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from fraud.errors import DataError
from fraud.simulation.applications import make_applications
from fraud.simulation.typologies import TYPOLOGIES, fraudulent_transactions
from fraud.simulation.world import (
    CARD_TYPES,
    CATEGORIES,
    CHANNELS,
    CHIP,
    CONTACTLESS,
    DAY_MS,
    HOUR_MS,
    N_CATEGORIES,
    Columns,
    World,
    genuine_transactions,
    make_world,
)

START_MS = 1_735_689_600_000  # 2025-01-01T00:00:00Z
FRAUD_RATE = 0.007
LATE_SHARE = 0.015


@dataclass(frozen=True)
class Simulated:
    """The written file: its path, its rows, and the number of rows of each kind of fraud."""

    path: Path
    rows: int
    fraud_rows: int
    typologies: dict[str, int]


def simulate_transactions(
    customers: int,
    days: int,
    seed: int,
    merchants: int | None = None,
    *,
    out: str | Path,
    fraud_rate: float = FRAUD_RATE,
    merchant_form: bool = False,
) -> Simulated:
    """Write card payments of `customers` over `days`, about 1.9 a customer and day.

    Customers have a home, a level of spending, favourite categories, merchants and hours, devices and journeys.
    Fraud comes in campaigns, see `fraud.simulation.typologies`. The same arguments write the same bytes.

    Parameters
    ----------
    merchants : int, optional
        Twice the customers when left out.
    out : path
        A file ending in .parquet or .csv; see docs/data.md for the columns.
    fraud_rate : float
        Share of fraudulent transactions.
    merchant_form : bool
        Write the columns of the contract merchant-form instead: see `merchant_form_of`.

    Raises
    ------
    DataError
        When a size is too small or the file type is unknown.
    """
    merchants = 2 * customers if merchants is None else merchants
    for name, value, least in (("customers", customers, 10), ("merchants", merchants, N_CATEGORIES), ("days", days, 7)):
        if value < least:
            raise DataError(f"{name} must be {least} or more; got {value}")
    if not 0 < fraud_rate < 0.5:
        raise DataError(f"fraud_rate must be above 0 and below 0.5; got {fraud_rate}")
    path = _writable(out)
    rng = np.random.default_rng(seed)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("customers and merchants", total=4)
        world = make_world(rng, customers, merchants, days, START_MS)
        progress.update(task, advance=1, description="genuine transactions")
        genuine = genuine_transactions(rng, world)
        progress.update(task, advance=1, description="fraud")
        fraudulent = fraudulent_transactions(rng, world, genuine, fraud_rate)
        progress.update(task, advance=1, description="writing")
        genuine["typology"] = np.zeros(len(genuine["customer"]), dtype=np.int64)
        genuine["label_time_ms"] = np.zeros(len(genuine["customer"]), dtype=np.int64)
        columns = {name: np.concatenate([genuine[name], fraudulent[name]]) for name in genuine}
        table = _table(rng, world, columns)
        _write(merchant_form_of(table) if merchant_form else table, path)
        progress.update(task, advance=1, description=f"{table.num_rows:,} transactions")
    counts = np.bincount(columns["typology"], minlength=len(TYPOLOGIES) + 1)[1:]
    return Simulated(path, table.num_rows, int(counts.sum()), dict(zip(TYPOLOGIES, counts.tolist(), strict=True)))


def merchant_form_of(table: pa.Table) -> pa.Table:
    """Return transactions as the contract merchant-form has them: ready features, with an id, a time and labels.

    ``amt`` is the amount, ``hour`` (0 to 23) and ``day_of_week`` (0 is Monday) are of the time in UTC.
    """
    times = table.column("event_time")
    return pa.table(
        {
            "transaction_id": table.column("transaction_id"),
            "event_time": times,
            "amt": table.column("amount"),
            "hour": pc.hour(times),
            "day_of_week": pc.day_of_week(times),
            "category": table.column("category"),
            "is_fraud": table.column("is_fraud"),
            "label_time": table.column("label_time"),
        }
    )


def simulate_features(rows: int, seed: int, *, out: str | Path) -> Simulated:
    """Write a table of loan applications with 15 ready features, about 3% of them fraudulent.

    Parameters
    ----------
    out : path
        A file ending in .parquet or .csv; see docs/data.md for the columns.

    Raises
    ------
    DataError
        When there are fewer than 100 rows or the file type is unknown.
    """
    if rows < 100:
        raise DataError(f"rows must be 100 or more; got {rows}")
    path = _writable(out)
    table, typologies = make_applications(np.random.default_rng(seed), rows, START_MS)
    _write(table, path)
    return Simulated(path, rows, sum(typologies.values()), typologies)


def _table(rng: np.random.Generator, world: World, columns: Columns) -> pa.Table:
    """The columns of the file, in the order in which the transactions arrive."""
    n = len(columns["customer"])
    present = (columns["channel"] == CHIP) | (columns["channel"] == CONTACTLESS)
    late = present & (rng.random(n) < LATE_SHARE)  # terminals that were offline
    arrival_ms = columns["time_ms"] + np.where(late, rng.exponential(3 * HOUR_MS, n), 0).astype(np.int64)
    order = np.lexsort((columns["customer"], columns["time_ms"], arrival_ms))
    row = {name: column[order] for name, column in columns.items()}
    arrival_ms = arrival_ms[order]
    fraud = row["typology"] > 0
    customer, merchant = row["customer"], row["merchant"]
    age = np.floor((row["time_ms"] - world.start_ms) / DAY_MS - world.opened_day[customer])
    label_time_ms = np.maximum(row["label_time_ms"], arrival_ms)
    return pa.table(
        {
            "transaction_id": _ids("t", np.arange(1, n + 1), 9),
            "event_time": _times(row["time_ms"]),
            "arrival_time": _times(arrival_ms),
            "customer_id": _ids("c", customer + 1, 6),
            "merchant_id": _ids("m", merchant + 1, 6),
            "amount": row["amount"],
            "category": _words(world.merchants.category[merchant], CATEGORIES),
            "channel": _words(row["channel"], CHANNELS),
            "device_id": _ids("d", row["device"] * 0x5851F42D % 2**44, 14, missing=row["device"] < 0),
            "latitude": _degrees(row["latitude"]),
            "longitude": _degrees(row["longitude"]),
            "merchant_latitude": _degrees(world.merchants.latitude[merchant]),
            "merchant_longitude": _degrees(world.merchants.longitude[merchant]),
            "account_age_days": np.maximum(age, 0).astype(np.int32),
            "strong_authentication": row["authenticated"],
            "card_type": _words(world.card_type[customer], CARD_TYPES),
            "is_fraud": fraud.astype(np.int8),
            "label_time": _times(label_time_ms, missing=~fraud),
            "typology": _words(row["typology"] - 1, tuple(TYPOLOGIES), missing=~fraud),
        }
    )


def _ids(prefix: str, numbers: Any, width: int, missing: Any = None) -> pa.Array:
    digits = pc.utf8_lpad(pc.cast(pa.array(numbers, mask=missing), pa.string()), width, "0")
    return pc.binary_join_element_wise(prefix, digits, "")


def _times(milliseconds: Any, missing: Any = None) -> pa.Array:
    return pc.cast(pa.array(milliseconds, mask=missing), pa.timestamp("ms", tz="UTC"))


def _words(codes: Any, names: tuple[str, ...], missing: Any = None) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int8), mask=missing), pa.array(names))


def _degrees(values: Any) -> pa.Array:
    return pa.array(np.round(values, 4), from_pandas=True)


def _writable(out: str | Path) -> Path:
    path = Path(out)
    if path.suffix not in (".parquet", ".csv"):
        raise DataError(f"{path.name}: the simulator writes .parquet or .csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
        return
    for index, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(index, field.name, pc.strftime(table.column(index), format="%Y-%m-%dT%H:%M:%SZ"))
        elif pa.types.is_dictionary(field.type):
            table = table.set_column(index, field.name, pc.cast(table.column(index), pa.string()))
    pyarrow.csv.write_csv(table, path)
