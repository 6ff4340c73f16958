"""Reasons and explanations in words: what is said of each feature, in which order, in which currency, and of whom."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fraud.currencies import Currency, history_amount
from fraud.detectors.explain import Explainer
from fraud.detectors.protocol import Unit
from fraud.detectors.ranking import NONE, SOMETHING, strongest, telling
from fraud.detectors.words import HISTORY_CLAUSES, clause_of, inert, number_text
from fraud.features.featurizer import HISTORY_FEATURES, Featurizer, Histories
from fraud.schema import Feature, FeatureSpec, Role, Row, RowDecoder
from tests.tiny import AMOUNT_QUANTILES, FEATURES_SPEC, TRANSACTION_SPEC

UNIT = Unit("log-odds", raises="raises the risk", lowers="lowers the risk")
EXPLAINER = Explainer(TRANSACTION_SPEC, UNIT)
DAY_MS, HOUR_MS = 86_400_000, 3_600_000
MONDAY_MS = 1_767_571_200_000  # 2026-01-05


def habitual(n: int, **last: Any) -> tuple[np.ndarray[Any, Any], Row]:
    """The features of one transaction after `n` of 20.00 at 14:00 at one merchant, with one device, and its row."""
    at = {"latitude": 50.0, "longitude": 8.0}
    usual = {"customer_id": "c", "amount": 20.0, "merchant_id": "m", "device_id": "d", "category": "cafe", **at}
    times = [MONDAY_MS + day * DAY_MS + 14 * HOUR_MS for day in range(n)]
    said = [usual | {"transaction_id": f"t{i}", "event_time": moment(time)} for i, time in enumerate(times)]
    now = MONDAY_MS + n * DAY_MS + 3 * HOUR_MS + 600_000
    said.append(usual | {"transaction_id": "now", "event_time": moment(now)} | last)
    decoder = RowDecoder(TRANSACTION_SPEC)
    rows = [decoder.decode(json.dumps(row).encode(), "$") for row in said]
    return Featurizer(TRANSACTION_SPEC, AMOUNT_QUANTILES).advance(rows, Histories.new(rows))[-1], rows[-1]


def moment(ms: int) -> str:
    return str(np.datetime64(ms, "ms")) + "Z"


def shares(**by_feature: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Contributions of some features, all others 0, the base value -2."""
    row = np.zeros(len(EXPLAINER.features) + 1)
    for name, share in by_feature.items():
        row[TRANSACTION_SPEC.names.index(name)] = share
    row[-1] = -2.0
    return row


def text_of(x: np.ndarray[Any, Any], row: Row, **by_feature: float) -> str:
    (text,) = EXPLAINER.texts(x[np.newaxis], shares(**by_feature)[np.newaxis], [row])
    return text


ODD: dict[str, Any] = {"amount": 740.0, "merchant_id": "elsewhere"}


def test_an_explanation_says_what_is_unusual_for_this_customer() -> None:
    x, row = habitual(30, **ODD)
    assert text_of(
        x,
        row,
        customer_amount_ratio_30d=0.9,
        customer_hour_deviation=0.5,
        customer_merchant_familiarity=0.3,
    ) == (
        "Amount is 37 times this customer's average of 30 days; "
        "at 03:10 UTC, an hour this customer has never used; first time at this merchant."
    )


def test_contributions_of_one_habit_are_added_up() -> None:
    """Four features share the credit of one large amount, and one has that of the hour."""
    x, row = habitual(30, **ODD)
    money = dict.fromkeys(
        ["customer_amount_ratio_30d", "customer_amount_zscore", "customer_amount_percentile", "amount_log"], 0.2
    )
    text = text_of(x, row, **money, customer_amount_log_zscore=0.21, customer_hour_deviation=0.5)
    assert text == (
        "Amount is 37 times this customer's average of 30 days; at 03:10 UTC, an hour this customer has never used."
    )
    lowered = text_of(x, row, **money, customer_amount_mean_30d=-0.9, customer_hour_deviation=0.5)
    assert lowered == "At 03:10 UTC, an hour this customer has never used."


@pytest.mark.parametrize("feature", ["customer_amount_zscore", "customer_amount_log_zscore"])
def test_deviations_are_said_as_a_multiple_of_the_average_where_that_is_unusual(feature: str) -> None:
    x, row = habitual(30, **ODD)
    assert text_of(x, row, **{feature: 0.9}) == "Amount is 37 times this customer's average of 30 days."
    ratio = EXPLAINER._names.index("customer_amount_ratio_30d")
    for usual in (1.2, math.nan):
        x[ratio] = usual
        assert "standard deviations above this customer's average" in text_of(x, row, **{feature: 0.9})


def test_a_value_that_raises_the_score_but_is_usual_is_not_called_unusual() -> None:
    x, row = habitual(30)
    assert text_of(x, row, customer_amount_ratio_30d=0.9) == "An unusual combination of usual values."
    assert text_of(x, row, customer_amount_ratio_30d=-0.9) == "Nothing about it is unusual."
    assert text_of(x, row, customer_hour_deviation=-1.0) == "Nothing about it is unusual."


@pytest.mark.parametrize(("n", "known"), [(0, "this is the first transaction"), (1, "1 earlier transaction")])
def test_a_new_customer_has_no_habits_and_the_text_says_so(n: int, known: str) -> None:
    x, row = habitual(n, **ODD)
    assert text_of(x, row, customer_hour_deviation=0.9, amount_is_globally_unusual=0.5) == (
        f"Amount is above 99% of the amounts seen in training; the customer is new and has no habits yet ({known})."
    )
    by_feature = shares(customer_merchant_familiarity=0.9, amount=0.5)
    (first, second) = EXPLAINER.reasons(x, by_feature, row)
    assert first.text == "first time at this merchant (a new customer, who has no habits yet), which raises the risk"
    assert second.text == "amount is 740.00, which raises the risk"


def test_reasons_keep_feature_value_and_contribution_and_say_both_directions() -> None:
    x, row = habitual(30, amount=740.0)
    by_feature = shares(
        customer_amount_ratio_30d=1.5,
        customer_merchant_familiarity=-0.7,
        customer_weekday_deviation=-0.2,
        customer_speed_kmh=0.1,
        basket_size=0.05,
        customer_count_1h=-0.01,
    )
    (explained,) = EXPLAINER.explained(x[np.newaxis], by_feature[np.newaxis], [row])
    assert [(r.feature, r.contribution, r.direction) for r in explained.reasons] == [
        ("customer_amount_ratio_30d", 1.5, "raises"),
        ("customer_merchant_familiarity", -0.7, "lowers"),
        ("customer_weekday_deviation", -0.2, "lowers"),
        ("customer_speed_kmh", 0.1, "raises"),
        ("basket_size", 0.05, "raises"),
    ]
    assert [r.text for r in explained.reasons] == [
        "amount is 37 times this customer's average of 30 days, which raises the risk",
        "30 earlier transactions of this customer at this merchant, which lowers the risk",
        "on a Wednesday (UTC), as 13% of this customer's transactions, which lowers the risk",
        "0 km/h from the place of this customer's last transaction, which raises the risk",
        "basket_size is unknown, which raises the risk",
    ]
    assert explained.reasons[0].value == 37.0
    assert explained.reasons[4].value is None
    assert explained.base_value == -2.0
    assert sum(explained.contributions.values()) == pytest.approx(by_feature[:-1].sum())
    assert explained.text == text_of(
        x, row, **{name: share for name, share in explained.contributions.items() if share}
    )


CURRENCIES = {"EUR": Currency(2, 4_000), "VND": Currency(0, 600_000), "BTC": Currency(8, 60_000)}
IN_CURRENCIES = FeatureSpec(
    "transaction", TRANSACTION_SPEC.features, (*TRANSACTION_SPEC.roles, Role("currency")), currencies=CURRENCIES
)


@pytest.mark.parametrize(
    ("code", "amount", "own", "largest"),
    [("EUR", 740.5, "740.50 EUR", "80.00 EUR"), ("VND", 9e6, "9,000,000 VND", "1,200,000 VND")],
)
def test_amounts_are_said_in_the_transactions_own_currency(code: str, amount: float, own: str, largest: str) -> None:
    """The customer's largest amount was twice what is typical: 80 euros, or 1,200,000 dong."""
    explainer = Explainer(IN_CURRENCIES, UNIT)
    row = Row("t", (), b"", MONDAY_MS, "c", amount, {"currency": code})
    x = np.full(len(explainer.features), np.nan)
    x[IN_CURRENCIES.names.index("customer_amount_max_30d")] = 200.0
    x[IN_CURRENCIES.names.index("amount")] = history_amount(amount, CURRENCIES[code])
    texts = [r.text for r in explainer.reasons(x, shares(amount=2.0, customer_amount_max_30d=1.0), row)]
    assert texts == [
        f"amount is {own}, which raises the risk",
        f"this customer's largest amount of 30 days is {largest}, which raises the risk",
    ]


def test_small_units_and_currencies_that_a_version_does_not_know_are_said_plainly() -> None:
    clause = HISTORY_CLAUSES["customer_amount_max_30d"]
    bitcoin = Row("t", (), b"", MONDAY_MS, "c", 0.00034, {"currency": "BTC"})
    assert clause.say(200.0, bitcoin, CURRENCIES) == "this customer's largest amount of 30 days is 0.0012 BTC"
    assert HISTORY_CLAUSES["amount"].say(0.0, bitcoin, CURRENCIES) == "amount is 0.00034 BTC"
    other = Row("t", (), b"", MONDAY_MS, "c", 5.0, {"currency": "XYZ"})
    assert clause.say(200.0, other, CURRENCIES).endswith("is 200% of its currency's typical amount")


def test_a_model_of_ready_features_says_its_own_features() -> None:
    explainer = Explainer(FEATURES_SPEC, UNIT)
    x = np.array([52_000.0, np.nan, 0.0, 1.0])
    row = Row(None, (), b"")
    (explained,) = explainer.explained(x[np.newaxis], np.array([[0.1, 0.5, 0.2, 0.3, -1.0]]), [row])
    assert explained.text == "email_domain is disposable; has_phone is false; income is 52,000."
    assert [r.text for r in explained.reasons] == [
        "velocity is unknown, which raises the risk",
        "email_domain is disposable, which raises the risk",
        "has_phone is false, which raises the risk",
        "income is 52,000, which raises the risk",
    ]
    assert [r.value for r in explained.reasons] == [None, "disposable", False, 52_000.0]


def test_every_history_feature_has_its_words() -> None:
    assert HISTORY_CLAUSES.keys() == HISTORY_FEATURES.keys()
    for name in HISTORY_FEATURES:
        assert clause_of(Feature(name, "history", meaning="another meaning")) is HISTORY_CLAUSES[name]
    of_request = clause_of(Feature("amount", "request", meaning="the sum asked for"))
    assert of_request.say(3.5, Row(None, (), b""), {}) == "the sum asked for is 3.5"


@pytest.mark.parametrize("name", HISTORY_FEATURES)
def test_no_value_makes_a_text_long_or_unprintable(name: str) -> None:
    clause = HISTORY_CLAUSES[name]
    hostile = {"currency": "E\x1b[31m\nR<script>" + "x" * 500, "merchant_id": "\u202e", "category": "\n"}
    for amount, time in ((1e308, 253_402_300_799_999), (5e-324, 0)):
        row = Row("t", (), b"", time, "c", amount, hostile)
        for currencies in ({}, {hostile["currency"]: Currency(18, 1)}, CURRENCIES):
            for value in (0.0, 0.004, 0.5, 0.999, 1.0, 1.02, 2.0, 19.5, 255.0, 4294967295.0):
                text = clause.say(value, row, currencies)
                assert text.isprintable(), text
                assert len(text) < 160, text
                assert "nan" not in text
                assert text == clause.say(value, row, currencies)


def test_texts_of_callers_stay_one_line_of_plain_characters() -> None:
    assert inert("a\nb\x00c\u202ed\x7f") == "a�b�c�d�"
    assert inert("x" * 500) == "x" * 59 + "…"
    feature = Feature("colour", "request", "categorical", ("[red]\x1b[31m",))
    assert clause_of(feature).say(0.0, Row(None, (), b""), {}) == "colour is [red]�[31m"
    assert [len(number_text(v)) < 20 for v in (1e308, -1e308, 5e-324, math.inf)] == [True] * 4


# The kernels against the naive way

floats = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.0, -3.0])


@given(st.lists(st.lists(floats, min_size=8, max_size=8), min_size=1, max_size=4), st.integers(1, 7))
def test_the_strongest_are_those_of_a_stable_sort(rows: list[list[float]], top: int) -> None:
    contributions = np.array(rows)
    expected = np.argsort(-np.abs(contributions[:, :-1]), axis=1, kind="stable")[:, :top]
    assert np.array_equal(strongest(contributions, top), expected)


def named_naively(x: list[float], c: list[float], habits: list[int], limits: list[tuple[float, float]]) -> list[int]:
    totals = {h: sum(share for share, habit in zip(c, habits, strict=False) if habit == h) for h in sorted({*habits})}
    raising = sorted((h for h in totals if totals[h] > 0), key=lambda h: -totals[h])
    named = []
    for h in raising:
        odd = [
            j for j, habit in enumerate(habits) if habit == h and c[j] > 0 and not limits[j][0] <= x[j] <= limits[j][1]
        ]
        if odd:
            named.append(max(odd, key=lambda j: c[j]))
    first = SOMETHING if raising and not named else NONE
    return [*named[:3], *([first] if not named else []), NONE, NONE, NONE][:3]


@given(
    st.lists(floats, min_size=6, max_size=6),
    st.lists(floats, min_size=7, max_size=7),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_the_telling_ones_are_those_of_the_naive_way(x: list[float], c: list[float], habits: list[int]) -> None:
    limits = [(-0.5, 0.5), (-2.5, 1.5), (0.0, 0.0), (-math.inf, 2.0), (0.5, math.inf), (-math.inf, math.inf)]
    found = telling(np.array([x]), np.array([c]), np.array(habits), np.array(limits), np.zeros(6, np.bool_), -1, -1, 3)
    assert found[0].tolist() == named_naively(x, c, habits, limits)
