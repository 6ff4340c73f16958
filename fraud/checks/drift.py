"""`fraud verify drift`: false alarms over simulated years without drift, and how soon changes are found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import chi2

from fraud.checks.wandering import CATEGORIES, NUMBERS, REFERENCE_HOURS, VALUES, YEAR_HOURS, Onset, World, world
from fraud.monitoring.fitting import fit_channels
from fraud.monitoring.hours import WEEK
from fraud.monitoring.sequential import Watched, events_of, new_state, watch

BUDGET_A_YEAR = 4.0
VOLUMES = (50_000, 1_000_000)
FIRST_CHANGE_SEED = 1_000_000
T = TypeVar("T")
S = TypeVar("S")

CHANGES: dict[str, tuple[Onset, float | None]] = {
    "0.5 sd in one feature": (Onset(0, location=0.5), 4),
    "0.1 sd in one feature": (Onset(0, location=0.1), None),
    "20% nulls in one feature": (Onset(0, missing=0.2), 4),
    "two columns swapped, means 1 sd apart": (Onset(0, location=1.0, spread=0.5), 4),
    "new category, 2%": (Onset(0, new=0.02), 4),
    "new category, 0.2%": (Onset(0, new=0.002), None),
    "score moved by 0.3 sd": (Onset(0, location=0.3), 4),
    "unit changed: all in the top bin": (Onset(0, location=2.0, spread=2.0), 4),
    "frozen at the median": (Onset(0, spread=-0.7), 4),
    "0 to 0.5 sd over 8 weeks": (Onset(0, location=0.5, weeks=8.0), 8 * WEEK),
}
"""What changes, and within how many hours the median has to be found."""

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


class Year(NamedTuple):
    """False alarms of one year: events of both tests together, and of each."""

    events: int
    fast: int
    slow: int


def year(decisions_a_day: int, seed: int, *, calendar: bool = True, dispersion: bool = True) -> Year:
    """Count the false alarms of a year without drift, hourly looks."""
    watched = _watched(world(decisions_a_day, seed), YEAR_HOURS, calendar, dispersion)
    none = np.full_like(watched.fast, -np.inf)
    alone = Watched(watched.fast, none), Watched(none, watched.slow)
    return Year(len(events_of(watched)), *(len(events_of(one)) for one in alone))


def delay(decisions_a_day: int, seed: int, change: str) -> float:
    """Return the hours from a change to its first alarm in the changed feature; infinite if there is none."""
    onset = CHANGES[change][0]
    hour = int(np.random.default_rng(seed).integers(WEEK, YEAR_HOURS // 2))
    until = hour + 24 * WEEK
    one = world(decisions_a_day, seed, onset._replace(hour=REFERENCE_HOURS + hour))
    watched = _watched(one, until, True, True)
    first, last = (3 * NUMBERS, 3 * NUMBERS + VALUES + 2) if onset.new else (0, 3)
    strength = np.maximum(watched.fast, watched.slow)[first:last, hour:]
    found = np.flatnonzero((strength >= 0).any(axis=0))
    return float(found[0] + 1) if len(found) else np.inf


def upper_rate(events: int, years: int) -> float:
    """Return the upper end of the 95% interval of a rate a year (Garwood's, of a Poisson count)."""
    return float(chi2.ppf(0.975, 2 * (events + 1)) / 2 / years)


def lower_rate(events: int, years: int) -> float:
    return float(chi2.ppf(0.025, 2 * events) / 2 / years) if events else 0.0


@app.command()
def drift(
    years: Annotated[int, typer.Option(min=1, help="Years without drift, at each volume.")] = 200,
    onsets: Annotated[int, typer.Option(min=1, help="Onsets of each change, at each volume.")] = 11,
    ablations: Annotated[int, typer.Option(min=1, help="Years without the calendar, and without dispersion.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="The first year's seed.")] = 10_000,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Measure false alarms in years without drift, and delays of changes; exit 1 when a promise does not hold.

    One budget, one false alarm a quarter, over some 410 channels that are looked at every hour. Without the calendar or
    without the dispersion term the same measurement has to fail, which shows that it can.
    """
    out.print(f"{3 * NUMBERS + CATEGORIES * (VALUES + 2)} channels of features, and volumes; 26 weeks of reference")
    failures: list[str] = []
    with ProcessPoolExecutor(jobs) as pool:
        for volume in VOLUMES:
            failures += _false_alarms(pool, volume, years, seed)
        for name, how in (("calendar", {"calendar": False}), ("dispersion term", {"dispersion": False})):
            totals = [
                sum(one.events for one in _each(pool, partial(year, volume, **how), range(seed, seed + ablations)))
                for volume in VOLUMES
            ]
            rates = [total / ablations for total in totals]
            out.print(f"without the {name}: {rates[0]:.2f} and {rates[1]:.2f} false alarms a year")
            if all(upper_rate(total, ablations) <= BUDGET_A_YEAR for total in totals):
                failures.append(f"without the {name} the check holds: it shows nothing")
        for volume in VOLUMES:
            failures += _delays(pool, volume, onsets)
    for failure in failures:
        out.print(failure, style="red")
    raise typer.Exit(1 if failures else 0)


def _false_alarms(pool: ProcessPoolExecutor, volume: int, years: int, seed: int) -> Iterator[str]:
    found = list(_each(pool, partial(year, volume), range(seed, seed + years)))
    for name in ("fast", "slow", "events"):
        total = sum(getattr(one, name) for one in found)
        low, high = lower_rate(total, years), upper_rate(total, years)
        title = "both" if name == "events" else name
        out.print(f"{volume:,} a day, {title}: {total / years:.2f} [{low:.2f}, {high:.2f}] false alarms a year")
    above = sum(one.events > BUDGET_A_YEAR for one in found) / years
    out.print(f"{volume:,} a day: {above:.0%} of {years} years had more than {BUDGET_A_YEAR:.0f}")
    if high > BUDGET_A_YEAR:
        yield f"{volume:,} a day: up to {high:.2f} false alarms a year, {BUDGET_A_YEAR:.0f} are promised"


def _delays(pool: ProcessPoolExecutor, volume: int, onsets: int) -> Iterator[str]:
    table = Table(f"{volume:,} a day", "median, hours", "90%", "found", "promised", box=None)
    seeds = range(FIRST_CHANGE_SEED, FIRST_CHANGE_SEED + onsets)
    for change, (_, promised) in CHANGES.items():
        hours = np.array(list(_each(pool, partial(_delay, volume, change), seeds)))
        median, late = (float(np.quantile(hours, q, method="inverted_cdf")) for q in (0.5, 0.9))
        told = "" if promised is None else f"{promised:g}"
        table.add_row(change, f"{median:g}", f"{late:g}", f"{np.isfinite(hours).mean():.0%}", told)
        if promised is not None and median > promised:
            yield f"{change} at {volume:,} a day: found after {median:g} h (median), {promised:g} are promised"
    out.print(table)


def _delay(volume: int, change: str, seed: int) -> float:
    return delay(volume, seed, change)


def _each(pool: ProcessPoolExecutor, work: Callable[[S], T], on: Iterable[S]) -> Iterable[T]:
    return pool.map(work, on, chunksize=1)


def _watched(one: World, hours: int, calendar: bool, dispersion: bool) -> Watched:
    until = REFERENCE_HOURS + hours
    known = one.hours if calendar else one.unlisted
    before, after = known.part(0, REFERENCE_HOURS), known.part(REFERENCE_HOURS, until)
    channels = fit_channels(one.y[:, _REFERENCE], one.n[:, _REFERENCE], before, one.kinds, dispersion=dispersion)
    return watch(channels, new_state(channels), one.y[:, REFERENCE_HOURS:until], one.n[:, REFERENCE_HOURS:until], after)


_REFERENCE = slice(0, REFERENCE_HOURS)
