"""Kernels that apply fraud labels to states: mark a transaction as fraud, withdraw it, and walk a list of labels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fraud.compiling import compiled
from fraud.history.state import DAYS, MARK_FRAUD, MS_PER_DAY, NEVER, NOTE_FRAUD
from fraud.history.updates import add_to, day_slot, minor_units


@compiled
def note_fraud(state: Any, time: Any, label_time: Any) -> Any:
    """Record that a label called a transaction of `time` fraud, even if another label overrules it.

    Opens the days that the label counts for, so that these depend on the set of labels and not on their order.
    """
    state.last_label_time = max(state.last_label_time, label_time)
    day_slot(state, label_time // MS_PER_DAY)
    day_slot(state, time // MS_PER_DAY)


@compiled
def mark_fraud(state: Any, time: Any, amount: Any, label_time: Any) -> Any:
    """Mark a transaction of `time` and `amount` as fraud in a customer's or a merchant's state."""
    note_fraud(state, time, label_time)
    minor = minor_units(amount)
    if (time, minor) > (state.last_fraud_time, np.int64(state.last_fraud_amount)):
        state.last_fraud_time = time
        state.last_fraud_amount = minor
    state.fraud_count += 1
    _count_fraud(state, time, label_time, 1)


@compiled
def _count_fraud(state: Any, time: Any, label_time: Any, step: Any) -> Any:
    top = 255 if state.day_label.itemsize == 1 else 65535
    slot = day_slot(state, label_time // MS_PER_DAY)
    if slot >= 0:
        add_to(state.day_label, slot, step, top)
    slot = day_slot(state, time // MS_PER_DAY)
    if slot >= 0:
        add_to(state.day_fraud, slot, step, top)


@compiled
def withdraw_fraud(state: Any, time: Any, label_time: Any) -> Any:
    """Withdraw a fraud that the state contains; `needs_other_frauds` must be false for it."""
    state.fraud_count -= min(state.fraud_count, 1)
    _count_fraud(state, time, label_time, -1)


@compiled
def needs_other_frauds(state: Any, time: Any, amount: Any, label_time: Any) -> Any:
    """Return whether a fraud can be withdrawn only by applying all other frauds of the state again.

    It is the last one, and the state does not hold the one before, or its counter is saturated.
    """
    if (time, minor_units(amount)) == (state.last_fraud_time, np.int64(state.last_fraud_amount)):
        return True
    top = 255 if state.day_label.itemsize == 1 else 65535
    label_slot, slot = day_slot(state, label_time // MS_PER_DAY), day_slot(state, time // MS_PER_DAY)
    return (label_slot >= 0 and state.day_label[label_slot] == top) or (slot >= 0 and state.day_fraud[slot] == top)


@compiled
def forget_frauds(state: Any) -> Any:
    """Clear all known frauds, to apply them again; the days that were opened stay open."""
    state.fraud_count = 0
    state.last_fraud_time = NEVER
    state.last_fraud_amount = 0
    for slot in range(DAYS):
        state.day_fraud[slot] = 0
        state.day_label[slot] = 0


@compiled
def apply_labels(
    customers: Any,
    merchants: Any,
    transactions: Any,
    customer_of: Any,
    merchant_of: Any,
    label_of: Any,
    label_times: Any,
    label_does: Any,
    in_effect: Any,
    begin: Any,
    end: Any,
) -> Any:
    """Apply the labels from `begin` to `end` to the states; `in_effect` marks the labels that count so far.

    A fraud is withdrawn by applying all other frauds again to its cleared states: a state alone does not know which
    fraud came before. See `advance` for the arrays.
    """
    for j in range(begin, end):
        i = label_of[j]
        t = transactions[i]
        time = max(t.time, label_times[j])
        has_merchant = merchant_of[i] >= 0
        if label_does[j] == NOTE_FRAUD:
            note_fraud(customers[customer_of[i]], t.time, time)
            if has_merchant:
                note_fraud(merchants[merchant_of[i]], t.time, time)
        elif label_does[j] == MARK_FRAUD:
            in_effect[j] = 1
            mark_fraud(customers[customer_of[i]], t.time, t.amount, time)
            if has_merchant:
                mark_fraud(merchants[merchant_of[i]], t.time, t.amount, time)
        else:
            in_effect[label_does[j]] = 0
            forget_frauds(customers[customer_of[i]])
            if has_merchant:
                forget_frauds(merchants[merchant_of[i]])
            for k in range(j):
                if in_effect[k] == 0:
                    continue
                other = transactions[label_of[k]]
                known = max(other.time, label_times[k])
                if customer_of[label_of[k]] == customer_of[i]:
                    mark_fraud(customers[customer_of[i]], other.time, other.amount, known)
                if has_merchant and merchant_of[label_of[k]] == merchant_of[i]:
                    mark_fraud(merchants[merchant_of[i]], other.time, other.amount, known)
