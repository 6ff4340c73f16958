"""`fraud verify explain`: reasons that add up, and probabilities that are the calibrator's."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from fraud.checks.history import scorer_for, simulated
from fraud.models.find import load_scorer
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision
from fraud.schema import MAX_INSTANCES
from fraud.stores.opening import StoreOptions, open_store
from training.data import Mapping, load_table
from training.replay import instances_of, transaction_spec

TOLERANCE = 1e-9
EXAMPLES = Path(__file__).parents[2] / "examples"

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True)


@dataclass(frozen=True)
class ExplanationCheck:
    """How exact the explanations of a model's answers are."""

    rows: int
    refused: int
    largest_gap: float
    other_probabilities: int

    @property
    def holds(self) -> bool:
        return self.rows > 0 and self.largest_gap <= TOLERANCE and self.other_probabilities == 0


@app.command()
def explain(
    rows: Annotated[int, typer.Option(min=1, help="How many rows to explain.")] = 1000,
    model: Annotated[
        str | None, typer.Option(help="A bundle or run folder, or NAME[:REF]; a quickly trained one if none.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The rows' file, with --model; simulated if none.")] = None,
    mapping: Annotated[Path, typer.Option(help="The file's mapping.")] = EXAMPLES / "simulated.yaml",
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Explain rows through the service's path: contributions and base value must sum to the raw margin.

    Exits with 1 unless they do within 1e-9 for every row, and the calibrator gives the answered probability.
    """
    mapped = Mapping.from_yaml(mapping)
    if data is None:
        table = simulated(max(rows, 20_000) if model is None else rows, seed)
    else:
        table = load_table(data, mapped, labelled=False)
    scorer = load_scorer(model) if model else scorer_for(table, transaction_spec(table, mapped, slice(None)))
    result = asyncio.run(measure_explanations(scorer, instances_of(table.iloc[:rows], scorer.spec)))
    out.print(
        f"rows {result.rows}, refused {result.refused}\n"
        f"largest |base value + contributions - raw margin| {result.largest_gap:.3g}, allowed {TOLERANCE:g}\n"
        f"probabilities other than calibrator(raw margin) {result.other_probabilities}"
    )
    if not result.holds:
        raise typer.Exit(1)


async def measure_explanations(scorer: Scorer, instances: list[bytes]) -> ExplanationCheck:
    """Explain instances through a pipeline of their own, an empty history behind it."""
    gaps, others, refused = [0.0], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        store = open_store("sqlite:", StoreOptions(Path(folder), durable=False))
        pipeline = Pipeline({scorer.name.name: scorer}, store)
        for begin in range(0, len(instances), MAX_INSTANCES):
            request = pipeline.read(instances[begin : begin + MAX_INSTANCES], explain=True)
            (outcomes,) = await pipeline.decide_requests([request])
            for outcome in outcomes:
                if not isinstance(outcome, Decision) or outcome.explanation is None:
                    refused += 1
                    continue
                total = outcome.explanation.base_value + sum(outcome.explanation.contributions.values())
                gaps.append(abs(total - outcome.raw_margin))
                calibrated = scorer.detector.decision_score(np.array([outcome.raw_margin]))
                others += float(calibrated[0]) != outcome.decision_score
        await pipeline.close()
    return ExplanationCheck(len(gaps) - 1, refused, max(gaps), others)
