"""Computes the states of past transactions, to be loaded into a store before it serves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fraud.currencies import Currency
from fraud.decisions.labels import Label
from fraud.features.featurizer import Featurizer
from fraud.history.frauds import apply_labels
from fraud.schema import FeatureSpec
from fraud.stores.protocol import KnownFraud, States
from training.replay import PIECE, Progress, arrays_of


def states_of(
    table: pd.DataFrame,
    as_of_ms: int,
    progress: Progress | None = None,
    currencies: dict[str, Currency] | None = None,
    labels: Sequence[Label] | None = None,
) -> States:
    """Return the state of every customer and merchant of a table.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    as_of_ms : int
        Labels whose time is later than this stay unknown, ms.
    progress : callable, optional
        Called repeatedly with the number of rows walked.
    currencies : dict, optional
        The scales of the model that will read the states, `FeatureSpec.currencies`.
    labels : sequence of Label, optional
        See `training.replay.arrays_of`.
    """
    arrays = arrays_of(table, currencies, labels)
    n = len(table)
    featurizer = Featurizer(FeatureSpec("transaction", ()), [0.0])
    nowhere = np.full(n, -1)
    for begin in range(0, n, PIECE):
        end = min(begin + PIECE, n)
        featurizer.walk(
            arrays.customers,
            arrays.merchants,
            arrays.transactions,
            arrays.customer_of,
            arrays.merchant_of,
            nowhere,
            np.empty((0, 0)),
            begin=begin,
            end=end,
        )
        if progress is not None:
            progress(end)
    known = int(np.searchsorted(arrays.label_times, as_of_ms, "right"))
    apply_labels(
        arrays.customers,
        arrays.merchants,
        arrays.transactions,
        arrays.customer_of,
        arrays.merchant_of,
        arrays.label_of,
        arrays.label_times,
        arrays.label_does,
        arrays.in_effect,
        0,
        known,
    )
    merchants = [str(m) for m in table["merchant_id"].cat.categories] if "merchant_id" in table.columns else []
    customers = [str(c) for c in table["customer_id"].cat.categories]
    frauds = []
    for j in np.flatnonzero(arrays.in_effect).tolist():
        i = int(arrays.label_of[j])
        event, merchant = int(arrays.transactions["time"][i]), int(arrays.merchant_of[i])
        frauds.append(
            KnownFraud(
                event,
                float(arrays.transactions["amount"][i]),
                max(event, int(arrays.label_times[j])),
                customers[int(arrays.customer_of[i])],
                None if merchant < 0 else merchants[merchant],
            )
        )
    return States(customers, merchants, arrays.customers, arrays.merchants, frauds)
