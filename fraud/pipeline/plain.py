"""The short way of plain rows: ready features without an id, which are neither recalled, recorded nor explained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, repeat
from operator import attrgetter

import numpy as np

from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.names import outputs_of
from fraud.decisions.rules.sets import MODEL
from fraud.decisions.verdict import verdict_of
from fraud.features.featurizer import Matrix
from fraud.models.beside import Measured
from fraud.models.scorer import Score, Scorer, Scores
from fraud.pipeline.rows import Decision, PendingRow
from fraud.schema import Row

Measure = Callable[[Scorer, Matrix, Scores, Sequence[Row]], Measured]
Timed = Callable[[str, float], None]


def decide_plain(
    rows: Sequence[PendingRow],
    measure: Measure,
    in_force: Mapping[str, RulesInForce],
    timed: Callable[[str, float], None],
) -> list[Decision]:
    """Decide on plain rows.

    Parameters
    ----------
    rows : sequence of PendingRow
    measure : callable
        Returns how unusual scored rows are.
    in_force : mapping of str to RulesInForce
        By the digest of the model version that they belong to.
    timed : callable
        Is called with a stage and when it began, of `time.perf_counter`.
    """
    decisions: list[Decision] = []
    for scorer, group in groupby(rows, key=attrgetter("scorer")):
        some = list(group)
        said = [row.row for row in some]
        X = scorer.featurizer.ready(said)
        started = time.perf_counter()
        scores = scorer.score(X)
        timed("score", started)
        measured, rules = measure(scorer, X, scores, said), in_force.get(scorer.name.digest)
        decisions += map(_decision, some, X, measured.rows(scores), repeat(measured), repeat(rules))
    return decisions


def are_plain(rows: Sequence[PendingRow]) -> bool:
    """Return whether no row needs recall, recording or explanation: ready features without an id."""
    for row in rows:
        if row.explain or row.reasons or row.row.transaction_id is not None or row.scorer.spec.kind != "features":
            return False
    return True


def _decision(
    row: PendingRow,
    x: np.ndarray[tuple[int], np.dtype[np.float64]],
    score: Score,
    measured: Measured,
    rules: RulesInForce | None,
) -> Decision:
    policy, said = row.scorer.policy, row.row
    decided_by: str = MODEL
    hits: Sequence[str] = ()
    if rules is None:
        verdict = verdict_of(policy, score.decision_score, score.severity)
    else:
        outputs, severity = outputs_of(score.fraud_probability, score.anomaly), score.severity
        verdict, ruling = rules.verdict(policy, said, x.tolist(), score.decision_score, outputs, row.now_ms, severity)
        decided_by, hits = ruling.decided_by, ruling.hits
    return Decision(
        None,
        row.scorer.name,
        score.raw_margin,
        score.fraud_probability,
        verdict,
        measured.lacks,
        anomaly=score.anomaly,
        reading=said.reading,
        decided_by=decided_by,
        rules_hit=hits,
        anomaly_model=measured.model,
    )
