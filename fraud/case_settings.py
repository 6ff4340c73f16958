"""The settings of cases, a group of `fraud.settings`."""

from __future__ import annotations

from pydantic import Field

from fraud.environment import Group


class CaseSettings(Group):
    """How cases are put together and worked."""

    work: bool = Field(
        True,
        validation_alias="FRAUD_CASES_WORK",
        description="Whether the service's start also runs `fraud cases work`, in a process of its own.",
    )
    window_h: float = Field(
        24.0,
        gt=0,
        validation_alias="FRAUD_CASES_WINDOW_H",
        description="Hours after the first transaction of a case in which it takes further ones of its customer.",
    )
    claim_minutes: float = Field(
        15.0, gt=0, validation_alias="FRAUD_CASES_CLAIM_MINUTES", description="Minutes after which a claim ends."
    )
    undo_s: float = Field(
        10.0,
        ge=0,
        validation_alias="FRAUD_CASES_UNDO_S",
        description="Seconds for which a resolution can be undone; its labels are written after that.",
    )
