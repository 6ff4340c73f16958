"""`fraud history`: who moved a model's alias; and the store: fill it with past transactions, look at a customer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import orjson
import typer
from rich.console import Console
from rich.progress import Progress

from cli import registry
from fraud.errors import DataError
from fraud.profile import readable_profile
from fraud.settings import Settings
from fraud.stores import Store, StoreOptions, open_store

app = typer.Typer(invoke_without_command=True)
out = Console(soft_wrap=True)
T = TypeVar("T")

StoreUrl = Annotated[str | None, typer.Option("--store", help="The store's URL; the service's own by default.")]


@app.callback()
def history(
    ctx: typer.Context, model: Annotated[str, typer.Option(help="Whose aliases.")] = "fraud-transaction"
) -> None:
    """Show who promoted or rolled back what, when and why, newest first; the commands below are of the store."""
    if ctx.invoked_subcommand is None:
        registry.history(model)


@app.command()
def backfill(
    data: Annotated[Path, typer.Option("--data", help="CSV or Parquet of past transactions, all of each customer.")],
    mapping: Annotated[Path, typer.Option("--mapping", help="YAML that names the columns, as for training.")],
    store: StoreUrl = None,
    as_of: Annotated[
        datetime | None, typer.Option("--as-of", help="Labels known later than this are left out; now by default.")
    ] = None,
) -> None:
    """Load past transactions and the labels known by now; the states replace what the store holds of the same ids."""
    from training.backfill import states_of
    from training.data import Mapping, load_transactions

    started = time.perf_counter()
    table = load_transactions(data, Mapping.from_yaml(mapping), labelled=False)
    loaded = time.perf_counter()
    moment = as_of.replace(tzinfo=UTC) if as_of else datetime.now(UTC)
    with Progress(console=out) as progress:
        task = progress.add_task("walking", total=len(table))
        states = states_of(table, int(moment.timestamp() * 1000), lambda n: progress.update(task, completed=n))
    walked = time.perf_counter()
    _with_store(store, lambda opened: opened.backfill(states))
    written = time.perf_counter()
    seconds = (("read", loaded - started), ("walked", walked - loaded), ("written", written - walked))
    out.print(
        f"{len(table):,} transactions of {len(states.customer_ids):,} customers and {len(states.merchant_ids):,} "
        f"merchants: {', '.join(f'{name} in {s:.1f} s' for name, s in seconds)}; "
        f"{len(table) / (written - loaded):,.0f} transactions/s without reading, "
        f"{len(table) / (written - started):,.0f} with"
    )


@app.command()
def profile(customer_id: str, store: StoreUrl = None) -> None:
    """Print what is kept of a customer."""
    kept = _with_store(store, lambda opened: opened.profile(customer_id))
    if kept is None:
        raise DataError(f"nothing is known of customer {customer_id!r}")
    out.print_json(orjson.dumps(readable_profile(kept)).decode())


@app.command()
def reset(customer_id: str, store: StoreUrl = None) -> None:
    """Forget a customer's history; decisions stay on record."""
    known = _with_store(store, lambda opened: opened.reset(customer_id))
    out.print("forgotten" if known else "nothing was known")


@app.command()
def expire(
    days: Annotated[
        float | None, typer.Option("--days", min=1, help="Days without news; FRAUD_HISTORY_TTL_DAYS by default.")
    ] = None,
    store: StoreUrl = None,
) -> None:
    """Forget customers and merchants of whom nothing was heard for a long time. Redis does so by itself."""
    days = days or Settings.read().history_ttl_days
    before_ms = int((time.time() - days * 86_400) * 1000)
    out.print(f"{_with_store(store, lambda opened: opened.expire(before_ms)):,} forgotten")


def _with_store(url: str | None, use: Callable[[Store], Awaitable[T]]) -> T:
    settings = Settings.read()

    async def run() -> T:
        store = open_store(url or settings.store, StoreOptions.of(settings))
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())
