"""Labels of a transaction, and which of several is in effect.

Labels come from several sources: a chargeback file, an analyst, a customer's call. Each says fraud, legitimate, or
withdrawn, and since when that is known. No label is removed. Of a transaction's labels the one with the greatest (label
time, arrival, digest) is in effect, whatever its source and the order of arrival.

A fraud is known since the first of the consecutive fraud labels that end with the one in effect: repeating a label
changes nothing, and a different label in between starts a new period.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec
import numpy as np

from fraud.decisions.record import decision_key_of
from fraud.history.state import MARK_FRAUD, NOTE_FRAUD

LabelValue = Literal["fraud", "legitimate", "none"]
"""What a label says of its transaction; ``none`` withdraws what earlier labels said."""
LabelOutcome = Literal["applied", "known", "superseded", "unknown"]
"""The outcome of a label: now in effect; same as before; superseded by a later one; transaction not recorded."""


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """One label of one transaction.

    Attributes
    ----------
    transaction_id : str
    is_fraud : bool or None
        None withdraws the earlier labels.
    label_time_ms : int
        Since when it is known, ms since the epoch.
    arrived_ms : int
        When it arrived, ms since the epoch.
    source : str
        Where it came from, such as ``http``, ``file``, ``case`` or ``stream``.
    actor : str
        Who sent it: the id of the API key, or a user's name.
    model : str or None
        The features model that decided, whose transaction ids are its own; None for transactions with a history.
    """

    transaction_id: str
    is_fraud: bool | None
    label_time_ms: int
    arrived_ms: int = 0
    source: str = ""
    actor: str = ""
    model: str | None = None

    @property
    def key(self) -> str:
        """The key of its decision."""
        return decision_key_of(self.transaction_id, self.model)

    @property
    def value(self) -> LabelValue:
        return "none" if self.is_fraud is None else "fraud" if self.is_fraud else "legitimate"

    @property
    def order(self) -> tuple[int, int, bytes]:
        """The sort key of the labels of one transaction; the greatest is in effect."""
        said = msgspec.msgpack.encode((self.is_fraud, self.source, self.actor))
        return self.label_time_ms, self.arrived_ms, blake2b(said, digest_size=8).digest()


def label_in_effect(labels: Iterable[Label]) -> Label | None:
    """Return the label of a transaction that is in effect, or None if there are no labels."""
    return max(labels, key=lambda label: label.order, default=None)


def value_in_effect(labels: Iterable[Label]) -> LabelValue:
    """Return what the label in effect says; ``none`` if there is none."""
    effective = label_in_effect(labels)
    return "none" if effective is None else effective.value


def known_since(labels: Iterable[Label]) -> int | None:
    """Return since when a transaction is known as fraud, ms; None if it is not."""
    since: int | None = None
    for label in sorted(labels, key=lambda label: label.order):
        if not label.is_fraud:
            since = None
        elif since is None:
            since = label.label_time_ms
    return since


def outcome_of(label: Label, before: Sequence[Label]) -> LabelOutcome:
    """Return the outcome of a label, given the earlier labels of its transaction."""
    if value_in_effect(before) == label.value:
        return "known"
    effective = label_in_effect(before)
    return "applied" if effective is None or label.order > effective.order else "superseded"


def label_effects(
    transaction_of: Sequence[int], is_fraud: Sequence[bool | None]
) -> tuple[list[int], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return which labels change a history, and the effect of each.

    Parameters
    ----------
    transaction_of : sequence of int, n
        The transaction of each label; labels in the order (label time, arrival, digest).
    is_fraud : sequence of bool or None, n
        What each label says, as `Label.is_fraud`.

    Returns
    -------
    kept : list of int, k
        Indices of the labels that change something.
    does : (k,) int64
        The effect of each, as `fraud.history.frauds.apply_labels` reads it: `MARK_FRAUD`, `NOTE_FRAUD`, or the index in
        `kept` of the label whose fraud is withdrawn.
    """
    marked_by: dict[int, int] = {}
    kept: list[int] = []
    does: list[int] = []
    for j, (transaction, says_fraud) in enumerate(zip(transaction_of, is_fraud, strict=True)):
        earlier = marked_by.get(transaction)
        if says_fraud:
            does.append(MARK_FRAUD if earlier is None else NOTE_FRAUD)
            marked_by.setdefault(transaction, len(kept))
        elif earlier is not None:
            does.append(marked_by.pop(transaction))
        else:
            continue
        kept.append(j)
    return kept, np.array(does, np.int64)
