"""The replay: from the canonical table to `X` by a walk in order of arrival, and the feature specification."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from fraud.currencies import Currency
from fraud.decisions.labels import Label, label_effects
from fraud.features.featurizer import HISTORY_FEATURES, Featurizer, Matrix, Records
from fraud.history.state import CUSTOMER, MARK_FRAUD, MERCHANT, TRANSACTION, fresh_token, new_states, token
from fraud.schema import POSITION_ROLES, TEXT_ROLES, Feature, FeatureSpec, Role
from training.currencies import amounts_of, scales
from training.mapping import EVERY_LABEL, Mapping
from training.mapping_parts import BooleanColumn, CategoricalColumn, NumericColumn
from training.trained_table import trained_table

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
Progress = Callable[[int], None]

PIECE = 50_000
MAX_CATEGORIES = 200  # the rarest beyond are read as missing
CATEGORY_ROLES = ("category", "channel")
PERCENT = ", in percent of its currency's typical amount"
_MONEY = re.compile(
    r"amount(_log)?$|(customer|merchant)_amount_(sum|mean|max|min)_(\d+[hd]|lifetime)$|.*_last_amount_log$"
)


@dataclass(frozen=True)
class Arrays:
    """A table as arrays for the kernel, with the states that it updates."""

    transactions: Records
    customer_of: Ints
    merchant_of: Ints
    processing_times: Ints
    label_of: Ints
    label_times: Ints
    label_does: Ints
    in_effect: np.ndarray[tuple[int], np.dtype[np.uint8]]
    customers: Records
    merchants: Records


def transaction_spec(table: pd.DataFrame, mapping: Mapping, learn: slice) -> FeatureSpec:
    """Return the specification of a transaction model for a table.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    learn : slice
        The rows whose categories may be known: the training window.
    """
    roles = tuple(
        Role(role, missing=_may_be_missing(table, mapping, role))
        for role in (*TEXT_ROLES, *POSITION_ROLES)
        if role in table.columns
    )
    currencies: dict[str, Currency] | msgspec.UnsetType = msgspec.UNSET
    if mapping.currency is not None:
        currencies = scales(table, mapping.currency, learn)
        is_one = mapping.currency.constant is not None and len(currencies) == 1
        roles += (Role("currency", missing=is_one),)
    names = {role.name for role in roles}
    given = {"label"} if (table["label"] == 1).any() else set()
    given |= {
        short
        for short, role in (("merchant", "merchant_id"), ("category", "category"), ("device", "device_id"))
        if role in names
    }
    if "latitude" in names or "merchant_latitude" in names:
        given.add("position")
    if "latitude" in names and "merchant_latitude" in names:
        given.add("distance")
    scale = PERCENT if currencies else ""
    derived = [
        Feature(n, "history", meaning=f.meaning + (scale if _MONEY.match(n) else ""))
        for n, f in HISTORY_FEATURES.items()
        if f.requires <= given
    ]
    requested = [
        Feature(
            role,
            "request",
            "categorical",
            categories=_categories(table[role], learn, None),
            unknown="refuse" if mapping.is_strict(role) else "missing",
            missing=_may_be_missing(table, mapping, role),
        )
        for role in CATEGORY_ROLES
        if role in names
    ]
    features = (*derived, *requested, *further_features(table, mapping, learn))
    return FeatureSpec("transaction", features, roles, currencies=currencies, table=trained_table(table))


def _may_be_missing(table: pd.DataFrame, mapping: Mapping, role: str) -> bool:
    """Whether a request may lack a role.

    A missing text role is treated like a new value. A missing position is not: if no training row lacked a distance, a
    missing one would count as 0 km.
    """
    lenient = role in TEXT_ROLES and not mapping.is_strict(role)
    return lenient or bool(table[role].isna().any())


def further_features(table: pd.DataFrame, mapping: Mapping, learn: slice) -> list[Feature]:
    """Return the features that the mapping takes from the table as they are."""
    features = []
    for _, name, options in mapping.expanded(table.columns).further():
        missing = options.missing == "allowed"
        match options:
            case NumericColumn():
                feature = Feature(name, "request", minimum=options.minimum, maximum=options.maximum, missing=missing)
            case BooleanColumn():
                feature = Feature(name, "request", "boolean", missing=missing)
            case CategoricalColumn():
                categories = _categories(table[name], learn, options.categories)
                chosen = options.categories is not None or "unknown" in options.model_fields_set
                unknown = (
                    options.unknown if chosen else "missing"
                )  # as a category that only later rows of the table have
                feature = Feature(name, "request", "categorical", categories, unknown, missing=missing)
        features.append(feature)
    return features


def _categories(column: pd.Series[Any], learn: slice, allowed: Sequence[str] | None) -> tuple[str, ...]:
    if allowed is not None:
        return tuple(allowed)
    counts = column.iloc[learn].value_counts()
    counts = counts[counts > 0]
    ranked = sorted(counts.items(), key=lambda item: (-int(item[1]), str(item[0])))[:MAX_CATEGORIES]
    return tuple(sorted(str(name) for name, _ in ranked))


def arrays_of(
    table: pd.DataFrame, currencies: dict[str, Currency] | None = None, labels: Sequence[Label] | None = None
) -> Arrays:
    """Return the canonical table as arrays, with empty states.

    Parameters
    ----------
    currencies : dict, optional
        The scales of the model that will read the states, `FeatureSpec.currencies`.
    labels : sequence of Label, optional
        All labels of the table's transactions, in any order, instead of its columns label and label_time_ms, which hold
        one label each. Labels of other transactions are ignored.
    """
    n = len(table)
    transactions = np.zeros(n, TRANSACTION)
    transactions["time"] = table["event_time_ms"]
    transactions["amount"] = amounts_of(table, currencies or {})
    transactions["id"] = np.fromiter((fresh_token(name) for name in table["transaction_id"]), np.uint32, n)
    for field, role in (
        ("customer", "customer_id"),
        ("merchant", "merchant_id"),
        ("category", "category"),
        ("device", "device_id"),
    ):
        if role in table.columns:
            tokens = [token(str(name)) for name in table[role].cat.categories]
            transactions[field] = np.array([*tokens, 0], np.uint32)[table[role].cat.codes]
    for role in POSITION_ROLES:
        transactions[role] = table[role] if role in table.columns else np.nan
    label_of, label_times, label_does = _frauds_of(table) if labels is None else _labels_of(table, labels)
    merchants = table["merchant_id"] if "merchant_id" in table.columns else None
    return Arrays(
        transactions,
        _codes(table["customer_id"]),
        np.full(n, -1, np.int64) if merchants is None else _codes(merchants),
        table["processing_time_ms"].to_numpy(np.int64),
        label_of,
        label_times,
        label_does,
        np.zeros(len(label_of), np.uint8),
        new_states(CUSTOMER, len(table["customer_id"].cat.categories)),
        new_states(MERCHANT, 0 if merchants is None else len(merchants.cat.categories)),
    )


def _frauds_of(table: pd.DataFrame) -> tuple[Ints, Ints, Ints]:
    """Return the labels that a table has of its transactions, and the effect of each."""
    frauds = np.flatnonzero(table["label"].to_numpy() == 1)
    label_times = table["label_time_ms"].to_numpy(np.int64)
    if EVERY_LABEL in table.columns:
        several = [(at, i, label) for i, said in enumerate(table[EVERY_LABEL]) for label, at in said]
        single = frauds[[not said for said in table[EVERY_LABEL].iloc[frauds]]]
        known = sorted([*several, *((label_times[i], i, 1) for i in single)], key=lambda label: label[0])
        kept, does = label_effects([i for _, i, _ in known], [label == 1 for *_, label in known])
        effective = np.array([known[k][:2] for k in kept], np.int64).reshape(-1, 2)
        return np.ascontiguousarray(effective[:, 1]), np.ascontiguousarray(effective[:, 0]), does
    label_times = label_times[frauds]
    order = np.argsort(label_times, kind="stable")
    return frauds[order], label_times[order], np.full(len(frauds), MARK_FRAUD, np.int64)


def _labels_of(table: pd.DataFrame, labels: Sequence[Label]) -> tuple[Ints, Ints, Ints]:
    """Return the labels that change a history, in order of label time, and the effect of each."""
    place = {str(name): i for i, name in enumerate(table["transaction_id"])}
    known = sorted((label for label in labels if label.transaction_id in place), key=lambda label: label.order)
    kept, does = label_effects([place[x.transaction_id] for x in known], [x.is_fraud for x in known])
    effective = [known[i] for i in kept]
    label_of = np.array([place[label.transaction_id] for label in effective], np.int64)
    return label_of, np.array([label.label_time_ms for label in effective], np.int64), does


def _codes(ids: pd.Series[Any]) -> Ints:
    return np.asarray(ids.cat.codes, dtype=np.int64)


def replay(
    table: pd.DataFrame,
    featurizer: Featurizer,
    wanted: slice,
    progress: Progress | None = None,
    labels: Sequence[Label] | None = None,
) -> Matrix:
    """Walk the whole table in the order of arrival and return the features of the wanted rows.

    Parameters
    ----------
    table : DataFrame
        The canonical table.
    featurizer : Featurizer
    wanted : slice
        Rows of the table; the others only update histories.
    progress : callable, optional
        Called repeatedly with the number of rows walked.
    labels : sequence of Label, optional
        See `arrays_of`; each is applied at its label time.

    Returns
    -------
    X : (n_wanted, n_features) float64
    """
    arrays = arrays_of(table, featurizer.spec.currencies or None, labels)
    first, last, _ = wanted.indices(len(table))
    X = np.empty((last - first, len(featurizer.spec.features)), np.float64)
    places = np.full(len(table), -1)
    places[wanted] = np.arange(last - first)
    applied = 0
    for begin in range(0, last, PIECE):
        end = min(begin + PIECE, last)
        applied = featurizer.walk(
            arrays.customers,
            arrays.merchants,
            arrays.transactions,
            arrays.customer_of,
            arrays.merchant_of,
            places,
            X,
            arrays.processing_times,
            arrays.label_of,
            arrays.label_times,
            arrays.label_does,
            arrays.in_effect,
            applied,
            begin,
            end,
        )
        if progress is not None:
            progress(end)
    requested_columns(table.iloc[wanted], featurizer.spec, X[:, featurizer.n_derived :])
    return X


def requested_columns(table: pd.DataFrame, spec: FeatureSpec, X: Matrix) -> None:
    """Fill the columns of `X` that a caller sends, in the specification's codes; unknown categories become missing."""
    for j, feature in enumerate(spec.requested):
        column = table[feature.name]
        if feature.type == "categorical":
            codes = {name: float(i) for i, name in enumerate(feature.categories)}
            known = np.array([*(codes.get(str(name), np.nan) for name in column.cat.categories), np.nan])
            X[:, j] = known[column.cat.codes]
        else:
            X[:, j] = column.to_numpy(dtype=np.float64, na_value=np.nan)


def instances_of(table: pd.DataFrame, spec: FeatureSpec) -> list[bytes]:
    """Return rows of a table as the JSON instances that a caller would send."""
    names = [f.name for f in spec.requested if f.name in table.columns]
    if spec.kind == "transaction":
        names = ["transaction_id", "event_time", "customer_id", "amount", *(r.name for r in spec.roles), *names]
        times = pd.to_datetime(table["event_time_ms"], unit="ms", utc=True).dt.strftime("%Y-%m-%dT%H:%M:%S.%f")
        table = table.assign(event_time=times.str[:-3] + "Z")
    columns = table[list(dict.fromkeys(names))].astype(object)
    return [msgspec.json.encode({k: v for k, v in row.items() if not pd.isna(v)}) for row in columns.to_dict("records")]
