"""Every history feature once more, from plain lists of events: slow, obvious, and written from the meanings.

The oracle keeps all it was told and looks through it for each transaction. What the engine bounds on
purpose is bounded here in the same words: what is called recent are the `RING` latest transactions told,
a window of w days is the UTC day and the w - 1 before, an hour window is the UTC hour and those before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fraud.features.kernels import AGE_CAP_DAYS, COUNT_CAP, EARTH_RADIUS_KM, NEW_CUSTOMER_BELOW
from fraud.history.state import RING, token

DAY, HOUR = 86_400_000, 3_600_000
NAN = math.nan


@dataclass(frozen=True)
class Event:
    id: str
    time: int
    amount: float
    customer: str
    merchant: str | None = None
    category: str | None = None
    device: str | None = None
    latitude: float = NAN
    longitude: float = NAN
    merchant_latitude: float = NAN
    merchant_longitude: float = NAN

    @property
    def minor(self) -> int:
        return max(math.floor(self.amount * 100 + 0.5), 1)

    @property
    def log(self) -> float:
        return log_of(self.minor)

    @property
    def place(self) -> tuple[float, float]:
        """Where the customer was: at the merchant if that is known."""
        if math.isnan(self.merchant_latitude):
            return self.latitude, self.longitude
        return self.merchant_latitude, self.merchant_longitude


@dataclass
class Oracle:
    """What was told so far, in the order of arrival."""

    amount_quantiles: list[float]
    events: list[Event] = field(default_factory=list)
    frauds: list[tuple[Event, int]] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def mark_fraud(self, event: Event, label_time: int) -> None:
        self.frauds.append((event, label_time))

    def features(self, t: Event) -> dict[str, float]:
        """Return all history features of a transaction that arrives now."""
        return self._own(t) | self._customer(t) | self._merchant(t)

    def _own(self, t: Event) -> dict[str, float]:
        q = self.amount_quantiles
        return {
            "amount": t.amount,
            "amount_log": t.log,
            "amount_global_percentile": sum(1 for a in q if a < t.amount) / len(q),
            "amount_is_globally_unusual": float(t.amount > q[-1]),
            "hour": (t.time % DAY) / HOUR,
            "weekday": float((t.time // DAY + 3) % 7),
        }

    def _customer(self, t: Event) -> dict[str, float]:
        told = [e for e in self.events if e.customer == t.customer]
        known = [e for e in told if e.time <= t.time]
        recent = [e for e in in_order(told)[-RING:] if e.time <= t.time]
        frauds = [(e, at) for e, at in self.frauds if e.customer == t.customer]
        n, minors = len(known), [e.minor for e in known]
        mean = sum(minors) / n if n else NAN
        last = recent[-1] if recent else None
        hour_ago = [e for e in recent if t.time - e.time < HOUR]
        day_ago = [e for e in recent if t.time - e.time < DAY]
        days_7, days_30 = in_days(known, t, 7), in_days(known, t, 30)
        age_days = (t.time - min(e.time for e in told)) / DAY if n else NAN
        in_category = [e for e in recent if e.category == t.category]
        high = [e for e in recent if e.minor > 3 * mean]
        hour, weekday = t.time // HOUR % 24, (t.time // DAY) % 7
        near_hours = {(hour - 1) % 24, hour, (hour + 1) % 24}
        km = distance(last.place, t.place) if last else NAN
        return {
            "customer_count_lifetime": min(n, COUNT_CAP),
            "customer_is_new": float(n < NEW_CUSTOMER_BELOW),
            "customer_age_days": min(age_days, AGE_CAP_DAYS) if n else NAN,
            "customer_seconds_since_last": (t.time - last.time) / 1000 if last else NAN,
            "customer_count_1h": len(hour_ago),
            "customer_count_1d": len(day_ago),
            "customer_count_7d": len(days_7),
            "customer_count_30d": len(days_30),
            "customer_velocity_ratio": len(day_ago) * max(age_days, 1.0) / n if n else NAN,
            "customer_velocity_ratio_7d": share(30 * len(days_7), 7 * len(days_30)),
            "customer_amount_sum_1h": total(hour_ago) / 100,
            "customer_amount_sum_1d": total(day_ago) / 100,
            "customer_amount_mean_1d": mean_of(day_ago),
            "customer_amount_mean_7d": mean_of(days_7),
            "customer_amount_mean_30d": mean_of(days_30),
            "customer_amount_max_1d": largest(day_ago),
            "customer_amount_min_1d": min(e.minor for e in day_ago) / 100 if day_ago else NAN,
            "customer_amount_max_7d": largest(days_7),
            "customer_amount_max_30d": largest(days_30),
            "customer_amount_mean_lifetime": mean / 100,
            "customer_amount_zscore": deviations(t.minor, minors, lambda m: 0.05 * m),
            "customer_amount_log_zscore": deviations(t.log, [e.log for e in known], lambda _: 0.1),
            "customer_amount_percentile": percentile(t, known, recent),
            "customer_amount_ratio_30d": share(t.minor * len(days_30), total(days_30)),
            "customer_amount_ratio_max_30d": share(t.minor, 100 * largest(days_30, 0.0)),
            "customer_amount_ratio_last": t.minor / last.minor if last else NAN,
            "customer_amount_max_ratio_7d": 100 * largest(days_7) / mean if days_7 else NAN,
            "customer_amount_mean_ratio_1d": share(total(day_ago), mean * len(day_ago)),
            "customer_high_amount_count_7d": len([e for e in high if t.time - e.time < 7 * DAY]),
            "customer_high_amount_count_14d": len([e for e in high if t.time - e.time < 14 * DAY]),
            "customer_same_amount_count": len([e for e in recent if e.minor == t.minor]),
            "customer_hour_deviation": 1 - share(len([e for e in known if e.time // HOUR % 24 in near_hours]), n),
            "customer_weekday_deviation": 1 - share(len([e for e in known if e.time // DAY % 7 == weekday]), n),
            "customer_category_familiarity": share(len([e for e in known if e.category == t.category]), n)
            if t.category
            else NAN,
            "customer_category_count_recent": len(in_category) if t.category else NAN,
            "customer_category_amount_ratio": share(t.minor * len(in_category), total(in_category))
            if t.category
            else NAN,
            "customer_merchant_familiarity": len([e for e in known if e.merchant == t.merchant]) if t.merchant else NAN,
            "customer_merchant_count_1d": len({e.merchant for e in day_ago}) if t.merchant else NAN,
            "customer_device_count_recent": len([e for e in recent if e.device == t.device]) if t.device else NAN,
            "customer_distance_km": distance((t.latitude, t.longitude), (t.merchant_latitude, t.merchant_longitude)),
            "customer_distance_last_km": km,
            "customer_speed_kmh": km / max((t.time - last.time) / HOUR, 1 / 60) if last else NAN,
            "customer_fraud_count_lifetime": len(frauds),
            "customer_fraud_count_30d": len(in_days([e for e, _ in frauds], t, 30)),
            "customer_fraud_days_since_last": days_since(max((e.time for e, _ in frauds), default=None), t),
            "customer_fraud_label_count_7d": known_in_days(frauds, t, 7),
        }

    def _merchant(self, t: Event) -> dict[str, float]:
        told = [e for e in self.events if t.merchant is not None and e.merchant == t.merchant]
        known = [e for e in told if e.time <= t.time]
        frauds = [(e, at) for e, at in self.frauds if t.merchant is not None and e.merchant == t.merchant]
        fraud_events = [e for e, _ in frauds]
        n, last = len(known), in_order(known)[-1] if known else None
        hour = t.time // HOUR
        day_ago = [e for e in known if hour - 24 < e.time // HOUR <= hour]
        today, days_7, days_30 = (in_days(known, t, w) for w in (1, 7, 30))
        frauds_30 = in_days(fraud_events, t, 30)
        fraud_days = sorted(e.time // DAY for e in frauds_30)
        streak = [e for e in known if fraud_days and fraud_days[0] <= e.time // DAY <= fraud_days[-1]]
        latest = max(fraud_events, key=lambda e: (e.time, e.minor), default=None)
        return {
            "merchant_count_lifetime": min(n, COUNT_CAP),
            "merchant_age_days": min((t.time - min(e.time for e in told)) / DAY, AGE_CAP_DAYS) if n else NAN,
            "merchant_seconds_since_last": (t.time - last.time) / 1000 if last else NAN,
            "merchant_count_1h": len([e for e in known if hour - 2 < e.time // HOUR <= hour]),
            "merchant_count_1d": len(day_ago),
            "merchant_count_7d": len(days_7),
            "merchant_count_30d": len(days_30),
            "merchant_velocity_ratio": share(30 * len(day_ago), len(days_30)),
            "merchant_amount_mean_1d": mean_of(today),
            "merchant_amount_mean_7d": mean_of(days_7),
            "merchant_amount_mean_30d": mean_of(days_30),
            "merchant_amount_max_30d": largest(days_30),
            "merchant_amount_log_zscore": deviations(t.log, [e.log for e in known], lambda _: 0.1),
            "merchant_fraud_count_lifetime": len(frauds),
            "merchant_fraud_share_lifetime": share(len(frauds), n),
            "merchant_fraud_count_7d": len(in_days(fraud_events, t, 7)),
            "merchant_fraud_count_14d": len(in_days(fraud_events, t, 14)),
            "merchant_fraud_count_30d": len(frauds_30),
            "merchant_fraud_share_30d": share(len(frauds_30), len(days_30)),
            "merchant_fraud_streak_share": share(len(frauds_30), len(streak)) if frauds_30 else NAN,
            "merchant_fraud_days_since_first": t.time // DAY - fraud_days[0] if frauds_30 else NAN,
            "merchant_fraud_days_since_last": days_since(latest.time if latest else None, t),
            "merchant_fraud_last_amount_log": log_of(latest.minor) if latest else NAN,
            "merchant_fraud_label_count_1d": known_in_days(frauds, t, 1),
            "merchant_fraud_label_count_7d": known_in_days(frauds, t, 7),
            "merchant_fraud_label_count_30d": known_in_days(frauds, t, 30),
        }


def in_order(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda e: (e.time, token(e.id)))


def in_days(events: list[Event], t: Event, days: int) -> list[Event]:
    today = t.time // DAY
    return [e for e in events if today - days < e.time // DAY <= today]


def known_in_days(frauds: list[tuple[Event, int]], t: Event, days: int) -> int:
    today = t.time // DAY
    return sum(1 for _, at in frauds if today - days < at // DAY <= today)


def days_since(time: int | None, t: Event) -> float:
    return NAN if time is None or time > t.time else (t.time - time) / DAY


def total(events: list[Event]) -> int:
    return sum(e.minor for e in events)


def mean_of(events: list[Event]) -> float:
    return total(events) / 100 / len(events) if events else NAN


def largest(events: list[Event], of_none: float = NAN) -> float:
    return max((e.minor for e in events), default=100 * of_none) / 100


def share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else NAN


def log_of(minor: int) -> float:
    return math.floor(math.log(minor / 100) * 65536 + 0.5) / 65536


def deviations(value: float, values: list[float] | list[int], floor_of: Callable[[float], float]) -> float:
    """How many sample deviations a value lies from the mean, the deviation being no less than a floor."""
    if len(values) < 2:
        return NAN
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return (value - mean) / max(deviation, floor_of(mean))


def percentile(t: Event, known: list[Event], recent: list[Event]) -> float:
    """The share below, ties counted half; by bins of 1/4 in the log amount once not all stand in the ring."""

    def bin_of(e: Event) -> int:
        return min(max((round(e.log * 65536) + 65536) // 16384, 0), 47)

    if len(known) <= len(recent):
        pairs = [(e.minor, t.minor) for e in recent]
    else:
        pairs = [(bin_of(e), bin_of(t)) for e in known]
    return share(sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in pairs), len(pairs))


def distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Great-circle kilometres by the spherical law of cosines' stable form, to metres."""
    if any(map(math.isnan, (*a, *b))):
        return NAN
    (lat1, lon1), (lat2, lon2) = (tuple(map(math.radians, p)) for p in (a, b))
    x = math.cos(lat1) * math.sin(lat2) - math.sin(lat1) * math.cos(lat2) * math.cos(lon2 - lon1)
    y = math.cos(lat2) * math.sin(lon2 - lon1)
    z = math.sin(lat1) * math.sin(lat2) + math.cos(lat1) * math.cos(lat2) * math.cos(lon2 - lon1)
    return round(EARTH_RADIUS_KM * math.atan2(math.hypot(x, y), z), 3)
