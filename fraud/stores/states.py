"""How a store changes states: read the blobs of those concerned, tell them, write the blobs back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numba import njit

from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Records
from fraud.history.state import CUSTOMER, MERCHANT, decode, encode, tell_fraud, update_customer, update_merchant
from fraud.stores.protocol import distinct

Blobs = Mapping[str, bytes | None]
Written = dict[str, bytes]


class Change:
    """What a few decisions, or frauds among them, tell the states of their customers and merchants.

    Parameters
    ----------
    decided : sequence of DecisionRecord
        Those with a history; `customer_ids` and `merchant_ids` say whose states have to be read.
    """

    def __init__(self, decided: Sequence[DecisionRecord], tell: Callable[..., None], *told: Any) -> None:
        self.customer_ids = distinct(d.customer_id for d in decided)
        self.merchant_ids = distinct(d.merchant_id for d in decided)
        customer_at = {name: i for i, name in enumerate(self.customer_ids)}
        merchant_at = {name: i for i, name in enumerate(self.merchant_ids)}
        self._customer_of = np.array([customer_at[d.customer_id] for d in decided], np.int64)
        self._merchant_of = np.array([merchant_at.get(d.merchant_id or "", -1) for d in decided], np.int64)
        self._tell = tell
        self._told = told

    @classmethod
    def of_transactions(cls, decided: Sequence[DecisionRecord], transactions: Records) -> Change:
        return cls(decided, tell_transactions, transactions)

    @classmethod
    def of_frauds(cls, decided: Sequence[DecisionRecord], label_times: Sequence[int]) -> Change:
        """Tell frauds; one that is said to have been known before its event counts as known from the event on."""
        event_times = np.array([d.event_time_ms for d in decided], np.int64)
        return cls(
            decided,
            apply_labels,
            event_times,
            np.array([d.history_amount for d in decided], np.float64),
            np.maximum(event_times, np.array(label_times, np.int64)),
        )

    def apply(self, customers: Blobs, merchants: Blobs) -> tuple[Written, Written]:
        """Return the blobs of all states concerned as they are after the change."""
        customer_states = decode([customers.get(name) for name in self.customer_ids], CUSTOMER)
        merchant_states = decode([merchants.get(name) for name in self.merchant_ids], MERCHANT)
        self._tell(customer_states, merchant_states, self._customer_of, self._merchant_of, *self._told)
        return (
            {name: encode(state) for name, state in zip(self.customer_ids, customer_states, strict=True)},
            {name: encode(state) for name, state in zip(self.merchant_ids, merchant_states, strict=True)},
        )


def row_key(name: str) -> int:
    """Return the 64-bit row number that stands for an id in a table: a short one keeps its tree flat."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def last_time_of(blob: bytes) -> int:
    """Return the event time of the latest transaction that an encoded state was told, ms."""
    at = 1 + _totals["last_time"][1]
    return int.from_bytes(blob[at : at + 8], "little", signed=True)


def told_of(blob: bytes) -> int:
    """Return how many transactions and frauds an encoded state was told: of two, which one is ahead."""
    count, fraud_count = (int.from_bytes(blob[at : at + 4], "little") for at in _TOLD)
    return count + fraud_count


_totals: Any = CUSTOMER.fields  # the first fields of both kinds of state are the same
_TOLD = [1 + _totals[name][1] for name in ("count", "fraud_count")]


@njit(cache=True, nogil=True)
def tell_transactions(customers: Any, merchants: Any, customer_of: Any, merchant_of: Any, transactions: Any) -> Any:
    for i in range(len(transactions)):
        update_customer(customers[customer_of[i]], transactions[i])
        if merchant_of[i] >= 0:
            update_merchant(merchants[merchant_of[i]], transactions[i])


@njit(cache=True, nogil=True)
def apply_labels(
    customers: Any, merchants: Any, customer_of: Any, merchant_of: Any, times: Any, amounts: Any, label_times: Any
) -> Any:
    for i in range(len(times)):
        tell_fraud(customers[customer_of[i]], times[i], amounts[i], label_times[i])
        if merchant_of[i] >= 0:
            tell_fraud(merchants[merchant_of[i]], times[i], amounts[i], label_times[i])
