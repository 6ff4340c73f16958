"""The thresholds of a model version; `fraud.decisions.verdict` applies them."""

from __future__ import annotations

from typing import Literal

import msgspec

Action = Literal["approve", "review", "decline", "challenge"]
"""What can be done with a transaction. Only a rule challenges: the customer is asked for a further proof."""
RiskLevel = Literal["low", "medium", "high", "critical"]


class RiskLevels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decision score from which each level above low begins."""

    medium: float
    high: float
    critical: float


class Policy(msgspec.Struct, frozen=True):
    """The thresholds of a bundle, from its `policy.json`; `costs` are those they were chosen by."""

    review_threshold: float
    decline_threshold: float
    risk_levels: RiskLevels
    costs: dict[str, float] = {}
