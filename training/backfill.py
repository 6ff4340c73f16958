"""Past transactions as the states they leave behind, to be loaded into a store before it serves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fraud.currencies import Currency
from fraud.features.featurizer import Featurizer
from fraud.schema import FeatureSpec
from fraud.stores.protocol import States
from fraud.stores.states import apply_labels
from training.replay import PIECE, Progress, arrays_of


def states_of(
    table: pd.DataFrame,
    as_of_ms: int,
    progress: Progress | None = None,
    currencies: dict[str, Currency] | None = None,
) -> States:
    """Return the state of every customer and merchant of a table.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    as_of_ms : int
        Frauds whose label time is later than this stay unknown, ms.
    progress : callable, optional
        LabelOutcome the number of rows walked, again and again.
    currencies : dict, optional
        The scales of the model that will read the states, `FeatureSpec.currencies`.
    """
    arrays = arrays_of(table, currencies)
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
    known = arrays.label_times <= as_of_ms
    frauds = arrays.fraud_of[known]
    apply_labels(
        arrays.customers,
        arrays.merchants,
        arrays.customer_of[frauds],
        arrays.merchant_of[frauds],
        arrays.transactions["time"][frauds],
        arrays.transactions["amount"][frauds],
        arrays.label_times[known],
    )
    merchants = [str(m) for m in table["merchant_id"].cat.categories] if "merchant_id" in table.columns else []
    customers = [str(c) for c in table["customer_id"].cat.categories]
    return States(customers, merchants, arrays.customers, arrays.merchants)
