"""Recorded decisions with their labels, as columns: what monitoring reads of the store's decision log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from fraud.decisions.labels import Label, known_since, label_in_effect
from fraud.decisions.rules.effect import FRAUD, LEGITIMATE, UNKNOWN
from fraud.decisions.verdict import ACTIONS
from fraud.errors import DataError
from fraud.monitoring.measures import Floats, Ints
from fraud.stores.log import Entry
from fraud.stores.rows import decode_label, decode_record

NO_SEGMENT = "not said"
MOST_SEGMENTS = 20
OTHER = "other"
APPROVE, DECLINE = ACTIONS.index("approve"), ACTIONS.index("decline")


class Log(Protocol):
    """What is read of a decision log; `fraud.stores.log.DecisionLog` has it."""

    def rows(self) -> Iterator[Entry]: ...

    def labels(self) -> Iterator[Entry]: ...


class Traffic(NamedTuple):
    """Decisions of one model, n of them.

    Attributes
    ----------
    event_time_ms : (n,) int64
    version : (n,) int64
        Index into `versions`.
    score, amount : (n,) float64
    is_calibrated : (n,) int64
        1 where `score` is a probability.
    action : (n,) int64
        Index into `ACTIONS`.
    customer : (n,) int64
    label : (n,) int64
        `FRAUD`, `LEGITIMATE` or `UNKNOWN`, as known at `as_of_ms`.
    label_delay_ms : (n,) int64
        From the event to when a fraud was known; -1 for all others.
    segments : dict of str to (n,) int64
        For each field that makes segments, index into `segment_values[field]`.
    """

    event_time_ms: Ints
    version: Ints
    score: Floats
    amount: Floats
    is_calibrated: Ints
    action: Ints
    customer: Ints
    label: Ints
    label_delay_ms: Ints
    segments: dict[str, Ints]
    segment_values: dict[str, list[str]]
    versions: list[str]
    as_of_ms: int


def read_traffic(
    log: Log,
    model: str,
    *,
    since_ms: int,
    as_of_ms: int,
    legitimate_after_ms: int,
    segment_fields: Sequence[str] = (),
) -> Traffic:
    """Return the decisions of a model on events from `since_ms` to `as_of_ms`, with what was known of them then.

    A transaction that was let through and has no label is legitimate once it is `legitimate_after_ms` old, as in
    training. A declined one without a label stays unknown however old it is: nobody saw what it would have become.

    Parameters
    ----------
    segment_fields : sequence of str
        Names of fields of the transaction as it was sent, such as ``channel``; the most frequent values are
        segments, the rest is ``other``.

    Raises
    ------
    DataError
        The log has no such decision.
    """
    labels = _labels(log.labels(), as_of_ms)
    n_fields = len(segment_fields)
    columns: tuple[list[float], ...] = tuple([] for _ in range(9))
    said: list[list[int]] = [[] for _ in range(n_fields)]
    values: list[dict[str, int]] = [{} for _ in range(n_fields)]
    versions: dict[str, int] = {}
    customers: dict[str, int] = {}
    for logged, key in log.rows():
        record = decode_record(logged.record)
        if record.model_name != model or not since_ms <= record.event_time_ms < as_of_ms:
            continue
        of_record = labels.get(key, ())
        action = ACTIONS.index(record.decision)
        label = _value(of_record)
        if label == UNKNOWN and action != DECLINE and record.event_time_ms + legitimate_after_ms <= as_of_ms:
            label = LEGITIMATE
        known_ms = known_since(of_record) if label == FRAUD else None
        row = (
            record.event_time_ms,
            versions.setdefault(record.model_digest, len(versions)),
            record.decision_score,
            record.history_amount,
            record.fraud_probability is not None,
            action,
            customers.setdefault(record.customer_id or key, len(customers)),
            label,
            -1 if known_ms is None else max(0, known_ms - record.event_time_ms),
        )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
        if n_fields:
            sent = _fields(record.transaction)
            for field, codes, column_of in zip(segment_fields, values, said, strict=True):
                text = str(sent.get(field, NO_SEGMENT))[:128]
                column_of.append(codes.setdefault(text, len(codes)))
    if not columns[0]:
        raise DataError(
            f"the decision log has no decision of {model} on events of the time asked for; "
            "name another model with --model, or an earlier --since"
        )
    time, version, score, amount, calibrated, actions, customer, labelled, delay = columns
    found = [_limited(np.array(codes, np.int64), list(names)) for codes, names in zip(said, values, strict=True)]
    return Traffic(
        np.array(time, np.int64),
        np.array(version, np.int64),
        np.array(score, np.float64),
        np.array(amount, np.float64),
        np.array(calibrated, np.int64),
        np.array(actions, np.int64),
        np.array(customer, np.int64),
        np.array(labelled, np.int64),
        np.array(delay, np.int64),
        dict(zip(segment_fields, [codes for codes, _ in found], strict=True)),
        dict(zip(segment_fields, [names for _, names in found], strict=True)),
        list(versions),
        as_of_ms,
    )


def _labels(entries: Iterable[Entry], as_of_ms: int) -> dict[str, list[Label]]:
    """Return the labels of each decision that had arrived at a time, and were in effect by then."""
    found: dict[str, list[Label]] = {}
    for logged, key in entries:
        label = decode_label(logged.record)
        if max(label.arrived_ms, label.label_time_ms) <= as_of_ms:
            found.setdefault(key, []).append(label)
    return found


def _value(labels: Sequence[Label]) -> int:
    label = label_in_effect(labels)
    if label is None or label.is_fraud is None:
        return UNKNOWN
    return FRAUD if label.is_fraud else LEGITIMATE


def _fields(transaction: bytes) -> dict[str, object]:
    """Return a transaction as it was sent; nothing of a record of the first release, which has none."""
    if not transaction:
        return {}
    sent = msgspec.json.decode(transaction)
    return sent if isinstance(sent, dict) else {}


def _limited(codes: Ints, names: list[str]) -> tuple[Ints, list[str]]:
    """Keep the most frequent values of a field; the rest becomes `OTHER`."""
    if len(names) <= MOST_SEGMENTS:
        return codes, names
    kept = np.sort(np.argsort(-np.bincount(codes), kind="stable")[:MOST_SEGMENTS])
    new = np.full(len(names), MOST_SEGMENTS)
    new[kept] = np.arange(MOST_SEGMENTS)
    return new[codes], [*(names[i] for i in kept), OTHER]
