"""The list of features, and the rows of `X` made from requests and histories."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fraud.features.advance import advance
from fraud.features.kernels import AGE_CAP_DAYS, COUNT_CAP, NEW_CUSTOMER_BELOW
from fraud.history.state import CUSTOMER, MARK_FRAUD, MERCHANT, TRANSACTION, fresh_token, new_states, token
from fraud.schema import FeatureSpec, Row, Said

Records = np.ndarray[tuple[int], np.dtype[np.void]]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True)
class HistoryFeature:
    """A history feature and its meaning; without the optional roles in `requires` it is always missing."""

    meaning: str
    requires: frozenset[str] = frozenset()


def _of(meaning: str, *requires: str) -> HistoryFeature:
    return HistoryFeature(meaning, frozenset(requires))


HISTORY_FEATURES: dict[str, HistoryFeature] = {
    # the transaction itself
    "amount": _of("amount of the transaction"),
    "amount_log": _of("natural logarithm of the amount"),
    "amount_global_percentile": _of("share of the training transactions with a smaller amount"),
    "amount_is_globally_unusual": _of("amount above 99% of the training transactions"),
    "hour": _of("hour of the day, with fraction, UTC"),
    "weekday": _of("day of the week, Monday 0, UTC"),
    # the customer's pace
    "customer_count_lifetime": _of(f"earlier transactions of the customer, at most {COUNT_CAP:.0f}"),
    "customer_is_new": _of(f"customer with fewer than {NEW_CUSTOMER_BELOW} earlier transactions"),
    "customer_age_days": _of(f"days since the customer's first transaction, at most {AGE_CAP_DAYS:.0f}"),
    "customer_seconds_since_last": _of("seconds since the customer's last transaction"),
    "customer_count_1h": _of("customer's transactions in the last hour"),
    "customer_count_1d": _of("customer's transactions in the last 24 hours"),
    "customer_count_7d": _of("customer's transactions in 7 days"),
    "customer_count_30d": _of("customer's transactions in 30 days"),
    "customer_velocity_ratio": _of("customer's transactions in 24 hours against the lifetime daily rate"),
    "customer_velocity_ratio_7d": _of("customer's daily rate over 7 days against 30 days"),
    # the customer's money
    "customer_amount_sum_1h": _of("customer's spending in the last hour"),
    "customer_amount_sum_1d": _of("customer's spending in the last 24 hours"),
    "customer_amount_mean_1d": _of("customer's mean amount in the last 24 hours"),
    "customer_amount_mean_7d": _of("customer's mean amount in 7 days"),
    "customer_amount_mean_30d": _of("customer's mean amount in 30 days"),
    "customer_amount_max_1d": _of("customer's largest amount in the last 24 hours"),
    "customer_amount_min_1d": _of("customer's smallest amount in the last 24 hours"),
    "customer_amount_max_7d": _of("customer's largest amount in 7 days"),
    "customer_amount_max_30d": _of("customer's largest amount in 30 days"),
    "customer_amount_mean_lifetime": _of("customer's mean amount"),
    "customer_amount_zscore": _of("deviations of the amount from the customer's mean amount"),
    "customer_amount_log_zscore": _of("deviations of the log amount from the customer's mean log amount"),
    "customer_amount_percentile": _of("share of the customer's transactions with a smaller amount"),
    "customer_amount_ratio_30d": _of("amount against the customer's mean amount in 30 days"),
    "customer_amount_ratio_max_30d": _of("amount against the customer's largest amount in 30 days"),
    "customer_amount_ratio_last": _of("amount against the customer's last amount"),
    "customer_amount_max_ratio_7d": _of("customer's largest amount in 7 days against the mean amount"),
    "customer_amount_mean_ratio_1d": _of("customer's mean amount in 24 hours against the mean amount"),
    "customer_high_amount_count_7d": _of("customer's recent transactions in 7 days above 3 times the mean"),
    "customer_high_amount_count_14d": _of("customer's recent transactions in 14 days above 3 times the mean"),
    "customer_same_amount_count": _of("recent transactions of the customer with the very same amount"),
    # the customer's habits
    "customer_hour_deviation": _of("share of the customer's transactions outside this hour and its neighbours"),
    "customer_weekday_deviation": _of("share of the customer's transactions on other weekdays"),
    "customer_category_familiarity": _of("share of the customer's transactions in this category", "category"),
    "customer_category_count_recent": _of("customer's recent transactions in this category", "category"),
    "customer_category_amount_ratio": _of(
        "amount against the customer's recent mean amount in this category", "category"
    ),
    "customer_merchant_familiarity": _of("customer's earlier transactions at this merchant", "merchant"),
    "customer_merchant_count_1d": _of("merchants the customer used in the last 24 hours", "merchant"),
    "customer_device_count_recent": _of("customer's recent transactions with this device", "device"),
    "customer_distance_km": _of("distance of the merchant from the customer's position", "distance"),
    "customer_distance_last_km": _of("distance from the customer's last transaction", "position"),
    "customer_speed_kmh": _of("speed needed from the place of the last transaction", "position"),
    # what is known of frauds against the customer
    "customer_fraud_count_lifetime": _of("known frauds of the customer", "label"),
    "customer_fraud_count_30d": _of("known frauds of the customer that happened in 30 days", "label"),
    "customer_fraud_days_since_last": _of("days since the customer's last known fraud happened", "label"),
    "customer_fraud_label_count_7d": _of("frauds of the customer that became known in 7 days", "label"),
    # the merchant's pace and money
    "merchant_count_lifetime": _of(f"earlier transactions at the merchant, at most {COUNT_CAP:.0f}", "merchant"),
    "merchant_age_days": _of(f"days since the merchant's first transaction, at most {AGE_CAP_DAYS:.0f}", "merchant"),
    "merchant_seconds_since_last": _of("seconds since the merchant's last transaction", "merchant"),
    "merchant_count_1h": _of("merchant's transactions in this and the last full hour", "merchant"),
    "merchant_count_1d": _of("merchant's transactions in the last 24 hours", "merchant"),
    "merchant_count_7d": _of("merchant's transactions in 7 days", "merchant"),
    "merchant_count_30d": _of("merchant's transactions in 30 days", "merchant"),
    "merchant_velocity_ratio": _of("merchant's transactions in 24 hours against its daily rate in 30 days", "merchant"),
    "merchant_amount_mean_1d": _of("merchant's mean amount today", "merchant"),
    "merchant_amount_mean_7d": _of("merchant's mean amount in 7 days", "merchant"),
    "merchant_amount_mean_30d": _of("merchant's mean amount in 30 days", "merchant"),
    "merchant_amount_max_30d": _of("merchant's largest amount in 30 days", "merchant"),
    "merchant_amount_log_zscore": _of("deviations of the log amount from the merchant's mean log amount", "merchant"),
    # the merchant's risk, from the labels known by then
    "merchant_fraud_count_lifetime": _of("known frauds at the merchant", "merchant", "label"),
    "merchant_fraud_share_lifetime": _of("known frauds per transaction at the merchant", "merchant", "label"),
    "merchant_fraud_count_7d": _of("known frauds at the merchant that happened in 7 days", "merchant", "label"),
    "merchant_fraud_count_14d": _of("known frauds at the merchant that happened in 14 days", "merchant", "label"),
    "merchant_fraud_count_30d": _of("known frauds at the merchant that happened in 30 days", "merchant", "label"),
    "merchant_fraud_share_30d": _of("known frauds per transaction at the merchant in 30 days", "merchant", "label"),
    "merchant_fraud_streak_share": _of(
        "known frauds per transaction at the merchant, from the first to the last fraud day in 30 days",
        "merchant",
        "label",
    ),
    "merchant_fraud_days_since_first": _of(
        "days since the first known fraud at the merchant in 30 days", "merchant", "label"
    ),
    "merchant_fraud_days_since_last": _of("days since the last known fraud at the merchant", "merchant", "label"),
    "merchant_fraud_last_amount_log": _of("log amount of the last known fraud at the merchant", "merchant", "label"),
    "merchant_fraud_label_count_1d": _of("frauds at the merchant that became known today", "merchant", "label"),
    "merchant_fraud_label_count_7d": _of("frauds at the merchant that became known in 7 days", "merchant", "label"),
    "merchant_fraud_label_count_30d": _of("frauds at the merchant that became known in 30 days", "merchant", "label"),
}

ROW = np.dtype([(name, "f8") for name in HISTORY_FEATURES])
"""One row of all history features, float64 each, NaN for missing."""

_NO_LABELS = np.empty(0, np.int64)


@dataclass
class Histories:
    """The states that a batch of transactions needs, changed in place as the batch is walked."""

    customer_ids: list[str]
    merchant_ids: list[str]
    customers: Records
    merchants: Records

    @classmethod
    def new(cls, rows: Iterable[Row]) -> Histories:
        """Return empty states of customers and merchants."""
        customer_ids, merchant_ids = keys_of(rows)
        return cls(
            customer_ids,
            merchant_ids,
            new_states(CUSTOMER, len(customer_ids)),
            new_states(MERCHANT, len(merchant_ids)),
        )


def keys_of(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """Return the distinct customers and merchants of some rows, in the order they come."""
    customers: dict[str, None] = {}
    merchants: dict[str, None] = {}
    for row in rows:
        customers[row.customer_id] = None
        merchant = row.text_role("merchant_id")
        if merchant is not None:
            merchants[merchant] = None
    return list(customers), list(merchants)


def transactions_of(rows: Sequence[Row]) -> Records:
    """Return rows as the records that the kernels read."""
    return np.array([_record(row) for row in rows], dtype=TRANSACTION)


def _record(row: Row) -> tuple[float | int, ...]:
    get, text = row.roles.get, row.text_role
    return (
        row.event_time_ms,
        row.history_amount,
        _position(get("latitude")),
        _position(get("longitude")),
        _position(get("merchant_latitude")),
        _position(get("merchant_longitude")),
        fresh_token(row.transaction_id or ""),
        token(row.customer_id),
        token(text("merchant_id")),
        token(text("category")),
        token(text("device_id")),
    )


def _position(degrees: Said) -> float:
    return degrees if isinstance(degrees, int | float) else np.nan


class Featurizer:
    """Makes rows of `X` as a feature specification orders them.

    Parameters
    ----------
    spec : FeatureSpec
    amount_quantiles : sequence of float
        The 0 to 99% quantiles of the training amounts, currency units.
    """

    def __init__(self, spec: FeatureSpec, amount_quantiles: Sequence[float]) -> None:
        self.spec = spec
        self.n_derived = len(spec.derived)
        names = list(HISTORY_FEATURES)
        self.columns = np.array([names.index(name) for name in spec.derived], dtype=np.int64)
        self.amount_quantiles = np.array(amount_quantiles, dtype=np.float64)
        self._local = threading.local()

    def ready(self, rows: Sequence[Row]) -> Matrix:
        """Return (n, n_features) float64 for rows of ready features."""
        return np.array([row.values for row in rows], dtype=np.float64).reshape(len(rows), len(self.spec.features))

    def advance(self, rows: Sequence[Row], histories: Histories, transactions: Records | None = None) -> Matrix:
        """Featurize transactions in order; each one updates the histories for the next.

        Parameters
        ----------
        rows : sequence of Row, n of them
        histories : Histories
            Must hold every customer and merchant of the rows; updated in place.
        transactions : Records, optional
            `transactions_of` the rows, for a caller that has them.

        Returns
        -------
        X : (n, n_features) float64
        """
        n = len(rows)
        customer_at = {name: i for i, name in enumerate(histories.customer_ids)}
        merchant_at = {name: i for i, name in enumerate(histories.merchant_ids)}
        X = np.empty((n, len(self.spec.features)), np.float64)
        self.walk(
            histories.customers,
            histories.merchants,
            transactions_of(rows) if transactions is None else transactions,
            np.array([customer_at[row.customer_id] for row in rows], np.int64),
            np.array([merchant_at.get(row.text_role("merchant_id") or "", -1) for row in rows], np.int64),
            np.arange(n),
            X,
        )
        if len(self.spec.features) > self.n_derived:
            X[:, self.n_derived :] = [row.values for row in rows]
        return X

    def walk(
        self,
        customers: Records,
        merchants: Records,
        transactions: Records,
        customer_of: np.ndarray[tuple[int], np.dtype[np.int64]],
        merchant_of: np.ndarray[tuple[int], np.dtype[np.int64]],
        places: np.ndarray[tuple[int], np.dtype[np.int64]],
        X: Matrix,
        processing_times: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None,
        label_of: np.ndarray[tuple[int], np.dtype[np.int64]] = _NO_LABELS,
        label_times: np.ndarray[tuple[int], np.dtype[np.int64]] = _NO_LABELS,
        label_does: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None,
        in_effect: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None,
        applied: int = 0,
        begin: int = 0,
        end: int | None = None,
    ) -> int:
        """Run the kernel `fraud.features.advance.advance` over arrays; its docstring says what they hold.

        Without `label_does`, every label marks a fraud.
        """
        if not hasattr(self._local, "scratch"):
            row = np.zeros(1, ROW)
            nobody = new_states(MERCHANT, 1)
            self._local.scratch = (
                new_states(CUSTOMER, 1),
                new_states(MERCHANT, 1),
                nobody,
                row,
                row.view(np.float64),
            )
        result: int = advance(
            customers,
            merchants,
            transactions,
            customer_of,
            merchant_of,
            transactions["time"].copy() if processing_times is None else processing_times,
            label_of,
            label_times,
            np.full(len(label_of), MARK_FRAUD, np.int64) if label_does is None else label_does,
            np.zeros(len(label_of), np.uint8) if in_effect is None else in_effect,
            applied,
            begin,
            len(transactions) if end is None else end,
            self.amount_quantiles,
            self.columns,
            self._local.scratch,
            places,
            X,
        )
        return result
