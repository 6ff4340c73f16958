"""`fraud verify nowcast`: do the intervals of this week's figures cover what they came to, over simulated worlds."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fraud.monitoring.nowcast import LONGEST_DELAY, NOWCAST, Days, nowcast

Floats: TypeAlias = NDArray[np.float64]
WARM_UP_WEEKS = 34
AGES = (3, 7, 14, 28)
"""Days since the week began: after 3, the days seen so far; later, the whole week."""
LOWEST, HIGHEST = 0.90, 0.98
FLAGGED_SHARE, FRAUDS_A_WEEK, PRECISION = 0.75, 170, 0.3

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@app.command("nowcast")
def nowcast_(
    worlds: Annotated[int, typer.Option(min=2, help="Simulated worlds, each with its own levels and delays.")] = 50,
    weeks: Annotated[int, typer.Option(min=1, help="Weeks judged in each.")] = 52,
    seed: Annotated[int, typer.Option(min=0, help="The first world's seed.")] = 1,
) -> None:
    """Measure the coverage of 95% intervals for precision, recall and losses; exit 1 outside of 90% to 98%.

    Levels of fraud and delays of labels wander by weeks. Weeks of a world are alike, so worlds are what is counted.
    """
    covered = np.array([coverage(seed + world, weeks) for world in range(worlds)])
    table = Table("", *(f"day {age}" for age in AGES), box=None)
    failures = []
    for i, name in enumerate(NOWCAST):
        cells = []
        for j, age in enumerate(AGES):
            mean, half = covered[:, i, j].mean(), 1.96 * covered[:, i, j].std(ddof=1) / np.sqrt(worlds)
            cells.append(f"{mean:.1%} ± {half:.1%}")
            if not LOWEST <= mean <= HIGHEST:
                failures.append(f"{name} on day {age}: {mean:.1%} covered, {LOWEST:.0%} to {HIGHEST:.0%} are promised")
        table.add_row(name, *cells)
    out.print(f"{worlds} worlds of {weeks} weeks; share of weeks covered by the 95% interval, ± by worlds")
    out.print(table)
    for failure in failures:
        out.print(failure, style="red")
    raise typer.Exit(1 if failures else 0)


def coverage(seed: int, weeks: int) -> Floats:
    """Return the share of a world's weeks whose final figures lay in the interval, (n_measures, n_ages)."""
    rng = np.random.default_rng(seed)
    days = world(rng, WARM_UP_WEEKS + weeks)
    found = np.zeros((len(NOWCAST), len(AGES)))
    for week in range(WARM_UP_WEEKS, WARM_UP_WEEKS + weeks):
        for j, age in enumerate(AGES):
            first, today = 7 * week, 7 * week + age
            last = min(first + 7, today)
            truth, told = final(days, first, last), nowcast(days, first, last, today, rng)
            for i, name in enumerate(NOWCAST):
                low, high = told[name].low, told[name].high
                assert low is not None
                assert high is not None
                found[i, j] += low - 1e-9 <= truth[i] <= high + 1e-9
    return found / weeks


def final(days: Days, first: int, last: int) -> list[float]:
    """Return what the events of some days came to: precision, recall, missed amount."""
    mine = (days.fraud_day >= first) & (days.fraud_day < last) & (days.fraud_delay <= LONGEST_DELAY)
    found, missed = (int((mine & (days.fraud_group == g)).sum()) for g in (1, 0))
    amount = float(days.fraud_amount[mine & (days.fraud_group == 0)].sum())
    return [found / int(days.flagged[first:last].sum()), found / (found + missed), amount]


def world(rng: np.random.Generator, weeks: int) -> Days:
    """Draw a world in which the model's calibration is off, and levels and delays wander by weeks."""
    n_days = 7 * (weeks + 8)
    of_day = rng.uniform(0.7, 1.3, 7)[np.arange(n_days) % 7]
    expected, counts, delays, groups = [], [], [], []
    for g, share in enumerate((1 - FLAGGED_SHARE, FLAGGED_SHARE)):
        true = FRAUDS_A_WEEK / 7 * share * of_day * np.exp(0.1 * rng.normal(size=n_days))
        expected.append(true / rng.uniform(0.7, 1.4))
        level = np.exp(_wander(rng, n_days // 7, 0.15))[np.arange(n_days) // 7]
        dispersion = rng.uniform(1.0, 1.8)
        mean = true * level
        count = rng.poisson(mean if dispersion < 1.01 else rng.gamma(mean / (dispersion - 1), dispersion - 1))
        median = (5.0, 2.5)[g] * np.exp(_wander(rng, n_days // 7, 0.2))[np.arange(n_days) // 7]
        day = np.repeat(np.arange(n_days), count)
        counts.append(day)
        groups.append(np.full(len(day), g))
        delays.append(np.minimum((median[day] * rng.lognormal(0, 1.0, len(day))).astype(np.int64), LONGEST_DELAY))
    day = np.concatenate(counts)
    flagged = rng.poisson(expected[1] / PRECISION) + np.bincount(counts[1], minlength=n_days)
    return Days(
        np.stack(expected, axis=1),
        flagged,
        day,
        np.concatenate(groups),
        np.concatenate(delays),
        rng.lognormal(5, 1.3, len(day)),
    )


def _wander(rng: np.random.Generator, weeks: int, deviation: float) -> Floats:
    value, found = rng.normal(), []
    for _ in range(weeks):
        value = 0.8 * value + 0.6 * rng.normal()
        found.append(deviation * value)
    return np.array(found)
