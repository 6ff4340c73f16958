"""`fraud compare`: is a challenger better than the champion, on the same labelled traffic."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from fraud.cli.audit import log_of
from fraud.cli.moments import utc_ms
from fraud.models.find import load_scorer
from fraud.monitoring.measures import DAY_MS
from fraud.settings import Settings

app = typer.Typer()
out = Console(soft_wrap=True, highlight=False, markup=False)

Reference = Annotated[str, typer.Argument(help="A bundle folder, or NAME:ALIAS, NAME:VERSION of the registry.")]


@app.command()
def compare(
    champion: Reference,
    challenger: Reference,
    since: Annotated[
        datetime,
        typer.Option(formats=["%Y-%m-%d"], help="The first day of the comparison, UTC; fix it before you look."),
    ],
    as_of: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="As it stood on this day, UTC; else now.")
    ] = None,
    settled_after: Annotated[int, typer.Option(min=1, help="Days after which a week's labels count as in.")] = 30,
    cap: Annotated[
        float | None,
        typer.Option(
            help="The most that a customer counts for in a week; else the 99% quantile of such losses before --since."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write everything here as JSON.")] = None,
) -> None:
    """Decide the champion's recorded transactions again by both versions, and say which one costs less.

    May be looked at as often as one likes: a challenger that is no better is called better with a probability of at
    most 5%. Exit code 0 when the challenger is better, 3 while that is open, 4 when it is worse.
    """
    from fraud.checks.comparison import compare_versions  # takes a second to import

    found = compare_versions(
        log_of(Settings.read()),
        load_scorer(champion),
        load_scorer(challenger),
        since_ms=utc_ms(since),
        as_of_ms=time.time_ns() // 1_000_000 if as_of is None else utc_ms(as_of),
        settled_after_ms=settled_after * DAY_MS,
        cap=cap,
    )
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    last = found.looks[-1]
    out.print(
        f"{found.units:,} customers' weeks, {found.differing:,} of them cost otherwise; cost capped at {found.cap:,.2f}"
    )
    out.print(f"the challenger would have saved {found.saved:,.2f}; capped {found.saved_capped:,.2f}")
    out.print(f"evidence that it is better: {last.better:.3g}; that it is worse: {last.worse:.3g}; 20 decides")
    verdict = f"{found.verdict} since the week of {found.since}" if found.since else "open"
    out.print(f"verdict: {verdict} (wrong with at most {found.confidence})")
    raise typer.Exit({"better": 0, "open": 3, "worse": 4}[found.verdict])
