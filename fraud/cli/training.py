"""The offline commands that train: simulate, train, backtest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from fraud.cli.progress import stages
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.registered import ALGORITHMS
from fraud.errors import DataError
from fraud.models.names import checked_name
from fraud.schema import Kind

if TYPE_CHECKING:
    import pandas as pd

    from fraud.detectors.protocol import Algorithm
    from training.config import Config
    from training.data import Mapping
    from training.train import Run

app = typer.Typer(no_args_is_help=True)
KINDS = f"[{'|'.join(get_args(Kind))}]"
out = Console(soft_wrap=True)
SHOWN_BY_WEEK = (
    "roc_auc",
    "average_precision",
    "card_precision_at_100",
    "recall_at_fpr_0.001",
    "log_loss",
    "expected_calibration_error",
    "cost_per_1000",
)
"""Of several weeks, on the terminal; the first three are plotted."""
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

DetectorName = Annotated[
    str, typer.Option("--detector", help=f"What scores: {' or '.join(ALGORITHMS)}, which needs no labels.")
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
    merchant_form: Annotated[
        bool, typer.Option("--merchant-form", help="Transactions as ready features: amt, hour, day_of_week, category.")
    ] = False,
) -> None:
    """Make labelled data: card transactions with six kinds of fraud, or a loan-application table.

    [bold]fraud simulate --customers 1000 --days 120 --seed 1 --out data/simulated.parquet[/bold]
    """
    from fraud.simulation.simulate import simulate_features, simulate_transactions

    file.parent.mkdir(parents=True, exist_ok=True)
    if kind == "features" and merchant_form:
        raise typer.BadParameter("--merchant-form is made of transactions; leave out --kind features")
    if kind == "features":
        made = simulate_features(rows, seed, out=file)
    else:
        made = simulate_transactions(customers, days, seed, merchants=merchants, out=file, merchant_form=merchant_form)
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
    detector: DetectorName = LIGHTGBM.name,
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

    mapped, configured, algorithm = Mapping.from_yaml(mapping), _config(config, seed, search), _algorithm(detector)
    expect_kind(mapped, kind)
    called = checked_name(name or ("fraud-transaction" if mapped.kind == "transaction" else "fraud-features"))
    check_folder(runs)
    with models().outbox.watch() as watch, stages() as progress:
        progress("read", 0, 1)
        needs_labels = bool(training.labelled_windows(algorithm, configured))
        table = load_table(data, mapped, labelled=needs_labels)
        dataset = dataset_facts(data, table, dataset_digest(data))
        progress("read", 1, 1)
        run = training.train(
            table,
            mapped,
            configured,
            name=called,
            dataset=dataset,
            runs=runs,
            progress=progress,
            algorithm=algorithm,
        )
        watch.finish(run.folder)
    _show(run, plain_fields(mapped.kind))
    warn(run.warnings)
    out.print(f"report   {run.folder / 'report.html'}\nbundle   {run.folder / 'bundle'}\ndigest   {run.digest}")
    models().log_run(run.folder)
    send_queue(models(), needed=False)
    out.print(f"next     fraud import {run.folder}", highlight=False)


@app.command()
def backtest(
    data: Data,
    mapping: MappingFile,
    file: Annotated[Path, typer.Option("--out", "-o", help="Where the scores go; .parquet or .csv.")],
    train_until: Annotated[
        str | None, typer.Option(help="When the model is trained, such as 2025-08-01 (UTC) or RFC 3339.")
    ] = None,
    test_from: Annotated[str | None, typer.Option(help="The first moment of the test days.")] = None,
    test_until: Annotated[
        str | None, typer.Option(help="The end of the test days, excluded; with --weeks, of the data by default.")
    ] = None,
    weeks: Annotated[
        int | None,
        typer.Option(min=1, max=52, help="Test so many weeks, each with a model trained as of its beginning."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --weeks: another configuration, tested on the same weeks and resamples.")
    ] = None,
    skip_defrauded: Annotated[
        str | None,
        typer.Option(
            help="With --weeks: leave out customers of whom a fraud was known by that day, if it happened at most "
            "so long before the week, such as 14d."
        ),
    ] = None,
    label_delay: Annotated[
        str | None, typer.Option(help="After how long a label is known, such as 7d; the mapping's own by default.")
    ] = None,
    config: ConfigFile = None,
    seed: Annotated[int | None, typer.Option(help="Overrides the configuration's seed.")] = None,
    detector: DetectorName = LIGHTGBM.name,
) -> None:
    """Train as of a day with the labels known then, and score the following days in order of arrival.

    One row a transaction: transaction_id, event_time, customer_id, label, raw_margin, and fraud_probability or
    anomaly_score. With --weeks, the measures go beside it: OUT.weeks.csv, one row for each week, model and measure with
    their means, and OUT.weeks.png.
    """
    from training.backtest import backtest as run_backtest
    from training.data import Mapping, load_transactions, parse_duration_ms
    from training.train import StageTimer, labelled_windows

    mapped, configured, algorithm = Mapping.from_yaml(mapping), _config(config, seed, None), _algorithm(detector)
    if mapped.kind != "transaction":
        raise DataError("the mapping is of kind features; a backtest walks histories, which only transactions have")
    delay = None if label_delay is None else parse_duration_ms(label_delay)
    if weeks is not None:
        if train_until or test_from:
            raise DataError("--weeks trains as of the beginning of each week; leave out --train-until and --test-from")
        _backtest_weeks(
            data,
            mapped,
            {"model": configured} | ({} if against is None else {"against": _config(against, seed, None)}),
            weeks,
            None if test_until is None else _moment(test_until),
            delay,
            None if skip_defrauded is None else parse_duration_ms(skip_defrauded),
            algorithm,
            file,
        )
        return
    if against or skip_defrauded:
        raise DataError("--against and --skip-defrauded are for --weeks; add for example --weeks 4")
    if not (train_until and test_from and test_until):
        raise DataError("give --train-until, --test-from and --test-until, or --weeks such as --weeks 4")
    until, test = _moment(train_until), (_moment(test_from), _moment(test_until))
    writable(file)
    clock = StageTimer()
    with stages() as progress:
        with clock.stage("read"):
            table = load_transactions(data, mapped, labelled=bool(labelled_windows(algorithm, configured)))
        scores, trained = run_backtest(
            table,
            mapped,
            configured,
            train_until=until,
            test=test,
            label_delay_ms=delay,
            progress=progress,
            clock=clock,
            algorithm=algorithm,
        )
    write(scores, file)
    labelled = scores[scores["label"] >= 0]
    out.print(f"{len(scores):,} transactions scored by {trained.fitted.n_trees} trees, wrote {file}")
    if 0 < labelled["label"].sum() < len(labelled):
        from sklearn.metrics import average_precision_score, roc_auc_score

        for name, measure in (("ROC AUC", roc_auc_score), ("average precision", average_precision_score)):
            out.print(f"{name:18} {measure(labelled['label'], labelled['raw_margin']):.4f}")
    out.print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.timings_s.items()))


def _backtest_weeks(
    data: list[Path],
    mapping: Mapping,
    configs: dict[str, Config],
    n_weeks: int,
    until: int | None,
    delay: int | None,
    defrauded_within: int | None,
    algorithm: Algorithm,
    file: Path,
) -> None:
    """Backtest over several weeks, write scores, table and plot, and print the means."""
    from training.data import load_transactions
    from training.plots import save
    from training.plots import weeks as plot_weeks
    from training.weeks import backtest_weeks, table_of

    writable(file)
    with stages() as progress:
        table = load_transactions(data, mapping, labelled=True)
        weeks, scores = backtest_weeks(
            table,
            mapping,
            configs,
            n_weeks=n_weeks,
            until=until,
            label_delay_ms=delay,
            defrauded_within_ms=defrauded_within,
            progress=progress,
            algorithm=algorithm,
        )
    measures = table_of(weeks)
    write(scores, file)
    beside = file.with_suffix("")
    measures.to_csv(f"{beside}.weeks.csv", index=False)
    save(plot_weeks(measures, SHOWN_BY_WEEK[:3]), Path(f"{beside}.weeks.png"))
    shown = Table("measure", "", "mean", "95% interval", "± of weeks", title=f"{n_weeks} test weeks", box=None)
    for name in SHOWN_BY_WEEK:
        for row in measures[(measures["week"] == "mean") & (measures["measure"] == name)].to_dict("records"):
            spread = "" if n_weeks == 1 else f"{row['spread']:.4f}"
            interval = f"[{row['low']:.4f}, {row['high']:.4f}]"
            shown.add_row(name, row["model"], f"{row['value']:.4f}", interval, spread)
    out.print(shown)
    out.print(f"{len(scores):,} transactions scored, wrote {file}, {beside}.weeks.csv and {beside}.weeks.png")


def expect_kind(mapping: Mapping, kind: Kind | None) -> None:
    """Raise `DataError` unless a mapping is of a kind; any is, where None is asked for."""
    if kind is not None and mapping.kind != kind:
        raise DataError(f"the mapping is of kind {mapping.kind}, {kind} is needed; set 'kind: {kind}' in it")


def _algorithm(name: str) -> Algorithm:
    if name not in ALGORITHMS:
        raise typer.BadParameter(f"{name!r}; allowed are {' and '.join(ALGORITHMS)}", param_hint="--detector")
    return ALGORITHMS[name]


def _config(file: Path | None, seed: int | None, search: int | None) -> Config:
    from training.config import Config

    config = Config() if file is None else Config.from_yaml(file)
    given = {"seed": seed, "search_trials": search}
    options = {name: value for name, value in given.items() if value is not None}
    return Config.of(config.model_dump(exclude_unset=True) | options, "options")


def name_of(data: list[Path]) -> str:
    """Return what files are called together."""
    from training.data import Files

    return Files.find(data).name


def dataset_facts(data: list[Path], table: pd.DataFrame, digest: str) -> dict[str, Any]:
    """Return what reports and versions say of the data."""
    from training.splits import moment

    facts: dict[str, Any] = {"name": name_of(data), "digest": digest, "rows": len(table)}
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


def writable(file: Path) -> None:
    """Refuse an output file that cannot be written, before scoring."""
    from training.preflight import check_folder

    if file.suffix not in (".csv", ".parquet"):
        raise DataError(f"{file.name}: scores are written as .parquet or .csv")
    if file.is_dir():
        raise DataError(f"{file}: is a folder; give a file")
    check_folder(file.parent)


def write(scores: pd.DataFrame, file: Path) -> None:
    """Write a table as its file's name says, without the attributes that it has from the table it was made of."""
    bare = scores.copy(deep=False)
    bare.attrs = {}
    if file.suffix == ".csv":
        bare.to_csv(file, index=False)
    else:
        bare.to_parquet(file, index=False)


def warn(warnings: list[str]) -> None:
    """Print warnings for a person."""
    for warning in warnings:
        Console(stderr=True, soft_wrap=True).print(f"warning: {warning}", style="yellow", markup=False, highlight=False)


def _show(run: Run, plain: str) -> None:
    table = Table("measure", "model", f"{plain} alone", title="test window, with 95% intervals", box=None)
    for name, interval in run.metrics.items():
        cells = [f"{i.value:.4f}  [{i.low:.4f}, {i.high:.4f}]" for i in (interval, run.baseline[name])]
        table.add_row(name, *cells)
    out.print(table)
    out.print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in run.timings_s.items()))
