"""A customer's state as a readable profile."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np

from fraud.history.state import CATEGORY_SLOTS, DAYS, MS_PER_DAY, NEVER


@dataclass
class Profile:
    """One customer's state, its number of transactions and decoded arrays."""

    customer_id: str
    state: np.ndarray[Any, np.dtype[np.void]]
    """One record of `fraud.history.state.CUSTOMER`."""


Time = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]


class ProfileWindow(TypedDict):
    """Counts and amounts of some days, ending with the day of the last transaction."""

    transactions: int
    amount_mean: float | None
    amount_max: float | None
    frauds: int


class RecentTransaction(TypedDict):
    """One of the latest transactions."""

    event_time: Time
    amount: float


class ReadableProfile(TypedDict):
    """A customer's profile: amounts in currency units, times in UTC."""

    customer_id: str
    transactions: int
    first_seen: Time | None
    last_seen: Time | None
    amount_mean: float | None
    amount_standard_deviation: float | None
    windows: dict[Literal["1d", "7d", "30d"], ProfileWindow]
    usual_hours_utc: Annotated[list[int], msgspec.Meta(max_length=3)]
    usual_weekdays: Annotated[list[str], msgspec.Meta(max_length=3)]
    known_categories: int
    known_merchants: int
    known_merchants_recent: int
    known_devices_recent: int
    frauds: Annotated[int, msgspec.Meta(description="known by now")]
    last_fraud: Annotated[Time | None, msgspec.Meta(description="when the latest of them happened")]
    recent: Annotated[list[RecentTransaction], msgspec.Meta(description="the latest transactions, newest first")]
    approximate: Annotated[dict[str, str], msgspec.Meta(description="which figures are approximate, and how")]
    state_bytes: int


WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def readable_profile(profile: Profile) -> ReadableProfile:
    """Return averages, habits, counts and latest transactions, amounts in currency units, times in UTC.

    Windows end with the day of the last transaction. Merchants, categories and devices are kept as
    fingerprints, not by name, and are only counted here.
    """
    c = profile.state[0]
    n, size = int(c["count"]), int(c["ring_size"])
    mean = int(c["amount_sum"]) / n if n else 0.0
    squares = int(c["amount_square_high"]) * 2**32 + int(c["amount_square_low"])
    variance = max(squares - mean * int(c["amount_sum"]), 0.0) / (n - 1) if n > 1 else 0.0
    return {
        "customer_id": profile.customer_id,
        "transactions": n,
        "first_seen": _time(c["first_time"]) if n else None,
        "last_seen": _time(c["last_time"]) if n else None,
        "amount_mean": round(mean / 100, 2) if n else None,
        "amount_standard_deviation": round(variance**0.5 / 100, 2) if n > 1 else None,
        "windows": {"1d": _window(c, 1), "7d": _window(c, 7), "30d": _window(c, 30)},
        "usual_hours_utc": _habit(c["hour_count"], range(24)),
        "usual_weekdays": _habit(c["weekday_count"], WEEKDAYS),
        "known_categories": int((c["category_count"] > 0).sum()),
        "known_merchants": int((c["merchant_count"] > 0).sum() + 1) // 2,
        "known_merchants_recent": len({int(m) for m in c["ring_merchant"][:size]} - {0}),
        "known_devices_recent": len({int(d) for d in c["ring_device"][:size]} - {0}),
        "frauds": int(c["fraud_count"]),
        "last_fraud": _time(c["last_fraud_time"]) if c["last_fraud_time"] != NEVER else None,
        "recent": [
            {"event_time": _time(c["ring_time"][i]), "amount": int(c["ring_amount"][i]) / 100}
            for i in reversed(range(size))
        ],
        "approximate": {"known_merchants": "a sketch", "known_categories": f"at most {CATEGORY_SLOTS}"},
        "state_bytes": c.nbytes,
    }


def _window(c: np.void, days: int) -> ProfileWindow:
    last, oldest_kept = int(c["last_time"]) // MS_PER_DAY, int(c["last_day"]) - DAYS + 1  # a label may be of later
    slots = [d % DAYS for d in range(max(last - days + 1, oldest_kept), last + 1)]
    n, total = int(c["day_count"][slots].sum()), int(c["day_amount"][slots].sum())
    return {
        "transactions": n,
        "amount_mean": round(total / n / 100, 2) if n else None,
        "amount_max": int(c["day_max"][slots].max()) / 100 if n else None,
        "frauds": int(c["day_fraud"][slots].sum()),
    }


def _habit(counts: np.ndarray[Any, Any], names: Any, most: int = 3) -> list[Any]:
    order = np.argsort(-counts.astype(np.int64), kind="stable")[:most]
    return [list(names)[i] for i in order if counts[i]]


def _time(ms: Any) -> str:
    return datetime.fromtimestamp(int(ms) / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
