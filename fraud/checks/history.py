"""`fraud verify parity` and `idempotency`: what the service's own path does, against the offline replay."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.progress import track

from fraud.decisions.labels import Label
from fraud.decisions.policy import Policy, RiskLevels
from fraud.detectors.calibration import Calibrator
from fraud.detectors.lightgbm.algorithm import LIGHTGBM, detector_files
from fraud.errors import SettingsError
from fraud.features.featurizer import Featurizer, Matrix
from fraud.models.bundle import Bundle, DetectorPart, Manifest, Preprocessor
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision, Rejection
from fraud.schema import FeatureSpec
from fraud.settings import Settings
from fraud.simulation.simulate import simulate_transactions
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store
from training.data import Mapping, load_transactions
from training.replay import instances_of, replay, transaction_spec

MINUTE_MS = 60_000
QUANTILES = [float(q) for q in np.geomspace(1.0, 1000.0, 100)]

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True)

StoreUrl = Annotated[
    str,
    typer.Option(
        "--store",
        help="A URL, or sqlite for a fresh file, or redis or postgresql for the one in the settings. "
        "The ids that are sent are new ones; what is recorded of them stays in the store.",
    ),
]
Rows = Annotated[int, typer.Option("--rows", min=100, help="How many simulated transactions.")]
Seed = Annotated[int, typer.Option("--seed")]


@dataclass(frozen=True)
class Parity:
    """The differences between the service's features and the offline replay's."""

    rows: int
    late: int
    out_of_order: int
    repeated: int
    frauds_applied: int
    differing_values: int
    maximum_difference: float
    differing_answers: int
    degraded: int
    seconds: float

    @property
    def holds(self) -> bool:
        return not (self.differing_values or self.maximum_difference or self.differing_answers or self.degraded)


@app.command()
def parity(rows: Rows = 20_000, store: StoreUrl = "sqlite", seed: Seed = 1) -> None:
    """Score transactions one at a time through the service's path and compare every feature with the replay.

    Arrival is shuffled inside a minute, some come hours late, some twice, and labels come days later.
    Exits with 1 unless the maximum difference is 0.
    """
    table = shuffled_arrival(simulated(rows, seed), seed)
    mapping = Mapping.from_yaml(_simulated_mapping())
    spec = transaction_spec(table, mapping, slice(None))
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(
            measure_parity(table, scorer_for(table, spec), _open(store, Path(folder)), seed, show=True)
        )
    out.print(
        f"rows {result.rows}, late by more than a minute {result.late}, before an earlier one {result.out_of_order}, "
        f"sent twice {result.repeated}, frauds applied {result.frauds_applied}\n"
        f"values that differ {result.differing_values}, maximum difference {result.maximum_difference:g}, "
        f"answers that differ {result.differing_answers}, degraded {result.degraded}\n"
        f"{result.rows / result.seconds:,.0f} rows/s, one at a time"
    )
    if not result.holds:
        raise typer.Exit(1)


def simulated(rows: int, seed: int) -> pd.DataFrame:
    """Return the first `rows` simulated transactions as the canonical table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "transactions.parquet"
        days = 60
        simulate_transactions(max(10, rows // days), days, seed, out=path)
        table = load_transactions(path, Mapping.from_yaml(_simulated_mapping()))
    if len(table) < rows:
        raise ValueError(f"{len(table)} transactions were simulated where {rows} are needed")
    return with_own_ids(table.iloc[:rows])


def shuffled_arrival(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return a table whose transactions arrive up to a minute later than simulated, so not in order."""
    delay = np.random.default_rng(seed).integers(0, MINUTE_MS, len(table))
    table = table.assign(processing_time_ms=table["processing_time_ms"] + delay)
    return table.sort_values("processing_time_ms", kind="stable").reset_index(drop=True)


def scorer_for(table: pd.DataFrame, spec: FeatureSpec) -> Scorer:
    """Return a scorer with a quickly trained booster; its quality does not matter here."""
    import lightgbm

    featurizer = Featurizer(spec, QUANTILES)
    some = slice(0, 20_000)
    X, y = replay(table.iloc[:20_000], featurizer, some), table["label"].to_numpy()[some] == 1
    booster = lightgbm.train({"objective": "binary", "num_leaves": 15, "verbose": -1}, lightgbm.Dataset(X, y), 20)
    return Scorer(
        Bundle(
            digest="sha256:" + "0" * 64,
            manifest=Manifest("fraud-verify", "transaction", DetectorPart.of(LIGHTGBM), {}, "", "", {}, {}, 0, ""),
            spec=spec,
            preprocessor=Preprocessor(QUANTILES),
            policy=Policy(0.3, 0.7, RiskLevels(0.2, 0.5, 0.8)),
            algorithm=LIGHTGBM,
            detector_files=detector_files(booster.model_to_string(), Calibrator([-5.0, 5.0], [0.0, 1.0])),
            golden=(),
            metrics={},
            reference={},
        ),
        max_ahead_ms=10 * MINUTE_MS,
    )


async def measure_parity(
    table: pd.DataFrame, scorer: Scorer, store: Store, seed: int, *, repeat_share: float = 0.02, show: bool = False
) -> Parity:
    """Send a table through a pipeline in the order of arrival and compare what it recorded with the replay.

    Parameters
    ----------
    table : DataFrame
        The canonical table; its customers and transactions must be new to the store.
    repeat_share : float
        The share of transactions that are sent a second time, later.
    """
    pipeline = Pipeline({scorer.name.name: scorer}, store)
    rng = np.random.default_rng(seed)
    instances = instances_of(table, scorer.spec)
    arrivals = table["processing_time_ms"].to_numpy()
    again = np.where(rng.random(len(table)) < repeat_share, (rng.random(len(table)) * np.arange(len(table))), -1)
    first: dict[int, Decision] = {}
    wanted = set(again[again >= 0].astype(int).tolist())
    frauds, applied, differing_answers, degraded = _frauds(table), 0, 0, 0
    started = time.perf_counter()
    for i in track(range(len(table)), "scoring", disable=not show):
        due = [fraud for fraud in frauds[applied : applied + 100] if fraud.label_time_ms <= arrivals[i]]
        if due:
            applied += len(due)
            if await store.apply_labels(due) != ["applied"] * len(due):
                raise ValueError("a label was not taken though its transaction had been scored")
        decision = await _decide(pipeline, instances[i], int(arrivals[i]))
        degraded += bool(decision.degraded)
        if i in wanted:
            first[i] = decision
        if again[i] >= 0:
            repeated = await _decide(pipeline, instances[int(again[i])], int(arrivals[i]))
            differing_answers += repeated != first.get(int(again[i]), decision)
    seconds = time.perf_counter() - started
    online = await recorded_features(store, table["transaction_id"], len(scorer.spec.features))
    await pipeline.close()
    offline = replay(table, scorer.featurizer, slice(None))
    differing, difference = compare(online, offline)
    times = table["event_time_ms"].to_numpy()
    return Parity(
        rows=len(table),
        late=int((arrivals - times > MINUTE_MS).sum()),
        out_of_order=int((times < np.maximum.accumulate(times)).sum()),
        repeated=len(again[again >= 0]),
        frauds_applied=applied,
        differing_values=differing,
        maximum_difference=difference,
        differing_answers=int(differing_answers),
        degraded=degraded,
        seconds=seconds,
    )


def compare(online: Matrix, offline: Matrix) -> tuple[int, float]:
    """Return how many values are not the same, and the largest difference; one missing value is infinity."""
    same = (online == offline) | (np.isnan(online) & np.isnan(offline))
    if same.all():
        return 0, 0.0
    difference = np.abs(online[~same] - offline[~same])
    return int((~same).sum()), float(np.where(np.isnan(difference), np.inf, difference).max())


async def recorded_features(store: Store, ids: Iterable[str], n_features: int) -> Matrix:
    """Return the features of recorded transactions as they were scored, (n, n_features) float64."""
    names = list(ids)
    rows: list[Any] = []
    for start in range(0, len(names), 1000):
        some = names[start : start + 1000]
        decided = (await store.recall(some, [], [])).decided
        rows += [np.frombuffer(decided[name].features, "<f8") for name in some]
    return np.array(rows).reshape(len(names), n_features)


@app.command()
def idempotency(rows: Rows = 2_000, store: StoreUrl = "sqlite", seed: Seed = 1) -> None:
    """Send every transaction up to four times through two workers at once; count decisions and history updates.

    Exits with 1 unless each transaction has one decision and each history one update a transaction.
    """
    table = simulated(rows, seed)
    spec = transaction_spec(table, Mapping.from_yaml(_simulated_mapping()), slice(None))
    with tempfile.TemporaryDirectory() as folder:
        stores = [_open(store, Path(folder)) for _ in range(2)]
        result = asyncio.run(measure_idempotency(table, scorer_for(table, spec), stores, seed))
    out.print(
        f"transactions {result.transactions}, sent {result.sent} times through {len(stores)} workers\n"
        f"decisions {result.decisions}, updates {result.updates}, answers that differ {result.differing_answers}"
    )
    if not result.holds:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Idempotency:
    """How often transactions were sent, and how many decisions and updates resulted."""

    transactions: int
    sent: int
    decisions: int
    updates: int
    differing_answers: int

    @property
    def holds(self) -> bool:
        return self.decisions == self.updates == self.transactions and self.differing_answers == 0


async def measure_idempotency(table: pd.DataFrame, scorer: Scorer, stores: list[Store], seed: int) -> Idempotency:
    """Send each transaction once or more to each of several workers, all of them at once."""
    pipelines = [Pipeline({scorer.name.name: scorer}, store) for store in stores]
    instances = instances_of(table, scorer.spec)
    now_ms = int(table["processing_time_ms"].max())
    answers: dict[int, set[bytes]] = {i: set() for i in range(len(table))}

    async def worker(pipeline: Pipeline, order: Iterable[int]) -> int:
        sent = 0
        for i in order:
            answers[i].add(msgspec.json.encode(await _decide(pipeline, instances[i], now_ms)))
            sent += 1
        return sent

    rng = np.random.default_rng(seed)
    orders = []
    for _ in pipelines:
        twice = np.repeat(np.arange(len(table)), rng.integers(1, 3, len(table)))
        orders.append(twice[np.argsort(twice + rng.random(len(twice)) * 8)].tolist())  # near, not in step
    sent = await asyncio.gather(*(worker(pipeline, order) for pipeline, order in zip(pipelines, orders, strict=True)))
    ids = table["transaction_id"].tolist()
    decisions = sum([len((await stores[0].recall(ids[i : i + 500], [], [])).decided) for i in range(0, len(ids), 500)])
    profiles = [await stores[0].profile(str(name)) for name in table["customer_id"].unique()]
    for pipeline in pipelines:
        await pipeline.close()
    return Idempotency(
        len(table),
        sum(sent),
        decisions,
        sum(int(profile.state["count"][0]) for profile in profiles if profile is not None),
        sum(len(of_one) - 1 for of_one in answers.values()),
    )


async def _decide(pipeline: Pipeline, instance: bytes, now_ms: int) -> Decision:
    """Return the decision on one transaction, the same whether it is made now or repeated."""
    ((outcome,),) = await pipeline.decide_requests([pipeline.read([instance], now_ms=now_ms)])
    if isinstance(outcome, Rejection):
        raise outcome.error
    return msgspec.structs.replace(outcome, is_repeat=False)


def _frauds(table: pd.DataFrame) -> list[Label]:
    known = table[table["label"] == 1].sort_values("label_time_ms", kind="stable")
    return [Label(str(i), True, int(t)) for i, t in zip(known["transaction_id"], known["label_time_ms"], strict=True)]


def with_own_ids(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with ids that no earlier run has used and no category that no row has."""
    run = f"{time.time_ns():x}-"
    table = table.reset_index(drop=True)
    for column in table.select_dtypes("category").columns:
        table[column] = table[column].cat.remove_unused_categories()
    for column in ("customer_id", "merchant_id"):
        table[column] = table[column].cat.rename_categories(lambda name: run + name)
    return table.assign(transaction_id=run + table["transaction_id"].astype(str))


def _open(url: str, folder: Path) -> Store:
    return open_store(url_of(url), StoreOptions(state_dir=folder, durable=False, budget_ms=1_000, cold_budget_ms=5_000))


def url_of(store: str) -> str:
    """Return the URL of a store that may be given by its kind alone.

    Raises
    ------
    SettingsError
        A server's kind was given, and the settings name no such server.
    """
    if ":" in store or store == "sqlite":
        return "sqlite:" if store == "sqlite" else store
    settings = Settings.read()
    for url in (settings.store.url, settings.store.cold_url or ""):
        if url.startswith(f"{store}:"):
            return url
    raise SettingsError(f"--store {store} needs a URL, here or in FRAUD_STORE; such as {store}://127.0.0.1/0")


def _simulated_mapping() -> Path:
    return Path(__file__).parents[2] / "examples" / "simulated.yaml"
