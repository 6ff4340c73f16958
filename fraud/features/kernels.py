"""The kernels that compute features from the two states of `fraud.history.state`.

`fraud.features.advance` calls them, offline and online alike.
Amounts inside are in minor units and times in ms; what is written to a row is in the units of
`fraud.features.featurizer.HISTORY_FEATURES`.
"""

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
    MERCHANT_SLOTS,
    MS_PER_DAY,
    MS_PER_HOUR,
    NEVER,
)
from fraud.history.updates import amount_bin, hour_of_day, log_units, minor_units, weekday_of

NEW_CUSTOMER_BELOW = 20
EARTH_RADIUS_KM = 6371.0088
COUNT_CAP = 200.0  # beyond, a count only measures how long the data has been collected
AGE_CAP_DAYS = 60.0
NAN = math.nan


@compiled
def _share(part: Any, whole: Any) -> Any:
    return part / whole if whole > 0 else NAN


@compiled
def _days(since: Any, time: Any) -> Any:
    return NAN if since == NEVER or since > time else (time - since) / MS_PER_DAY


@compiled
def _window(values: Any, last_day: Any, day: Any, days: Any) -> Any:
    """Sum a day counter over `days` days up to and with `day`."""
    total = np.int64(0)
    for d in range(max(day - days + 1, np.int64(last_day) - DAYS + 1), min(day, np.int64(last_day)) + 1):
        total += np.int64(values[d % DAYS])
    return total


@compiled
def _window_max(values: Any, last_day: Any, day: Any, days: Any) -> Any:
    top = np.int64(0)
    for d in range(max(day - days + 1, np.int64(last_day) - DAYS + 1), min(day, np.int64(last_day)) + 1):
        top = max(top, np.int64(values[d % DAYS]))
    return top


@compiled
def _hours(m: Any, hour: Any, hours: Any) -> Any:
    total = np.int64(0)
    for h in range(max(hour - hours + 1, np.int64(m.last_hour) - HOURS + 1), min(hour, np.int64(m.last_hour)) + 1):
        total += np.int64(m.hour_count[h % HOURS])
    return total


@compiled
def _deviations(value: Any, mean: Any, variance: Any, floor: Any) -> Any:
    """Return (value - mean) / deviation; the deviation is at least `floor`, so near-constant habits give no spikes."""
    return (value - mean) / max(math.sqrt(max(variance, 0.0)), floor)


@compiled
def _log_zscore(state: Any, log: Any) -> Any:
    """Return how many deviations a log amount lies from a state's mean; the deviation is at least 0.1."""
    n = float(state.count)
    if n < 2:
        return NAN
    mean = state.log_sum / n
    variance = (state.log_square - mean * state.log_sum) / (n - 1.0)
    return _deviations(float(log), mean, variance, 0.1 * LOG_UNIT)


@compiled
def distance_km(latitude: Any, longitude: Any, to_latitude: Any, to_longitude: Any) -> Any:
    """Return the great-circle distance (haversine formula), rounded to metres; NaN if a position is NaN."""
    if math.isnan(latitude + longitude + to_latitude + to_longitude):
        return NAN
    a, b = math.radians(latitude), math.radians(to_latitude)
    half = math.sin((b - a) / 2.0) ** 2
    half += math.cos(a) * math.cos(b) * math.sin(math.radians(to_longitude - longitude) / 2.0) ** 2
    km = 2.0 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(half, 1.0)))
    return math.floor(km * 1000.0 + 0.5) / 1000.0


@compiled
def _percentile(c: Any, minor: Any) -> Any:
    """Return the share of a customer's transactions below an amount, ties counted half.

    Exact while the ring holds them all, then from the histogram; the amount's own bin counts half.
    """
    below = 0.0
    if c.count <= c.ring_size:
        for i in range(c.ring_size):
            if c.ring_amount[i] < minor:
                below += 1.0
            elif c.ring_amount[i] == minor:
                below += 0.5
        return _share(below, float(c.ring_size))
    bin_ = amount_bin(minor)
    total = 0.0
    for i in range(AMOUNT_BINS):
        n = float(c.amount_count[i])
        total += n
        below += n if i < bin_ else (0.5 * n if i == bin_ else 0.0)
    return _share(below, total)


@compiled
def _transaction_features(t: Any, amount_quantiles: Any, row: Any) -> Any:
    row.amount = t.amount
    row.amount_log = log_units(minor_units(t.amount)) / LOG_UNIT
    top = len(amount_quantiles) - 1
    row.amount_global_percentile = np.searchsorted(amount_quantiles, t.amount) / (top + 1.0)
    row.amount_is_globally_unusual = 1.0 if t.amount > amount_quantiles[top] else 0.0
    row.hour = (t.time % MS_PER_DAY) / MS_PER_HOUR
    row.weekday = float(weekday_of(t.time))


@compiled
def _customer_recent(c: Any, t: Any, minor: Any, mean: Any, row: Any) -> Any:
    """Features computed from the individual transactions in the ring."""
    n_1h, n_1d, high_7d, high_14d, same = 0, 0, 0, 0, 0
    sum_1h, sum_1d, max_1d, min_1d = np.int64(0), np.int64(0), np.int64(0), np.int64(2**62)
    in_category, category_sum, at_device, merchants_1d = 0, np.int64(0), 0, 0
    size = np.int64(c.ring_size)
    for i in range(size):
        age, amount = t.time - c.ring_time[i], np.int64(c.ring_amount[i])
        same += amount == minor
        if amount > 3.0 * mean:
            high_7d += age < 7 * MS_PER_DAY
            high_14d += age < 14 * MS_PER_DAY
        if c.ring_category[i] == t.category:
            in_category += 1
            category_sum += amount
        at_device += c.ring_device[i] == t.device
        if age < MS_PER_HOUR:
            n_1h += 1
            sum_1h += amount
        if age < MS_PER_DAY:
            n_1d += 1
            sum_1d += amount
            max_1d, min_1d = max(max_1d, amount), min(min_1d, amount)
            first = True
            for j in range(i):
                if c.ring_merchant[j] == c.ring_merchant[i] and t.time - c.ring_time[j] < MS_PER_DAY:
                    first = False
                    break
            merchants_1d += first
    row.customer_count_1h, row.customer_amount_sum_1h = float(n_1h), sum_1h / 100.0
    row.customer_count_1d, row.customer_amount_sum_1d = float(n_1d), sum_1d / 100.0
    row.customer_amount_mean_1d = _share(sum_1d / 100.0, float(n_1d))
    row.customer_amount_mean_ratio_1d = _share(sum_1d, mean * n_1d)
    row.customer_amount_max_1d = max_1d / 100.0 if n_1d > 0 else NAN
    row.customer_amount_min_1d = min_1d / 100.0 if n_1d > 0 else NAN
    row.customer_high_amount_count_7d, row.customer_high_amount_count_14d = float(high_7d), float(high_14d)
    row.customer_same_amount_count = float(same)
    row.customer_category_count_recent = float(in_category) if t.category != 0 else NAN
    row.customer_category_amount_ratio = (
        _share(float(minor) * in_category, float(category_sum)) if t.category != 0 else NAN
    )
    row.customer_device_count_recent = float(at_device) if t.device != 0 else NAN
    row.customer_merchant_count_1d = float(merchants_1d) if t.merchant != 0 else NAN
    row.customer_seconds_since_last = (t.time - c.ring_time[size - 1]) / 1000.0 if size > 0 else NAN
    row.customer_amount_ratio_last = minor / c.ring_amount[size - 1] if size > 0 else NAN


@compiled
def _customer_place(c: Any, t: Any, row: Any) -> Any:
    row.customer_distance_km = distance_km(t.latitude, t.longitude, t.merchant_latitude, t.merchant_longitude)
    row.customer_distance_last_km, row.customer_speed_kmh = NAN, NAN
    if c.ring_size > 0:
        last = c.ring_size - 1
        at_merchant = not math.isnan(t.merchant_latitude)
        km = distance_km(
            c.ring_latitude[last],
            c.ring_longitude[last],
            t.merchant_latitude if at_merchant else t.latitude,
            t.merchant_longitude if at_merchant else t.longitude,
        )
        row.customer_distance_last_km = km
        hours = max((t.time - c.ring_time[last]) / MS_PER_HOUR, 1.0 / 60.0)  # a minute: clocks differ
        row.customer_speed_kmh = km / hours


@compiled
def _customer_features(c: Any, t: Any, row: Any) -> Any:
    day = t.time // MS_PER_DAY
    minor = minor_units(t.amount)
    n = float(c.count)
    mean = c.amount_sum / n if n > 0 else NAN
    age_days = _days(c.first_time, t.time) if n > 0 else NAN
    row.customer_count_lifetime = min(n, COUNT_CAP)
    row.customer_is_new = 1.0 if n < NEW_CUSTOMER_BELOW else 0.0
    row.customer_age_days = min(age_days, AGE_CAP_DAYS)
    _customer_recent(c, t, minor, mean, row)
    n_7d = _window(c.day_count, c.last_day, day, 7)
    n_30d = _window(c.day_count, c.last_day, day, 30)
    sum_7d = _window(c.day_amount, c.last_day, day, 7)
    sum_30d = _window(c.day_amount, c.last_day, day, 30)
    max_7d = _window_max(c.day_max, c.last_day, day, 7)
    max_30d = _window_max(c.day_max, c.last_day, day, 30)
    row.customer_count_7d, row.customer_count_30d = float(n_7d), float(n_30d)
    row.customer_velocity_ratio = row.customer_count_1d * max(age_days, 1.0) / n if n > 0 else NAN
    row.customer_velocity_ratio_7d = _share(30.0 * n_7d, 7.0 * n_30d)
    row.customer_amount_mean_7d = _share(sum_7d / 100.0, float(n_7d))
    row.customer_amount_mean_30d = _share(sum_30d / 100.0, float(n_30d))
    row.customer_amount_max_7d = max_7d / 100.0 if n_7d > 0 else NAN
    row.customer_amount_max_30d = max_30d / 100.0 if n_30d > 0 else NAN
    row.customer_amount_ratio_30d = _share(float(minor) * n_30d, float(sum_30d))
    row.customer_amount_ratio_max_30d = _share(float(minor), float(max_30d))
    row.customer_amount_max_ratio_7d = max_7d / mean if n_7d > 0 else NAN
    row.customer_amount_mean_lifetime = mean / 100.0
    row.customer_amount_zscore = NAN
    if n >= 2:
        squares = c.amount_square_high * 4294967296.0 + c.amount_square_low
        variance = (squares - mean * c.amount_sum) / (n - 1.0)
        row.customer_amount_zscore = _deviations(float(minor), mean, variance, 0.05 * mean)
    row.customer_amount_log_zscore = _log_zscore(c, log_units(minor))
    row.customer_amount_percentile = _percentile(c, minor)
    hour = hour_of_day(t.time)
    near = np.int64(c.hour_count[(hour + 23) % 24]) + c.hour_count[hour] + c.hour_count[(hour + 1) % 24]
    row.customer_hour_deviation = 1.0 - _share(float(near), n)
    row.customer_weekday_deviation = 1.0 - _share(float(c.weekday_count[weekday_of(t.time)]), n)
    row.customer_category_familiarity = (
        _share(float(c.category_count[t.category % CATEGORY_SLOTS]), n) if t.category != 0 else NAN
    )
    seen = min(c.merchant_count[t.merchant % MERCHANT_SLOTS], c.merchant_count[(t.merchant >> 16) % MERCHANT_SLOTS])
    row.customer_merchant_familiarity = float(seen) if t.merchant != 0 else NAN
    _customer_place(c, t, row)
    row.customer_fraud_count_lifetime = float(c.fraud_count)
    row.customer_fraud_count_30d = float(_window(c.day_fraud, c.last_day, day, 30))
    row.customer_fraud_days_since_last = _days(c.last_fraud_time, t.time)
    row.customer_fraud_label_count_7d = float(_window(c.day_label, c.last_day, day, 7))


@compiled
def _merchant_risk(m: Any, t: Any, row: Any) -> Any:
    day = t.time // MS_PER_DAY
    row.merchant_fraud_count_lifetime = float(m.fraud_count)
    row.merchant_fraud_share_lifetime = _share(float(m.fraud_count), float(m.count))
    row.merchant_fraud_count_7d = float(_window(m.day_fraud, m.last_day, day, 7))
    row.merchant_fraud_count_14d = float(_window(m.day_fraud, m.last_day, day, 14))
    frauds = _window(m.day_fraud, m.last_day, day, 30)
    row.merchant_fraud_count_30d = float(frauds)
    row.merchant_fraud_share_30d = _share(float(frauds), float(_window(m.day_count, m.last_day, day, 30)))
    row.merchant_fraud_streak_share, row.merchant_fraud_days_since_first = NAN, NAN
    if frauds > 0:
        first, last = day, day - 30
        for d in range(max(day - 29, np.int64(m.last_day) - DAYS + 1), min(day, np.int64(m.last_day)) + 1):
            if m.day_fraud[d % DAYS] > 0:
                first, last = min(first, d), max(last, d)
        streak = _window(m.day_count, m.last_day, last, last - first + 1)
        row.merchant_fraud_streak_share = _share(float(frauds), float(streak))
        row.merchant_fraud_days_since_first = float(day - first)
    row.merchant_fraud_days_since_last = _days(m.last_fraud_time, t.time)
    row.merchant_fraud_last_amount_log = NAN
    if m.last_fraud_amount > 0:
        row.merchant_fraud_last_amount_log = log_units(m.last_fraud_amount) / LOG_UNIT
    row.merchant_fraud_label_count_1d = float(_window(m.day_label, m.last_day, day, 1))
    row.merchant_fraud_label_count_7d = float(_window(m.day_label, m.last_day, day, 7))
    row.merchant_fraud_label_count_30d = float(_window(m.day_label, m.last_day, day, 30))


@compiled
def _merchant_features(m: Any, t: Any, row: Any) -> Any:
    day, hour = t.time // MS_PER_DAY, t.time // MS_PER_HOUR
    n = float(m.count)
    row.merchant_count_lifetime = min(n, COUNT_CAP)
    row.merchant_age_days = min(_days(m.first_time, t.time), AGE_CAP_DAYS) if n > 0 else NAN
    size = np.int64(m.ring_size)
    row.merchant_seconds_since_last = (t.time - m.ring_time[size - 1]) / 1000.0 if size > 0 else NAN
    n_1d, n_7d = _hours(m, hour, 24), _window(m.day_count, m.last_day, day, 7)
    n_30d = _window(m.day_count, m.last_day, day, 30)
    today = _window(m.day_count, m.last_day, day, 1)
    row.merchant_count_1h, row.merchant_count_1d = float(_hours(m, hour, 2)), float(n_1d)
    row.merchant_count_7d, row.merchant_count_30d = float(n_7d), float(n_30d)
    row.merchant_velocity_ratio = _share(30.0 * n_1d, float(n_30d))
    row.merchant_amount_mean_1d = _share(_window(m.day_amount, m.last_day, day, 1) / 100.0, float(today))
    row.merchant_amount_mean_7d = _share(_window(m.day_amount, m.last_day, day, 7) / 100.0, float(n_7d))
    row.merchant_amount_mean_30d = _share(_window(m.day_amount, m.last_day, day, 30) / 100.0, float(n_30d))
    row.merchant_amount_max_30d = _window_max(m.day_max, m.last_day, day, 30) / 100.0 if n_30d > 0 else NAN
    row.merchant_amount_log_zscore = _log_zscore(m, log_units(minor_units(t.amount)))
    _merchant_risk(m, t, row)


@compiled
def featurize(c: Any, m: Any, t: Any, amount_quantiles: Any, row: Any) -> Any:
    """Write into `row` (`ROW`) the features of transaction `t` by a customer's and a merchant's state."""
    _transaction_features(t, amount_quantiles, row)
    _customer_features(c, t, row)
    _merchant_features(m, t, row)
