"""`fraud decisions`: recorded decisions and their labels, one by transaction id or those that match a query."""

from __future__ import annotations

import csv
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, cast, get_args

import msgspec
import typer
from rich.console import Console

from fraud.cli.history import StoreUrl, with_store
from fraud.cli.moments import utc_ms
from fraud.decisions.labels import LabelValue, value_in_effect
from fraud.decisions.policy import Action
from fraud.decisions.queries import DecisionQuery
from fraud.decisions.record import decision_key_of
from fraud.decisions.verdict import ACTIONS
from fraud.errors import UnknownTransaction
from fraud.stores.protocol import Store

app = typer.Typer(no_args_is_help=True, help="Recorded decisions: show one, list or export those that match.")
out = Console(soft_wrap=True, highlight=False)

AT_ONCE = 500
Time = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="UTC.")]
Model = Annotated[str | None, typer.Option("--model", help="The features model that decided.")]


@app.command()
def show(transaction_id: str, model: Model = None, store: StoreUrl = None) -> None:
    """Print one decision with its reasons, the transaction as it was sent, and all its labels."""
    from fraud.serving.decisions import DecisionAnswer, recorded_decision, recorded_label

    key = decision_key_of(transaction_id, model)

    async def read(opened: Store) -> DecisionAnswer:
        record = (await opened.recall([key], [], [])).decided.get(key)
        if record is None:
            raise UnknownTransaction
        labels = await opened.labels(key)
        return DecisionAnswer(recorded_decision(record, value_in_effect(labels)), [recorded_label(x) for x in labels])

    out.print_json(msgspec.json.encode(with_store(store, read)).decode())


@app.command("list")
def list_(
    customer: Annotated[str | None, typer.Option("--customer", help="Of this customer.")] = None,
    merchant: Annotated[str | None, typer.Option("--merchant", help="At this merchant.")] = None,
    decision: Annotated[str | None, typer.Option(help="approve, challenge, review or decline.")] = None,
    label: Annotated[str | None, typer.Option(help="fraud, legitimate, or none: without a label.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="By this model.")] = None,
    version: Annotated[str | None, typer.Option(help="By the version whose digest begins with this.")] = None,
    since: Time = None,
    until: Time = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most; with --out all.")] = 50,
    file: Annotated[Path | None, typer.Option("--out", help="Write all of them here: .csv, else JSON lines.")] = None,
    store: StoreUrl = None,
) -> None:
    """Write the decisions that match, the latest first: JSON, one a line, or CSV."""
    from fraud.serving.decisions import RecordedDecision, recorded_decision

    for value, allowed in ((decision, ACTIONS), (label, get_args(LabelValue))):
        if value is not None and value not in allowed:
            raise typer.BadParameter(f"{value!r}; allowed: {', '.join(allowed)}")
    query = DecisionQuery(
        customer,
        merchant,
        cast("Action | None", decision),
        cast("LabelValue | None", label),
        model,
        version,
        utc_ms(since),
        utc_ms(until),
        limit=AT_ONCE if file else min(limit, AT_ONCE),
    )
    most = None if file else limit

    async def pages(opened: Store) -> AsyncIterator[RecordedDecision]:
        asked, n = query, 0
        while True:
            page = await opened.find(asked)
            for _, record, value in page.found:
                yield recorded_decision(record, value)
                n += 1
                if n == most:
                    return
            if page.next is None:
                return
            asked = replace(asked, after=page.next)

    async def write(opened: Store) -> int:
        n = 0
        with (
            file.open("w", newline="", encoding="utf-8")
            if file
            else open(sys.stdout.fileno(), "w", closefd=False) as to
        ):
            rows = csv.writer(to)
            if file is not None and file.suffix == ".csv":
                rows.writerow(RecordedDecision.__struct_fields__)
            async for row in pages(opened):
                if file is not None and file.suffix == ".csv":
                    rows.writerow([_cell(getattr(row, name)) for name in RecordedDecision.__struct_fields__])
                else:
                    to.write(msgspec.json.encode(row).decode() + "\n")
                n += 1
        return n

    Console(stderr=True).print(f"{with_store(store, write)} decisions")


def _cell(value: object) -> object:
    return value if isinstance(value, str | int | float | None) else msgspec.json.encode(value).decode()
