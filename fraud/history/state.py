"""The states of a customer and of a merchant; `updates` applies transactions to them, `frauds` labels.

Both states are records of fixed size, all counters whole numbers (money in minor units, logarithms in
1/65536), so a state depends on the set of updates and not on their order: concurrent writers, retries after a fault and
a serial run end in the same bytes.

A state keeps

- the latest transactions one by one (`RING` of a customer, `MERCHANT_RING` of a merchant), exact;
- counts and sums per UTC day for `DAYS` days, so a window of w days is today and the w - 1 days before;
- totals and habits since the first transaction;
- the known frauds, by the day they happened and by the day they became known.

Late transactions. A transaction that arrives after a later one is added to everything that still covers its time. It is
scored on the state as of its own time (`customer_as_of`, `merchant_as_of`): the state without the later transactions,
exact while these are still in the ring. A fraud counts from the moment its label is applied until it is withdrawn.
Offline replay applies the same updates in order of arrival.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np

MS_PER_HOUR = 3_600_000
MS_PER_DAY = 86_400_000
RING = 24
MERCHANT_RING = 16
DAYS = 38  # the 30-day window, a week of label delay, and today
HOURS = 25
AMOUNT_BINS = 48
MERCHANT_SLOTS = 128
CATEGORY_SLOTS = 32
LOG_UNIT = 65536.0
MARK_FRAUD, NOTE_FRAUD = -1, -2
"""The effect of a label: mark a fraud, or repeat the current state. A number from 0 on withdraws that label's fraud."""
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
    return np.frombuffer(bytearray(empty_state(dtype) * n), dtype)  # np.repeat takes eight times as long


@lru_cache(maxsize=2)
def empty_state(dtype: np.dtype[np.void]) -> bytes:
    """Return the record of a customer or merchant without transactions."""
    state = np.zeros(1, dtype)
    for name in ("last_time", "last_fraud_time", "last_label_time"):
        state[name] = NEVER
    state["first_time"] = np.iinfo(np.int64).max
    state["last_day"] = np.iinfo(np.int32).min
    if dtype is MERCHANT:
        state["last_hour"] = np.iinfo(np.int32).min
    return state.tobytes()
