"""What a fraud analyst would say of each feature's value, by the habit of the customer that it belongs to.

A clause is a fact: "amount is 37 times this customer's average of 30 days", "at 03:10 UTC, an hour this customer has
never used". Amounts are in the transaction's own currency, hours and days in UTC. A feature of the request has no known
habit; its clause is its meaning and its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from fraud.currencies import Currency
from fraud.features.featurizer import HISTORY_FEATURES
from fraud.features.kernels import COUNT_CAP, NEW_CUSTOMER_BELOW
from fraud.schema import Feature, Row

Habit = Literal["money", "time", "merchant", "device", "place", "pace", "customer", "fraud"]
Currencies = Mapping[str, Currency]
Say = Callable[[float, Row, Currencies], str]

MOST_SHOWN = 60
"""Characters of a category or a currency's code; further ones are cut."""
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Clause(NamedTuple):
    """How a feature's value is said, and which values are unusual.

    Attributes
    ----------
    say : callable
        Returns the clause of a value that is not missing.
    habit : str
        Contributions of one habit are added up; a feature of the request has its own name here.
    above, below : float
        Values beyond these are unusual, and may be named in the explanation.
    by_custom : bool
        Whether it compares with what the customer usually does, which is not known of a new customer.
    plainly : str
        A history feature that says the same in plain words where its own value is unusual too; empty if there is none.
    """

    say: Say
    habit: str
    above: float = math.inf
    below: float = -math.inf
    by_custom: bool = False
    plainly: str = ""


def readable(feature: Feature, number: float) -> float | bool | str | None:
    """Return a value of `X` as the caller sent it: a category by name, a flag as a boolean."""
    if math.isnan(number):
        return None
    if feature.type == "categorical":
        return feature.categories[int(number)]
    if feature.type == "boolean":
        return bool(number)
    return number


def clause_of(feature: Feature) -> Clause:
    """Return the clause of a feature of a specification."""
    known = HISTORY_CLAUSES.get(feature.name) if feature.source == "history" else None
    return known or _of_request(feature)


def meaning_of(feature: Feature) -> str:
    """Return what a feature is: by the specification, else by the list of history features, else its name."""
    known = HISTORY_FEATURES.get(feature.name) if feature.source == "history" else None
    return inert(feature.meaning or (known.meaning if known else feature.name), 200)


def inert(text: str, most: int = MOST_SHOWN) -> str:
    """Return a text of a caller or a table so that it stays one line of plain characters."""
    shown = text if len(text) <= most else text[: most - 1] + "…"
    return shown if shown.isprintable() else "".join(c if c.isprintable() else "�" for c in shown)


def number_text(value: float) -> str:
    """Return a number with at most six digits before an exponent.

    Examples
    --------
    >>> [number_text(value) for value in (0.5, 37.0, 52_000.0, 1_234_567.0, 1e300)]
    ['0.5', '37', '52,000', '1,234,567', '1e+300']
    """
    return f"{value:,.0f}" if 100_000 <= abs(value) < 1e15 else f"{value:,.6g}"


def _of_request(feature: Feature) -> Clause:
    meaning = meaning_of(feature)
    if feature.type == "categorical":
        names = tuple(inert(category) for category in feature.categories)
        return Clause(lambda v, row, currencies: f"{meaning} is {names[int(v)]}", feature.name, above=-math.inf)
    if feature.type == "boolean":
        return Clause(
            lambda v, row, currencies: f"{meaning} is {'true' if v else 'false'}", feature.name, above=-math.inf
        )
    return Clause(lambda v, row, currencies: f"{meaning} is {number_text(v)}", feature.name, above=-math.inf)


# --- numbers as they are said


def _times(ratio: float) -> str:
    if ratio >= 1e6:
        return "over a million times"
    if ratio >= 9.95:
        return f"{ratio:,.0f} times"
    if ratio >= 1.05:
        return f"{ratio:.1f} times"
    if ratio >= 0.95:
        return "about"
    return f"{ratio:.0%} of" if ratio >= 0.01 else "less than 1% of"


def _share(part: float) -> str:
    if 0 < part < 0.01:
        return "less than 1%"
    return f"{part:.0%}" if not 0.99 < part < 1 else "over 99%"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3_600:.0f} hours"
    return f"{seconds / 86_400:,.0f} days"


def _money(scaled: float, row: Row, currencies: Currencies) -> str:
    """Return an amount in the unit of histories as money of the transaction's currency."""
    if not currencies:
        return f"{scaled:,.2f}" if scaled < 1e15 else f"{scaled:.6g}"
    code = str(row.roles.get("currency") or next(iter(currencies)))
    currency = currencies.get(code)
    if currency is None:  # a version with other currencies explains an earlier decision
        return f"{scaled:,.0f}% of its currency's typical amount"
    return _in_currency(scaled * currency.typical_minor_units / 100.0 / 10.0**currency.minor_digits, code, currency)


def _in_currency(amount: float, code: str, currency: Currency) -> str:
    digits = currency.minor_digits
    shown = f"{amount:,.{digits}f}" if digits <= 4 and amount < 1e15 else f"{amount:,.6g}"
    return f"{shown} {inert(code)}"


def _own_amount(row: Row, currencies: Currencies) -> str:
    """Return the amount of the transaction as it was sent."""
    code = str(row.roles.get("currency") or next(iter(currencies), ""))
    currency = currencies.get(code)
    if currency is not None:
        return _in_currency(row.amount, code, currency)
    return f"{row.amount:,.2f}" if row.amount < 1e15 else f"{row.amount:.6g}"


def _clock(row: Row) -> str:
    minute = row.event_time_ms // 60_000
    return f"{minute // 60 % 24:02d}:{minute % 60:02d} UTC"


def _weekday(row: Row) -> str:
    return WEEKDAYS[(row.event_time_ms // 86_400_000 + 3) % 7]


# --- forms that several features share


def _count(text: str, habit: Habit, above: float = math.inf, *, cap: float = math.inf) -> Clause:
    """Return the clause of a number of things; `text` follows the number, with ``(s)`` where a plural has its s."""
    one, many = text.replace("(s)", ""), text.replace("(s)", "s")

    def say(v: float, row: Row, currencies: Currencies) -> str:
        number = "no" if v == 0 else f"{v:,.0f}" if v < cap else f"at least {v:,.0f}"
        return f"{number} {one if v == 1 else many}"

    return Clause(say, habit, above)


def _ratio(of: str, habit: Habit, above: float, subject: str = "amount is", *, by_custom: bool = True) -> Clause:
    return Clause(lambda v, row, currencies: f"{subject} {_times(v)} {of}", habit, above, by_custom=by_custom)


def _amount_of(what: str) -> Clause:
    return Clause(lambda v, row, currencies: f"{what} is {_money(v, row, currencies)}", "money")


def _deviations(of: str, *, by_custom: bool = True, plainly: str = "") -> Clause:
    def say(v: float, row: Row, currencies: Currencies) -> str:
        return f"amount is {number_text(round(abs(v), 1))} standard deviations {'above' if v >= 0 else 'below'} {of}"

    return Clause(say, "money", 2.0, by_custom=by_custom, plainly=plainly)


def _days(text: str, habit: Habit, below: float = -math.inf) -> Clause:
    """Return the clause of an age in days; `text` has one place for it."""
    return Clause(lambda v, row, currencies: text.format(_duration(v * 86_400)), habit, below=below)


# --- what needs a form of its own


def _own_amount_clause(v: float, row: Row, currencies: Currencies) -> str:
    return f"amount is {_own_amount(row, currencies)}"


def _global_percentile(v: float, row: Row, currencies: Currencies) -> str:
    return f"amount is above {min(v, 0.99):.0%} of the amounts seen in training"


def _globally_unusual(v: float, row: Row, currencies: Currencies) -> str:
    return f"amount is {'above' if v else 'not above'} 99% of the amounts seen in training"


def _percentile(v: float, row: Row, currencies: Currencies) -> str:
    if v == 1:
        return "amount is above every amount of this customer so far"
    if v == 0:
        return "amount is below every amount of this customer so far"
    return f"amount is above {_share(v)} of this customer's amounts"


def _same_amount(v: float, row: Row, currencies: Currencies) -> str:
    if v == 0:
        return "an amount that none of this customer's recent transactions had"
    return f"{v:,.0f} of this customer's recent transactions had the very same amount"


def _hour(v: float, row: Row, currencies: Currencies) -> str:
    return f"at {_clock(row)}"


def _hour_deviation(v: float, row: Row, currencies: Currencies) -> str:
    if v >= 1:
        return f"at {_clock(row)}, an hour this customer has never used"
    return f"at {_clock(row)}, around which {_share(1 - v)} of this customer's transactions were made"


def _on_weekday(v: float, row: Row, currencies: Currencies) -> str:
    return f"on a {_weekday(row)} (UTC)"


def _weekday_deviation(v: float, row: Row, currencies: Currencies) -> str:
    if v >= 1:
        return f"on a {_weekday(row)} (UTC), a day of the week this customer has never used"
    return f"on a {_weekday(row)} (UTC), as {_share(1 - v)} of this customer's transactions"


def _merchant_familiarity(v: float, row: Row, currencies: Currencies) -> str:
    if v == 0:
        return "first time at this merchant"
    return f"{v:,.0f} earlier {'transaction' if v == 1 else 'transactions'} of this customer at this merchant"


def _category_familiarity(v: float, row: Row, currencies: Currencies) -> str:
    return "first time in this category" if v == 0 else f"{_share(v)} of this customer's transactions in this category"


def _device(v: float, row: Row, currencies: Currencies) -> str:
    if v == 0:
        return "a device that this customer has not used recently"
    return f"the device of {v:,.0f} of this customer's recent transactions"


def _seconds_since_last(v: float, row: Row, currencies: Currencies) -> str:
    return f"{_duration(v)} after this customer's last transaction"


def _distance(text: str) -> Clause:
    return Clause(lambda v, row, currencies: f"{v:,.0f} km {text}", "place", 100.0)


def _speed(v: float, row: Row, currencies: Currencies) -> str:
    return f"{v:,.0f} km/h from the place of this customer's last transaction"


def _is_new(v: float, row: Row, currencies: Currencies) -> str:
    few = f"{NEW_CUSTOMER_BELOW} earlier transactions"
    return f"a new customer, with fewer than {few}" if v else f"a customer with at least {few}"


def _fraud_share(where: str) -> Clause:
    return Clause(lambda v, row, currencies: f"{_share(v)} known frauds {where}", "fraud", 0.0)


def _last_fraud_amount(v: float, row: Row, currencies: Currencies) -> str:
    return f"the last known fraud at this merchant was of {_money(math.exp(min(v, 60.0)), row, currencies)}"


HISTORY_CLAUSES: dict[str, Clause] = {
    "amount": Clause(_own_amount_clause, "money"),
    "amount_log": Clause(_own_amount_clause, "money"),
    "amount_global_percentile": Clause(_global_percentile, "money", 0.95),
    "amount_is_globally_unusual": Clause(_globally_unusual, "money", 0.5),
    "hour": Clause(_hour, "time"),
    "weekday": Clause(_on_weekday, "time"),
    "customer_count_lifetime": _count("earlier transaction(s) of this customer", "customer", cap=COUNT_CAP),
    "customer_is_new": Clause(_is_new, "customer"),
    "customer_age_days": _days("{} after this customer's first transaction", "customer"),
    "customer_seconds_since_last": Clause(_seconds_since_last, "pace", below=60.0),
    "customer_count_1h": _count("earlier transaction(s) of this customer in the last hour", "pace", 2.5),
    "customer_count_1d": _count("earlier transaction(s) of this customer in the last 24 hours", "pace", 9.5),
    "customer_count_7d": _count("earlier transaction(s) of this customer in 7 days", "pace"),
    "customer_count_30d": _count("earlier transaction(s) of this customer in 30 days", "pace"),
    "customer_velocity_ratio": _ratio(
        "the usual number", "pace", 3.0, "this customer's transactions of the last 24 hours are"
    ),
    "customer_velocity_ratio_7d": _ratio("that of 30 days", "pace", 2.0, "this customer's pace of 7 days is"),
    "customer_amount_sum_1h": _amount_of("this customer's spending in the last hour"),
    "customer_amount_sum_1d": _amount_of("this customer's spending in the last 24 hours"),
    "customer_amount_mean_1d": _amount_of("this customer's average of the last 24 hours"),
    "customer_amount_mean_7d": _amount_of("this customer's average of 7 days"),
    "customer_amount_mean_30d": _amount_of("this customer's average of 30 days"),
    "customer_amount_max_1d": _amount_of("this customer's largest amount of the last 24 hours"),
    "customer_amount_min_1d": _amount_of("this customer's smallest amount of the last 24 hours"),
    "customer_amount_max_7d": _amount_of("this customer's largest amount of 7 days"),
    "customer_amount_max_30d": _amount_of("this customer's largest amount of 30 days"),
    "customer_amount_mean_lifetime": _amount_of("this customer's average"),
    "customer_amount_zscore": _deviations("this customer's average", plainly="customer_amount_ratio_30d"),
    "customer_amount_log_zscore": _deviations(
        "this customer's average, both on a log scale", plainly="customer_amount_ratio_30d"
    ),
    "customer_amount_percentile": Clause(_percentile, "money", 0.95, by_custom=True),
    "customer_amount_ratio_30d": _ratio("this customer's average of 30 days", "money", 1.5),
    "customer_amount_ratio_max_30d": _ratio("this customer's largest amount of 30 days", "money", 1.0),
    "customer_amount_ratio_last": _ratio("this customer's last amount", "money", 3.0),
    "customer_amount_max_ratio_7d": _ratio(
        "the customer's average", "money", 3.0, "this customer's largest amount of 7 days is"
    ),
    "customer_amount_mean_ratio_1d": _ratio(
        "the customer's average", "money", 1.5, "this customer's average of the last 24 hours is"
    ),
    "customer_high_amount_count_7d": _count(
        "amount(s) of this customer in 7 days above 3 times the average", "money", 0.5
    ),
    "customer_high_amount_count_14d": _count(
        "amount(s) of this customer in 14 days above 3 times the average", "money", 0.5
    ),
    "customer_same_amount_count": Clause(_same_amount, "money", 1.5),
    "customer_hour_deviation": Clause(_hour_deviation, "time", 0.95, by_custom=True),
    "customer_weekday_deviation": Clause(_weekday_deviation, "time", 0.95, by_custom=True),
    "customer_category_familiarity": Clause(_category_familiarity, "merchant", below=0.02, by_custom=True),
    "customer_category_count_recent": _count("recent transaction(s) of this customer in this category", "merchant"),
    "customer_category_amount_ratio": _ratio("this customer's recent average in this category", "money", 1.5),
    "customer_merchant_familiarity": Clause(_merchant_familiarity, "merchant", below=0.5, by_custom=True),
    "customer_merchant_count_1d": _count("merchant(s) used by this customer in the last 24 hours", "pace", 4.5),
    "customer_device_count_recent": Clause(_device, "device", below=0.5, by_custom=True),
    "customer_distance_km": _distance("between the customer and the merchant"),
    "customer_distance_last_km": _distance("from the place of this customer's last transaction"),
    "customer_speed_kmh": Clause(_speed, "place", 300.0),
    "customer_fraud_count_lifetime": _count("known fraud(s) of this customer", "fraud", 0.5),
    "customer_fraud_count_30d": _count("known fraud(s) of this customer in 30 days", "fraud", 0.5),
    "customer_fraud_days_since_last": _days("{} after this customer's last known fraud", "fraud", 30.0),
    "customer_fraud_label_count_7d": _count("fraud(s) of this customer became known in 7 days", "fraud", 0.5),
    "merchant_count_lifetime": _count("earlier transaction(s) at this merchant", "merchant", cap=COUNT_CAP),
    "merchant_age_days": _days("{} after the first transaction at this merchant", "merchant", 7.0),
    "merchant_seconds_since_last": Clause(
        lambda v, row, currencies: f"{_duration(v)} after the last transaction at this merchant", "merchant"
    ),
    "merchant_count_1h": _count("transaction(s) at this merchant in this and the last full hour", "merchant"),
    "merchant_count_1d": _count("transaction(s) at this merchant in the last 24 hours", "merchant"),
    "merchant_count_7d": _count("transaction(s) at this merchant in 7 days", "merchant"),
    "merchant_count_30d": _count("transaction(s) at this merchant in 30 days", "merchant"),
    "merchant_velocity_ratio": _ratio(
        "their usual number", "merchant", 3.0, "this merchant's transactions of the last 24 hours are", by_custom=False
    ),
    "merchant_amount_mean_1d": _amount_of("this merchant's average of today"),
    "merchant_amount_mean_7d": _amount_of("this merchant's average of 7 days"),
    "merchant_amount_mean_30d": _amount_of("this merchant's average of 30 days"),
    "merchant_amount_max_30d": _amount_of("this merchant's largest amount of 30 days"),
    "merchant_amount_log_zscore": _deviations("this merchant's average, both on a log scale", by_custom=False),
    "merchant_fraud_count_lifetime": _count("known fraud(s) at this merchant", "fraud", 0.5),
    "merchant_fraud_share_lifetime": _fraud_share("at this merchant"),
    "merchant_fraud_count_7d": _count("known fraud(s) at this merchant in 7 days", "fraud", 0.5),
    "merchant_fraud_count_14d": _count("known fraud(s) at this merchant in 14 days", "fraud", 0.5),
    "merchant_fraud_count_30d": _count("known fraud(s) at this merchant in 30 days", "fraud", 0.5),
    "merchant_fraud_share_30d": _fraud_share("at this merchant in 30 days"),
    "merchant_fraud_streak_share": _fraud_share("at this merchant since the first one of 30 days"),
    "merchant_fraud_days_since_first": _days("{} after the first known fraud of 30 days at this merchant", "fraud"),
    "merchant_fraud_days_since_last": _days("{} after the last known fraud at this merchant", "fraud", 7.0),
    "merchant_fraud_last_amount_log": Clause(_last_fraud_amount, "fraud"),
    "merchant_fraud_label_count_1d": _count("fraud(s) at this merchant became known today", "fraud", 0.5),
    "merchant_fraud_label_count_7d": _count("fraud(s) at this merchant became known in 7 days", "fraud", 0.5),
    "merchant_fraud_label_count_30d": _count("fraud(s) at this merchant became known in 30 days", "fraud", 0.5),
}
"""By the name of a history feature; its habits are the customer's and, where none is its, the merchant's."""
