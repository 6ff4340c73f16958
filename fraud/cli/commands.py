"""The `fraud` command. Each module of this package defines the commands of one area; this one joins them."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

from fraud.cli import (
    audit,
    cases,
    comparing,
    decisions,
    history,
    inspecting,
    keys,
    lists,
    monitoring,
    registry,
    rules,
    scoring,
    serving,
    streaming,
    training,
)


class Verify(TyperGroup):
    """`fraud verify`: its checks import both training and serving, so they are imported on first use."""

    ROOMS = (
        "history",
        "explain",
        "swap",
        "batching",
        "log",
        "hostile",
        "fuzz",
        "severity",
        "rules",
        "cases",
        "stream",
        "drift",
        "nowcast",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        self._read()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._read()
        return super().get_command(ctx, cmd_name)

    def _read(self) -> None:
        for part in self.ROOMS:
            self.commands.update(typer.main.get_group(importlib.import_module(f"fraud.checks.{part}").app).commands)


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="""Train a fraud model, version it, package it, serve it, explain it, watch it and roll it back.

A first model: [bold]simulate[/bold] data, [bold]train[/bold] on it, [bold]import[/bold] the run, \
[bold]promote[/bold] it, then [bold]bentoml serve[/bold] and [bold]fraud try[/bold].

Exit codes: 0 done; 1 an input, a setting or a file is refused, and the message says which; 2 a wrong option; 70 a \
defect of this program, whose traceback is in a file that the message names; 75 something waits for W&B. \
3 and 4 are verdicts: [bold]monitor drift[/bold] had an alarm; [bold]compare[/bold] is open, or the challenger is worse.
""",
)
for part in (
    training.app,
    scoring.app,
    inspecting.app,
    registry.app,
    serving.app,
    streaming.app,
    audit.replaying,
    comparing.app,
):
    app.registered_commands += part.registered_commands
app.add_typer(history.app, name="history", help="Who moved an alias, when and why; and the store of customers.")
app.add_typer(decisions.app, name="decisions", help="Decisions on record: show one, list or export them.")
app.add_typer(rules.app, name="rules", help="Rule sets: check one, save it, put it in force, take it back.")
app.add_typer(lists.app, name="lists", help="Lists that rules look into: add, remove, import, show; snooze a rule.")
app.add_typer(cases.app, name="cases", help="Cases: derive them, list, show, claim and resolve them.")
app.add_typer(monitoring.app, name="monitor", help="Watch a model in production: how right it was, week by week.")
app.add_typer(keys.app, name="keys", help="API keys of the service.")
app.add_typer(audit.app, name="audit", help="Verify, export and trim the decision log.")
app.add_typer(
    typer.Typer(cls=Verify, no_args_is_help=True, callback=lambda: None),
    name="verify",
    help="Check a promise of the service, print its figures, exit by them.",
)
