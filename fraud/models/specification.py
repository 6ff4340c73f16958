"""Checks that this release supports a feature specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from fraud.columns.table import Table
from fraud.columns.times import check_form
from fraud.currencies import MAX_MINOR_DIGITS
from fraud.errors import BundleError
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.forms import MAX_WHOLE_FLOAT
from fraud.schema import ID_FIELDS, POSITION_ROLES, TEXT_ROLES, Feature, FeatureSpec

MAX_FEATURES = 4096
MAX_CATEGORIES = 100_000
MAX_NAME_LENGTH = 256
MAX_QUANTILES = 1000
MAX_CURRENCIES = 1000
MAX_JOINED = 16
KNOWN_ROLES = (*TEXT_ROLES, *POSITION_ROLES, "currency")
RESERVED = {*ID_FIELDS, "event_time"} - {"merchant_id"}


def expect_specification(spec: FeatureSpec, path: Path) -> None:
    """Check that a specification holds together.

    Raises
    ------
    BundleError
        Names the feature or role, the fault and the file.
    """
    names, roles = [feature.name for feature in spec.features], [role.name for role in spec.roles]
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: spec.format_version == 1, f"has format {spec.format_version}; this release reads format 1"),
        (lambda: 1 <= len(names) <= MAX_FEATURES, f"has {len(names)} features; 1 to {MAX_FEATURES} are allowed"),
        (lambda: len(set(names)) == len(names), "names a feature twice"),
        (lambda: len(set(roles)) == len(roles), "names a role twice"),
        (lambda: {*roles} <= {*KNOWN_ROLES}, f"has a role that is none of {', '.join(KNOWN_ROLES)}"),
        (lambda: names[: len(spec.derived)] == list(spec.derived), "has a history feature behind one of the request"),
        (lambda: _currencies_hold(spec), "has currencies without their role, or scales that are none"),
        (lambda: spec.kind != "features" or not (roles or spec.derived), "is of ready features, and asks for history"),
        (lambda: _table_fits(spec), "has a table of training whose columns are not those of its roles and features"),
    ]
    for holds, otherwise in checks:
        if not holds():
            raise BundleError(f"{path} {otherwise}")
    if spec.table is not msgspec.UNSET and (wrong := _wrong_with_times(spec.table)):
        raise BundleError(f"{path}: the table of training {wrong}")
    for feature in spec.features:
        if wrong := _wrong_with(feature, set(roles) if spec.kind != "features" else set()):
            raise BundleError(f"{path}: feature {feature.name[:MAX_NAME_LENGTH]!r} {wrong}")


def _currencies_hold(spec: FeatureSpec) -> bool:
    if spec.currencies is msgspec.UNSET:
        return all(role.name != "currency" for role in spec.roles)
    by_role = [role for role in spec.roles if role.name == "currency"]
    return (
        len(by_role) == 1
        and 1 <= len(spec.currencies) <= MAX_CURRENCIES
        and (len(spec.currencies) == 1 or not by_role[0].missing)
        and all(
            0 <= currency.minor_digits <= MAX_MINOR_DIGITS and 1 <= currency.typical_minor_units < MAX_WHOLE_FLOAT
            for currency in spec.currencies.values()
        )
    )


def _table_fits(spec: FeatureSpec) -> bool:
    if spec.table is msgspec.UNSET:
        return True
    fields = [column.field for column in spec.table.columns]
    allowed = {"transaction_id", *(feature.name for feature in spec.requested)}
    if spec.kind == "transaction":
        allowed |= {"event_time", "customer_id", "amount", *(role.name for role in spec.roles)}
    return (
        len(set(fields)) == len(fields)
        and {*fields} <= allowed
        and all(
            1 <= len(column.columns) <= MAX_JOINED and all(len(name) <= MAX_NAME_LENGTH for name in column.columns)
            for column in spec.table.columns
        )
        and len(spec.table.nulls) <= MAX_JOINED
    )


def _wrong_with_times(table: Table) -> str | None:
    """Return what is wrong with the notation of a column, of which nothing else is built before a row arrives."""
    for column in table.columns:
        if (column.time is None) != (column.reads != "time"):
            return f"reads {column.field[:MAX_NAME_LENGTH]!r} as {column.reads}, which does not fit its options"
        if column.time is None:
            continue
        try:
            check_form(column.time)
        except ValueError as error:
            return f"has times that cannot be read: {error}"
    return None


def expect_preprocessor(spec: FeatureSpec, amount_quantiles: Sequence[float], path: Path) -> None:
    """Check that the amount quantiles are present and ascending if a feature ranks amounts; raises `BundleError`."""
    n = len(amount_quantiles)
    rising = all(a <= b for a, b in pairwise(amount_quantiles))
    if n > MAX_QUANTILES or not rising or (spec.kind != "features" and n == 0):
        raise BundleError(f"{path} has {n} amount_quantiles; 1 to {MAX_QUANTILES} that never fall are allowed")


def _wrong_with(feature: Feature, roles: set[str]) -> str | None:
    categories = feature.categories
    if not 1 <= len(feature.name) <= MAX_NAME_LENGTH:
        return f"has a name of {len(feature.name)} characters; 1 to {MAX_NAME_LENGTH} are allowed"
    if feature.source == "history":
        return None if feature.name in HISTORY_FEATURES else "is no feature of the history that this release knows"
    if feature.name in RESERVED:
        return "has the name of an id or time"
    if feature.name in roles & set(TEXT_ROLES) and feature.type != "categorical":
        return f"is the text of a role, and {feature.type}"
    numbers = {"amount", *(roles & set(POSITION_ROLES))} if roles else set()
    if feature.name in numbers and feature.type != "numeric":
        return f"is the number of a role, and {feature.type}"
    if len(categories) > (MAX_CATEGORIES if feature.type == "categorical" else 0):
        return f"is {feature.type} and has {len(categories)} categories"
    if len(set(categories)) != len(categories):
        return "names a category twice"
    lowest, highest = feature.minimum, feature.maximum
    if lowest is not None and highest is not None and not lowest <= highest:
        return f"has the minimum {lowest} above the maximum {highest}"
    return None if all(bound is None or math.isfinite(bound) for bound in (lowest, highest)) else "has no finite bounds"
