"""One row on its way through the pipeline: its idempotency key and its outcome so far."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from fraud.decisions.record import DecisionRecord, decision_key_of, fingerprint
from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.names import outputs_of
from fraud.decisions.rules.sets import MODEL
from fraud.decisions.verdict import Ruling, Verdict, verdict_of
from fraud.detectors.explain import Explained
from fraud.errors import FraudError, IdempotencyConflict
from fraud.models.bundle import short
from fraud.models.scorer import ModelName, Score, Scorer
from fraud.pipeline.rows import Decision, Outcome, PendingRow, Rejection


class RowInFlight:
    """The state of one pending row within one call of the pipeline.

    Parameters
    ----------
    pending : PendingRow
    name_it : bool
        Whether a row without a transaction id gets one, so that it is recorded.
    """

    __slots__ = (
        "asks_explanation",
        "asks_reasons",
        "error",
        "explanation",
        "fingerprint",
        "is_named",
        "is_repeat",
        "key",
        "lacks",
        "pending",
        "reasons",
        "record",
        "recorded_reasons",
        "row",
        "scorer",
    )

    def __init__(self, pending: PendingRow, *, name_it: bool = False) -> None:
        row = pending.row
        self.pending = pending
        self.scorer: Scorer = pending.scorer
        self.asks_explanation = pending.explain
        self.asks_reasons = pending.reasons
        self.is_named = row.transaction_id is not None
        if name_it and not self.is_named:
            row = msgspec.structs.replace(row, transaction_id=given_id())
        self.row = row
        self.key: str | None = None
        self.fingerprint = b""
        if row.transaction_id is not None:
            self.key = decision_key_of(row.transaction_id, None if row.customer_id else self.scorer.name.name)
            self.fingerprint = fingerprint(row)
        self.record: DecisionRecord | None = None
        self.reasons: list[tuple[str, float]] = []
        self.recorded_reasons: list[tuple[str, float]] = []
        self.lacks: tuple[str, ...] = ()
        """What could not be done with the decision after it was made: ``record``, as long as it is not on record."""
        self.is_repeat = False
        self.explanation: Explained | None = None
        self.error: FraudError | None = None

    def decide(
        self,
        x: np.ndarray[tuple[int], np.dtype[np.float64]],
        score: Score,
        degraded: Sequence[str],
        rules: RulesInForce | None = None,
        beside: ModelName | None = None,
    ) -> None:
        """Take the decision on a score.

        Parameters
        ----------
        x : (n_features,) float64
            The row of `X`.
        score : Score
        degraded : sequence of str
            What the score had to do without.
        rules : RulesInForce, optional
        beside : ModelName, optional
            Which model measured the anomaly, where it is not the one that scored.
        """
        said, model, policy = self.row, self.scorer.name, self.scorer.policy
        ruling: Ruling | msgspec.UnsetType = msgspec.UNSET
        if rules is None:
            verdict = verdict_of(policy, score.decision_score, score.severity)
        else:
            outputs = outputs_of(score.fraud_probability, score.anomaly)
            now_ms, severity = self.pending.now_ms, score.severity
            verdict, ruling = rules.verdict(policy, said, x.tolist(), score.decision_score, outputs, now_ms, severity)
        prediction, risk_level, decision = verdict
        self.record = DecisionRecord(
            said.transaction_id,
            self.fingerprint,
            model.name,
            model.digest,
            x.tobytes(),
            score.raw_margin,
            score.fraud_probability,
            prediction,
            risk_level,
            decision,
            list(degraded),
            said.event_time_ms,
            self.pending.now_ms,
            self.pending.request_id,
            said.customer_id,
            said.text_role("merchant_id"),
            said.amount,
            self.recorded_reasons,
            msgspec.UNSET if said.scaled_amount is None else said.scaled_amount,
            said.raw,
            msgspec.UNSET if score.anomaly is None else score.anomaly,
            self.pending.contract or msgspec.UNSET,
            ruling,
            msgspec.UNSET if beside is None or score.anomaly is None else (beside.name, beside.digest),
        )

    def repeat(self, record: DecisionRecord) -> None:
        """Take the recorded decision if it was made on the same row; otherwise reject the row with a conflict."""
        self.record = self.explanation = None
        self.reasons = []
        self.is_repeat = True
        if record.said_the_same(self.fingerprint, self.scorer.name.digest):
            self.record = record
        else:
            assert self.row.transaction_id is not None
            self.error = IdempotencyConflict(self.row.transaction_id, f"{self.pending.path}.transaction_id")

    def follow(self, first: RowInFlight) -> None:
        """Take the outcome of an earlier row of this call with the same key."""
        if first.record is None:
            self.is_repeat = True
            self.error = first.error
        else:
            self.repeat(first.record)
            self.lacks = first.lacks

    @property
    def lacks_words(self) -> bool:
        """Whether what was asked for of the reasons has to be made from the recorded features."""
        if self.record is None or self.explanation is not None:
            return False
        return self.asks_explanation or (self.asks_reasons and not (self.reasons or self.record.reasons))

    def outcome(self) -> Outcome:
        """Return the outcome of the row."""
        record = self.record
        if self.error is not None or record is None:
            assert self.error is not None, "a row has neither a decision nor an error"
            return Rejection(self.pending.row.transaction_id, self.error)
        model = self.scorer.name
        if record.model_digest != model.digest:
            model = model_named(record.model_name, record.model_digest)
        ruling = record.ruling
        decided_by, hits = (MODEL, ()) if ruling is msgspec.UNSET else (ruling.decided_by, ruling.hits)
        return Decision(
            record.transaction_id,
            model,
            record.raw_margin,
            record.fraud_probability,
            Verdict(record.prediction, record.risk_level, record.decision),
            (*record.degraded, *self.lacks),
            self.is_repeat,
            self.explanation,
            None if record.anomaly is msgspec.UNSET else record.anomaly,
            self.row.reading,
            decided_by,
            hits,
            self.reasons or record.reasons,
            None if record.anomaly_model is msgspec.UNSET else model_named(*record.anomaly_model),
            b"" if record.transaction_id is None else record.features,
        )


def firsts(rows: Iterable[RowInFlight]) -> tuple[dict[str, RowInFlight], list[RowInFlight], list[RowInFlight]]:
    """Split rows into the first of each key, the repeats of these, and the rows that arrived without an id."""
    by_key: dict[str, RowInFlight] = {}
    repeats: list[RowInFlight] = []
    unnamed: list[RowInFlight] = []
    for row in rows:
        if row.key is None or not row.is_named:
            unnamed.append(row)
        elif row.key in by_key:
            repeats.append(row)
        else:
            by_key[row.key] = row
    return by_key, repeats, unnamed


def reject(rows: Sequence[RowInFlight], error: FraudError) -> None:
    """Reject rows with one error, and drop their decisions."""
    for row in rows:
        row.record = row.explanation = None
        row.error = error


def model_named(name: str, digest: str) -> ModelName:
    """Return a version as answers name it."""
    return ModelName(name, short(digest), digest)


def given_id() -> str:
    """Return an id for a row that came without one."""
    return f"given-{secrets.token_hex(12)}"
