"""How labels change the states of a store: what each does, and which frauds a state has to be told anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fraud.decisions.labels import Label, LabelOutcome, known_since, outcome_of
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Records
from fraud.history.encoding import decode, encode, is_readable, updates_of
from fraud.history.frauds import forget_frauds, mark_fraud, needs_other_frauds, note_fraud, withdraw_fraud
from fraud.history.state import CUSTOMER, MERCHANT, NEVER, TRANSACTION
from fraud.history.updates import minor_units
from fraud.stores.protocol import KnownFraud
from fraud.stores.states import apply_transactions

Told = tuple[int, float, int]
"""A fraud as a state is told it: event time, amount, and since when it is known, ms."""
Others = Callable[[], Sequence[Told]]
"""Returns the frauds that a state contains beside the one that is taken back."""


class Effect(NamedTuple):
    """What one label does.

    Attributes
    ----------
    outcome : LabelOutcome
    is_new : bool
        Whether it is to be written: it was not told before, word for word.
    noted : tuple of int, optional
        Event time, and since when the label calls the transaction fraud.
    before, after : Told, optional
        The fraud that the states contain, and what they are to contain.
    """

    outcome: LabelOutcome
    is_new: bool
    noted: tuple[int, int] | None = None
    before: Told | None = None
    after: Told | None = None

    @property
    def changes(self) -> bool:
        """Whether any state changes."""
        return self.noted is not None or self.before != self.after


def effect_of(label: Label, record: DecisionRecord, labels: Sequence[Label], known_ms: int | None) -> Effect:
    """Return what a label does.

    Parameters
    ----------
    record : DecisionRecord
        Of its transaction.
    labels : sequence of Label
        Those told of it before.
    known_ms : int or None
        Since when the states know it as fraud, if they do.
    """
    is_new = all(label.order != other.order for other in labels)
    outcome = outcome_of(label, labels)
    if not is_new or not record.customer_id:
        return Effect(outcome, is_new)
    event, amount = record.event_time_ms, record.history_amount
    since = known_since([*labels, label])
    return Effect(
        outcome,
        is_new,
        (event, max(event, label.label_time_ms)) if label.is_fraud else None,
        None if known_ms is None else (event, amount, known_ms),
        None if since is None else (event, amount, max(event, since)),
    )


def labelled(blob: bytes | None, dtype: np.dtype[np.void], effect: Effect, contains: bool, others: Others) -> bytes:
    """Return a state after a label.

    Parameters
    ----------
    blob : bytes or None
        The state before; of a later release it stays as it is.
    contains : bool
        Whether the state contains the fraud that stood before, which it does not after a reset.
    others : callable
        Is called if the state has to be told its other frauds anew.
    """
    if blob is not None and not is_readable(blob):
        return blob
    states = decode([blob], dtype)
    if effect.noted is not None:
        _note(states, *effect.noted)
    if effect.before != effect.after:
        if effect.before is not None and contains:
            _take_back(states, effect.before, others)
        if effect.after is not None:
            _tell(states, *effect.after)
    return encode(states[0], 1 if blob is None else updates_of(blob) + 1)


def needs_others(blob: bytes | None, dtype: np.dtype[np.void], effect: Effect) -> bool:
    """Tell whether `labelled` will ask for the other frauds of a state that contains the one before."""
    if blob is None or effect.before is None or effect.before == effect.after or not is_readable(blob):
        return False
    return bool(_needs_others(decode([blob], dtype), *effect.before))


def _take_back(states: Records, fraud: Told, others: Others) -> None:
    time, amount, known = fraud
    if not _needs_others(states, time, amount, known):
        _subtract(states, time, known)
        return
    left = others()
    if len(left) + 1 < int(states["fraud_count"][0]):  # a release that kept no list of them told it some
        _subtract(states, time, known)
        last = max(((then, int(minor_units(much))) for then, much, _ in left), default=(int(NEVER), 0))
        states["last_fraud_time"][0], states["last_fraud_amount"][0] = last
        return
    _forget(states)
    for told in left:
        _tell(states, *told)


@njit(cache=True, nogil=True)
def _note(states: Any, time: Any, label_time: Any) -> Any:
    note_fraud(states[0], time, label_time)


@njit(cache=True, nogil=True)
def _tell(states: Any, time: Any, amount: Any, label_time: Any) -> Any:
    mark_fraud(states[0], time, amount, label_time)


@njit(cache=True, nogil=True)
def _subtract(states: Any, time: Any, label_time: Any) -> Any:
    withdraw_fraud(states[0], time, label_time)


@njit(cache=True, nogil=True)
def _needs_others(states: Any, time: Any, amount: Any, label_time: Any) -> Any:
    return needs_other_frauds(states[0], time, amount, label_time)


@njit(cache=True, nogil=True)
def _forget(states: Any) -> Any:
    forget_frauds(states[0])


def known_fraud(told: Told, record: DecisionRecord) -> KnownFraud:
    """Return a fraud as it is kept for the day it has to be taken back."""
    return KnownFraud(*told, record.customer_id, record.merchant_id)


def compile_kernels() -> None:
    """Compile what stores run on states, or read it from numba's cache.

    A store's calls have a time budget, which a first one that waits for the compiler would exceed.
    """
    customers, merchants = decode([None], CUSTOMER), decode([None], MERCHANT)
    for states in (customers, merchants):
        _note(states, 0, 0)
        _tell(states, 0, 1.0, 0)
        _needs_others(states, 0, 1.0, 0)
        _subtract(states, 0, 0)
        _forget(states)
    minor_units(1.0)
    nothing = np.empty(0, np.int64)
    apply_transactions(customers, merchants, nothing, nothing, np.empty(0, TRANSACTION))
