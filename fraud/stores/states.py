"""How a store updates states: decode the blobs concerned, apply the changes, encode them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fraud.compiling import compiled
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Histories, Records
from fraud.history.encoding import decode, encode, updates_of
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.history.updates import update_customer, update_merchant
from fraud.stores.protocol import Unread, distinct

Blobs = Mapping[str, bytes | None]
Written = dict[str, bytes]


class Change:
    """The updates that some transactions make to the states of their customers and merchants.

    Parameters
    ----------
    customer_of : sequence of str, n of them
        The customer of each.
    merchant_of : sequence of str or None, n of them
        The merchant of each.
    transactions : (n,) records of `TRANSACTION`

    Attributes
    ----------
    customer_ids, merchant_ids : list of str
        Whose states have to be read.
    """

    def __init__(self, customer_of: Sequence[str], merchant_of: Sequence[str | None], transactions: Records) -> None:
        self.customer_ids = distinct(customer_of)
        self.merchant_ids = distinct(merchant_of)
        customer_at = {name: i for i, name in enumerate(self.customer_ids)}
        merchant_at: dict[str | None, int] = {name: i for i, name in enumerate(self.merchant_ids)}
        self._customer_of = np.array([customer_at[name] for name in customer_of], np.int64)
        self._merchant_of = np.array([merchant_at.get(name, -1) for name in merchant_of], np.int64)
        self._transactions = transactions

    @classmethod
    def of(cls, decided: Sequence[DecisionRecord], transactions: Records) -> Change:
        """Return the change that decisions with a history make."""
        return cls([d.customer_id for d in decided], [d.merchant_id for d in decided], transactions)

    def apply(self, customers: Blobs, merchants: Blobs) -> tuple[Written, Written]:
        """Return the blobs of all states concerned after the change.

        A state that a later release wrote is unchanged: this one cannot update it.
        """
        before = (
            [customers.get(name) for name in self.customer_ids],
            [merchants.get(name) for name in self.merchant_ids],
        )
        unread: tuple[list[int], list[int]] = ([], [])
        customer_states = decode(before[0], CUSTOMER, unread[0])
        merchant_states = decode(before[1], MERCHANT, unread[1])
        apply_transactions(customer_states, merchant_states, self._customer_of, self._merchant_of, self._transactions)
        return (
            _encoded(self.customer_ids, before[0], customer_states, unread[0], self._customer_of),
            _encoded(self.merchant_ids, before[1], merchant_states, unread[1], self._merchant_of),
        )


def _encoded(
    names: Sequence[str], before: Sequence[bytes | None], states: Records, unread: Sequence[int], state_of: Any
) -> Written:
    times = np.bincount(state_of[state_of >= 0], minlength=len(names)).tolist()
    written = {
        name: encode(state, n if blob is None else updates_of(blob) + n)
        for name, blob, state, n in zip(names, before, states, times, strict=True)
    }
    for place in unread:
        blob = before[place]
        assert blob is not None
        written[names[place]] = blob
    return written


def histories_of(
    customer_ids: list[str], merchant_ids: list[str], customers: Blobs, merchants: Blobs
) -> tuple[Histories, Unread]:
    """Return states as histories, and the indices of those that a later release wrote."""
    unread: tuple[list[int], list[int]] = ([], [])
    histories = Histories(
        customer_ids,
        merchant_ids,
        decode([customers.get(name) for name in customer_ids], CUSTOMER, unread[0]),
        decode([merchants.get(name) for name in merchant_ids], MERCHANT, unread[1]),
    )
    return histories, (frozenset(unread[0]), frozenset(unread[1]))


@compiled
def apply_transactions(customers: Any, merchants: Any, customer_of: Any, merchant_of: Any, transactions: Any) -> Any:
    for i in range(len(transactions)):
        update_customer(customers[customer_of[i]], transactions[i])
        if merchant_of[i] >= 0:
            update_merchant(merchants[merchant_of[i]], transactions[i])
