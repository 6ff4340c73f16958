"""Two versions compared on the same labelled traffic, paired by customer and week, at any time valid.

A unit is one customer in one week: x is what the champion's decisions cost there less what the challenger's would have.
Bets on x, capped at b, multiply a wealth that starts at 1. If the challenger is no better, the wealth reaches 20 with
a probability of at most 5%, however often one looks (Ville's inequality; Waudby-Smith and Ramdas: Estimating means of
bounded random variables by betting, 2024). Transactions would be no units: an episode's outcomes are one outcome.
"""

from __future__ import annotations

import msgspec
import numpy as np

from fraud.errors import DataError
from fraud.monitoring.measures import Floats, Ints
from fraud.monitoring.performance import MONDAY_MS, WEEK_MS, week_name

STAKES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
ENOUGH = 20.0
CAP_QUANTILE, LEAST_FOR_CAP = 0.99, 100
CONFIDENCE = "5% for this challenger, however often one looks"


class Units(msgspec.Struct, frozen=True):
    """Customers' weeks, n of them, in the order in which they enter.

    Attributes
    ----------
    week : (n,) int64
        Weeks since 1970's first Monday.
    saved : (n,) float64
        The champion's cost less the challenger's.
    """

    week: Ints
    saved: Floats


class Look(msgspec.Struct, frozen=True):
    """The evidence at the end of a week: e-values that the challenger is better, and that it is worse."""

    week: str
    units: int
    better: float
    worse: float


class Comparison(msgspec.Struct, frozen=True):
    """What the traffic says of a challenger.

    Attributes
    ----------
    verdict : str
        ``better`` or ``worse`` once its evidence reached 20, whatever came after; else ``open``.
    since : str or None
        The week in which it did.
    cap : float
        A unit counts for at most this, either way: the question is cost capped at this much a customer and week.
    units, differing : int
        Customers' weeks; those in which the two cost otherwise.
    saved : float
        In all, uncapped; `saved_capped` as it was tested.
    saved_capped : float
    confidence : str
    looks : list of Look
    """

    verdict: str
    since: str | None
    cap: float
    units: int
    differing: int
    saved: float
    saved_capped: float
    confidence: str
    looks: list[Look]


def units_of(customer: Ints, event_time_ms: Ints, saved: Floats) -> Units:
    """Add up what was saved by customer and week, in the order of weeks and, within one, of customers."""
    week = (event_time_ms - MONDAY_MS) // WEEK_MS
    keys, place = np.unique(np.stack([week, customer], axis=1), axis=0, return_inverse=True)
    total = np.bincount(place, weights=saved, minlength=len(keys)).astype(np.float64)
    return Units(keys[:, 0], total)


def compare(units: Units, cap: float) -> Comparison:
    """Test whether a challenger is better, or worse; looks are taken at the end of each week.

    Raises
    ------
    DataError
        The cap is not a positive number.
    """
    if not (np.isfinite(cap) and cap > 0):
        raise DataError(f"the cap is {cap}; allowed: a positive amount of money")
    z = np.clip(units.saved / cap, -1, 1)
    looks: list[Look] = []
    wealth = np.zeros((2, len(STAKES)))
    verdict, since = "open", None
    for week in np.unique(units.week).tolist():
        rows = units.week == week
        for side, sign in enumerate((1, -1)):
            wealth[side] += np.log1p(STAKES[:, None] * sign * z[rows]).sum(axis=1)
        name = week_name(week)
        better, worse = (float(np.mean(np.exp(np.minimum(side, 600.0)))) for side in wealth)
        looks.append(Look(name, int((units.week <= week).sum()), better, worse))
        if verdict == "open" and max(better, worse) >= ENOUGH:
            verdict, since = ("better" if better >= worse else "worse"), name
    return Comparison(
        verdict,
        since,
        cap,
        len(z),
        int((units.saved != 0).sum()),
        float(units.saved.sum()),
        float((z * cap).sum()),
        CONFIDENCE,
        looks,
    )


def cap_of(customer: Ints, event_time_ms: Ints, fraud_amount: Floats) -> float:
    """Return the 99% quantile of customers' weekly fraud losses, of events before the comparison begins.

    Raises
    ------
    DataError
        There are fewer than 100 customers' weeks with fraud.
    """
    losses = units_of(customer, event_time_ms, fraud_amount).saved
    losses = losses[losses > 0]
    if len(losses) < LEAST_FOR_CAP:
        raise DataError(
            f"{len(losses)} customers' weeks with fraud lie before the comparison; {LEAST_FOR_CAP} are needed to set "
            "the cap of a customer's loss: begin later with --since, or give --cap"
        )
    return float(np.quantile(losses, CAP_QUANTILE))
