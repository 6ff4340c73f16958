"""The `fraud` command. Each module of this package holds the commands of one room; here they meet."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from cli import registry, training, verify
from fraud.errors import FraudError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="""Train a fraud model, version it, package it, serve it, explain it, watch it and roll it back.

A first model:

    fraud simulate --customers 500 --days 90 --seed 1 --out data/simulated.parquet

    fraud train --data data/simulated.parquet --mapping examples/simulated.yaml

    fraud import runs/NAME

    bentoml serve
""",
)
for room in (training, registry):
    app.registered_commands += room.app.registered_commands
app.add_typer(verify.app, name="verify", help="Check a promise of the service, print its figures, exit by them.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error of the project is one message and exit code 1, no traceback."""
    try:
        app(arguments)
    except FraudError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
