"""The commands of API keys."""

from __future__ import annotations

from typing import Annotated

import typer

from fraud.serving.scopes import SCOPES, Scope
from fraud.serving.security import new_key

app = typer.Typer(no_args_is_help=True, help="API keys of the service.")


@app.command()
def create(
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help=f"What the key may do: {', '.join(SCOPES)}; may be repeated.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Requests a second, else the service's default.")
    ] = None,
    burst: Annotated[float | None, typer.Option(min=1, help="Requests at once, else one second's worth.")] = None,
) -> None:
    """Make a key: the first line is the secret for the caller, the second the entry for FRAUD_API_KEYS.

    The secret is printed once and kept nowhere. The entry holds only its hash; give it to the service in the
    variable FRAUD_API_KEYS, or in the file that FRAUD_API_KEYS_FILE names, one a line.
    """
    scopes: list[Scope] = [known for known in SCOPES if known in (scope or ["score"])]
    unknown = set(scope or ()) - set(SCOPES)
    if unknown:
        raise typer.BadParameter(f"scope {', '.join(sorted(unknown))}; allowed: {', '.join(SCOPES)}")
    if burst is not None and rate is None:
        raise typer.BadParameter("a burst needs a rate")
    secret, key = new_key(scopes, rate, burst)
    typer.echo(secret)
    typer.echo(key.line())
