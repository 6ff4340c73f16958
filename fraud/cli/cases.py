"""`fraud cases`: derive cases beside the service, and work them in a terminal."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from fraud.cases.case import Case, Resolution, Status
from fraud.cli.moments import shown_time
from fraud.errors import InvalidRequest
from fraud.models.lifecycle import who_am_i
from fraud.settings import Settings
from fraud.stores.cases import CaseStore, open_cases

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False, markup=False)

CaseId = Annotated[int, typer.Argument(metavar="CASE", min=1, help="The number of the case.")]


@app.command()
def work(
    once: Annotated[
        bool, typer.Option("--once", help="Derive what is on record, write labels that are due, end.")
    ] = False,
) -> None:
    """Derive cases from the decision log, and write the labels of resolutions when their time to undo is over.

    Runs until it is stopped. The service's start runs the same, unless FRAUD_CASES_WORK is false; several may run.
    """
    from fraud.stores.case_work import work_for, work_once  # takes a second to import
    from fraud.telemetry.logs import configure_logging

    settings = Settings.read()
    if once:
        read, resolved = asyncio.run(work_once(settings))
        out.print(f"{read} decisions read, {resolved} cases resolved")
        return
    configure_logging(settings.log.level, settings.log.format)
    asyncio.run(work_for(settings, lambda: False))


@app.command("list")
def list_(
    status: Annotated[str | None, typer.Option(help=", ".join(get_args(Status)))] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 50,
) -> None:
    """List cases, the greatest expected loss first."""
    if status is not None and status not in get_args(Status):
        raise InvalidRequest(f"status {status[:60]!r}; allowed: {', '.join(get_args(Status))}")
    table = Table("case", "status", "customer", "transactions", "expected loss", "opened", "by", box=None)
    for case in _opened().find(status, limit):  # type: ignore[arg-type]
        table.add_row(
            *(str(case.id), case.status_at(_now_ms()), case.customer_id or "", str(case.transactions)),
            *(f"{case.expected_loss:.2f}", shown_time(case.opened_ms), case.resolved_by or case.claimed_by),
        )
    Console(width=max(out.width, 140), highlight=False, markup=False).print(table)


@app.command()
def show(case_id: CaseId) -> None:
    """Show a case with its transactions and its trail."""
    case, transactions, trail = _opened().whole(case_id)
    _print(case)
    table = Table("transaction", "event time", "merchant", "amount", "score", "decided by", "reasons", box=None)
    for of in transactions:
        reasons = ", ".join(f"{name} {value:+.3g}" for name, value in of.reasons)
        table.add_row(
            *(of.transaction_id, shown_time(of.event_time_ms), of.merchant_id or "", f"{of.amount:.2f}"),
            *(f"{of.score:.4f}", of.decided_by, reasons),
        )
    wide = Console(width=max(out.width, 200), highlight=False, markup=False)
    wide.print(table)
    steps = Table("change", "time", "actor", "step", "detail", box=None)
    for entry in trail:
        steps.add_row(str(entry.number), shown_time(entry.time_ms), entry.actor, entry.step, entry.detail)
    wide.print(steps)


@app.command()
def claim(
    case_id: Annotated[int | None, typer.Argument(metavar="[CASE]", help="The next one if none.")] = None,
) -> None:
    """Claim a case, or the open one with the greatest expected loss."""
    store = _opened()
    case = store.claim_next(who_am_i()) if case_id is None else store.claim(case_id, who_am_i())
    if case is None:
        out.print("no case is open")
    else:
        _print(case)


@app.command()
def release(case_id: CaseId) -> None:
    """Give up a claim."""
    _print(_opened().release(case_id, who_am_i()))


@app.command()
def note(case_id: CaseId, text: Annotated[str, typer.Argument(help="At most 4,000 characters.")]) -> None:
    """Add a note to the trail of a case."""
    if not 1 <= len(text) <= 4000:
        raise InvalidRequest(f"a note of {len(text)} characters; 1 to 4000 are allowed")
    _print(_opened().note(case_id, who_am_i(), text))


@app.command()
def resolve(
    case_id: CaseId,
    resolution: Annotated[str, typer.Argument(help=", ".join(get_args(Resolution)))],
    revision: Annotated[int, typer.Option(min=1, help="The revision that you saw.")],
) -> None:
    """Resolve a case that you have claimed; its labels are written when its time to undo is over."""
    if resolution not in get_args(Resolution):
        raise InvalidRequest(f"resolution {resolution[:60]!r}; allowed: {', '.join(get_args(Resolution))}")
    _print(_opened().resolve(case_id, who_am_i(), resolution, revision))  # type: ignore[arg-type]


@app.command()
def undo(case_id: CaseId) -> None:
    """Take your resolution back before its labels are written."""
    _print(_opened().undo(case_id, who_am_i()))


@app.command()
def reopen(case_id: CaseId) -> None:
    """Open a resolved case again; its next resolution corrects the labels."""
    _print(_opened().reopen(case_id, who_am_i()))


def _opened() -> CaseStore:
    return open_cases(Settings.read())


def _print(case: Case) -> None:
    status = case.status_at(_now_ms())
    by = {"claimed": f" by {case.claimed_by} until {shown_time(case.claimed_until_ms)}"}.get(status, "")
    if case.resolution is not None:
        by = f" as {case.resolution} by {case.resolved_by}"
    out.print(
        f"case {case.id}, revision {case.revision}: {status}{by}; {case.transactions} transactions, "
        f"expected loss {case.expected_loss:.2f}"
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
