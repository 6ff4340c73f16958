"""`fraud verify severity`: the alarm rates of the severities on fresh simulated traffic, with their bounds."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import beta

from fraud.decisions.anomaly import SEVERITIES, Severity
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.severity import Level, SeverityScale
from fraud.features.featurizer import Featurizer, Matrix
from fraud.simulation.simulate import simulate_transactions
from training.config import Config
from training.data import Mapping, load_table
from training.prepare import PreparedData, prepare
from training.replay import replay
from training.severity import fit_severity
from training.train import Trained, fit_model

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIDENCE = 0.99
"""Of the interval of a measured rate."""
CHANCE = 0.001
"""Of a sound calibration to be outside of what is expected of it, on either side."""
LEGITIMATE = "legitimate"
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Vector = NDArray[np.float64]

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True)


@dataclass(frozen=True)
class World:
    """What is simulated: so many customers over so many days."""

    customers: int
    days: int


class Traffic(NamedTuple):
    """Fresh transactions: their raw scores, their customers, and what they are."""

    raw_margins: Vector
    customers: Ints
    kinds: NDArray[np.str_]

    @classmethod
    def joined(cls, parts: Sequence[Traffic]) -> Traffic:
        """Return the traffic of several worlds, whose customers are others."""
        first = np.cumsum([0, *(int(part.customers.max(initial=-1)) + 1 for part in parts[:-1])])
        return cls(
            np.concatenate([part.raw_margins for part in parts]),
            np.concatenate([part.customers + start for part, start in zip(parts, first, strict=True)]),
            np.concatenate([part.kinds for part in parts]),
        )


class Rate(NamedTuple):
    """A share of transactions, with an interval that allows for customers whose transactions resemble each other."""

    value: float
    low: float
    high: float


class Again(NamedTuple):
    """Calibrations drawn anew from the same window: how many, and how many are surely above the rate of a level."""

    calibrations: int
    above: int

    def keeps(self, confidence: float) -> bool:
        """Return whether no more are above than the confidence allows, by an exact interval of their share."""
        surely = (
            float(beta.ppf((1 - CONFIDENCE) / 2, self.above, self.calibrations - self.above + 1)) if self.above else 0.0
        )
        return surely <= 1 - confidence


class Measured(NamedTuple):
    """One level: how often it may be reached, how often it was, and whether that fits."""

    level: Level
    least: float
    """Below it the rate of a sound calibration lies with the probability `CHANCE`."""
    most: float
    """Above it the rate of a sound calibration lies with the probability `CHANCE`."""
    all: Rate
    legitimate: Rate
    again: Again
    confidence: float

    @property
    def holds(self) -> bool:
        fits = self.all.low <= self.most and self.all.high >= self.least
        return fits and self.again.keeps(self.confidence)


@dataclass(frozen=True)
class SeverityCheck:
    """A calibrated scale, and what fresh traffic says of it."""

    scale: SeverityScale
    measured: tuple[Measured, ...]
    traffic: Traffic

    @property
    def holds(self) -> bool:
        return bool(self.measured) and self.scale.rows == self.scale.customers and all(m.holds for m in self.measured)


@app.command()
def severity(
    customers: Annotated[int, typer.Option(min=100, help="Customers of each simulated world.")] = 20_000,
    days: Annotated[int, typer.Option(min=16, help="Days of each simulated world.")] = 24,
    rows: Annotated[int, typer.Option(min=1000, help="Fresh transactions to measure on, at least.")] = 1_000_000,
    config: Annotated[Path | None, typer.Option(help="A training configuration with other rates.")] = None,
    seed: Annotated[int, typer.Option(help="Of the world that is trained on; fresh ones have the next.")] = 1,
    calibrations: Annotated[int, typer.Option(min=20, help="Calibrations drawn anew from the window.")] = 200,
) -> None:
    """Train a forest without labels, and measure how often fresh traffic reaches each severity.

    The traffic is of other customers, in the days of the calibration window, frauds among it as they come. A rate is
    promised with a confidence, so the calibration is drawn anew many times from the same window, and those are counted
    that are surely above the rate. Exits with 1 unless there are no more of them than the confidence allows, the rates
    of the model's own calibration fit what is expected of it, and it is of one transaction a customer.
    """
    world = World(customers, days)
    configured = Config() if config is None else Config.from_yaml(config)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("fresh traffic", total=rows)
        prepared, trained = train_on(world, configured, seed)
        parts: list[Traffic] = []
        while sum(len(part.raw_margins) for part in parts) < rows:
            parts.append(fresh_traffic(prepared, trained, world, seed + 1 + len(parts)))
            progress.update(task, completed=sum(len(part.raw_margins) for part in parts))
    result = check(
        trained.detector.severity, Traffic.joined(parts), drawn_anew(prepared, trained, configured, calibrations)
    )
    _show(result)
    if not result.holds:
        raise typer.Exit(1)


def train_on(world: World, config: Config, seed: int) -> tuple[PreparedData, Trained]:
    """Train a forest on a simulated world without labels, as `fraud train` does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transactions.parquet"
        simulate_transactions(world.customers, world.days, seed, out=path)
        mapping = unlabelled()
        prepared = prepare(load_table(path, mapping, labelled=False), mapping, config, ())
    return prepared, fit_model(prepared, config, algorithm=ISOLATION_FOREST)


def drawn_anew(prepared: PreparedData, trained: Trained, config: Config, count: int) -> list[SeverityScale]:
    """Return calibrations of a detector on the window of its own, each with another sample."""
    window = prepared.windows.calibration
    margins = trained.detector.raw_margin(prepared.X[prepared.windows.within(window)])
    customers = prepared.table["customer_id"].cat.codes.to_numpy()[window].astype(np.int64)
    return [fit_severity(margins, customers, config.severity, config.seed + i) for i in range(1, count + 1)]


def fresh_traffic(prepared: PreparedData, trained: Trained, world: World, seed: int) -> Traffic:
    """Return the raw scores of another world's transactions, in the days of the calibration window."""
    window = prepared.table["processing_time_ms"].to_numpy(np.int64)[prepared.windows.calibration]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transactions.parquet"
        simulate_transactions(world.customers, world.days, seed, out=path)
        table = load_table(path, unlabelled(), labelled=False)
        told = pq.read_table(path, columns=["transaction_id", "typology"]).to_pandas()
    first, last = np.searchsorted(table["processing_time_ms"], [window[0], window[-1] + 1]).tolist()
    some = slice(first, last)
    X: Matrix = replay(table, Featurizer(prepared.spec, prepared.preprocessor.amount_quantiles), some)
    kinds = told.set_index("transaction_id")["typology"].astype(object).reindex(table["transaction_id"].iloc[some])
    return Traffic(
        trained.detector.raw_margin(X),
        table["customer_id"].cat.codes.to_numpy()[some].astype(np.int64),
        kinds.where(kinds.notna(), LEGITIMATE).to_numpy().astype(np.str_),
    )


def unlabelled() -> Mapping:
    """Return the mapping of simulated transactions without its labels."""
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    return mapping.model_copy(update={"label": None, "label_time": None, "label_delay": None})


def check(scale: SeverityScale | None, traffic: Traffic, again: Sequence[SeverityScale]) -> SeverityCheck:
    """Compare the rates of a scale's levels with fresh traffic, and those of the same scale calibrated again."""
    assert scale is not None, "an isolation forest has a severity scale"
    legitimate = traffic.kinds == LEGITIMATE
    measured = []
    for place, level in enumerate(scale.levels):
        if level.above is None:
            continue
        reached = traffic.raw_margins > level.above
        least, most = beta.ppf([CHANCE, 1 - CHANCE], level.rank, scale.rows + 1 - level.rank).tolist()
        alone = rate_of(reached[legitimate], traffic.customers[legitimate])
        anew = _again(traffic, [drawn.levels[place] for drawn in again])
        measured.append(
            Measured(level, least, most, rate_of(reached, traffic.customers), alone, anew, scale.confidence)
        )
    return SeverityCheck(scale, tuple(measured), traffic)


def _again(traffic: Traffic, levels: Sequence[Level]) -> Again:
    """Count those of a level's calibrations whose rate on the traffic is surely above the rate promised."""
    rates = [
        (level.rate, rate_of(traffic.raw_margins > level.above, traffic.customers))
        for level in levels
        if level.above is not None
    ]
    return Again(len(rates), sum(found.low > promised for promised, found in rates))


def rate_of(reached: Bools, customers: Ints) -> Rate:
    """Return the share of rows that are true, with an interval.

    The interval is Clopper and Pearson's for as many independent rows as have the same variance: that of the ratio of
    two sums over customers (Cochran 1977, Sampling Techniques, chapter 6).
    """
    n = len(reached)
    of_customer = np.bincount(customers)
    hits = np.bincount(customers, weights=reached)
    hits, of_customer = hits[of_customer > 0], of_customer[of_customer > 0]
    rate = float(reached.mean())
    variance = float(((hits - rate * of_customer) ** 2).sum()) / n**2 * len(hits) / max(len(hits) - 1, 1)
    effect = max(1.0, variance * n / (rate * (1 - rate))) if 0 < rate < 1 else 1.0
    rows, alarms, tail = n / effect, rate * n / effect, (1 - CONFIDENCE) / 2
    low = float(beta.ppf(tail, alarms, rows - alarms + 1)) if rate > 0 else 0.0
    high = float(beta.ppf(1 - tail, alarms + 1, rows - alarms)) if rate < 1 else 1.0
    return Rate(rate, low, high)


def found_by_kind(scale: SeverityScale, traffic: Traffic) -> pd.DataFrame:
    """Return the share of each typology, and of legitimate transactions, at each severity or above."""
    names: list[Severity] = list(SEVERITIES[1:])
    beginnings = [np.inf if level.above is None else level.above for level in scale.levels]
    kinds = [*sorted({*traffic.kinds.tolist()} - {LEGITIMATE}), LEGITIMATE]
    rows = {}
    for kind in kinds:
        some = traffic.raw_margins[traffic.kinds == kind]
        rows[kind] = [len(some), *(float((some > above).mean()) for above in beginnings)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["transactions", *names])


def _show(result: SeverityCheck) -> None:
    scale = result.scale
    out.print(
        f"calibrated on {scale.rows:,} transactions of {scale.customers:,} customers; "
        f"measured on {len(result.traffic.raw_margins):,} fresh ones, intervals {CONFIDENCE:.0%}"
    )
    columns = ("severity", "at most", "expected", "measured", "legitimate alone", "above, of drawn anew", "")
    rates = Table(*columns, box=None)
    for m in result.measured:
        shown = [f"{rate.value:.4%} [{rate.low:.4%}, {rate.high:.4%}]" for rate in (m.all, m.legitimate)]
        verdict = "holds" if m.holds else "does not hold"
        expected, anew = f"{m.least:.4%} to {m.most:.4%}", f"{m.again.above} of {m.again.calibrations}"
        rates.add_row(m.level.severity, f"{m.level.rate:.4%}", expected, *shown, anew, verdict)
    out.print(rates)
    for name in scale.not_offered:
        needed = next(level.rows_needed(scale.confidence) for level in scale.levels if level.severity == name)
        out.print(f"{name} is not offered: it needs a sample of {needed:,}")
    kinds = found_by_kind(scale, result.traffic)
    shares = Table("found at this severity or above", *kinds.columns, box=None)
    for kind, values in zip(kinds.index, kinds.itertuples(index=False), strict=True):
        shares.add_row(str(kind), f"{values[0]:,}", *(f"{value:.2%}" for value in values[1:]))
    out.print(shares)
