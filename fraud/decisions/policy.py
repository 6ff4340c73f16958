"""The thresholds of a model version; `fraud.decisions.verdict` applies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from fraud.decisions.anomaly import Severity

PolicyAction = Literal["approve", "review", "decline"]
"""What a policy can do with a transaction, from the mildest to the strictest."""
Action = Literal["approve", "review", "decline", "challenge"]
"""What can be done with a transaction. Only a rule challenges: the customer is asked for a further proof."""
RiskLevel = Literal["low", "medium", "high", "critical"]


SEVERITY_ACTIONS: Mapping[Severity, PolicyAction] = {"CRITICAL": "review"}
"""Of a policy that does not say otherwise."""


class RiskLevels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decision score from which each level above low begins."""

    medium: float
    high: float
    critical: float


class Policy(msgspec.Struct, frozen=True):
    """The thresholds of a bundle, from its `policy.json`; `costs` are those they were chosen by.

    `severity_actions` are the least that is done with a transaction of a severity, whatever its score.
    """

    review_threshold: float
    decline_threshold: float
    risk_levels: RiskLevels
    costs: dict[str, float] = {}
    severity_actions: Mapping[Severity, PolicyAction] = msgspec.field(default_factory=lambda: dict(SEVERITY_ACTIONS))
