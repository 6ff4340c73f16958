"""The verdict on a transaction: prediction, risk level and decision.

Every verdict is made here: by the pipeline, a shadow, a replay of the decision log, the checks of `fraud verify`,
and the evaluation of a policy in training. The model's policy and, where a rule set is in force, its rules decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fraud.decisions.anomaly import Severity
from fraud.decisions.policy import Action, Policy, PolicyAction, RiskLevel
from fraud.decisions.rules.sets import MODEL, Rules

POLICY_ACTIONS: tuple[PolicyAction, ...] = get_args(PolicyAction)
"""What a policy can do with a transaction, from the mildest to the strictest."""
ACTIONS: tuple[Action, ...] = (*POLICY_ACTIONS, "challenge")
"""What can be done with a transaction."""


Odds = TypeVar("Odds", float, NDArray[np.float64])


class Verdict(NamedTuple):
    """The verdict on one transaction; `prediction` is true when it is called fraud."""

    prediction: bool
    risk_level: RiskLevel
    decision: Action


class Ruling(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the rules said of one transaction, as it is recorded.

    Attributes
    ----------
    rules : str
        The digest of the rule set in force.
    model_decision : Action
        What the policy alone would have decided.
    decided_by : str
        The id of the rule that decided, or ``model``.
    hits : list of str
        The rules that fired and count, in the order of precedence.
    shadow_hits : list of str
        Shadow rules that fired.
    stopped_hits : list of str
        Rules that fired and were stopped, so that they decided nothing.
    snoozed_hits : list of str
        Rules that fired and are snoozed for this customer, merchant or device.
    lists_revision : int
        Up to which change the lists were known.
    facts : list of float
        What the set asked of the request, as its columns (`fraud.decisions.rules.names`); NaN for missing.
    """

    rules: str
    model_decision: Action
    decided_by: str = MODEL
    hits: list[str] = []
    shadow_hits: list[str] = []
    stopped_hits: list[str] = []
    snoozed_hits: list[str] = []
    lists_revision: int = 0
    facts: list[float] = []


_VERDICTS: dict[tuple[RiskLevel, Action], Verdict] = {
    (level, action): Verdict(action != "approve", level, action)
    for level in get_args(RiskLevel)
    for action in POLICY_ACTIONS
}


def verdict_of(policy: Policy, score: float, severity: Severity | None = None) -> Verdict:
    """Return the verdict on one decision score; a score equal to a threshold reaches it.

    The score is a calibrated probability of fraud, or the anomaly score of a model without one. A transaction is called
    fraud where it is reviewed or declined: from the review threshold on, or for its severity, where an anomaly model
    measured one. Severity never makes a decision milder.
    """
    levels = policy.risk_levels
    level: RiskLevel = "low"
    if score >= levels.critical:
        level = "critical"
    elif score >= levels.high:
        level = "high"
    elif score >= levels.medium:
        level = "medium"
    action: PolicyAction = "approve"
    if score >= policy.decline_threshold:
        action = "decline"
    elif score >= policy.review_threshold:
        action = "review"
    if severity is not None:
        least = policy.severity_actions.get(severity)
        if least is not None and POLICY_ACTIONS.index(least) > POLICY_ACTIONS.index(action):
            action = least
    return _VERDICTS[level, action]


def ruled(
    policy: Policy,
    score: float,
    rules: Rules,
    columns: list[float],
    fired: list[int],
    stopped: Collection[str] = (),
    snoozed: Collection[str] = (),
    lists_revision: int = 0,
    severity: Severity | None = None,
) -> tuple[Verdict, Ruling]:
    """Return the verdict on a transaction where a rule set is in force, and what the rules said.

    The rule that comes first in the order of precedence decides: approve, then decline, then review, then challenge.
    Without one, the policy decides, on odds multiplied by those of the rules that adjust them. Prediction and risk
    level are always those of the model's own score.

    Parameters
    ----------
    score : float
        The decision score, as in `verdict_of`.
    columns : list of float
        What the rules read; see `fraud.decisions.rules.names`.
    fired : list of int
        The rules that fire and are valid, by index, ascending.
    stopped, snoozed : collection of str
        Ids of rules that decide nothing now, on any transaction or on this one.
    lists_revision : int
        What is recorded of the lists.
    severity : Severity, optional
        As in `verdict_of`: part of what the policy decides.
    """
    verdict = verdict_of(policy, score, severity)
    hits: list[str] = []
    shadows: list[str] = []
    stopped_hits: list[str] = []
    snoozed_hits: list[str] = []
    decision, decided_by, factor = verdict.decision, MODEL, 1.0
    for i in fired:
        rule = rules.rules[i]
        if rule.shadow:
            shadows.append(rule.id)
        elif rule.id in stopped:
            stopped_hits.append(rule.id)
        elif rule.id in snoozed:
            snoozed_hits.append(rule.id)
        else:
            if rule.odds is not None:
                factor = min(max(factor * rule.odds, 1e-12), 1e12)  # so that it stays a finite number above zero
            elif decided_by == MODEL and rule.outcome is not None:
                decision, decided_by = rule.outcome, rule.id
            hits.append(rule.id)
    if factor != 1.0 and decided_by == MODEL:
        decision = verdict_of(policy, with_odds(score, factor), severity).decision
    silent = (stopped_hits, snoozed_hits)
    facts = columns[rules.width :]
    ruling = Ruling(rules.digest, verdict.decision, decided_by, hits, shadows, *silent, lists_revision, facts)
    return (verdict if decision == verdict.decision else verdict._replace(decision=decision)), ruling


def with_odds(probability: Odds, factor: Odds) -> Odds:
    """Return a probability whose odds are multiplied: pk / (1 - p + pk)."""
    raised = probability * factor
    return raised / (1.0 - probability + raised)


def actions_at(
    y_prob: ArrayLike,
    review_threshold: float,
    decline_threshold: float,
    severity: Sequence[Severity | None] | None = None,
    severity_actions: Mapping[Severity, PolicyAction] | None = None,
) -> NDArray[np.int64]:
    """Return the actions that `verdict_of` takes at many probabilities, as indices into `POLICY_ACTIONS`.

    Parameters
    ----------
    y_prob : array, shape (n_transactions,), float64
        Decision scores, such as calibrated probabilities.
    review_threshold, decline_threshold : float
        Those of the policy.
    severity : sequence, shape (n_transactions,), optional
        Of a detector that measures it.
    severity_actions : mapping, optional
        Those of the policy: the least that is done at a severity.

    Returns
    -------
    ndarray, shape (n_transactions,), int64
    """
    p = np.asarray(y_prob, dtype=np.float64)
    by_score = np.where(p >= decline_threshold, 2, np.where(p >= review_threshold, 1, 0)).astype(np.int64)
    if severity is None or not severity_actions:
        return by_score
    least = {level: POLICY_ACTIONS.index(action) for level, action in severity_actions.items()}
    return np.maximum(by_score, [0 if level is None else least.get(level, 0) for level in severity])
