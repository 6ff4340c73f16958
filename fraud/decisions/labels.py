"""What people say became of a transaction, and which of several labels stands.

Labels are told by many: a chargeback file, an analyst, a customer's call. Each says fraud, legitimate, or that what was
said before is taken back, and since when that is known. None is ever removed. Of a transaction's labels the one with
the greatest (label time, arrival, digest) stands, whoever told it and in whatever order they came.

A fraud is known since the first label of the row of fraud labels that leads to the one that stands: to say the same
again changes nothing, to say otherwise in between begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec
import numpy as np

from fraud.decisions.record import decision_key_of

Verdict = Literal["fraud", "legitimate", "none"]
LabelOutcome = Literal["told", "known", "superseded", "unknown"]
"""What became of a label: it stands now; it says what stood; a later one stands; of no recorded transaction."""


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """One label of one transaction.

    Attributes
    ----------
    transaction_id : str
    is_fraud : bool or None
        None takes back what was said before.
    label_time_ms : int
        Since when it is known, ms since the epoch.
    arrived_ms : int
        When it was told, ms since the epoch.
    source : str
        What it came by, such as ``http``, ``file``, ``case`` or ``stream``.
    actor : str
        Who told it: the id of the API key, or a user's name.
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
        """Under what its decision is kept."""
        return decision_key_of(self.transaction_id, self.model)

    @property
    def verdict(self) -> Verdict:
        return "none" if self.is_fraud is None else "fraud" if self.is_fraud else "legitimate"

    @property
    def order(self) -> tuple[int, int, bytes]:
        """By what labels of one transaction are ordered; the greatest stands."""
        said = msgspec.msgpack.encode((self.is_fraud, self.source, self.actor))
        return self.label_time_ms, self.arrived_ms, blake2b(said, digest_size=8).digest()


def standing(labels: Iterable[Label]) -> Label | None:
    """Return the label of a transaction that stands."""
    return max(labels, key=lambda label: label.order, default=None)


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
    """Return what a label changes of those told before it."""
    stood = standing(before)
    if (stood.verdict if stood is not None else "none") == label.verdict:
        return "known"
    return "told" if stood is None or label.order > stood.order else "superseded"


TELL, NOTE = -1, -2
"""What a label does to the histories, as `fraud.features.kernels.apply_labels` reads it."""


def label_effects(
    transaction_of: Sequence[int], verdicts: Sequence[bool | None]
) -> tuple[list[int], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return which of many labels change a history, and what each of these does.

    Parameters
    ----------
    transaction_of : sequence of int, n
        The transaction of each label; labels in the order (label time, arrival, digest).
    verdicts : sequence of bool or None, n

    Returns
    -------
    kept : list of int, k
        The labels that change something.
    does : (k,) int64
        `TELL`, `NOTE`, or the place among the kept of the label whose fraud is taken back.
    """
    told_by: dict[int, int] = {}
    kept: list[int] = []
    does: list[int] = []
    for j, (transaction, is_fraud) in enumerate(zip(transaction_of, verdicts, strict=True)):
        standing_at = told_by.get(transaction)
        if is_fraud:
            does.append(TELL if standing_at is None else NOTE)
            told_by.setdefault(transaction, len(kept))
        elif standing_at is not None:
            does.append(told_by.pop(transaction))
        else:
            continue
        kept.append(j)
    return kept, np.array(does, np.int64)
