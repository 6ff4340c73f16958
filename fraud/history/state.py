"""The states of a customer and of a merchant, and how a transaction or label updates them.

Both states are records of fixed size, all counters whole numbers (money in minor units, logarithms in
1/65536), so a state depends on the set of updates and not on their order: concurrent writers, retries after a fault and
a serial run end in the same bytes.

A state keeps

- the latest transactions one by one (`RING` of a customer, `MERCHANT_RING` of a merchant), exact;
- counts and sums per UTC day for `DAYS` days, so a window of w days is today and the w - 1 days before;
- totals and habits since the first transaction;
- the known frauds, by the day they happened and by the day they became known.

Late transactions. A transaction that arrives after a later one is added to everything that still covers its time. It is
scored on the state `*_as_of` its own time: the state without the later transactions, exact while these are still in the
ring. A fraud counts from the moment its label is applied until it is withdrawn. Offline replay applies the same updates
in order of arrival.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numba import njit

from fraud.errors import StoreError

MS_PER_HOUR = 3_600_000
MS_PER_DAY = 86_400_000
RING = 24
MERCHANT_RING = 16
DAYS = 38  # the 30-day window, a week of label delay, and today
HOURS = 25
AMOUNT_BINS = 48
MERCHANT_SLOTS = 128
CATEGORY_SLOTS = 32
ENCODING_VERSION = 2
LOG_UNIT = 65536.0
NEVER = np.int64(np.iinfo(np.int64).min)

TRANSACTION = np.dtype(
    [
        ("time", "i8"),  # event time, ms since the epoch
        ("amount", "f8"),
        ("latitude", "f8"),
        ("longitude", "f8"),
        ("merchant_latitude", "f8"),
        ("merchant_longitude", "f8"),
        ("id", "u4"),
        ("customer", "u4"),
        ("merchant", "u4"),
        ("category", "u4"),
        ("device", "u4"),
    ],
    align=True,
)
"""One transaction as the kernels read it: ids as `token`s (0 for none), positions NaN where unknown."""

_TOTALS = [
    ("first_time", "i8"),
    ("last_time", "i8"),
    ("log_sum", "i8"),
    ("log_square", "i8"),
    ("last_fraud_time", "i8"),
    ("last_label_time", "i8"),
    ("count", "u4"),
    ("fraud_count", "u4"),
    ("last_fraud_amount", "u4"),
    ("last_day", "i4"),
    ("ring_size", "u4"),
]

CUSTOMER = np.dtype(
    [
        *_TOTALS,
        ("day_max", "u4", (DAYS,)),
        ("day_fraud", "u1", (DAYS,)),
        ("day_label", "u1", (DAYS,)),
        ("day_amount", "u4", (DAYS,)),
        ("day_count", "u2", (DAYS,)),
        ("amount_sum", "i8"),
        ("amount_square_high", "i8"),  # squares of minor units need more than 64 bits: high * 2**32 + low
        ("amount_square_low", "i8"),
        ("ring_time", "i8", (RING,)),
        ("ring_id", "u4", (RING,)),
        ("ring_amount", "u4", (RING,)),
        ("ring_merchant", "u4", (RING,)),
        ("ring_category", "u4", (RING,)),
        ("ring_device", "u4", (RING,)),
        ("ring_latitude", "f4", (RING,)),
        ("ring_longitude", "f4", (RING,)),
        ("hour_count", "u2", (24,)),
        ("weekday_count", "u2", (7,)),
        ("amount_count", "u2", (AMOUNT_BINS,)),
        ("category_count", "u2", (CATEGORY_SLOTS,)),
        ("merchant_count", "u1", (MERCHANT_SLOTS,)),
    ]
)

MERCHANT = np.dtype(
    [
        *_TOTALS,
        ("day_max", "u4", (DAYS,)),
        ("day_fraud", "u2", (DAYS,)),
        ("day_label", "u2", (DAYS,)),
        ("day_amount", "i8", (DAYS,)),
        ("day_count", "u4", (DAYS,)),
        ("last_hour", "i4"),
        ("hour_count", "u2", (HOURS,)),
        ("ring_time", "i8", (MERCHANT_RING,)),
        ("ring_id", "u4", (MERCHANT_RING,)),
        ("ring_amount", "u4", (MERCHANT_RING,)),
    ]
)


def fresh_token(text: str) -> int:
    """Return the 32-bit hash of an id, never 0, that states hold."""
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little") or 1


@lru_cache(maxsize=1 << 12)
def token(text: str | None) -> int:
    """Return `fresh_token` of an id, cached, or 0 for None.

    A larger cache would save 1 µs for rare ids, and take 200 bytes for each.
    """
    return 0 if text is None else fresh_token(text)


def new_states(dtype: np.dtype[np.void], n: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return `n` empty states of customers or merchants."""
    return np.frombuffer(bytearray(_nobody(dtype) * n), dtype)  # np.repeat takes eight times as long


@lru_cache(maxsize=2)
def _nobody(dtype: np.dtype[np.void]) -> bytes:
    state = np.zeros(1, dtype)
    for name in ("last_time", "last_fraud_time", "last_label_time"):
        state[name] = NEVER
    state["first_time"] = np.iinfo(np.int64).max
    state["last_day"] = np.iinfo(np.int32).min
    if dtype is MERCHANT:
        state["last_hour"] = np.iinfo(np.int32).min
    return state.tobytes()


def encode(state: np.void, updates: int | None = None) -> bytes:
    """Return one state as bytes: the encoding's version, the number of updates, then the record.

    Parameters
    ----------
    updates : int, optional
        The number of updates, withdrawn labels included; it grows with each one, so the newer of two copies is known.
        By default the number of transactions and frauds.
    """
    updates = int(state["count"]) + int(state["fraud_count"]) if updates is None else updates
    return _HEADER.pack(ENCODING_VERSION, updates & 0xFFFFFFFF) + state.tobytes()


def told_of(blob: bytes) -> int:
    """Return the number of updates of an encoded state of a version known here."""
    updates: int = _HEADER.unpack_from(upgraded(blob))[1]
    return updates


def upgraded(blob: bytes) -> bytes:
    """Return an encoded state in this release's encoding; one of a later release is unchanged."""
    while blob[0] in UPGRADERS:
        blob = UPGRADERS[blob[0]](blob)
    return blob


def decode(
    blobs: Sequence[bytes | None], dtype: np.dtype[np.void], unread: list[int] | None = None
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return the states in `blobs`; None is a new customer or merchant.

    Parameters
    ----------
    unread : list of int, optional
        Receives the indices of blobs that a later release wrote; their states come back empty.

    Raises
    ------
    StoreError
        A blob was written by a later release and `unread` is not given, or it is damaged.
    """
    nobody = _nobody(dtype)
    parts = []
    for place, blob in enumerate(blobs):
        if blob is None:
            parts.append(nobody)
            continue
        blob = upgraded(blob)
        if blob[0] > ENCODING_VERSION and unread is not None:
            unread.append(place)
            parts.append(nobody)
            continue
        if blob[0] != ENCODING_VERSION or len(blob) != _HEADER.size + dtype.itemsize:
            raise StoreError(
                f"a stored state has version {blob[0]} and {len(blob)} bytes; this release reads version "
                f"{ENCODING_VERSION} of {_HEADER.size + dtype.itemsize} bytes, and those before it"
            )
        parts.append(blob[_HEADER.size :])
    return np.frombuffer(bytearray(b"".join(parts)), dtype)


def is_readable(blob: bytes) -> bool:
    """Return whether this release or an earlier one wrote an encoded state."""
    return blob[0] <= ENCODING_VERSION


def last_time_of(blob: bytes) -> int:
    """Return the event time of the latest transaction in an encoded state, ms."""
    at = _HEADER.size + _TIME_AT
    return int.from_bytes(upgraded(blob)[at : at + 8], "little", signed=True)


def _from_version_1(blob: bytes) -> bytes:
    """The first release wrote the record alone; the number of updates follows from its counters."""
    count, frauds = (int.from_bytes(blob[1 + at : 5 + at], "little") for at in _COUNTS_AT)
    return _HEADER.pack(2, (count + frauds) & 0xFFFFFFFF) + blob[1:]


_HEADER = struct.Struct("<BI")
_FIELDS: Any = CUSTOMER.fields  # the first fields of both kinds of state are the same
_TIME_AT: int = _FIELDS["last_time"][1]
_COUNTS_AT: list[int] = [_FIELDS[name][1] for name in ("count", "fraud_count")]
UPGRADERS: dict[int, Callable[[bytes], bytes]] = {1: _from_version_1}
"""By the version of an encoded state, what brings it to the next one. None is ever removed."""


# --- kernels


@njit(cache=True, nogil=True)
def minor_units(amount: Any) -> Any:
    """Return an amount in minor units as states store it, from 1 to 2**32 - 1."""
    return np.int64(min(max(amount * 100.0 + 0.5, 1.0), 4294967295.0))  # bounded first: int64 ends at 9.2e18


@njit(cache=True, nogil=True)
def log_units(minor: Any) -> Any:
    """Return ln(amount) in 1/65536; the rounding makes it the same under every C library."""
    return np.int64(math.floor(math.log(minor / 100.0) * LOG_UNIT + 0.5))


@njit(cache=True, nogil=True)
def amount_bin(minor: Any) -> Any:
    """Return the bin of the amount histogram: steps of 1/4 in ln(amount), from 0.37 to 60,000."""
    return min(max((log_units(minor) + 65536) // 16384, 0), AMOUNT_BINS - 1)


@njit(cache=True, nogil=True)
def hour_of_day(time: Any) -> Any:
    return (time // MS_PER_HOUR) % 24


@njit(cache=True, nogil=True)
def weekday_of(time: Any) -> Any:
    """Return 0 for Monday to 6 for Sunday, in UTC."""
    return (time // MS_PER_DAY + 3) % 7


@njit(cache=True, nogil=True)
def _add(counts: Any, at: Any, step: Any, top: Any) -> Any:
    """Add to one counter, which saturates at `top`."""
    counts[at] = min(max(np.int64(counts[at]) + step, 0), top)


@njit(cache=True, nogil=True)
def _day_slot(state: Any, day: Any) -> Any:
    """Return the slot of `day`, cleared if it is new, or -1 if the day is too old."""
    if day > state.last_day:
        for d in range(max(np.int64(state.last_day) + 1, day - DAYS + 1), day + 1):
            slot = d % DAYS
            state.day_count[slot] = 0
            state.day_amount[slot] = 0
            state.day_max[slot] = 0
            state.day_fraud[slot] = 0
            state.day_label[slot] = 0
        state.last_day = day
    return day % DAYS if day > state.last_day - DAYS else -1


@njit(cache=True, nogil=True)
def _hour_slot(m: Any, hour: Any) -> Any:
    if hour > m.last_hour:
        for h in range(max(np.int64(m.last_hour) + 1, hour - HOURS + 1), hour + 1):
            m.hour_count[h % HOURS] = 0
        m.last_hour = hour
    return hour % HOURS if hour > m.last_hour - HOURS else -1


@njit(cache=True, nogil=True)
def _ring_position(state: Any, time: Any, identity: Any) -> Any:
    """Return the position of (time, id) in the ring, which is sorted by them."""
    at = np.int64(state.ring_size)
    while at > 0 and (
        state.ring_time[at - 1] > time or (state.ring_time[at - 1] == time and state.ring_id[at - 1] > identity)
    ):
        at -= 1
    return at


@njit(cache=True, nogil=True)
def _insert(ring: Any, at: Any, size: Any, value: Any) -> Any:
    """Insert `value` at its position in a ring of `size` entries; a full ring drops its oldest."""
    if size < len(ring):
        for i in range(size, at, -1):
            ring[i] = ring[i - 1]
        ring[at] = value
    elif at > 0:
        for i in range(1, at):
            ring[i - 1] = ring[i]
        ring[at - 1] = value


@njit(cache=True, nogil=True)
def _count_totals(state: Any, minor: Any, step: Any) -> Any:
    log = log_units(minor)
    state.count += step
    state.log_sum += step * log
    state.log_square += step * log * log


@njit(cache=True, nogil=True)
def _count_habits(c: Any, time: Any, minor: Any, merchant: Any, category: Any, step: Any) -> Any:
    """Add (step 1) or remove (step -1) one transaction in a customer's totals and habits."""
    _count_totals(c, minor, step)
    square = np.uint64(minor) * np.uint64(minor)
    c.amount_sum += step * minor
    c.amount_square_high += step * np.int64(square >> np.uint64(32))
    c.amount_square_low += step * np.int64(square & np.uint64(0xFFFFFFFF))
    _add(c.hour_count, hour_of_day(time), step, 65535)
    _add(c.weekday_count, weekday_of(time), step, 65535)
    _add(c.amount_count, amount_bin(minor), step, 65535)
    if category != 0:
        _add(c.category_count, category % CATEGORY_SLOTS, step, 65535)
    if merchant != 0:
        _add(c.merchant_count, merchant % MERCHANT_SLOTS, step, 255)
        _add(c.merchant_count, (merchant >> 16) % MERCHANT_SLOTS, step, 255)


@njit(cache=True, nogil=True)
def _count_day(state: Any, time: Any, minor: Any) -> Any:
    slot = _day_slot(state, time // MS_PER_DAY)
    if slot >= 0:
        _add(state.day_count, slot, 1, 65535)
        _add(state.day_amount, slot, minor, 4294967295)
        state.day_max[slot] = max(np.int64(state.day_max[slot]), minor)


@njit(cache=True, nogil=True)
def update_customer(c: Any, t: Any) -> Any:
    """Apply one transaction to a customer's state."""
    minor = minor_units(t.amount)
    c.first_time = min(c.first_time, t.time)
    c.last_time = max(c.last_time, t.time)
    _count_habits(c, t.time, minor, t.merchant, t.category, 1)
    _count_day(c, t.time, minor)
    at = _ring_position(c, t.time, t.id)
    size = np.int64(c.ring_size)
    at_merchant = not math.isnan(t.merchant_latitude)
    _insert(c.ring_time, at, size, t.time)
    _insert(c.ring_id, at, size, t.id)
    _insert(c.ring_amount, at, size, minor)
    _insert(c.ring_merchant, at, size, t.merchant)
    _insert(c.ring_category, at, size, t.category)
    _insert(c.ring_device, at, size, t.device)
    _insert(c.ring_latitude, at, size, t.merchant_latitude if at_merchant else t.latitude)
    _insert(c.ring_longitude, at, size, t.merchant_longitude if at_merchant else t.longitude)
    c.ring_size = min(size + 1, RING)


@njit(cache=True, nogil=True)
def update_merchant(m: Any, t: Any) -> Any:
    """Apply one transaction to a merchant's state."""
    minor = minor_units(t.amount)
    m.first_time = min(m.first_time, t.time)
    m.last_time = max(m.last_time, t.time)
    _count_totals(m, minor, 1)
    _count_day(m, t.time, minor)
    slot = _hour_slot(m, t.time // MS_PER_HOUR)
    if slot >= 0:
        _add(m.hour_count, slot, 1, 65535)
    at = _ring_position(m, t.time, t.id)
    size = np.int64(m.ring_size)
    _insert(m.ring_time, at, size, t.time)
    _insert(m.ring_id, at, size, t.id)
    _insert(m.ring_amount, at, size, minor)
    m.ring_size = min(size + 1, MERCHANT_RING)


@njit(cache=True, nogil=True)
def note_fraud(state: Any, time: Any, label_time: Any) -> Any:
    """Record that a label called a transaction of `time` fraud, even if another label overrules it.

    Opens the days that the label counts for, so that these depend on the set of labels and not on their order.
    """
    state.last_label_time = max(state.last_label_time, label_time)
    _day_slot(state, label_time // MS_PER_DAY)
    _day_slot(state, time // MS_PER_DAY)


@njit(cache=True, nogil=True)
def tell_fraud(state: Any, time: Any, amount: Any, label_time: Any) -> Any:
    """Mark a transaction of `time` and `amount` as fraud in a customer's or a merchant's state."""
    note_fraud(state, time, label_time)
    minor = minor_units(amount)
    if (time, minor) > (state.last_fraud_time, np.int64(state.last_fraud_amount)):
        state.last_fraud_time = time
        state.last_fraud_amount = minor
    state.fraud_count += 1
    _count_fraud(state, time, label_time, 1)


@njit(cache=True, nogil=True)
def _count_fraud(state: Any, time: Any, label_time: Any, step: Any) -> Any:
    top = 255 if state.day_label.itemsize == 1 else 65535
    slot = _day_slot(state, label_time // MS_PER_DAY)
    if slot >= 0:
        _add(state.day_label, slot, step, top)
    slot = _day_slot(state, time // MS_PER_DAY)
    if slot >= 0:
        _add(state.day_fraud, slot, step, top)


@njit(cache=True, nogil=True)
def take_back_fraud(state: Any, time: Any, label_time: Any) -> Any:
    """Withdraw a fraud that the state contains; `needs_frauds` must be false for it."""
    state.fraud_count -= min(state.fraud_count, 1)
    _count_fraud(state, time, label_time, -1)


@njit(cache=True, nogil=True)
def needs_frauds(state: Any, time: Any, amount: Any, label_time: Any) -> Any:
    """Return whether a fraud can be withdrawn only by applying all other frauds of the state again.

    It is the last one, and the state does not hold the one before, or its counter is saturated.
    """
    if (time, minor_units(amount)) == (state.last_fraud_time, np.int64(state.last_fraud_amount)):
        return True
    top = 255 if state.day_label.itemsize == 1 else 65535
    label_slot, slot = _day_slot(state, label_time // MS_PER_DAY), _day_slot(state, time // MS_PER_DAY)
    return (label_slot >= 0 and state.day_label[label_slot] == top) or (slot >= 0 and state.day_fraud[slot] == top)


@njit(cache=True, nogil=True)
def forget_frauds(state: Any) -> Any:
    """Clear all known frauds, to apply them again; the days that were opened stay open."""
    state.fraud_count = 0
    state.last_fraud_time = NEVER
    state.last_fraud_amount = 0
    for slot in range(DAYS):
        state.day_fraud[slot] = 0
        state.day_label[slot] = 0


@njit(cache=True, nogil=True)
def _pop_latest(state: Any) -> Any:
    """Remove the latest transaction from the ring and its day; return its time, amount and old position."""
    at = np.int64(state.ring_size) - 1
    time, minor = state.ring_time[at], np.int64(state.ring_amount[at])
    state.ring_size = at
    state.last_time = state.ring_time[at - 1] if at > 0 else NEVER
    day = time // MS_PER_DAY
    slot = _day_slot(state, day)
    if slot >= 0:
        _add(state.day_count, slot, -1, 65535)
        _add(state.day_amount, slot, -minor, 4294967295)
        top = np.int64(0)
        for i in range(at):
            if state.ring_time[i] // MS_PER_DAY == day:
                top = max(top, np.int64(state.ring_amount[i]))
        state.day_max[slot] = top
    return time, minor, at


@njit(cache=True, nogil=True)
def customer_as_of(c: Any, time: Any) -> Any:
    """Remove from a copy of a customer's state the transactions later than `time`."""
    while c.ring_size > 0 and c.ring_time[c.ring_size - 1] > time:
        then, minor, at = _pop_latest(c)
        _count_habits(c, then, minor, c.ring_merchant[at], c.ring_category[at], -1)


@njit(cache=True, nogil=True)
def merchant_as_of(m: Any, time: Any) -> Any:
    """Remove from a copy of a merchant's state the transactions later than `time`."""
    while m.ring_size > 0 and m.ring_time[m.ring_size - 1] > time:
        then, minor, _ = _pop_latest(m)
        _count_totals(m, minor, -1)
        slot = _hour_slot(m, then // MS_PER_HOUR)
        if slot >= 0:
            _add(m.hour_count, slot, -1, 65535)
