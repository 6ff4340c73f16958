"""Queries of recorded decisions: the conditions, and the position from which a page goes on."""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from typing import NamedTuple

from fraud.decisions.labels import LabelValue
from fraud.decisions.policy import Action
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest

_POSITION = struct.Struct(">qq")


class Position(NamedTuple):
    """The position of a decision among all: when it was made, ms since the epoch, and its number in the store."""

    time_ms: int
    number: int

    def cursor(self) -> str:
        """Return the position as text, which a caller sends to get the next page."""
        return base64.urlsafe_b64encode(_POSITION.pack(*self)).decode().rstrip("=")

    @classmethod
    def of(cls, cursor: str) -> Position:
        """Return the position that a cursor encodes.

        Raises
        ------
        InvalidRequest
            It is not a cursor of an earlier answer.
        """
        try:
            return cls(*_POSITION.unpack(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)))
        except (binascii.Error, struct.error, ValueError):
            raise InvalidRequest("send the cursor as an earlier answer gave it in next", "$.cursor") from None


@dataclass(frozen=True)
class DecisionQuery:
    """Which decisions are wanted, the latest first. All conditions hold together; None is no condition.

    Parameters
    ----------
    customer_id, merchant_id : str, optional
    decision : Action, optional
    label : LabelValue, optional
        The label in effect; ``none`` for decisions without one.
    model, version : str, optional
        The model's name, and the first characters of its version's digest, without ``sha256:``.
    since_ms, until_ms : int, optional
        Decisions made at or after the first and before the second, ms since the epoch.
    after : Position, optional
        Only decisions that come after this position.
    limit : int
        How many at most.
    """

    customer_id: str | None = None
    merchant_id: str | None = None
    decision: Action | None = None
    label: LabelValue | None = None
    model: str | None = None
    version: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    after: Position | None = None
    limit: int = 50


class FoundDecision(NamedTuple):
    """A decision that a query found, its position, and the label in effect."""

    position: Position
    record: DecisionRecord
    label: LabelValue


class Page(NamedTuple):
    """Some decisions, and the position after which the next page begins; None at the end."""

    found: list[FoundDecision]
    next: Position | None
