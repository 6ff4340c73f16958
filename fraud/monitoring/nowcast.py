"""What a week's precision, recall and losses will be once its labels are in, from those that are and the probabilities.

Frauds of a group (flagged or not) are expected by the calibrated probabilities, corrected by the completed weeks. Of
these, the delays of recent labels say how many should have been told by now; the labels that are in correct the week's
level, and what is still untold is drawn. Before any label the level is the prior: the probabilities alone.

Delays: reverse-time hazards (Lawless, J. F. (1994): Adjustments for reporting delays and the prediction of occurred but
not reported events. Canadian Journal of Statistics 22).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fraud.monitoring.measures import Estimate, Floats, Ints

LONGEST_DELAY = 45
"""Days; a later label is not waited for."""
PAST_DAYS = 26 * 7
DELAY_DAYS = 70
DELAY_WANDER = 0.35
"""Deviation of the log-odds of being told by now: delays wander."""
LEVEL_AGE = 2.2
"""The completed weeks are seven weeks old: with levels that wander, this many times their variance."""
DRAWS = 1000
LEAST_WEEKS = 8
NOWCAST = ("precision", "recall", "missed_amount")


class Days(NamedTuple):
    """Traffic by day and group; group 0 is not flagged, 1 is flagged.

    Attributes
    ----------
    expected : (n_days, 2) float64
        Sum of the calibrated probabilities.
    flagged : (n_days,) int64
        Flagged transactions.
    fraud_day, fraud_group, fraud_delay : (n_frauds,) int64
        Day of the event, group, and days until the label came.
    fraud_amount : (n_frauds,) float64
    """

    expected: Floats
    flagged: Ints
    fraud_day: Ints
    fraud_group: Ints
    fraud_delay: Ints
    fraud_amount: Floats


class _Group(NamedTuple):
    """One group's correction of the probabilities, dispersions, and share told by each age, (LONGEST_DELAY + 1,)."""

    ratio: float
    dispersion: float
    shape: float
    told: Floats


def nowcast(days: Days, first: int, last: int, today: int, rng: np.random.Generator) -> dict[str, Estimate]:
    """Return what the events of days `first` to `last` will come to, with 95% intervals.

    Parameters
    ----------
    days : Days
        Labels that come on `today` or later are not looked at.
    first, last, today : int
        Days; `last` is left out and is at most `today`.
    rng : Generator

    Returns
    -------
    dict of str to Estimate
        Of NOWCAST; values are None where fewer than eight weeks are complete, or nothing was flagged.
    """
    nothing = dict.fromkeys(NOWCAST, Estimate(None, None, None))
    known = days.fraud_day + days.fraud_delay < today
    complete = max(0, today - LONGEST_DELAY) // 7 * 7
    past = slice(max(0, complete - PAST_DAYS), complete)
    if complete - past.start < LEAST_WEEKS * 7:
        return nothing
    mine = known & (days.fraud_day >= first) & (days.fraud_day < last)
    here = slice(first, last)
    totals = np.zeros((2, DRAWS))
    untold = np.zeros(DRAWS, np.int64)
    for g in (0, 1):
        group = _group(days, g, past, known & (days.fraud_group == g), today)
        age = np.minimum(today - 1 - np.arange(first, last), LONGEST_DELAY)
        expected = group.ratio * days.expected[here, g]
        told = group.told[age]
        y = int((mine & (days.fraud_group == g)).sum())
        rate = group.shape + float(expected @ told) / group.dispersion
        level = rng.gamma(group.shape + y / group.dispersion, 1 / rate, DRAWS)
        left = 1 - _shifted(told, DELAY_WANDER * rng.normal(size=(DRAWS, 1)))
        drawn = _counts(rng, level * (left @ expected), group.dispersion)
        totals[g] = y + drawn
        if g == 0:
            untold = drawn
    missed, found = totals
    missed_before = (days.fraud_group == 0) & known & (days.fraud_day >= past.start)
    amounts = days.fraud_amount[missed_before]
    loss = np.full(DRAWS, float(days.fraud_amount[mine & (days.fraud_group == 0)].sum()))
    if len(amounts):
        whose = np.repeat(np.arange(DRAWS), untold)
        loss += np.bincount(whose, weights=rng.choice(amounts, len(whose)), minlength=DRAWS)
    flagged = int(days.flagged[here].sum())
    with np.errstate(invalid="ignore"):
        draws = {
            "precision": np.minimum(found / flagged, 1.0) if flagged else np.full(DRAWS, np.nan),
            "recall": found / (found + missed),
            "missed_amount": loss,
        }
    return {name: _estimate(values) for name, values in draws.items()}


def told_by(delay: Ints, age: Ints) -> Floats:
    """Return the share of frauds that are told by each age in days, 0 to LONGEST_DELAY, from those told so far.

    Parameters
    ----------
    delay, age : (n,) int64
        Of frauds that are told: days until the label came, and since the event; the delay is at most the age.
    """
    told = np.ones(LONGEST_DELAY + 1)
    for d in range(LONGEST_DELAY, 0, -1):
        seen = age >= d
        within = int((seen & (delay <= d)).sum())
        hazard = (seen & (delay == d)).sum() / within if within else 0.0
        told[d - 1] = told[d] * (1 - hazard)
    return told


def _group(days: Days, g: int, past: slice, mine: Ints, today: int) -> _Group:
    """Learn from the completed weeks, and from recent labels how late they come."""
    expected = days.expected[past, g]
    told_in_time = mine & (days.fraud_delay <= LONGEST_DELAY)
    in_past = told_in_time & (days.fraud_day >= past.start) & (days.fraud_day < past.stop)
    observed = np.bincount(days.fraud_day[in_past] - past.start, minlength=len(expected)).astype(np.float64)
    ratio = (observed.sum() + 0.5) / max(float(expected.sum()), 1e-9)
    by_week = observed.reshape(-1, 7), ratio * expected.reshape(-1, 7)
    weekly, mean = (part.sum(axis=1) for part in by_week)
    within = by_week[1] * (weekly / np.maximum(mean, 1e-9))[:, None]
    pearson = np.where(within > 0, (by_week[0] - within) ** 2 / np.maximum(within, 1e-9), 0.0).sum()
    dispersion = max(1.0, float(pearson) / (6 * len(weekly)))
    relative = weekly / np.maximum(mean, 1e-9)
    beyond = max(0.0, float(np.var(relative, ddof=1)) - dispersion * float(np.mean(1 / np.maximum(mean, 1e-9))))
    recent = told_in_time & (days.fraud_day >= today - DELAY_DAYS)
    told = told_by(days.fraud_delay[recent], today - 1 - days.fraud_day[recent])
    return _Group(ratio, dispersion, 1 / max(LEVEL_AGE * beyond + 0.002, 0.004), told)


def _shifted(share: Floats, by: Floats) -> Floats:
    """Return shares whose log-odds are shifted; 0 and 1 stay."""
    with np.errstate(divide="ignore"):
        odds = np.exp(by) * share / (1 - share)
    return np.where(share >= 1, 1.0, odds / (1 + np.where(np.isfinite(odds), odds, 0.0)))


def _counts(rng: np.random.Generator, mean: Floats, dispersion: float) -> Ints:
    """Draw counts of these means whose variance is `dispersion` times the mean."""
    if dispersion > 1.0 + 1e-9:
        mean = rng.gamma(np.maximum(mean, 1e-12) / (dispersion - 1), dispersion - 1)
    return rng.poisson(mean)


def _estimate(draws: Floats) -> Estimate:
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Estimate(None, None, None)
    low, value, high = np.quantile(draws, [0.025, 0.5, 0.975])
    return Estimate(float(value), float(low), float(high))
