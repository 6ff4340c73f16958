"""The kernel that serves both flows: offline it walks a whole table with its labels, online the rows of a request.

So training rows are computed by the code that serves.
"""

from __future__ import annotations

from typing import Any

from fraud.compiling import compiled
from fraud.features.kernels import featurize
from fraud.history.frauds import apply_labels
from fraud.history.updates import customer_as_of, merchant_as_of, update_customer, update_merchant


@compiled
def advance(
    customers: Any,
    merchants: Any,
    transactions: Any,
    customer_of: Any,
    merchant_of: Any,
    processing_times: Any,
    label_of: Any,
    label_times: Any,
    label_does: Any,
    in_effect: Any,
    applied: Any,
    begin: Any,
    end: Any,
    amount_quantiles: Any,
    columns: Any,
    scratch: Any,
    places: Any,
    X: Any,
) -> Any:
    """Walk transactions in order of arrival: apply the labels known by then, featurize, update the states.

    Parameters
    ----------
    customers, merchants : records of `CUSTOMER`, `MERCHANT`
        The states, changed in place.
    transactions : (n,) records of `TRANSACTION`
    customer_of, merchant_of : (n,) int64
        Which state each transaction belongs to; merchant -1 where the data has none.
    processing_times : (n,) int64
        Arrival, ms, ascending.
    label_of, label_times : (f,) int64
        Which transactions labels are of, and when each becomes known, ms, ascending in time.
    label_does : (f,) int64
        `MARK_FRAUD`, `NOTE_FRAUD`, or the number of the label whose fraud it takes back.
    in_effect : (f,) uint8
        Which labels are in effect, changed in place.
    applied : int
        How many of the labels have been applied before.
    begin, end : int
        Which transactions to walk; a long table is walked in pieces.
    amount_quantiles : (q,) float64
    columns : (k,) int64
        The fields of `ROW` wanted, in the order of the first k columns of `X`.
    scratch : tuple of 1-element arrays
        A `CUSTOMER` and a `MERCHANT` work record, an empty `MERCHANT` for transactions without one, a `ROW` record, and
        the row as float64.
    places : (n,) int64
        The line of `X` for each transaction, or -1 where its features are not needed.
    X : (m, >= k) float64
        Receives the features.

    Returns
    -------
    applied : int
        How many labels have been applied now.
    """
    c_then, m_then, nobody, row, values = scratch
    for i in range(begin, end):
        due = applied
        while due < len(label_of) and label_times[due] <= processing_times[i]:
            due += 1
        if due > applied:
            apply_labels(
                customers,
                merchants,
                transactions,
                customer_of,
                merchant_of,
                label_of,
                label_times,
                label_does,
                in_effect,
                applied,
                due,
            )
            applied = due
        t = transactions[i]
        c, m = customers[customer_of[i]], nobody[0]
        if places[i] >= 0:
            if c.ring_size > 0 and c.ring_time[c.ring_size - 1] > t.time:
                c_then[0] = c
                customer_as_of(c_then[0], t.time)
                c = c_then[0]
            if merchant_of[i] >= 0:
                m = merchants[merchant_of[i]]
                if m.ring_size > 0 and m.ring_time[m.ring_size - 1] > t.time:
                    m_then[0] = m
                    merchant_as_of(m_then[0], t.time)
                    m = m_then[0]
            featurize(c, m, t, amount_quantiles, row[0])
            for k in range(len(columns)):
                X[places[i], k] = values[columns[k]]
        update_customer(customers[customer_of[i]], t)
        if merchant_of[i] >= 0:
            update_merchant(merchants[merchant_of[i]], t)
    return applied
