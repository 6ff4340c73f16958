"""`fraud inspect`: propose a first mapping for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fraud.errors import DataError

app = typer.Typer()


@app.command()
def inspect(
    data: Annotated[list[Path], typer.Argument(help="CSV or Parquet files, a folder, or a pattern in quotes.")],
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the mapping; shown if none.")] = None,
) -> None:
    """Propose a mapping for a file; a comment marks each guess that you should check.

    [bold]fraud inspect payments.csv --out payments.yaml[/bold]
    """
    from training.proposal import propose

    text = propose(data)
    if file is None:
        typer.echo(text, nl=False)
        return
    if file.exists():
        raise DataError(f"{file} is there already; give another name or remove it")
    file.write_text(text, encoding="utf-8")
    typer.echo(f"wrote {file}; look at its comments, then fraud train --data {data[0]} --mapping {file}")
