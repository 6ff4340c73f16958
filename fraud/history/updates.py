"""Kernels that apply a transaction to the states of its customer and merchant, and that undo the latest ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fraud.compiling import compiled
from fraud.history.state import (
    AMOUNT_BINS,
    CATEGORY_SLOTS,
    DAYS,
    HOURS,
    LOG_UNIT,
    MERCHANT_RING,
    MERCHANT_SLOTS,
    MS_PER_DAY,
    MS_PER_HOUR,
    NEVER,
    RING,
)


@compiled
def minor_units(amount: Any) -> Any:
    """Return an amount in minor units as states store it, from 1 to 2**32 - 1."""
    return np.int64(min(max(amount * 100.0 + 0.5, 1.0), 4294967295.0))  # bounded first: int64 ends at 9.2e18


@compiled
def log_units(minor: Any) -> Any:
    """Return ln(amount) in 1/65536; the rounding makes it the same under every C library."""
    return np.int64(math.floor(math.log(minor / 100.0) * LOG_UNIT + 0.5))


@compiled
def amount_bin(minor: Any) -> Any:
    """Return the bin of the amount histogram: steps of 1/4 in ln(amount), from 0.37 to 60,000."""
    return min(max((log_units(minor) + 65536) // 16384, 0), AMOUNT_BINS - 1)


@compiled
def hour_of_day(time: Any) -> Any:
    return (time // MS_PER_HOUR) % 24


@compiled
def weekday_of(time: Any) -> Any:
    """Return 0 for Monday to 6 for Sunday, in UTC."""
    return (time // MS_PER_DAY + 3) % 7


@compiled
def add_to(counts: Any, at: Any, step: Any, top: Any) -> Any:
    """Add to one counter, which saturates at `top`."""
    counts[at] = min(max(np.int64(counts[at]) + step, 0), top)


@compiled
def day_slot(state: Any, day: Any) -> Any:
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


@compiled
def _hour_slot(m: Any, hour: Any) -> Any:
    if hour > m.last_hour:
        for h in range(max(np.int64(m.last_hour) + 1, hour - HOURS + 1), hour + 1):
            m.hour_count[h % HOURS] = 0
        m.last_hour = hour
    return hour % HOURS if hour > m.last_hour - HOURS else -1


@compiled
def _ring_position(state: Any, time: Any, identity: Any) -> Any:
    """Return the position of (time, id) in the ring, which is sorted by them."""
    at = np.int64(state.ring_size)
    while at > 0 and (
        state.ring_time[at - 1] > time or (state.ring_time[at - 1] == time and state.ring_id[at - 1] > identity)
    ):
        at -= 1
    return at


@compiled
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


@compiled
def _count_totals(state: Any, minor: Any, step: Any) -> Any:
    log = log_units(minor)
    state.count += step
    state.log_sum += step * log
    state.log_square += step * log * log


@compiled
def _count_habits(c: Any, time: Any, minor: Any, merchant: Any, category: Any, step: Any) -> Any:
    """Add (step 1) or remove (step -1) one transaction in a customer's totals and habits."""
    _count_totals(c, minor, step)
    square = np.uint64(minor) * np.uint64(minor)
    c.amount_sum += step * minor
    c.amount_square_high += step * np.int64(square >> np.uint64(32))
    c.amount_square_low += step * np.int64(square & np.uint64(0xFFFFFFFF))
    add_to(c.hour_count, hour_of_day(time), step, 65535)
    add_to(c.weekday_count, weekday_of(time), step, 65535)
    add_to(c.amount_count, amount_bin(minor), step, 65535)
    if category != 0:
        add_to(c.category_count, category % CATEGORY_SLOTS, step, 65535)
    if merchant != 0:
        add_to(c.merchant_count, merchant % MERCHANT_SLOTS, step, 255)
        add_to(c.merchant_count, (merchant >> 16) % MERCHANT_SLOTS, step, 255)


@compiled
def _count_day(state: Any, time: Any, minor: Any) -> Any:
    slot = day_slot(state, time // MS_PER_DAY)
    if slot >= 0:
        add_to(state.day_count, slot, 1, 65535)
        add_to(state.day_amount, slot, minor, 4294967295)
        state.day_max[slot] = max(np.int64(state.day_max[slot]), minor)


@compiled
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


@compiled
def update_merchant(m: Any, t: Any) -> Any:
    """Apply one transaction to a merchant's state."""
    minor = minor_units(t.amount)
    m.first_time = min(m.first_time, t.time)
    m.last_time = max(m.last_time, t.time)
    _count_totals(m, minor, 1)
    _count_day(m, t.time, minor)
    slot = _hour_slot(m, t.time // MS_PER_HOUR)
    if slot >= 0:
        add_to(m.hour_count, slot, 1, 65535)
    at = _ring_position(m, t.time, t.id)
    size = np.int64(m.ring_size)
    _insert(m.ring_time, at, size, t.time)
    _insert(m.ring_id, at, size, t.id)
    _insert(m.ring_amount, at, size, minor)
    m.ring_size = min(size + 1, MERCHANT_RING)


@compiled
def _pop_latest(state: Any) -> Any:
    """Remove the latest transaction from the ring and its day; return its time, amount and old position."""
    at = np.int64(state.ring_size) - 1
    time, minor = state.ring_time[at], np.int64(state.ring_amount[at])
    state.ring_size = at
    state.last_time = state.ring_time[at - 1] if at > 0 else NEVER
    day = time // MS_PER_DAY
    slot = day_slot(state, day)
    if slot >= 0:
        add_to(state.day_count, slot, -1, 65535)
        add_to(state.day_amount, slot, -minor, 4294967295)
        top = np.int64(0)
        for i in range(at):
            if state.ring_time[i] // MS_PER_DAY == day:
                top = max(top, np.int64(state.ring_amount[i]))
        state.day_max[slot] = top
    return time, minor, at


@compiled
def customer_as_of(c: Any, time: Any) -> Any:
    """Remove from a copy of a customer's state the transactions later than `time`."""
    while c.ring_size > 0 and c.ring_time[c.ring_size - 1] > time:
        then, minor, at = _pop_latest(c)
        _count_habits(c, then, minor, c.ring_merchant[at], c.ring_category[at], -1)


@compiled
def merchant_as_of(m: Any, time: Any) -> Any:
    """Remove from a copy of a merchant's state the transactions later than `time`."""
    while m.ring_size > 0 and m.ring_time[m.ring_size - 1] > time:
        then, minor, _ = _pop_latest(m)
        _count_totals(m, minor, -1)
        slot = _hour_slot(m, then // MS_PER_HOUR)
        if slot >= 0:
            add_to(m.hour_count, slot, -1, 65535)
