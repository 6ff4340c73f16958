"""Hourly counts of what went in and came out: all that the drift tests need of the decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import islice
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import ACTIONS
from fraud.errors import DataError
from fraud.monitoring.hours import HOUR_MS, WEEK
from fraud.monitoring.sequential import ChannelKind, Floats
from fraud.schema import FeatureSpec
from fraud.stores.log import Entry
from fraud.stores.rows import decode_record

Counts: TypeAlias = NDArray[np.int64]
VALUES, MISSING, BINS = 10, 10, 11
"""A number's tenths, or a category's eight most frequent values and the rest; then missing, in the last bin."""
LARGEST = 8
SCORE, DECISION = "(score)", "(decision)"
AT_ONCE = 16_384


class Layout(NamedTuple):
    """How values are put into bins.

    Attributes
    ----------
    names : list of str
        The features, `SCORE` and `DECISION`.
    cuts : list of ndarray
        Of a number, the nine values between its tenths in training; of a category, the bin of each code.
    categories : list of list of str
        Of a category, the names of its bins; empty for a number.
    key : str
        Another layout has another key.
    """

    names: list[str]
    cuts: list[NDArray[Any]]
    categories: list[list[str]]
    key: str

    @property
    def n_features(self) -> int:
        return len(self.names) - 2


class HourlyCounts(Protocol):
    """Where counts are kept; `fraud.stores.hourly_counts` has it."""

    def place(self, key: str) -> int: ...

    def add(self, key: str, after: int, place: int, counts: Mapping[int, Counts]) -> None: ...

    def read(self, key: str) -> dict[int, Counts]: ...


class Rows(Protocol):
    """A decision log that is read after one place; `fraud.stores.log.DecisionLog` has it."""

    def rows(self, after: int = 0) -> Iterator[Entry]: ...


class Series(NamedTuple):
    """Channels over consecutive hours from a Monday's first.

    Attributes
    ----------
    first : datetime
    names : list of str
        Such as ``amount: location`` and ``category=cafe``.
    kinds : list of ChannelKind
    y, n : (n_channels, n_hours) float64
    """

    first: datetime
    names: list[str]
    kinds: list[ChannelKind]
    y: Floats
    n: Floats


def layout_of(model: str, spec: FeatureSpec, reference: Mapping[str, Any]) -> Layout:
    """Return the layout by the distributions in a bundle's `reference.json`.

    Raises
    ------
    DataError
        The bundle has no reference.
    """
    features = reference.get("features", {})
    score = next((reference[name] for name in ("fraud_probability", "anomaly_score") if name in reference), None)
    if score is None or any(feature.name not in features for feature in spec.features):
        raise DataError(f"the bundle of {model} has no reference of its features and scores; train it anew")
    cuts: list[NDArray[Any]] = []
    categories: list[list[str]] = []
    for feature in spec.features:
        facts = features[feature.name]
        if feature.type == "categorical":
            shares = np.array(facts["shares"])
            kept = np.argsort(-shares, kind="stable")[:LARGEST]
            bins = np.full(len(shares), LARGEST, np.int64)
            bins[kept] = np.arange(len(kept))
            cuts.append(bins)
            categories.append([*(feature.categories[i] for i in kept), *(["other"] * (len(shares) > LARGEST))])
        else:
            cuts.append(np.array(facts["deciles"][1:-1], np.float64))
            categories.append([])
    cuts += [np.array(score["deciles"][1:-1], np.float64), np.arange(len(ACTIONS))]
    names = [*spec.names, SCORE, DECISION]
    said = msgspec.msgpack.encode((model, names, [c.tolist() for c in cuts]))
    return Layout(names, cuts, [*categories, [], list(ACTIONS)], blake2b(said, digest_size=16).hexdigest())


def keep_counting(
    log: Rows, store: HourlyCounts, layout: Layout, model: str, reads_alike: Callable[[str], bool]
) -> int:
    """Count the decisions that the log has after those counted before; return how many were counted.

    Counts and the place in the log are written together, so that a decision counts once, whenever this is killed.

    Parameters
    ----------
    reads_alike : callable
        Whether the version of a digest has the layout's features, in its order; others are not counted.
    """
    counted, after = 0, store.place(layout.key)
    for part in _parts(log.rows(after=after), AT_ONCE):
        records = [decode_record(entry.logged.record) for entry in part]
        mine = [record for record in records if record.model_name == model and reads_alike(record.model_digest)]
        store.add(layout.key, after, part[-1].logged.sequence, count(layout, mine))
        after = part[-1].logged.sequence
        counted += len(mine)
    return counted


def count(layout: Layout, records: Sequence[DecisionRecord]) -> dict[int, Counts]:
    """Return by hour (since 1970, of the processing) how many values fell into each bin, (n_names, BINS)."""
    if not records:
        return {}
    hour = np.array([record.processing_time_ms for record in records]) // HOUR_MS
    X = np.frombuffer(b"".join([record.features for record in records]), "<f8").reshape(-1, layout.n_features)
    score = np.array([record.decision_score for record in records])
    action = np.array([ACTIONS.index(record.decision) for record in records], np.float64)
    codes = np.empty((len(layout.names), len(records)), np.int64)
    columns = [*X.T, score, action]
    for j, (column, cuts, categories) in enumerate(zip(columns, layout.cuts, layout.categories, strict=True)):
        known = ~np.isnan(column)
        if categories:
            at = np.where(known, column, 0).astype(np.int64)
            known &= (at >= 0) & (at < len(cuts))
            bins = cuts[np.where(known, at, 0)] if len(cuts) else np.zeros(len(column), np.int64)
        else:
            bins = np.searchsorted(cuts, column, side="right")
        codes[j] = np.where(known, bins, MISSING)
    hours, place = np.unique(hour, return_inverse=True)
    size = len(layout.names) * BINS
    flat = (place * size + np.arange(len(layout.names))[:, None] * BINS + codes).ravel()
    found = np.bincount(flat, minlength=len(hours) * size).reshape(len(hours), len(layout.names), BINS)
    return dict(zip(hours.tolist(), found, strict=True))


def series_of(layout: Layout, counts: Mapping[int, Counts], reference_weeks: int, until_hour: int) -> Series:
    """Return the channels from the first Monday of the counts up to an hour, which is left out.

    Parameters
    ----------
    reference_weeks : int
        Scores of a number's bins are chosen on so many weeks, so that mean and variance are 0 and 1 there.

    Raises
    ------
    DataError
        There is no whole week.
    """
    first = (min(counts, default=until_hour) - 96 + WEEK - 1) // WEEK * WEEK + 96
    n_hours = until_hour - first
    if n_hours < WEEK:
        raise DataError("no whole week, Monday to Sunday UTC, has been counted yet")
    cube = np.zeros((n_hours, len(layout.names), BINS))
    for hour, found in counts.items():
        if first <= hour < until_hour:
            cube[hour - first] = found
    names: list[str] = ["volume"]
    kinds: list[ChannelKind] = ["volume"]
    total = cube[:, 0].sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        y, n = [np.where(total > 0, np.log(total), np.nan)], [total]
        for j, name in enumerate(layout.names):
            present = cube[:, j, :VALUES].sum(axis=1)
            for title, kind, values, size in _channels(layout, j, cube[:, j], present, total, reference_weeks * WEEK):
                names.append(f"{name}{title}")
                kinds.append(kind)
                y.append(np.where(size > 0, values, np.nan))
                n.append(size)
    return Series(datetime.fromtimestamp(first * 3600, UTC), names, kinds, np.array(y), np.array(n))


def psi(expected: Floats, seen: Floats) -> float:
    """Return the population stability index of two rows of counts: sum of (p - q) ln(p / q)."""
    p, q = (np.maximum(row / max(row.sum(), 1), 1e-4) for row in (seen, expected))
    return float(np.sum((p - q) * np.log(p / q)))


def _channels(
    layout: Layout, j: int, bins: Floats, present: Floats, total: Floats, reference_hours: int
) -> Iterator[tuple[str, ChannelKind, Floats, Floats]]:
    if layout.names[j] not in (SCORE, DECISION):
        yield ": missing", "rare", _root(bins[:, MISSING], total), total
    if layout.categories[j]:
        for k, category in enumerate(layout.categories[j]):
            yield f"={category}", "share", _root(bins[:, k], present), present
        return
    expected = bins[:reference_hours, :VALUES].sum(axis=0)
    if (expected > 0).sum() < 2:
        return  # constant: nothing to standardise by
    share = expected / expected.sum()
    normal = NormalDist()
    edges = np.r_[0.0, np.cumsum(share)]
    density = np.array([normal.pdf(normal.inv_cdf(e)) if 1e-12 < e < 1 - 1e-12 else 0.0 for e in edges])
    score = np.where(share > 0, (density[:-1] - density[1:]) / np.maximum(share, 1e-300), 0.0)
    score = (score - share @ score) / np.sqrt(share @ (score - share @ score) ** 2)
    second = score**2 - 1 - (share @ score**3) * score
    deviation = float(np.sqrt(share @ second**2))
    location = bins[:, :VALUES] @ score / present
    yield ": location", "location", location, present
    if deviation > 1e-6:
        spread = bins[:, :VALUES] @ (second / deviation) / present
        usual = np.flatnonzero(present[:reference_hours] > 0)
        squared = location[usual] ** 2 - np.mean(location[usual] ** 2)
        beta = float(squared @ spread[usual] / (squared @ squared)) if squared.any() else 0.0
        yield ": spread", "spread", spread - beta * location**2, present


def _root(x: Floats, n: Floats) -> Floats:
    found: Floats = 2 * np.sqrt((x + 0.375) / n)
    return found


def _parts(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    rows = iter(entries)
    while some := list(islice(rows, size)):
        yield some
