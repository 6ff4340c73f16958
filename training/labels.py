"""The labels of a table: when each is known, and which of several for one transaction is in effect."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from training import ids, numbers, times
from training.columns import Reader
from training.mapping import Mapping

Times = NDArray[np.int64]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """What each row of a table says.

    Attributes
    ----------
    label : (n,) int8
        1, 0, or -1 where it is unknown.
    time_ms : (n,) int64
        When it became known; without meaning where it is unknown and no time is given.
    is_timed : (n,) bool
        Whether the row itself says when.
    """

    label: NDArray[np.int8]
    time_ms: Times
    is_timed: NDArray[np.bool_]


def read_labels(reader: Reader, mapping: Mapping, labelled: bool, event_time_ms: Times) -> Labels:
    """Return the labels of a table's rows; notes in the reader what breaks the contract.

    Parameters
    ----------
    labelled : bool
        Whether there must be both frauds and legitimate rows.
    event_time_ms : (n,) int64
    """
    present = reader.table.column_names
    spec = mapping.label
    n = len(event_time_ms)
    if spec is None or spec.column not in present:
        return Labels(np.full(n, -1, dtype=np.int8), event_time_ms, np.zeros(n, bool))
    before = len(reader.problems)
    rule = "must be 0 or 1, or empty where it is unknown"
    label = numbers.flag(reader, spec.column, "label", rule, spec.positive, spec.negative)
    if labelled and len(reader.problems) == before:
        counts = {value: int((label == value).sum()) for value in (1, 0)}
        for value, what in ((1, "fraud"), (0, "legitimate")):
            if counts[value] == 0:
                reader.reject(spec.column, "label", f"has no row with label {value} ({what}); a model needs both")
    label_time_ms = event_time_ms + (mapping.label_delay_ms or 0)
    given = np.zeros(n, bool)
    if mapping.label_time is not None and set(mapping.label_time.names) <= set(present):
        column = mapping.label_time.name
        before = len(reader.problems)
        given_ms = times.time_ms(reader, mapping.label_time, "label_time", missing=True, day_end=True)
        given = given_ms != times.MISSING_MS
        if len(reader.problems) == before:
            early = given & (given_ms < event_time_ms)
            reader.refuse(column, "label_time", "must not be before the event_time", early)
            if mapping.label_delay is None:
                reader.refuse(
                    column,
                    "label_time",
                    "must be given where there is a label, as the mapping has no label_delay",
                    ~given & (label >= 0),
                    lambda row: "missing",
                )
        label_time_ms = np.where(given, given_ms, label_time_ms)
    return Labels(label, label_time_ms, given)


def fold_labels(reader: Reader, mapping: Mapping) -> NDArray[Any] | None:
    """Make one row of the rows of one transaction that differ in their label and its time alone.

    The label with the latest time is in effect; of several with that time, the one furthest down. The row that is kept
    is the first of the consecutive rows that end with the label in effect and agree with it; it takes the place of the
    transaction's first row. Rows that differ in anything else are kept, for the caller to refuse.

    Returns
    -------
    every_label : (n,) object or None
        For each row that is kept, the (label, time in ms) of every row of its transaction in the order in which they
        became known; empty for transactions with one row. None if no transaction has several.

    Raises
    ------
    DataError
        A label, a label time or an event time of a table with such rows breaks the contract.
    """
    spec, label_time = mapping.transaction_id, mapping.label_time
    present = set(reader.table.column_names)
    if spec is None or label_time is None or mapping.label is None or mapping.event_time is None:
        return None
    if mapping.label.column not in present or not set(label_time.names) <= present:
        return None
    rows_of = _repeated(reader, mapping, spec.names)
    if not rows_of:
        return None
    event_time_ms = times.time_ms(reader, mapping.event_time, "event_time")
    found = read_labels(reader, mapping, False, event_time_ms)
    reader.finish()
    n = reader.table.num_rows
    takes = np.arange(n)
    is_left = np.ones(n, bool)
    every_label = np.empty(n, object)
    every_label[:] = [[] for _ in range(n)]
    for rows in rows_of:
        said = [i for i in rows if found.label[i] >= 0 or found.is_timed[i]]
        said.sort(key=lambda i: (found.time_ms[i], i))
        first = rows[0]
        is_left[rows[1:]] = False
        if said:
            effective = found.label[said[-1]]
            takes[first] = [*takewhile(lambda i: found.label[i] == effective, reversed(said))][-1]  # noqa: B023
            every_label[first] = [(int(found.label[i]), int(found.time_ms[i])) for i in said]
    reader.take(takes[is_left])
    _logger.info(
        "%s: %s rows are further labels of transactions; of each the latest label is in effect",
        *(reader.source, f"{n - int(is_left.sum()):,}"),
    )
    return every_label[is_left]


def _repeated(reader: Reader, mapping: Mapping, parts: tuple[str, ...]) -> list[list[int]]:
    """Return the rows of each transaction that has several, all of which agree in everything but the label."""
    before = len(reader.problems)
    assert mapping.transaction_id is not None
    names = ids.ids(reader, mapping.transaction_id, "transaction_id")[0]
    del reader.problems[before:]  # they are read again, and judged, when each has one row
    codes = _codes(names)
    counts = np.bincount(codes + 1)[codes + 1]
    rows = np.flatnonzero((codes >= 0) & (counts > 1))
    if len(rows) == 0:
        return []
    mapped = mapping.expanded(reader.table.column_names).columns()
    others = {c for role, columns in mapped.items() if role not in ("label", "label_time") for c in columns}
    groups: dict[int, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(int(codes[row]), []).append(row)
    first_of = np.array([groups[code][0] for code in codes[rows].tolist()])
    place = np.searchsorted(rows, first_of)
    agrees = np.ones(len(rows), bool)
    some = reader.table.take(rows)
    for column in others - set(parts):
        if column in some.column_names:
            of = _codes(some.column(column).combine_chunks())
            agrees &= of == of[place]
    differing = set(codes[rows][~agrees].tolist())
    return [own for code, own in groups.items() if code not in differing]


def _codes(values: Any) -> Times:
    """Return a number for each value, the same for the same; -1 where it is missing."""
    encoded = values if hasattr(values, "indices") else values.dictionary_encode()
    codes: Times = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes
