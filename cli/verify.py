"""`fraud verify`: every check of a promise, from the modules that hold them."""

from __future__ import annotations

import typer

from cli import verify_explain, verify_history

app = typer.Typer(no_args_is_help=True)
for room in (verify_history, verify_explain):
    app.registered_commands += room.app.registered_commands
