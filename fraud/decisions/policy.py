"""The thresholds of a model version; `fraud.decisions.verdict` makes verdicts of them."""

from __future__ import annotations

from typing import Literal

import msgspec

Action = Literal["approve", "review", "decline"]
RiskLevel = Literal["low", "medium", "high", "critical"]


class RiskLevels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The probability from which each level above low begins."""

    medium: float
    high: float
    critical: float


class Policy(msgspec.Struct, frozen=True):
    """What is done at which probability, `policy.json` of a bundle; costs say how it was chosen."""

    review_threshold: float
    decline_threshold: float
    risk_levels: RiskLevels
    costs: dict[str, float] = {}
