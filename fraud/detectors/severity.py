"""How rare a score is: levels whose alarm rates were calibrated, with a guarantee.

A level begins above the `rank`-th largest of the raw scores of a calibration sample. Of exchangeable scores, the share
of further ones above that order statistic is distributed as Beta(rank, rows + 1 - rank), or less where scores are
equal (Vovk 2012, "Conditional validity of inductive conformal predictors"). The rank is the largest one for which this
share is at most the level's rate with the scale's confidence. Rank 1 is the least, so a level needs `rows_needed` rows.

The sample has one transaction a customer: those of one customer resemble each other, and the distribution above does
not hold for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from fraud.decisions.anomaly import SEVERITIES, Severity
from fraud.errors import BundleError

Vector = NDArray[np.float64]
SEVERITY = "severity.json"
LEVELS = SEVERITIES[1:]
"""Those that have a rate: all but the lowest."""


class Level(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One level: how often it may be reached, and where it begins."""

    severity: Severity
    rate: float
    """Most of the transactions that reach it, as a share."""
    rank: int
    """Which of the sample's largest raw scores it begins above; 0 if the sample is too small for the level."""
    above: float | None
    """That raw score; None if the level is not offered."""

    def rows_needed(self, confidence: float) -> int:
        """Return the size of the smallest sample that offers this level.

        Examples
        --------
        >>> [Level("HIGH", rate, 0, None).rows_needed(0.95) for rate in (0.01, 0.001, 0.0001)]
        [299, 2995, 29956]
        """
        return math.ceil(math.log1p(-confidence) / math.log1p(-self.rate))


class SeverityScale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The levels of one model, `severity.json` of its bundle."""

    confidence: float
    rows: int
    """Of the calibration sample."""
    customers: int
    """Of the calibration sample: as many as rows. Rows of ready features count as a customer each."""
    levels: tuple[Level, ...]

    def check(self) -> None:
        """Check that the levels hold together.

        Raises
        ------
        BundleError
            A rate, a rank or a beginning is none, or the sample has several rows of a customer.
        """
        offered = [level for level in self.levels if level.above is not None]
        beginnings = [level.above for level in offered if level.above is not None]
        checks: list[tuple[Callable[[], bool], str]] = [
            (lambda: tuple(level.severity for level in self.levels) == LEVELS, f"the levels {', '.join(LEVELS)}"),
            (lambda: 0.5 <= self.confidence < 1, "a confidence from 0.5 to below 1"),
            (lambda: self.rows == self.customers, "one row a customer in the sample"),
            (lambda: all(0 < level.rate < 1 for level in self.levels), "rates between 0 and 1"),
            (lambda: all(a.rate > b.rate for a, b in pairwise(self.levels)), "rates that fall from level to level"),
            (
                lambda: all((level.above is None) == (level.rank == 0) for level in self.levels),
                "a rank where it begins",
            ),
            (lambda: all(0 <= level.rank <= self.rows for level in self.levels), "ranks within the sample"),
            (lambda: tuple(offered) == self.levels[: len(offered)], "no offered level beyond one that is not"),
            (
                lambda: all(self.rows >= level.rows_needed(self.confidence) for level in offered),
                "more rows for a level",
            ),
            (lambda: all(math.isfinite(above) for above in beginnings), "finite beginnings"),
            (lambda: all(a <= b for a, b in pairwise(beginnings)), "beginnings that do not fall from level to level"),
        ]
        for holds, needed in checks:
            if not holds():
                raise BundleError(f"{SEVERITY} is no severity scale: it needs {needed}")

    @property
    def not_offered(self) -> tuple[Severity, ...]:
        """The levels that the sample is too small for."""
        return tuple(level.severity for level in self.levels if level.above is None)

    @property
    def usual(self) -> str:
        """What the lowest severity means, in a sentence."""
        return f"As usual as {100.0 * (1.0 - self.levels[0].rate):.6g}% of transactions."

    def of(self, raw_margin: Vector) -> list[Severity | None]:
        """Return the severity of each raw score (n,); None if no level is offered."""
        beginnings = np.array([level.above for level in self.levels if level.above is not None], np.float64)
        if not len(beginnings):
            return [None] * len(raw_margin)
        return [SEVERITIES[i] for i in np.searchsorted(beginnings, raw_margin, side="left").tolist()]


def read_scale(content: bytes) -> SeverityScale | None:
    """Return what a bundle's severity.json holds; None for null. Raises `BundleError` if it is neither."""
    try:
        scale = msgspec.json.decode(content, type=SeverityScale | None)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{SEVERITY} cannot be read: {error}") from None
    if scale is not None:
        scale.check()
    return scale


def write_scale(scale: SeverityScale | None) -> bytes:
    """Return the content of severity.json."""
    return msgspec.json.format(msgspec.json.encode(scale), indent=1) + b"\n"
