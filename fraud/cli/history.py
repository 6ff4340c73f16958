"""`fraud history`: who moved a model's alias; and the store: fill it with past transactions, look at a customer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
import typer
from rich.console import Console
from rich.progress import Progress

from fraud.cli import registry
from fraud.decisions.labels import Label, LabelOutcome
from fraud.errors import DataError, RequestError
from fraud.forms import one_text
from fraud.history.profile import readable_profile
from fraud.settings import Settings
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store

app = typer.Typer(invoke_without_command=True)
out = Console(soft_wrap=True)
T = TypeVar("T")

StoreUrl = Annotated[str | None, typer.Option("--store", help="The store's URL; the service's own by default.")]


@app.callback()
def history(
    ctx: typer.Context, model: Annotated[str | None, typer.Option(help="Whose aliases; every model's if none.")] = None
) -> None:
    """Show who promoted or rolled back what, when and why, newest first; the commands below are of the store."""
    if ctx.invoked_subcommand is None:
        registry.history(model)


@app.command()
def backfill(
    data: Annotated[
        list[Path],
        typer.Option("--data", help="CSV or Parquet of past transactions, all of each customer; one or several files."),
    ],
    mapping: Annotated[Path, typer.Option("--mapping", help="YAML that names the columns, as for training.")],
    store: StoreUrl = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model that will read the states; needed where the mapping names a currency."),
    ] = None,
    as_of: Annotated[
        datetime | None, typer.Option("--as-of", help="Labels known later than this are left out; now by default.")
    ] = None,
) -> None:
    """Load past transactions and the labels known by now; the states replace what the store holds of the same ids."""
    from fraud.models.find import load_scorer
    from training.backfill import states_of
    from training.data import Mapping, load_transactions

    started = time.perf_counter()
    mapped = Mapping.from_yaml(mapping)
    if mapped.currency is not None and model is None:
        raise DataError("the mapping names a currency, whose scale is the model's; name the model: --model NAME")
    currencies = None if model is None else load_scorer(model).spec.currencies or None
    table = load_transactions(data, mapped, labelled=False)
    loaded = time.perf_counter()
    moment = as_of.replace(tzinfo=UTC) if as_of else datetime.now(UTC)
    with Progress(console=out) as progress:
        task = progress.add_task("walking", total=len(table))
        states = states_of(
            table, int(moment.timestamp() * 1000), lambda n: progress.update(task, completed=n), currencies
        )
    walked = time.perf_counter()
    with_store(store, lambda opened: opened.backfill(states))
    written = time.perf_counter()
    seconds = (("read", loaded - started), ("walked", walked - loaded), ("written", written - walked))
    out.print(
        f"{len(table):,} transactions of {len(states.customer_ids):,} customers and {len(states.merchant_ids):,} "
        f"merchants: {', '.join(f'{name} in {s:.1f} s' for name, s in seconds)}; "
        f"{len(table) / (written - loaded):,.0f} transactions/s without reading, "
        f"{len(table) / (written - started):,.0f} with"
    )


@app.command()
def label(
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="CSV of transactions: transaction_id and, where they differ from fraud known from now on, is_fraud "
            "(1, 0, or none to withdraw a label) and label_time; model for decisions of a features model.",
        ),
    ],
    store: StoreUrl = None,
) -> None:
    """Label transactions: as fraud unless is_fraud says otherwise, known from label_time on, or from now.

    Labelling with the same file again changes nothing.
    """
    from fraud.pipeline.labels import apply_labels

    labels = read_labels(data)
    outcomes: list[LabelOutcome] = []

    async def apply(opened: Store) -> None:
        async for _, some in apply_labels(opened, labels):
            outcomes.extend(some)

    try:
        with_store(store, apply)
    finally:
        unknown = [
            label.transaction_id for label, outcome in zip(labels, outcomes, strict=False) if outcome == "unknown"
        ]
        superseded = f"{outcomes.count('superseded'):,} superseded by a later one, " if "superseded" in outcomes else ""
        what = "frauds" if all(label.is_fraud for label in labels) else "labels"
        out.print(
            f"{len(outcomes):,} of {len(labels):,} {what}: {outcomes.count('applied'):,} applied, "
            f"{outcomes.count('known'):,} known before, {superseded}{len(unknown):,} unknown"
            + (f": {', '.join(unknown[:5])}{', …' if len(unknown) > 5 else ''}" if unknown else "")
        )


LABEL_COLUMNS = {"transaction_id", "is_fraud", "label_time", "model"}
IS_FRAUD: dict[str | None, bool | None] = {"1": True, "true": True, "0": False, "false": False, "none": None}
"""What the column is_fraud may say, in lower case; empty means fraud."""


def read_labels(data: Path) -> list[Label]:
    """Return the labels of a file, or say of each row what is wrong with it."""
    from fraud.models.lifecycle import user_name
    from fraud.pipeline.labels import read_label
    from training.csv_files import CsvFile, Dialect

    now_ms, max_ahead_ms = time.time_ns() // 1_000_000, round(Settings.read().scoring.max_clock_ahead_s * 1000)
    if not data.is_file():
        raise DataError(f"{data}: no such file")
    file = replace(CsvFile.open(data, Dialect(), LABEL_COLUMNS), nulls=("",))  # NULL may not come to mean fraud
    if (
        "transaction_id" not in file.header
        or len(set(file.header)) < len(file.header)
        or set(file.header) - LABEL_COLUMNS
    ):
        raise DataError(
            f"{data.name}: columns {', '.join(file.header)}; "
            "give transaction_id and, where they are known, label_time, is_fraud and model"
        )
    rows: list[Label | RequestError] = []
    for number, row in enumerate(file.read(file.header).to_pylist(), 1):
        is_fraud = row.get("is_fraud") or "1"
        said = {name: value for name, value in row.items() if value is not None} | {
            "transaction_id": row["transaction_id"] or "",
            "is_fraud": IS_FRAUD.get(one_text(is_fraud.lower()), is_fraud),
        }
        raw = orjson.dumps(said)
        rows.append(read_label(raw, f"row {number}", now_ms, max_ahead_ms, source="file", actor=user_name()))
    if not rows:
        raise DataError(f"{data.name}: the file has no rows")
    wrong = [row for row in rows if isinstance(row, RequestError)]
    if wrong:
        lines = [f"{data.name}: {len(wrong):,} of {len(rows):,} rows cannot be applied, so none was"]
        raise DataError("\n".join([*lines, *(f"{error.path}: {error.message}" for error in wrong[:10])]))
    return [row for row in rows if isinstance(row, Label)]


@app.command()
def profile(customer_id: str, store: StoreUrl = None) -> None:
    """Print what is kept of a customer."""
    kept = with_store(store, lambda opened: opened.profile(customer_id))
    if kept is None:
        raise DataError(f"nothing is known of customer {customer_id!r}")
    out.print_json(orjson.dumps(readable_profile(kept)).decode())


@app.command()
def reset(customer_id: str, store: StoreUrl = None) -> None:
    """Forget a customer's history; decisions stay on record."""
    known = with_store(store, lambda opened: opened.reset(customer_id))
    out.print("forgotten" if known else "nothing was known")


@app.command()
def expire(
    days: Annotated[
        float | None, typer.Option("--days", min=1, help="Days without news; FRAUD_HISTORY_TTL_DAYS by default.")
    ] = None,
    store: StoreUrl = None,
) -> None:
    """Forget customers and merchants of whom nothing was heard for a long time. Redis does so by itself."""
    days = days or Settings.read().store.history_ttl_days
    before_ms = int((time.time() - days * 86_400) * 1000)
    out.print(f"{with_store(store, lambda opened: opened.expire(before_ms)):,} forgotten")


def with_store(url: str | None, use: Callable[[Store], Awaitable[T]]) -> T:
    settings = Settings.read()

    async def run() -> T:
        store = open_store(url or settings.store.url, StoreOptions.of(settings))
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())
