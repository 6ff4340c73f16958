"""How labels change the states of a store: the effect of each, and the other frauds that a state needs for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fraud.compiling import compiled
from fraud.decisions.labels import Label, LabelOutcome, known_since, outcome_of
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Records
from fraud.history.encoding import decode, encode, is_readable, updates_of
from fraud.history.frauds import forget_frauds, mark_fraud, needs_other_frauds, note_fraud, withdraw_fraud
from fraud.history.state import CUSTOMER, MERCHANT, NEVER, TRANSACTION
from fraud.history.updates import minor_units
from fraud.stores.protocol import KnownFraud
from fraud.stores.states import apply_transactions

Fraud = tuple[int, float, int]
"""A fraud as a state takes it: event time, ms; amount; since when it is known, ms."""
Others = Callable[[], Sequence[Fraud]]
"""Returns the frauds that a state contains beside the one that is withdrawn."""


class Effect(NamedTuple):
    """What one label does.

    Attributes
    ----------
    outcome : LabelOutcome
    is_new : bool
        Whether it has to be written: the same label did not come before.
    noted : tuple of int, optional
        Event time, and since when the label calls the transaction fraud.
    before, after : Fraud, optional
        The fraud that the states contain, and what they are to contain.
    """

    outcome: LabelOutcome
    is_new: bool
    noted: tuple[int, int] | None = None
    before: Fraud | None = None
    after: Fraud | None = None

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
        Its earlier labels.
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
        Whether the state contains the earlier fraud, which it does not after a reset.
    others : callable
        Called if the other frauds of the state have to be applied again.
    """
    if blob is not None and not is_readable(blob):
        return blob
    states = decode([blob], dtype)
    if effect.noted is not None:
        _note(states, *effect.noted)
    if effect.before != effect.after:
        if effect.before is not None and contains:
            _withdraw(states, effect.before, others)
        if effect.after is not None:
            _mark(states, *effect.after)
    return encode(states[0], 1 if blob is None else updates_of(blob) + 1)


def needs_others(blob: bytes | None, dtype: np.dtype[np.void], effect: Effect) -> bool:
    """Return whether `labelled` will ask for the other frauds of a state that contains the one before."""
    if blob is None or effect.before is None or effect.before == effect.after or not is_readable(blob):
        return False
    return bool(_needs_others(decode([blob], dtype), *effect.before))


def _withdraw(states: Records, fraud: Fraud, others: Others) -> None:
    time, amount, known = fraud
    if not _needs_others(states, time, amount, known):
        _subtract(states, time, known)
        return
    left = others()
    if len(left) + 1 < int(states["fraud_count"][0]):  # an earlier release kept no list of some of them
        _subtract(states, time, known)
        last = max(((then, int(minor_units(much))) for then, much, _ in left), default=(int(NEVER), 0))
        states["last_fraud_time"][0], states["last_fraud_amount"][0] = last
        return
    _forget(states)
    for other in left:
        _mark(states, *other)


@compiled
def _note(states: Any, time: Any, label_time: Any) -> Any:
    note_fraud(states[0], time, label_time)


@compiled
def _mark(states: Any, time: Any, amount: Any, label_time: Any) -> Any:
    mark_fraud(states[0], time, amount, label_time)


@compiled
def _subtract(states: Any, time: Any, label_time: Any) -> Any:
    withdraw_fraud(states[0], time, label_time)


@compiled
def _needs_others(states: Any, time: Any, amount: Any, label_time: Any) -> Any:
    return needs_other_frauds(states[0], time, amount, label_time)


@compiled
def _forget(states: Any) -> Any:
    forget_frauds(states[0])


def known_fraud(fraud: Fraud, record: DecisionRecord) -> KnownFraud:
    """Return a fraud as stores keep it, so that it can be withdrawn."""
    return KnownFraud(*fraud, record.customer_id, record.merchant_id)


def compile_kernels() -> None:
    """Compile what stores run on states, or read it from numba's cache.

    A store's calls have a time budget, which a first one that waits for the compiler would exceed.
    """
    customers, merchants = decode([None], CUSTOMER), decode([None], MERCHANT)
    for states in (customers, merchants):
        _note(states, 0, 0)
        _mark(states, 0, 1.0, 0)
        _needs_others(states, 0, 1.0, 0)
        _subtract(states, 0, 0)
        _forget(states)
    minor_units(1.0)
    nothing = np.empty(0, np.int64)
    apply_transactions(customers, merchants, nothing, nothing, np.empty(0, TRANSACTION))
