"""The offline commands: simulate, train, backtest, score, explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fraud.cli.progress import stages
from fraud.decisions.verdict import verdict_of
from fraud.errors import DataError
from fraud.models.names import checked_name
from fraud.schema import Kind, Row

if TYPE_CHECKING:
    import pandas as pd

    from fraud.models.scorer import Scorer
    from training.config import Config
    from training.data import Mapping
    from training.train import Run

app = typer.Typer(no_args_is_help=True)
KINDS = f"[{'|'.join(get_args(Kind))}]"
out = Console(soft_wrap=True)
SHOWN_AS = {"fraud_probability": "probability", "anomaly_score": "anomaly score"}
DROPPED = ("dropped_zero_amounts", "dropped_negative_amounts")


def _kind(text: str) -> Kind:
    """Return the kind of row by its name; the plural of an earlier release is accepted too."""
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"transactions": "transaction"}
    if text not in kinds:
        raise typer.BadParameter(f"{text!r}; allowed are {' and '.join(get_args(Kind))}")
    return kinds[text]


Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        "-d",
        help="A CSV or Parquet file, a folder, or a pattern such as 'data/*.csv' in quotes; given again, "
        "the files are one table, read one after the other.",
    ),
]
MappingFile = Annotated[
    Path, typer.Option("--mapping", "-m", help="Which columns play which role; see examples/ and docs/data.md.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A YAML file of training options; docs/training.md lists them.")
]
Model = Annotated[
    str, typer.Option("--model", help="A bundle folder, a run folder, or NAME[:ALIAS or VERSION] of the registry.")
]


@app.command()
def simulate(
    file: Annotated[Path, typer.Option("--out", "-o", help="Where to write; .parquet or .csv.")],
    kind: Annotated[
        Any, typer.Option(parser=_kind, metavar=KINDS, help="Raw transactions, or a table of ready features.")
    ] = "transaction",
    customers: Annotated[int, typer.Option(min=10, help="Customers (transactions).")] = 1000,
    days: Annotated[int, typer.Option(min=7, help="Days (transactions).")] = 120,
    merchants: Annotated[int | None, typer.Option(min=12, help="Merchants; twice the customers by default.")] = None,
    rows: Annotated[int, typer.Option(min=100, help="Rows (features).")] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 1,
) -> None:
    """Make labelled data: card transactions with six kinds of fraud, or a loan-application table.

    [bold]fraud simulate --customers 1000 --days 120 --seed 1 --out data/simulated.parquet[/bold]
    """
    from fraud.simulation.simulate import simulate_features, simulate_transactions

    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "features":
        made = simulate_features(rows, seed, out=file)
    else:
        made = simulate_transactions(customers, days, seed, merchants=merchants, out=file)
    out.print(f"wrote {file}: {made.rows:,} rows, {made.fraud_rows / made.rows:.2%} of them fraud")
    for typology, count in made.typologies.items():
        out.print(f"  {count:>8,} {typology}")


@app.command()
def train(
    data: Data,
    mapping: MappingFile,
    kind: Annotated[
        Any, typer.Option(parser=_kind, metavar=KINDS, help="Check that the mapping is of this kind.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; fraud-transaction or fraud-features.")] = None,
    config: ConfigFile = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the configuration's seed.")] = None,
    search: Annotated[int | None, typer.Option(min=0, help="Trials of the hyperparameter search.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
) -> None:
    """Train, calibrate, evaluate and package a model; write its report; log it to W&B.

    Without a W&B key the run is kept offline and sent later by [bold]fraud push --pending[/bold].

    [bold]fraud train --data data/simulated.parquet --mapping examples/simulated.yaml[/bold]
    """
    import training.train as training
    from fraud.cli.registry import models, send_queue
    from training.data import Mapping, dataset_digest, load_table
    from training.preflight import check_folder
    from training.report import plain_fields

    mapped, configured = Mapping.from_yaml(mapping), _config(config, seed, search)
    _expect_kind(mapped, kind)
    called = checked_name(name or ("fraud-transaction" if mapped.kind == "transaction" else "fraud-features"))
    check_folder(runs)
    with models().outbox.watch() as watch, stages() as progress:
        progress("read", 0, 1)
        table = load_table(data, mapped)
        dataset = _dataset(data, table, dataset_digest(data))
        progress("read", 1, 1)
        run = training.train(
            table,
            mapped,
            configured,
            name=called,
            dataset=dataset,
            runs=runs,
            progress=progress,
        )
        watch.finish(run.folder)
    _show(run, plain_fields(mapped.kind))
    _warn(run.warnings)
    out.print(f"report   {run.folder / 'report.html'}\nbundle   {run.folder / 'bundle'}\ndigest   {run.digest}")
    models().log_run(run.folder)
    send_queue(models(), needed=False)
    out.print(f"next     fraud import {run.folder}", highlight=False)


@app.command()
def backtest(
    data: Data,
    mapping: MappingFile,
    train_until: Annotated[str, typer.Option(help="When the model is trained, such as 2025-08-01 (UTC) or RFC 3339.")],
    test_from: Annotated[str, typer.Option(help="The first moment of the test days.")],
    test_until: Annotated[str, typer.Option(help="The end of the test days, excluded.")],
    file: Annotated[Path, typer.Option("--out", "-o", help="Where the scores go; .parquet or .csv.")],
    label_delay: Annotated[
        str | None, typer.Option(help="After how long a label is known, such as 7d; the mapping's own by default.")
    ] = None,
    config: ConfigFile = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the configuration's seed.")] = None,
) -> None:
    """Train as of a day with the labels known then, and score the following days in order of arrival.

    One row a transaction: transaction_id, event_time, customer_id, label, raw_margin, fraud_probability.
    """
    from training.backtest import backtest as run_backtest
    from training.data import Mapping, load_transactions, parse_duration_ms
    from training.train import StageTimer

    mapped, configured = Mapping.from_yaml(mapping), _config(config, seed, None)
    if mapped.kind != "transaction":
        raise DataError("the mapping is of kind features; a backtest walks histories, which only transactions have")
    until, test = _moment(train_until), (_moment(test_from), _moment(test_until))
    delay = None if label_delay is None else parse_duration_ms(label_delay)
    _writable(file)
    clock = StageTimer()
    with stages() as progress:
        with clock.stage("read"):
            table = load_transactions(data, mapped)
        scores, trained = run_backtest(
            table,
            mapped,
            configured,
            train_until=until,
            test=test,
            label_delay_ms=delay,
            progress=progress,
            clock=clock,
        )
    _write(scores, file)
    labelled = scores[scores["label"] >= 0]
    out.print(f"{len(scores):,} transactions scored by {trained.fitted.n_trees} trees, wrote {file}")
    if 0 < labelled["label"].sum() < len(labelled):
        from sklearn.metrics import average_precision_score, roc_auc_score

        for name, measure in (("ROC AUC", roc_auc_score), ("average precision", average_precision_score)):
            out.print(f"{name:18} {measure(labelled['label'], labelled['raw_margin']):.4f}")
    out.print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.timings_s.items()))


@app.command()
def score(
    data: Data,
    mapping: MappingFile,
    model: Model,
    file: Annotated[Path, typer.Option("--out", "-o", help="Where the scores go; .parquet or .csv.")],
) -> None:
    """Score a whole file, each transaction with the ones before it in the file as its history.

    Where the file has labels, the scores are measured; for a version of the registry that is a backtest, which W&B
    shows in the version's lineage.
    """
    _writable(file)
    table, X, scorer = _scored(data, mapping, model)
    given = scorer.score(X)
    verdicts = [verdict_of(scorer.policy, score) for score in given.decision_score.tolist()]
    scores = table[[c for c in ("transaction_id", "event_time_ms", "customer_id") if c in table]].assign(
        raw_margin=given.raw_margin,
        **given.measured(),
        prediction=[verdict.prediction for verdict in verdicts],
        risk_level=[verdict.risk_level for verdict in verdicts],
        decision=[verdict.decision for verdict in verdicts],
    )
    _write(scores, file)
    out.print(f"{len(scores):,} rows scored by {scorer.name.name} {scorer.name.version}, wrote {file}")
    out.print(scores["decision"].value_counts().to_frame("transactions").to_string())
    if 0 < (table["label"] == 1).sum() < (table["label"] >= 0).sum():
        from fraud.models.find import bundle_folder

        _record_backtest(data, table, scores, scorer, registered=bundle_folder(model) is None)


@app.command()
def explain(
    data: Data,
    mapping: MappingFile,
    model: Model,
    transaction: Annotated[
        str | None, typer.Option(help="Which transaction (row-7 where the mapping names no ids); the riskiest if none.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many reasons.")] = 10,
) -> None:
    """Explain the score of a transaction of a file: what each feature adds to the raw margin."""
    import numpy as np

    table, X, scorer = _scored(data, mapping, model)
    rows = table["transaction_id"]
    scores = scorer.score(X)
    at = int(np.argmax(scores.raw_margin))
    if transaction is not None:
        found = np.flatnonzero((rows == transaction).to_numpy())
        if not len(found):
            raise DataError(f"{_name_of(data)} has no transaction {transaction!r}")
        at = int(found[0])
    contributions = scorer.contributions(X[at : at + 1])[0]
    _, level, decision = verdict_of(scorer.policy, float(scores.decision_score[at]))
    measured = "  ".join(f"{SHOWN_AS[name]} {values[at]:.4f}" for name, values in scores.measured().items())
    out.print(f"transaction {rows.iloc[at]}  {measured}  risk {level}  decision {decision}")
    shown = Table("reason", scorer.explainer.unit.name, box=None)
    row = _row_of(table.iloc[at])
    for reason in scorer.explainer.reasons(X[at], contributions, row, top):
        shown.add_row(Text(reason.text), f"{reason.contribution:+.3f}")
    shown.add_row("base value", f"{contributions[-1]:+.3f}", style="dim")
    shown.add_row("sum", f"{contributions.sum():+.3f} = raw margin {scores.raw_margin[at]:+.3f}", style="bold")
    out.print(shown)
    out.print(Text(*scorer.explainer.texts(X[at : at + 1], contributions[np.newaxis], [row])))


def _row_of(values: pd.Series[Any]) -> Row:
    """Return what reasons say of a transaction of a table: its time, and its amount with its currency."""
    if not {"event_time_ms", "amount"} <= {*values.index}:
        return Row(None, (), b"")
    roles = {"currency": values["currency"]} if "currency" in values else {}
    return Row(None, (), b"", int(values["event_time_ms"]), amount=float(values["amount"]), roles=roles)


def _scored(data: list[Path], mapping: Path, model: str) -> tuple[pd.DataFrame, Any, Scorer]:
    """Return a table, the features of its rows, and the model."""
    import numpy as np

    from fraud.models.find import load_scorer
    from training.currencies import stakes
    from training.data import Mapping, load_table
    from training.replay import replay, requested_columns

    scorer, mapped = load_scorer(model), Mapping.from_yaml(mapping)
    _expect_kind(mapped, scorer.spec.kind)
    table = load_table(data, mapped, labelled=False)
    if scorer.spec.kind == "transaction":
        _expect_columns(table, [role.name for role in scorer.spec.roles], data)
        with stages() as progress:
            X = replay(table, scorer.featurizer, slice(None), lambda done: progress("replay", done, len(table)))
        if scorer.spec.currencies:
            table = table.assign(stake=stakes(table, scorer.spec.currencies, slice(None)))
        return table, X, scorer
    _expect_columns(table, [f.name for f in scorer.spec.requested], data)
    X = np.empty((len(table), len(scorer.spec.features)))
    requested_columns(table, scorer.spec, X)
    return table, X, scorer


def _record_backtest(
    data: list[Path], table: pd.DataFrame, scores: pd.DataFrame, scorer: Scorer, *, registered: bool
) -> None:
    """Measure the scores of the labelled rows, print them, and record them in W&B if the model is `registered`."""
    import msgspec

    from fraud.cli.registry import models, send_queue
    from training.config import Config
    from training.data import dataset_digest
    from training.evaluate import Scored
    from training.policy import declines_too_many
    from training.train import measure_window, stake_of

    known = (table["label"] >= 0).to_numpy()
    rows, given, config = table[known], scores[known], Config()
    policy = msgspec.to_builtins(scorer.policy)
    scored = Scored(
        given["raw_margin"].to_numpy(),
        given["fraud_probability"].to_numpy(),
        policy | {"costs": (policy["costs"] or config.costs) if stake_of(rows) is not None else {}},
    )
    measures = measure_window(scored, rows, stake_of(rows), config).intervals()
    digest = dataset_digest(data)
    trained_on_it = scorer.bundle.manifest.data.get("digest") == digest
    shown = Table("measure", "value", title=f"{len(rows):,} labelled rows, with 95% intervals", box=None)
    for name, interval in measures.items():
        shown.add_row(name, f"{interval.value:.4f}  [{interval.low:.4f}, {interval.high:.4f}]")
    out.print(shown)
    declined, fraud_rate = measures["decline_rate"].value, float((rows["label"] == 1).mean())
    _warn([warning] if (warning := declines_too_many(declined, fraud_rate)) else [])
    if trained_on_it:
        out.print("The model was trained on this file: rows that it knows flatter it.")
    if registered:
        facts = {"data": _dataset(data, table, digest), "labelled_rows": len(rows), "trained_on_it": trained_on_it}
        facts["metrics"] = {name: interval._asdict() for name, interval in measures.items()}
        models().record_use(scorer.name.name, scorer.name.digest, "backtest", facts)
        send_queue(models(), needed=False)


def _expect_columns(table: pd.DataFrame, needed: list[str], data: list[Path]) -> None:
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{_name_of(data)}: the model needs {', '.join(missing)}, which the mapping does not name")


def _expect_kind(mapping: Mapping, kind: Kind | None) -> None:
    if kind is not None and mapping.kind != kind:
        raise DataError(f"the mapping is of kind {mapping.kind}, {kind} is needed; set 'kind: {kind}' in it")


def _config(file: Path | None, seed: int | None, search: int | None) -> Config:
    from training.config import Config

    config = Config() if file is None else Config.from_yaml(file)
    given = {"seed": seed, "search_trials": search}
    options = {name: value for name, value in given.items() if value is not None}
    return Config.of(config.model_dump(exclude_unset=True) | options, "options")


def _name_of(data: list[Path]) -> str:
    from training.data import Files

    return Files.find(data).name


def _dataset(data: list[Path], table: pd.DataFrame, digest: str) -> dict[str, Any]:
    from training.splits import moment

    facts: dict[str, Any] = {"name": _name_of(data), "digest": digest, "rows": len(table)}
    if "event_time_ms" in table:
        facts |= {"from": moment(int(table["event_time_ms"].min())), "to": moment(int(table["event_time_ms"].max()))}
    facts |= {name: table.attrs[name] for name in DROPPED if table.attrs.get(name)}
    return facts


def _moment(text: str) -> int:
    import pandas as pd

    moment = pd.to_datetime(text, errors="coerce")
    if pd.isna(moment):
        raise DataError(f"{text!r} is no moment; give 2025-08-01 (midnight UTC) or 2025-08-01T12:00:00+02:00") from None
    return int((moment.tz_localize("UTC") if moment.tzinfo is None else moment).timestamp() * 1000)


def _writable(file: Path) -> None:
    """Refuse an output file that cannot be written, before scoring."""
    from training.preflight import check_folder

    if file.suffix not in (".csv", ".parquet"):
        raise DataError(f"{file.name}: scores are written as .parquet or .csv")
    if file.is_dir():
        raise DataError(f"{file}: is a folder; give a file")
    check_folder(file.parent)


def _write(scores: pd.DataFrame, file: Path) -> None:
    if file.suffix == ".csv":
        scores.to_csv(file, index=False)
    else:
        scores.to_parquet(file, index=False)


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        Console(stderr=True, soft_wrap=True).print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _show(run: Run, plain: str) -> None:
    table = Table("measure", "model", f"{plain} alone", title="test window, with 95% intervals", box=None)
    for name, interval in run.metrics.items():
        cells = [f"{i.value:.4f}  [{i.low:.4f}, {i.high:.4f}]" for i in (interval, run.baseline[name])]
        table.add_row(name, *cells)
    out.print(table)
    out.print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in run.timings_s.items()))
