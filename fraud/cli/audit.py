"""The commands of the decision log: verify, export, retain, replay."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from fraud.cli.moments import utc_ms
from fraud.decisions.chain import Anchor, audit_key_of
from fraud.settings import Settings
from fraud.stores.log import DecisionLog
from fraud.stores.opening import open_log

app = typer.Typer(no_args_is_help=True, help="The decision log: is it whole, what does it say.")
replaying = typer.Typer()
out = Console(soft_wrap=True, highlight=False, markup=False)

Time = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="UTC.")]


@app.command()
def verify(
    noted: Annotated[
        str | None, typer.Option(metavar="ROW:LINK", help="What an earlier run printed as the head.")
    ] = None,
) -> None:
    """Walk the chain of all decisions; exit 1 at the first row that is changed, missing or moved, naming it.

    Keep the head that it prints somewhere else: with --noted a later run also shows a log that was cut off at
    its end, or written anew as a whole.
    """
    from fraud.checks.audit import verify_chain  # takes a second to import, as its siblings below

    settings = Settings.read()
    known = None
    if noted is not None:
        try:
            sequence, link = noted.split(":")
            known = Anchor(int(sequence), bytes.fromhex(link))
        except ValueError:
            raise typer.BadParameter("give it as it was printed, ROW:LINK") from None
    started = time.perf_counter()
    verified = verify_chain(log_of(settings), audit_key_of(settings.privacy.audit_key.get_secret_value()), known)
    seconds = time.perf_counter() - started
    if verified.broken is not None:
        out.print(f"broken at row {verified.broken.sequence}: {verified.broken.reason}", style="red")
        out.print(f"the {verified.rows} rows before it are whole")
        raise typer.Exit(1)
    out.print(f"whole: {verified.rows} rows in {seconds:.1f} s")
    out.print(f"head: {verified.head.sequence}:{verified.head.link.hex()}")


@app.command()
def export(
    file: Annotated[Path | None, typer.Option("--out", help="A file, else standard output.")] = None,
    since: Time = None,
    until: Time = None,
) -> None:
    """Write decisions as JSON, one a line, in the order of the chain, with the features as they were scored."""
    from fraud.checks.audit import exported

    rows = exported(log_of(Settings.read()), utc_ms(since), utc_ms(until))
    n = 0
    with open(file, "wb") if file else sys.stdout.buffer as stream:
        for row in rows:
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            n += 1
    Console(stderr=True).print(f"{n} decisions")


@app.command()
def retain(
    days: Annotated[float, typer.Option(min=0, help="Decisions older than this many days are removed.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, nothing is removed.")] = False,
) -> None:
    """Remove the oldest decisions; the chain begins after them from then on.

    A removed transaction counts as new when it comes again, and can no longer be labelled: keep more days than
    chargebacks take.
    """
    log = log_of(Settings.read())
    before = datetime.now(UTC) - timedelta(days=days)
    if not yes:
        out.print(f"would remove the decisions before {before:%Y-%m-%d %H:%M} UTC; add --yes to do it")
        return
    removed = log.forget(int(before.timestamp() * 1000))
    anchor = log.anchor()
    out.print(f"removed {removed} decisions; the chain begins after {anchor.sequence}:{anchor.link.hex()}")


@replaying.command("replay")
def replay_(
    everything: Annotated[bool, typer.Option("--all", help="Every decision in the log.")] = False,
    last: Annotated[int, typer.Option(min=1, help="So many of the latest decisions.")] = 1000,
) -> None:
    """Decide recorded transactions again from record, bundle and rule set; name every bit that differs, and exit 1."""
    from fraud.checks.audit import replay
    from fraud.models.bento_store import BentoStore
    from fraud.models.bundle import short
    from fraud.models.rule_sets import RuleSets
    from fraud.models.scorer import Scorer

    settings = Settings.read()

    def scorer_of(name: str, digest: str) -> Scorer:
        return Scorer.of(BentoStore(settings.models.bentoml_home).read(f"{name}:{short(digest)}", digest))

    started = time.perf_counter()
    rules_of = RuleSets(settings.models.bentoml_home).read
    result = replay(log_of(settings), scorer_of, rules_of, None if everything else last)
    seconds = time.perf_counter() - started
    for digest, rows in result.rows.items():
        out.print(f"{rows} decisions of {digest} scored again")
    for digest, reason in result.failures.items():
        out.print(f"decisions of {digest} cannot be scored again: {reason}", style="red")
    for d in result.differences:
        out.print(
            f"row {d.sequence}, transaction {d.transaction_id}: {d.field} is {d.replayed}, recorded was {d.recorded}",
            style="red",
        )
    out.print(f"{len(result.differences)} differences in {sum(result.rows.values())} decisions, {seconds:.1f} s")
    if result.differences or result.failures:
        raise typer.Exit(1)


def log_of(settings: Settings) -> DecisionLog:
    """Return the decision log of the store that the settings name.

    Raises
    ------
    StoreError
        That store keeps no log, or cannot be reached.
    """
    audit_key = audit_key_of(settings.privacy.audit_key.get_secret_value())
    return open_log(settings.store.cold_url or settings.store.url, settings.process.state_dir, audit_key)
