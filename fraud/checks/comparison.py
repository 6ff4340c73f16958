"""Recorded traffic decided again by two versions, for `fraud compare`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from fraud.decisions.costs import decision_costs
from fraud.decisions.labels import Label, label_in_effect
from fraud.decisions.record import DecisionRecord
from fraud.decisions.rules.effect import FRAUD, LEGITIMATE, UNKNOWN
from fraud.decisions.verdict import actions_at
from fraud.errors import DataError
from fraud.features.featurizer import Matrix
from fraud.models.scorer import Scorer
from fraud.monitoring.comparison import Comparison, cap_of, compare, units_of
from fraud.monitoring.measures import Ints
from fraud.monitoring.performance import MONDAY_MS, WEEK_MS
from fraud.stores.log import DecisionLog
from fraud.stores.rows import decode_label, decode_record

AT_ONCE = 16_384


def compare_versions(
    log: DecisionLog,
    champion: Scorer,
    challenger: Scorer,
    *,
    since_ms: int,
    as_of_ms: int,
    settled_after_ms: int,
    cap: float | None = None,
) -> Comparison:
    """Decide the champion's recorded transactions by both versions' policies, and compare what that costs.

    Both read the features as they were scored, and costs are those of the champion's policy. A week enters when it is
    over by `settled_after_ms`, with the labels that had arrived by then: a later label changes nothing, so that the
    evidence at each week stays what it was.

    Parameters
    ----------
    since_ms : int
        The comparison's first event; earlier ones only set the cap.
    cap : float, optional
        The most that one customer counts for in a week; by default as `cap_of`.

    Raises
    ------
    DataError
        The versions cannot be compared, or there is nothing to compare them on.
    """
    names = champion.name.name, challenger.name.name
    if names[0] != names[1] or champion.bundle.spec.features != challenger.bundle.spec.features:
        raise DataError(
            f"{_named(champion)} and {_named(challenger)} read different features; recorded rows have only those of "
            "the version that scored them, so only versions with equal features can be compared"
        )
    costs = champion.bundle.policy.costs
    if not costs:
        raise DataError(f"the policy of {_named(champion)} has no costs, in which the two would be compared")
    labels: dict[str, list[Label]] = {}
    for logged, key in log.labels():
        labels.setdefault(key, []).append(decode_label(logged.record))
    customers: dict[str, int] = {}
    columns: list[list[float]] = [[], [], [], [], []]
    for part in _parts(log, champion):
        X = np.frombuffer(b"".join([record.features for record, _ in part]), "<f8").reshape(len(part), -1)
        ours, theirs = _actions(champion, X), _actions(challenger, X)
        for (record, key), one, other in zip(part, ours.tolist(), theirs.tolist(), strict=True):
            week_end = ((record.event_time_ms - MONDAY_MS) // WEEK_MS + 1) * WEEK_MS + MONDAY_MS
            settled_ms = week_end + settled_after_ms
            label = _label(record, labels.get(key, ()), settled_ms)
            if settled_ms <= as_of_ms and label != UNKNOWN:
                who = customers.setdefault(record.customer_id or key, len(customers))
                row = record.event_time_ms, who, label == FRAUD, record.history_amount, one * 8 + other
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
    time, customer, fraud, both = (np.array(columns[i], np.int64) for i in (0, 1, 2, 4))
    amount = np.array(columns[3], np.float64)
    by_action, rows = decision_costs(fraud, amount, costs), np.arange(len(both))
    saved = by_action[both // 8, rows] - by_action[both % 8, rows]
    begun = time >= since_ms
    if not begun.any():
        raise DataError(
            f"no transaction of {names[0]} since then has a label and lies in a week that has been over for "
            f"{settled_after_ms // 86_400_000} days; begin earlier with --since, or wait"
        )
    if cap is None:
        cap = cap_of(customer[~begun], time[~begun], (fraud * amount)[~begun])
    return compare(units_of(customer[begun], time[begun], saved[begun]), cap)


def _label(record: DecisionRecord, labels: list[Label] | tuple[()], settled_ms: int) -> int:
    effective = label_in_effect(label for label in labels if max(label.arrived_ms, label.label_time_ms) <= settled_ms)
    if effective is not None and effective.is_fraud is not None:
        return FRAUD if effective.is_fraud else LEGITIMATE
    return UNKNOWN if record.decision == "decline" else LEGITIMATE


def _actions(scorer: Scorer, X: Matrix) -> Ints:
    scores, policy = scorer.score(X), scorer.bundle.policy
    thresholds = policy.review_threshold, policy.decline_threshold
    return actions_at(scores.decision_score, *thresholds, scores.severity, policy.severity_actions)


def _parts(log: DecisionLog, champion: Scorer) -> Iterator[list[tuple[DecisionRecord, str]]]:
    """Yield the records of the champion's version, which have its features."""
    entries = ((decode_record(entry.logged.record), entry.key) for entry in log.rows())
    mine = ((record, key) for record, key in entries if record.model_digest == champion.name.digest)
    while some := list(islice(mine, AT_ONCE)):
        yield some


def _named(scorer: Scorer) -> str:
    return f"{scorer.name.name}:{scorer.name.version}"
