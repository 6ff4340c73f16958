"""How well each model version did, week by week and segment by segment, on the labels that are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

import msgspec
import numpy as np

from fraud.decisions.rules.effect import FRAUD, UNKNOWN
from fraud.decisions.verdict import ACTIONS
from fraud.monitoring.measures import DAY_MS, Bools, Estimate, Floats, Ints, Labelled, measure
from fraud.monitoring.nowcast import LONGEST_DELAY, Days, nowcast
from fraud.monitoring.traffic import APPROVE, DECLINE, Traffic

WEEK_MS = 7 * DAY_MS
MONDAY_MS = 4 * DAY_MS
"""1970 began on a Thursday: the first Monday, ms since the epoch."""
ALL = "all"
Costs = Mapping[str, Floats]
"""What each action would have cost, by the digest of the version: (n_actions, n) float64 over all decisions."""


def week_name(week: int) -> str:
    """Return the Monday, UTC, of a week that is counted from 1970's first Monday, such as ``2026-03-02``."""
    return datetime.fromtimestamp((week * WEEK_MS + MONDAY_MS) / 1000, UTC).date().isoformat()


class Performance(msgspec.Struct, frozen=True):
    """One version in one week, on one segment.

    Attributes
    ----------
    week : str
        Its Monday, UTC, such as ``2026-03-02``.
    version : str
        The bundle's digest; ``all`` for all versions together.
    segment : str
        Such as ``channel=online``; ``all`` for the whole traffic.
    decisions, flagged, frauds : int
        Decisions; those not approved; those labelled fraud.
    labelled_share : float
        Share of the decisions whose label is known.
    declined_unobserved : int
        Declined without a label: precision and recall leave them out.
    is_complete : bool
        Whether every event of the week is older than the time after which no label means legitimate.
    measures : dict of str to Estimate
    remarks : list of str
        What is missing, and why.
    """

    week: str
    version: str
    segment: str
    decisions: int
    flagged: int
    frauds: int
    labelled_share: float
    declined_unobserved: int
    is_complete: bool
    measures: dict[str, Estimate]
    remarks: list[str]


def weekly_performance(
    traffic: Traffic, costs: Costs, legitimate_after_ms: int, n_bootstrap: int = 200
) -> list[Performance]:
    """Return the performance by week, version and segment, the earliest week first.

    Weeks without traffic between others are listed with 0 decisions. Segments are measured over all versions.
    """
    week = (traffic.event_time_ms - MONDAY_MS) // WEEK_MS
    found = []
    for number in range(int(week.min()), int(week.max()) + 1):
        in_week = week == number
        until_ms = (number + 1) * WEEK_MS + MONDAY_MS
        is_complete = until_ms + legitimate_after_ms <= traffic.as_of_ms
        for version, segment, rows in _groups(traffic, in_week):
            found.append(_performance(traffic, costs, number, (version, segment), rows, is_complete, n_bootstrap))
    return found


class Nowcast(msgspec.Struct, frozen=True):
    """What a week's figures will be once its labels are in; `week` is its Monday, `days` those that are over."""

    week: str
    days: int
    measures: dict[str, Estimate]


def recent_nowcasts(traffic: Traffic, seed: int = 0) -> list[Nowcast]:
    """Return nowcasts of the weeks whose labels are still coming, the earliest first.

    Empty where no probabilities decided, where fewer than eight weeks are complete, or where no day of a week is over.
    A decline without a label counts as what its label will most likely say, which is nothing: the figures are those
    that the weekly performance will show.
    """
    if not len(traffic.label) or not traffic.is_calibrated.all():
        return []
    first_ms = (int(traffic.event_time_ms.min()) - MONDAY_MS) // WEEK_MS * WEEK_MS + MONDAY_MS
    today = (traffic.as_of_ms - first_ms) // DAY_MS
    day = (traffic.event_time_ms - first_ms) // DAY_MS
    group = (traffic.action != APPROVE).astype(np.int64)
    fraud = traffic.label == FRAUD
    expected = np.bincount(2 * day + group, weights=traffic.score, minlength=2 * (today + 1))
    days = Days(
        expected.astype(np.float64).reshape(-1, 2),
        np.bincount(day[group == 1], minlength=today + 1),
        day[fraud],
        group[fraud],
        traffic.label_delay_ms[fraud] // DAY_MS,
        traffic.amount[fraud],
    )
    rng = np.random.default_rng(seed)
    found = []
    for week in range(max(0, (today - LONGEST_DELAY) // 7), -(-today // 7)):
        last = min(7 * week + 7, today)
        measures = nowcast(days, 7 * week, last, today, rng)
        if measures["recall"].value is not None:
            found.append(Nowcast(week_name((first_ms - MONDAY_MS) // WEEK_MS + week), last - 7 * week, measures))
    return found


def labelled(traffic: Traffic, costs: Costs, rows: Ints) -> Labelled:
    """Return the rows as `measure` takes them; each has a known label."""
    cost, approving = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for digest, by_action in costs.items():
        if digest in traffic.versions:
            mine = traffic.version[rows] == traffic.versions.index(digest)
            cost[mine] = by_action[traffic.action[rows[mine]], rows[mine]]
            approving[mine] = by_action[APPROVE, rows[mine]]
    return Labelled(
        traffic.label[rows] == FRAUD,
        traffic.action[rows] != APPROVE,
        traffic.score[rows],
        traffic.amount[rows],
        traffic.customer[rows],
        traffic.event_time_ms[rows],
        cost,
        approving,
    )


def _groups(traffic: Traffic, in_week: Bools) -> Iterator[tuple[str, str, Ints]]:
    yield ALL, ALL, np.flatnonzero(in_week)
    for code, digest in enumerate(traffic.versions):
        rows = np.flatnonzero(in_week & (traffic.version == code))
        if len(rows):
            yield digest, ALL, rows
    for field, codes in traffic.segments.items():
        for code, value in enumerate(traffic.segment_values[field]):
            rows = np.flatnonzero(in_week & (codes == code))
            if len(rows):
                yield ALL, f"{field}={value}", rows


def _performance(
    traffic: Traffic,
    costs: Costs,
    week: int,
    of: tuple[str, str],
    rows: Ints,
    is_complete: bool,
    n_bootstrap: int,
) -> Performance:
    known = rows[traffic.label[rows] != UNKNOWN]
    data = labelled(traffic, costs, known)
    is_calibrated = bool(traffic.is_calibrated[known].all())
    frauds = int(data.is_fraud.sum())
    unobserved = int(((traffic.action[rows] == DECLINE) & (traffic.label[rows] == UNKNOWN)).sum())
    remarks = _remarks(rows, known, frauds, is_calibrated, unobserved, is_complete)
    if len(known) and not np.isfinite(data.cost).all():
        remarks.append("no cost: a policy without costs, a version that is not in the store, or a challenge")
    hours = (
        (int(traffic.event_time_ms[rows].max()) - int(traffic.event_time_ms[rows].min())) / 3_600_000
        if len(rows)
        else 0.0
    )
    if len(rows) and hours <= 1:
        remarks.append("it decided for an hour at most")
    return Performance(
        week_name(week),
        *of,
        len(rows),
        int((traffic.action[rows] != APPROVE).sum()),
        frauds,
        len(known) / len(rows) if len(rows) else 0.0,
        unobserved,
        is_complete,
        measure(data, is_calibrated, n_bootstrap),
        remarks,
    )


def _remarks(
    rows: Ints, known: Ints, frauds: int, is_calibrated: bool, unobserved: int, is_complete: bool
) -> list[str]:
    if not len(rows):
        return ["no traffic"]
    said = []
    if not len(known):
        said.append("no labels yet")
    elif frauds in (0, len(known)):
        said.append("one class: only frauds" if frauds else "one class: no fraud among the labels")
    if len(known) and not is_calibrated:
        said.append("no probability decided: calibration is not measured")
    if unobserved:
        said.append(f"{unobserved} declined without a label: what they were was never seen, so they are left out")
    if not is_complete:
        said.append("labels are still coming: frauds told late are missing")
    return said


def action_costs(by_policy: Floats) -> Floats:
    """Return costs of each of `ACTIONS` from those of a policy's actions; NaN for a challenge, which has no cost."""
    return np.vstack([by_policy, np.full((len(ACTIONS) - len(by_policy), by_policy.shape[1]), np.nan)])
