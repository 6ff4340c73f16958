"""The effect that a rule set would have had on past decisions, rule by rule and as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fraud.decisions.anomaly import SEVERITIES
from fraud.decisions.policy import Policy
from fraud.decisions.rules.blocks import fired
from fraud.decisions.rules.sets import Rules
from fraud.decisions.verdict import ACTIONS, actions_at, with_odds

Numbers: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
FRAUD, LEGITIMATE, UNKNOWN = 1, 0, -1
"""What a label says, as numbers."""
NONE = -1
"""In place of a rule: none."""
Z_95 = 1.959963984540054


class Redecided(NamedTuple):
    """Rows decided again under a rule set.

    Attributes
    ----------
    fired : (n_rules, n) bool
    first, second : (n,) int64
        The rule that decides, and the one that would decide without it; `NONE` for the policy.
    policy : (n,) int64
        What the policy does, on odds that rules adjusted, as an index into `ACTIONS`.
    model : (n,) int64
        What the policy alone does.
    action : (n,) int64
        What is decided.
    """

    fired: Flags
    first: Indices
    second: Indices
    policy: Indices
    model: Indices
    action: Indices


def redecide(rules: Rules, policy: Policy, columns: Numbers, score: Numbers) -> Redecided:
    """Decide many rows again, equal to `fraud.decisions.verdict.ruled` row by row.

    Every rule counts as valid, and none as stopped or snoozed.

    Parameters
    ----------
    columns : (n, n_columns) float64
        What the rules read; see `fraud.decisions.rules.names`.
    score : (n,) float64
        The decision scores.
    """
    hits = fired(rules.definite, columns)
    first, second = np.full(len(score), NONE), np.full(len(score), NONE)
    factor = np.ones(len(score))
    for i, rule in enumerate(rules.rules):
        if rule.shadow:
            continue
        if rule.odds is not None:
            factor[hits[i]] = np.clip(factor[hits[i]] * rule.odds, 1e-12, 1e12)
        else:
            second[hits[i] & (first != NONE) & (second == NONE)] = i
            first[hits[i] & (first == NONE)] = i
    thresholds = policy.review_threshold, policy.decline_threshold
    least = least_actions(policy, columns[:, rules.width - 1])
    adjusted = np.where(factor == 1.0, score, with_odds(score, factor))
    by_policy = np.maximum(actions_at(adjusted, *thresholds), least)
    action = np.where(first == NONE, by_policy, outcomes_of(rules)[first])
    return Redecided(hits, first, second, by_policy, np.maximum(actions_at(score, *thresholds), least), action)


def least_actions(policy: Policy, severity: Numbers) -> Indices:
    """Return the least that a policy does for the severities of rows, NaN for none, as indices into `ACTIONS`."""
    least = [ACTIONS.index(policy.severity_actions.get(name, "approve")) for name in SEVERITIES]
    return np.array([*least, 0])[np.where(np.isnan(severity), len(least), severity).astype(np.int64)]


def outcomes_of(rules: Rules) -> Indices:
    """Return the outcome of each rule as an index into `ACTIONS`, `NONE` for rules that adjust odds; and one more."""
    return np.array([NONE if r.outcome is None else ACTIONS.index(r.outcome) for r in rules.rules] + [NONE])


def joined(parts: Sequence[Redecided]) -> Redecided:
    """Return rows that were decided again in parts as one."""
    return Redecided(*(np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)))


class RuleEffect(msgspec.Struct):
    """What one rule would have done.

    Attributes
    ----------
    hits : int
        Transactions on which it fires; `hits_a_day` of them.
    decided : int
        Of these, those that it decides, or for a shadow rule would decide.
    labelled, frauds, legitimate : int
        Of its hits: those with a label, and what the labels say.
    fraud_amount, legitimate_amount : float
        Their money.
    precision, precision_low, precision_high : float or None
        Frauds among its labelled hits, with Wilson's 95% interval; None without a label.
    added_frauds : int
        Frauds that neither the policy stops nor any other rule fires on.
    saving : float or None
        What its decisions save on labelled transactions by the costs of the policy, against the decisions without it;
        None for a rule that adjusts odds or challenges, or where the policy has no costs.
    """

    id: str
    outcome: str
    shadow: bool
    hits: int
    hits_a_day: float
    decided: int
    labelled: int
    frauds: int
    legitimate: int
    fraud_amount: float
    legitimate_amount: float
    precision: float | None
    precision_low: float | None
    precision_high: float | None
    added_frauds: int
    saving: float | None

    @property
    def earns_nothing(self) -> bool:
        """Whether it never fires, or costs at least what it saves."""
        return self.hits == 0 or (self.saving is not None and self.labelled > 0 and self.saving <= 0)


class Outcome(msgspec.Struct):
    """What a way of deciding does with the transactions.

    Attributes
    ----------
    actions : dict of str to int
        Transactions by decision.
    reviews_a_day : float
    frauds_stopped, legitimate_declined : int
        By their labels: frauds that are not approved, and legitimate transactions that are declined.
    fraud_amount_stopped, legitimate_amount_declined : float
    cost : float or None
        Of the labelled ones that are not challenged, by the costs of the policy.
    """

    actions: dict[str, int]
    reviews_a_day: float
    frauds_stopped: int
    fraud_amount_stopped: float
    legitimate_declined: int
    legitimate_amount_declined: float
    cost: float | None


def rule_effects(
    rules: Rules, now: Redecided, label: Indices, amount: Numbers, costs: Numbers | None, days: float
) -> list[RuleEffect]:
    """Return the effect of each rule, in the order in which they decide.

    Parameters
    ----------
    label : (n,) int64
        `FRAUD`, `LEGITIMATE` or `UNKNOWN`.
    amount : (n,) float64
    costs : (n_actions, n) float64, optional
        What each action costs on each transaction, NaN where that is not known.
    days : float
        The time that the transactions cover.
    """
    outcomes = outcomes_of(rules)
    n_fired = now.fired.sum(axis=0)
    is_fraud, is_legitimate = label == FRAUD, label == LEGITIMATE
    rows = np.arange(len(label))
    effects = []
    for i, rule in enumerate(rules.rules):
        hit = now.fired[i]
        if rule.shadow and rule.outcome is not None:
            decides, without = hit & ((now.first == NONE) | (now.first > i)), now.action
        else:
            decides, without = now.first == i, np.where(now.second == NONE, now.policy, outcomes[now.second])
        saving = None
        if costs is not None and rule.outcome not in (None, "challenge"):
            of = decides & (label != UNKNOWN)
            saving = float(np.nansum(costs[without[of], rows[of]] - costs[outcomes[i], rows[of]]))
        frauds, legitimate = int((hit & is_fraud).sum()), int((hit & is_legitimate).sum())
        low, high = wilson(frauds, frauds + legitimate)
        effects.append(
            RuleEffect(
                rule.id,
                rule.outcome or f"odds x {rule.odds:g}",
                rule.shadow,
                int(hit.sum()),
                float(hit.sum() / days),
                int(decides.sum()),
                frauds + legitimate,
                frauds,
                legitimate,
                float(amount[hit & is_fraud].sum()),
                float(amount[hit & is_legitimate].sum()),
                frauds / (frauds + legitimate) if frauds + legitimate else None,
                low,
                high,
                int((hit & is_fraud & (n_fired == 1) & (now.model == 0)).sum()),
                saving,
            )
        )
    return effects


def outcome_of(action: Indices, label: Indices, amount: Numbers, costs: Numbers | None, days: float) -> Outcome:
    """Return what some decisions do with the transactions; the parameters are those of `rule_effects`."""
    stopped = (label == FRAUD) & (action != ACTIONS.index("approve"))
    declined = (label == LEGITIMATE) & (action == ACTIONS.index("decline"))
    cost = None
    if costs is not None:
        known = np.flatnonzero(label != UNKNOWN)
        cost = float(np.nansum(costs[action[known], known]))
    return Outcome(
        {name: int((action == i).sum()) for i, name in enumerate(ACTIONS)},
        float((action == ACTIONS.index("review")).sum() / days),
        int(stopped.sum()),
        float(amount[stopped].sum()),
        int(declined.sum()),
        float(amount[declined].sum()),
        cost,
    )


def wilson(k: int, n: int) -> tuple[float | None, float | None]:
    """Return Wilson's 95% interval of a share of k in n; Nones for n = 0.

    Wilson, E. B. (1927): Probable inference, the law of succession, and statistical inference. JASA 22, 209-212.
    """
    if n == 0:
        return None, None
    p, z = k / n, Z_95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
