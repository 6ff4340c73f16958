"""What can be asked of recorded decisions: which ones, and from where on."""

from __future__ import annotations

import base64
import binascii
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fraud.decisions.labels import Verdict
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest

_PLACE = struct.Struct(">qq")


class Place(NamedTuple):
    """Where a decision stands among all: by when it was made, ms, and by its number in the store."""

    time_ms: int
    number: int

    def cursor(self) -> str:
        """Return the place as callers hand it back to go on behind it."""
        return base64.urlsafe_b64encode(_PLACE.pack(*self)).decode().rstrip("=")

    @classmethod
    def of(cls, cursor: str) -> Place:
        """Return the place that a cursor stands for.

        Raises
        ------
        InvalidRequest
            It is no cursor of an earlier answer.
        """
        try:
            return cls(*_PLACE.unpack(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)))
        except (binascii.Error, struct.error, ValueError):
            raise InvalidRequest("send the cursor as an earlier answer gave it in next", "$.cursor") from None


@dataclass(frozen=True)
class Question:
    """Which decisions are asked for, the latest first; what is None does not matter.

    Parameters
    ----------
    customer_id, merchant_id : str, optional
    decision : optional
    label : Verdict, optional
        What the label that stands says; ``none`` for decisions without one.
    model, version : str, optional
        The model's name, and the beginning of its version's digest without ``sha256:``.
    since_ms, until_ms : int, optional
        When they were made, from the first up to and without the second, ms since the epoch.
    after : Place, optional
        Only those behind this one.
    limit : int
        How many at most.
    """

    customer_id: str | None = None
    merchant_id: str | None = None
    decision: Literal["approve", "review", "decline"] | None = None
    label: Verdict | None = None
    model: str | None = None
    version: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    after: Place | None = None
    limit: int = 50


class Found(NamedTuple):
    """A decision that was asked for, and what the label that stands says."""

    place: Place
    record: DecisionRecord
    label: Verdict


class Page(NamedTuple):
    """Some decisions, and the place to go on behind if there are more."""

    found: list[Found]
    next: Place | None
