"""A case: the transactions of one customer that wait for a person, and what may be done with it.

The functions of this module change a case in memory and return what the trail says of it; `fraud.stores.cases` keeps
both in one transaction.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fraud.decisions.labels import Label
from fraud.decisions.record import DecisionRecord
from fraud.errors import CaseConflict

Status = Literal["open", "claimed", "resolving", "settling", "resolved"]
"""Resolving: its labels wait, and the resolution can be undone. Settling: its labels are being written."""
Resolution = Literal["confirmed_fraud", "legitimate", "unsure"]
Step = Literal["opened", "joined", "claimed", "released", "noted", "resolved", "undone", "labelled", "reopened"]

IS_FRAUD: dict[Resolution, bool | None] = {"confirmed_fraud": True, "legitimate": False, "unsure": None}
SOURCE = "case"
"""The source of labels that a resolution writes."""
DERIVED = "decision log"
"""The actor of what no person did."""


class CaseRules(msgspec.Struct, frozen=True):
    """How cases are put together and worked, in ms.

    Attributes
    ----------
    window_ms : int
        How long after its first transaction a case takes further ones of its customer.
    claim_ms : int
        How long a claim lasts.
    undo_ms : int
        How long a resolution can be undone; its labels are written after that.
    """

    window_ms: int = 24 * 3_600_000
    claim_ms: int = 15 * 60_000
    undo_ms: int = 10_000


class CaseTransaction(msgspec.Struct, frozen=True):
    """One reviewed transaction of a case, as the decision log has it; `score` is the one that decided."""

    transaction_id: str
    model: str | None
    event_time_ms: int
    processing_time_ms: int
    merchant_id: str | None
    amount: float
    score: float
    expected_loss: float
    decided_by: str
    rules_hit: list[str]
    reasons: list[tuple[str, float]]

    @classmethod
    def of(cls, record: DecisionRecord) -> CaseTransaction:
        ruling = None if record.ruling is msgspec.UNSET else record.ruling
        score = record.decision_score
        return cls(
            record.transaction_id or "",
            None if record.customer_id else record.model_name,
            record.event_time_ms,
            record.processing_time_ms,
            record.merchant_id,
            record.amount,
            score,
            score * record.history_amount,
            "model" if ruling is None else ruling.decided_by,
            [] if ruling is None else ruling.hits,
            record.reasons,
        )


class Case(msgspec.Struct):
    """One case as it is now.

    Attributes
    ----------
    id : int
    customer_id : str or None
        Whose transactions it collects; None for the one transaction of a features model.
    opened_ms, changed_ms : int
        Of its first transaction's decision, and of the last change, ms since the epoch.
    revision : int
        Counts changes. Whoever resolves a case names the revision that they saw.
    transactions : int
        How many it has.
    expected_loss : float
        The sum of score times amount; the open case with the greatest comes first.
    claimed_by, claimed_until_ms
        Who works it, and until when nobody else can.
    resolution, resolved_by, resolved_ms
        The last resolution, also while it can still be undone; a reopened case has none.
    due_ms : int
        When the labels of a resolution are written.
    labels_written : bool
        Whether an earlier resolution labelled its transactions.
    """

    id: int
    customer_id: str | None
    opened_ms: int
    changed_ms: int
    status: Status = "open"
    revision: int = 0
    transactions: int = 0
    expected_loss: float = 0.0
    claimed_by: str = ""
    claimed_until_ms: int = 0
    resolution: Resolution | None = None
    resolved_by: str = ""
    resolved_ms: int = 0
    due_ms: int = 0
    labels_written: bool = False

    def status_at(self, now_ms: int) -> Status:
        """Return the status, where a claim that has ended leaves a case open."""
        return "open" if self.status == "claimed" and self.claimed_until_ms <= now_ms else self.status


class TrailEntry(msgspec.Struct, frozen=True):
    """One change of a case: who did what and when, and the note or transaction it is about."""

    number: int
    time_ms: int
    actor: str
    step: Step
    detail: str = ""


def subject_of(record: DecisionRecord) -> str:
    """Return what a case collects: the customer, or a decision of a features model alone."""
    return f"customer:{record.customer_id}" if record.customer_id else f"decision:{record.key}"


def join(case: Case, transaction: CaseTransaction) -> Step:
    """Add a transaction; whoever has claimed the case keeps the claim, at a new revision."""
    case.transactions += 1
    case.expected_loss += transaction.expected_loss
    return "opened" if case.transactions == 1 else "joined"


def claim(case: Case, actor: str, now_ms: int, rules: CaseRules) -> None:
    """Give a case to one analyst; who has it already has it for longer.

    Raises
    ------
    CaseConflict
        Another one has it, or it is not open.
    """
    status = case.status_at(now_ms)
    if status == "claimed" and case.claimed_by != actor:
        raise CaseConflict(case.id, f"{case.claimed_by} has claimed it")
    if status not in ("open", "claimed"):
        raise CaseConflict(case.id, f"it is {status}")
    case.status, case.claimed_by, case.claimed_until_ms = "claimed", actor, now_ms + rules.claim_ms


def release(case: Case, actor: str, now_ms: int) -> None:
    """Give up a claim. Raises `CaseConflict` if the actor has none."""
    _expect_claim(case, actor, now_ms)
    _open(case)


def resolve(case: Case, actor: str, resolution: Resolution, revision: int, now_ms: int, rules: CaseRules) -> None:
    """Resolve a case that the actor has claimed, at the revision that the actor saw.

    Raises
    ------
    CaseConflict
        The actor has no claim on it, or it has changed since.
    """
    _expect_claim(case, actor, now_ms)
    if case.revision != revision:
        raise CaseConflict(case.id, f"it is at revision {case.revision}, not {revision}: look at it again")
    case.status, case.resolution, case.resolved_by = "resolving", resolution, actor
    case.resolved_ms, case.due_ms = now_ms, now_ms + rules.undo_ms


def undo(case: Case, actor: str, now_ms: int, rules: CaseRules) -> None:
    """Take a resolution back before its labels are written; the actor has the case claimed again.

    Raises
    ------
    CaseConflict
        Another one resolved it, or it is not resolving.
    """
    if case.status != "resolving":
        raise CaseConflict(case.id, f"it is {case.status_at(now_ms)}; a supervisor can reopen what is resolved")
    if case.resolved_by != actor:
        raise CaseConflict(case.id, f"{case.resolved_by} resolved it")
    case.status, case.resolution, case.resolved_by, case.resolved_ms = "claimed", None, "", 0
    case.claimed_by, case.claimed_until_ms = actor, now_ms + rules.claim_ms


def reopen(case: Case, now_ms: int) -> None:
    """Open a resolved case again; its next resolution corrects the labels. Raises `CaseConflict` if it is none."""
    if case.status != "resolved":
        raise CaseConflict(case.id, f"it is {case.status_at(now_ms)}; only what is resolved can be reopened")
    case.resolution, case.resolved_by, case.resolved_ms = None, "", 0
    _open(case)


def labels_of_case(case: Case, transactions: list[CaseTransaction]) -> list[Label]:
    """Return the labels of a resolution: the same ones however often, so that writing them again changes nothing.

    An unsure resolution writes none, and withdraws those of an earlier one.
    """
    if case.resolution is None or (case.resolution == "unsure" and not case.labels_written):
        return []
    is_fraud = IS_FRAUD[case.resolution]
    return [
        Label(t.transaction_id, is_fraud, case.resolved_ms, case.resolved_ms, SOURCE, case.resolved_by, t.model)
        for t in transactions
    ]


def _expect_claim(case: Case, actor: str, now_ms: int) -> None:
    status = case.status_at(now_ms)
    if status != "claimed":
        raise CaseConflict(case.id, f"it is {status}; claim it first")
    if case.claimed_by != actor:
        raise CaseConflict(case.id, f"{case.claimed_by} has claimed it")


def _open(case: Case) -> None:
    case.status, case.claimed_by, case.claimed_until_ms = "open", "", 0
