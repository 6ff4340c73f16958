"""The offline commands that score a file with a model: score, explain."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fraud.cli.progress import stages
from fraud.cli.training import (
    Data,
    MappingFile,
    Model,
    dataset_facts,
    expect_kind,
    name_of,
    out,
    warn,
    writable,
    write,
)
from fraud.decisions.verdict import verdict_of
from fraud.errors import DataError
from fraud.schema import Row

if TYPE_CHECKING:
    import pandas as pd

    from fraud.models.scorer import Scorer

app = typer.Typer(no_args_is_help=True)
SHOWN_AS = {"fraud_probability": "probability", "anomaly_score": "anomaly score"}


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
    writable(file)
    table, X, scorer = _scored(data, mapping, model)
    given = scorer.score(X)
    severities = given.severity or [None] * len(X)
    verdicts = [
        verdict_of(scorer.policy, score, severity)
        for score, severity in zip(given.decision_score.tolist(), severities, strict=True)
    ]
    scores = table[[c for c in ("transaction_id", "event_time_ms", "customer_id") if c in table]].assign(
        raw_margin=given.raw_margin,
        **given.measured(),
        prediction=[verdict.prediction for verdict in verdicts],
        risk_level=[verdict.risk_level for verdict in verdicts],
        decision=[verdict.decision for verdict in verdicts],
    )
    if given.severity is not None:
        scores["severity"] = severities
    write(scores, file)
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
            raise DataError(f"{name_of(data)} has no transaction {transaction!r}")
        at = int(found[0])
    contributions = scorer.contributions(X[at : at + 1])[0]
    severity = None if scores.severity is None else scores.severity[at]
    _, level, decision = verdict_of(scorer.policy, float(scores.decision_score[at]), severity)
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
    expect_kind(mapped, scorer.spec.kind)
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
    from training.assess import measure_window
    from training.config import Config
    from training.data import dataset_digest
    from training.evaluate import Scored
    from training.policy import declines_too_many
    from training.prepare import stake_of

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
    warn([warning] if (warning := declines_too_many(declined, fraud_rate)) else [])
    if trained_on_it:
        out.print("The model was trained on this file: rows that it knows flatter it.")
    if registered:
        facts = {"data": dataset_facts(data, table, digest), "labelled_rows": len(rows), "trained_on_it": trained_on_it}
        facts["metrics"] = {name: interval._asdict() for name, interval in measures.items()}
        models().record_use(scorer.name.name, scorer.name.digest, "backtest", facts)
        send_queue(models(), needed=False)


def _expect_columns(table: pd.DataFrame, needed: list[str], data: list[Path]) -> None:
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{name_of(data)}: the model needs {', '.join(missing)}, which the mapping does not name")
