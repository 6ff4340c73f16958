"""`fraud lists`: what rules look into, changed at run time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fraud.cli.moments import shown_time, utc_ms
from fraud.decisions.rules.lists import SNOOZE, SNOOZED_FIELDS, Hash, ListEntry, ListName, stored_value
from fraud.errors import InvalidRequest
from fraud.models.lifecycle import who_am_i
from fraud.settings import Settings
from fraud.stores.lists import ListStore, open_lists
from fraud.stores.opening import StoreOptions
from fraud.stores.personal import hash_of

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False, markup=False)

AT_ONCE = 10_000
Name = Annotated[str, typer.Argument(metavar="LIST", help="Lower-case letters, digits and _.")]
Values = Annotated[
    list[str], typer.Argument(metavar="VALUE...", help="Ids, networks (10.0.0.0/8) or e-mail domains (@example.com).")
]
Until = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="When the entries end by themselves, UTC."),
]
Reason = Annotated[str, typer.Option(help="Why, kept with each entry.")]


@app.command()
def add(name: Name, values: Values, reason: Reason = "", until: Until = None) -> None:
    """Put values on a list; every worker of the service has them within two seconds."""
    _change(name, values, reason, until)


@app.command()
def remove(name: Name, values: Values) -> None:
    """Take values off a list."""
    _change(name, values, removed=True)


@app.command("import")
def import_(
    name: Name,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="One value a line.")],
    reason: Reason = "",
    until: Until = None,
) -> None:
    """Put the values of a file on a list."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        _change(name, (line for line in lines if line.strip()), reason, until)


@app.command()
def show(name: Name, limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100) -> None:
    """Show the entries of a list, by value; their keyed hashes where ids are personal."""
    store, _ = _opened()
    table = Table("value", "reason", "author", "added", "until", box=None)
    for entry in store.entries(_checked(name), "", limit):
        until = "" if entry.until_ms is None else shown_time(entry.until_ms)
        table.add_row(entry.value, entry.reason, entry.author, shown_time(entry.changed_ms), until)
    Console(width=max(out.width, 140), highlight=False, markup=False).print(table)


@app.command()
def snooze(
    rule: Annotated[str, typer.Argument(metavar="RULE", help="The id of a rule.")],
    value: Annotated[str, typer.Argument(metavar="VALUE", help="The customer, the merchant or the device.")],
    until: Annotated[datetime, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Until when, UTC.")],
    field: Annotated[str, typer.Option(help="customer_id, merchant_id or device_id.")] = "customer_id",
    reason: Reason = "",
) -> None:
    """Silence a rule for one customer, merchant or device until a time."""
    if field not in SNOOZED_FIELDS:
        raise typer.BadParameter(f"{field!r}; allowed: {', '.join(SNOOZED_FIELDS)}")
    _write(SNOOZE + _checked(rule), [f"{field}:{value}"], reason, until)


def _change(
    name: str, values: Iterable[str], reason: str = "", until: datetime | None = None, *, removed: bool = False
) -> None:
    _write(_checked(name), values, reason, until, removed=removed)


def _write(
    name: str, values: Iterable[str], reason: str = "", until: datetime | None = None, *, removed: bool = False
) -> None:
    store, hashed = _opened()
    until_ms = utc_ms(until)
    author, now_ms = who_am_i(), time.time_ns() // 1_000_000

    def entries() -> Iterator[ListEntry]:
        for value in values:
            yield ListEntry(name, stored_value(value, hashed), until_ms, reason, author, now_ms, removed)

    made, n, revision = entries(), 0, 0
    while some := list(islice(made, AT_ONCE)):
        revision = store.change(some)
        n += len(some)
    out.print(f"{name}: {n} {'removed' if removed else 'added'}, revision {revision}")


def _opened() -> tuple[ListStore, Hash | None]:
    settings = Settings.read()
    options = StoreOptions.of(settings)
    return open_lists(settings.store.url, options), hash_of(options.personal_fields, options.personal_key)


def _checked(name: str) -> str:
    try:
        return msgspec.convert(name, ListName)
    except msgspec.ValidationError:
        raise InvalidRequest(f"{name[:60]!r} is no name: lower-case letters, digits and _ are allowed") from None
