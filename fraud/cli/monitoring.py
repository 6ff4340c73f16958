"""`fraud monitor`: how right the decisions were, from the decision log and its labels, beside the running service."""

from __future__ import annotations

import re
import time
from datetime import UTC, date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from fraud.cli.audit import log_of
from fraud.cli.moments import shown_time, utc_ms
from fraud.decisions.costs import decision_costs
from fraud.decisions.rules.effect import FRAUD
from fraud.errors import DataError, FraudError
from fraud.models.bundle import short
from fraud.models.find import load_bundle
from fraud.models.served import Served
from fraud.monitoring.counts import BINS, keep_counting, layout_of, series_of
from fraud.monitoring.drift import Drift, judge, reference_weeks_of
from fraud.monitoring.hours import HOUR_MS
from fraud.monitoring.measures import DAY_MS
from fraud.monitoring.page import report_page
from fraud.monitoring.performance import ALL, Costs, Performance, action_costs, recent_nowcasts, weekly_performance
from fraud.monitoring.traffic import Traffic, read_traffic
from fraud.settings import ModelSettings, Settings
from fraud.stores.hourly_counts import SqliteHourlyCounts

ALARM = 3
"""Exit code of `drift` after an alarm."""

app = typer.Typer(no_args_is_help=True, callback=lambda: None)
out = Console(soft_wrap=True, highlight=False, markup=False)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model whose decisions are judged.")]
Days = Annotated[str, typer.Option("--last", help="Events of the last so many days, such as 90d.")]
LegitimateAfter = Annotated[
    str,
    typer.Option(help="A transaction let through without a label is legitimate once it is this old, such as 30d."),
]
AsOf = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="Only what was known at this time, UTC; else now."),
]
Segment = Annotated[
    list[str] | None,
    typer.Option(help="A field of the transaction, as it was sent, whose values are judged apart; may be repeated."),
]


@app.command()
def report(
    model: Model,
    file: Annotated[Path, typer.Option("--out", "-o", help="The page, .html; or .json for the figures.")] = Path(
        "monitoring.html"
    ),
    last: Days = "300d",
    legitimate_after: LegitimateAfter = "30d",
    as_of: AsOf = None,
    segment: Segment = None,
    resamples: Annotated[
        int, typer.Option(min=0, help="Of customers, for the intervals; fewer are quicker, 0 leaves only Wilson's.")
    ] = 200,
) -> None:
    """Write precision, recall, AUC, calibration, cost and more by week, version and segment, with intervals.

    For the weeks whose labels are still coming: what precision, recall and losses will be once they are in.

    Reads the decision log and the labels of the service's store beside the running service; nothing is changed.
    """
    if file.suffix not in (".html", ".json"):
        raise typer.BadParameter(f"--out {str(file)!r}; allowed: a name that ends with .html or .json")
    as_of_ms = time.time_ns() // 1_000_000 if as_of is None else utc_ms(as_of)
    delay_ms = _days_ms(legitimate_after, "--legitimate-after")
    traffic = read_traffic(
        log_of(Settings.read()),
        model,
        since_ms=as_of_ms - _days_ms(last, "--last"),
        as_of_ms=as_of_ms,
        legitimate_after_ms=delay_ms,
        segment_fields=segment or (),
    )
    weeks = weekly_performance(traffic, _costs(traffic, model), delay_ms, resamples)
    nowcasts = recent_nowcasts(traffic)
    if file.suffix == ".json":
        file.write_bytes(msgspec.json.format(msgspec.json.encode({"weeks": weeks, "nowcasts": nowcasts})))
    else:
        made = shown_time(as_of_ms)
        rules = [
            f"A transaction that was let through and has no label counts as legitimate after {legitimate_after}. "
            "A declined one without a label is left out: nobody saw what it would have become.",
            "Intervals of 95%: resampled customers, for shares at least Wilson's. Weeks begin on Monday, UTC, and "
            "hold the events of that week. An open circle is a week whose labels are still coming.",
        ]
        file.write_text(report_page(model, made, weeks, nowcasts, rules), encoding="utf-8")
    _show(weeks)
    for one in nowcasts:
        said = [
            f"{name.replace('_', ' ')} {e.value:.3g} [{e.low:.3g}, {e.high:.3g}]"
            for name, e in one.measures.items()
            if e.value is not None
        ]
        out.print(f"once the labels of {one.week} ({one.days} days) are in: {', '.join(said)}")
    out.print(f"wrote {file}")


@app.command()
def drift(
    model: Model,
    holidays: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A text file of days such as 2026-12-25, one a line."),
    ] = None,
    as_of: AsOf = None,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Write everything here as JSON.")] = None,
) -> None:
    """Count the decisions made since the last time, and say what has drifted; exit 3 if the last day had an alarm.

    Run it every hour: one false alarm a quarter over all features together is the budget, however often it looks.
    Counts are kept in `monitoring.db` in the state directory, by the layout of the version in force.
    """
    settings = Settings.read()
    bundle = load_bundle(model)
    name = bundle.manifest.name
    layout = layout_of(name, bundle.spec, bundle.reference)
    served = Served(settings.models)

    @lru_cache
    def reads_alike(digest: str) -> bool:
        try:
            return served.read(f"{name}:{short(digest)}", digest).spec.features == bundle.spec.features
        except FraudError as error:
            out.print(f"not counted, decisions of {short(digest)}: {error.message}", style="yellow")
            return False

    store = SqliteHourlyCounts(settings.process.state_dir / "monitoring.db", (len(layout.names), BINS))
    counted = keep_counting(log_of(settings), store, layout, name, reads_alike)
    counts = store.read(layout.key)
    store.close()
    out.print(f"{counted:,} decisions counted; {len(counts):,} hours are known")
    until = (time.time_ns() // 1_000_000 if as_of is None else utc_ms(as_of)) // HOUR_MS
    weeks = reference_weeks_of(min(counts, default=until), until)
    found = judge(layout, counts, series_of(layout, counts, weeks, until), weeks, _holidays(holidays))
    if file is not None:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    _show_drift(found)
    day_before = datetime.fromtimestamp((until - 24) * 3600, UTC).isoformat(timespec="minutes")
    if any(event.last >= day_before for event in found.events):
        raise typer.Exit(ALARM)


def _show_drift(found: Drift) -> None:
    out.print(
        f"reference from {found.reference_from}, watched from {found.watched_from} until {found.until}: "
        f"{found.channels - len(found.not_watched)} of {found.channels} channels"
    )
    for remark in found.remarks:
        out.print(remark, style="yellow")
    for event in found.events:
        more = f" and {len(event.channels) - 5} more" if len(event.channels) > 5 else ""
        out.print(f"{event.first} to {event.last} ({', '.join(event.tests)}): {', '.join(event.channels[:5])}{more}")
    if not found.events:
        out.print("no drift")
    highest = sorted(found.psi.items(), key=lambda one: -one[1])[:5]
    if highest:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in highest)
        out.print(f"highest PSI of the last seven days (shown, raises no alarm): {shown}")


def _holidays(file: Path | None) -> set[date]:
    days = set()
    for i, line in enumerate([] if file is None else file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        try:
            days |= {date.fromisoformat(text)} if text else set()
        except ValueError:
            raise DataError(f"{file}:{i}: {text!r} is no day; allowed: days such as 2026-12-25, one a line") from None
    return days


def _show(weeks: list[Performance]) -> None:
    table = Table("week", "decisions", "frauds", "labels in", "precision", "recall", "auc", "remarks", box=None)
    for one in weeks:
        if one.version == ALL and one.segment == ALL:
            figures = [one.measures[name].value for name in ("precision", "recall", "auc")]
            table.add_row(
                *(one.week, f"{one.decisions:,}", f"{one.frauds:,}", f"{one.labelled_share:.1%}"),
                *("–" if figure is None else f"{figure:.3f}" for figure in figures),
                "; ".join(one.remarks),
            )
    Console(width=max(out.width, 150), highlight=False, markup=False).print(table)


def _costs(traffic: Traffic, model: str) -> Costs:
    """Return what each action would have cost, for the versions that are in the store and have costs."""
    served, found = Served(ModelSettings.read()), {}
    for digest in traffic.versions:
        try:
            policy = served.read(f"{model}:{short(digest)}", digest).policy
        except FraudError as error:
            out.print(f"no costs of {short(digest)}: {error.message}", style="yellow")
            continue
        if policy.costs:
            found[digest] = action_costs(
                decision_costs((traffic.label == FRAUD).astype(np.int64), traffic.amount, policy.costs)
            )
    return found


def _days_ms(text: str, option: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}d", text):
        raise typer.BadParameter(f"{option} {text!r}; allowed: a number of days from 1d to 99999d, such as 30d")
    return int(text[:-1]) * DAY_MS
