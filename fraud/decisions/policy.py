"""From a calibrated probability to a risk level and a decision."""

from __future__ import annotations

from typing import Literal

import msgspec

Decision = Literal["approve", "review", "decline"]
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

    def decide(self, probability: float) -> tuple[bool, RiskLevel, Decision]:
        """Return whether it is called fraud, the risk level and the decision.

        A transaction is called fraud from the review threshold on: someone or something acts on it.
        """
        levels = self.risk_levels
        level: RiskLevel = "low"
        if probability >= levels.critical:
            level = "critical"
        elif probability >= levels.high:
            level = "high"
        elif probability >= levels.medium:
            level = "medium"
        decision: Decision = "approve"
        if probability >= self.decline_threshold:
            decision = "decline"
        elif probability >= self.review_threshold:
            decision = "review"
        return decision != "approve", level, decision
