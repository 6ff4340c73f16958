"""Schema migrations: numbered steps, forward only.

A store holds its schema version; later steps run in order, in one transaction with the new version, under a lock shared
by all workers. A released step is never changed. A store with a later version is refused, because this release
could damage it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fraud.decisions.chain import Anchor, Logged, first_link_of
from fraud.decisions.labels import Label
from fraud.decisions.record import DecisionRecord
from fraud.errors import StoreError

Step = TypeVar("Step")


def steps_after(version: int, steps: Sequence[Step], where: str) -> list[tuple[int, Step]]:
    """Return the steps that a store at `version` still needs, each with its number.

    Raises
    ------
    StoreError
        The store has a later version than this release knows.
    """
    if version > len(steps):
        raise StoreError(
            f"{where} has schema {version}; this release reads schema {len(steps)} and those before it: "
            "start the release that wrote it, or a later one"
        )
    return list(enumerate(steps[version:], version + 1))


def check_adopted(anchor: Anchor, head: Anchor, last: Sequence[Logged], key: bytes, where: str) -> None:
    """Check the end of a log of the first release before its head is marked (`fraud.decisions.marks`).

    Parameters
    ----------
    last : sequence of Logged
        The last two rows of the chain (or fewer), the latest first.

    Raises
    ------
    StoreError
        The head does not match the last row, the key is another one, or a later release wrote the log.
    """
    if not last:
        if head != anchor:
            raise StoreError(f"the decision log in {where} has lost its rows: {_AS_IT_IS}")
        return
    before = last[1].link if len(last) > 1 else anchor.link
    if head != Anchor(last[0].sequence, last[0].link):
        raise StoreError(f"the decision log in {where} does not end where it says: {_AS_IT_IS}")
    if last[0].link != first_link_of(before, last[0].record, key):
        raise StoreError(
            f"the last row of the decision log in {where} is not what the first release recorded under this key; "
            f"set FRAUD_AUDIT_KEY as it was, or {_AS_IT_IS}"
        )


def first_label(record: DecisionRecord, label_time_ms: int) -> Label:
    """Return a label of the first release, which stored only the time since when a fraud is known."""
    return Label(record.transaction_id or "", True, label_time_ms, label_time_ms, "first release")


_AS_IT_IS = "look at it with `fraud audit verify`; nothing was changed"
