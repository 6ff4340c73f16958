"""Each way a request can be bad, with its text, its path and its status."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from fraud.errors import MalformedJson, RequestError
from fraud.forms import id_text
from fraud.schema import Feature, FeatureSpec, Role, RowDecoder
from fraud.serving.scoring import decode_envelope

PAYMENTS = RowDecoder(
    FeatureSpec(
        "transaction",
        (
            Feature("amount", "history"),
            Feature("category", "request", "categorical", ("fuel", "grocery", "travel")),
            Feature("age", "request", minimum=0, maximum=120),
            Feature("strong", "request", "boolean", missing=True),
        ),
        (Role("merchant_id"), Role("category"), Role("latitude", missing=True), Role("longitude", missing=True)),
    ),
    max_ahead_ms=300_000,
)
LOANS = RowDecoder(
    FeatureSpec(
        "features",
        (
            Feature("income", "request", minimum=0, missing=True),
            Feature("term in months", "request"),
            Feature("email_domain_category", "request", "categorical", ("free", "corporate")),
            Feature("employment", "request", "categorical", ("employed", "retired"), unknown="missing"),
        ),
    )
)
PAYMENT = {
    "transaction_id": "t-1",
    "event_time": "2026-01-31T12:30:00.250+01:00",
    "customer_id": "c-1",
    "merchant_id": "m-1",
    "amount": 12.5,
    "category": "fuel",
    "age": 44,
}
LOAN = {"income": 1e5, "term in months": 24, "email_domain_category": "free", "employment": "astronaut"}
NOW_MS = 1_769_859_000_000  # half an hour after midday, 31 January 2026, UTC+1


def test_a_good_payment_becomes_a_row() -> None:
    row = PAYMENTS.decode(json.dumps(PAYMENT | {"note": 1, "why": {}}).encode(), "$.instances[0]", NOW_MS)
    assert (row.transaction_id, row.customer_id, row.amount) == ("t-1", "c-1", 12.5)
    assert row.event_time_ms == NOW_MS + 250
    assert row.values[:2] == (0.0, 44.0)
    assert np.isnan(row.values[2])
    assert row.roles == {"merchant_id": "m-1", "category": "fuel", "latitude": None, "longitude": None}
    assert row.n_extra == 2


@pytest.mark.parametrize(
    "more", ['"note": 1', '"no\\u0074e": "ö"', '"a": [{"income": 1}], "b": "\\"c\\": 1", "a": 2', ""]
)
@pytest.mark.parametrize("space", ["", " ", "\n\t"])
def test_a_row_is_read_alike_whether_or_not_it_holds_more(more: str, space: str) -> None:
    known = {"transaction_id", *(feature.name for feature in LOANS.spec.features)}
    fields = [f"{json.dumps(name)}{space}:{space}{json.dumps(value)}" for name, value in LOAN.items()]
    again = '"\\u0069ncome": 7'  # of a name that comes twice, the last counts
    raw = ("{" + f"{space},{space}".join([more, *fields, again] if more else [*fields, again]) + "}").encode()
    row = LOANS.decode(raw, "$")
    assert row.n_extra == len(json.loads(raw).keys() - known)
    assert row.values[:3] == (7.0, 24.0, 0.0)
    assert np.isnan(row.values[3])
    assert row.raw == raw


def test_an_id_may_hold_any_other_character() -> None:
    ids = {"transaction_id": "\\u0000", "customer_id": "ö/\n", "merchant_id": "\x01"}
    row = PAYMENTS.decode(json.dumps(PAYMENT | ids).encode(), "$", NOW_MS)
    assert (row.transaction_id, row.customer_id, row.roles["merchant_id"]) == tuple(ids.values())


def test_a_good_loan_becomes_a_row_and_what_it_may_not_know_is_missing() -> None:
    row = LOANS.decode(json.dumps(LOAN | {"income": None}).encode(), "$")
    assert row.transaction_id is None
    assert np.isnan(row.values[0])
    assert row.values[1:3] == (24.0, 0.0)
    assert np.isnan(row.values[3])


@pytest.mark.parametrize(
    ("sent", "means"),
    [
        ({"customer_id": 4532021234567890}, {"customer_id": "4532021234567890"}),
        ({"customer_id": 1001.0}, {"customer_id": "1001"}),
        ({"customer_id": "1001.0"}, {"customer_id": "1001"}),
        ({"customer_id": 2**63 + 5}, {"customer_id": str(2**63 + 5)}),
        ({"transaction_id": 17, "merchant_id": -3, "age": 44.0}, {"transaction_id": "17", "merchant_id": "-3"}),
        ({"strong": 1}, {"strong": True}),
        ({"strong": 0.0}, {"strong": False}),
        ({"strong": ""}, {}),
        ({"age": True}, {"age": 1}),
        ({"device_id": 7, "channel": 3.0}, {"device_id": "7", "channel": "3"}),
        ({"device_id": "", "channel": None}, {}),
        ({"channel": True}, {"channel": "true"}),
        ({"terminal": 5411}, {"terminal": "5411"}),
        ({"terminal": 5411.0}, {"terminal": "5411"}),
        ({"terminal": "crypto"}, {"terminal": None}),
        ({"terminal": ""}, {}),
        ({"event_time": "2026-01-31T12:30+01:00"}, {"event_time": "2026-01-31T12:30:00+01:00"}),
        ({"event_time": "20260131T113000Z"}, {"event_time": "2026-01-31T11:30:00Z"}),
    ],
)
def test_a_value_in_a_tables_own_form_is_the_same_row(sent: dict[str, Any], means: dict[str, Any]) -> None:
    spec = PAYMENTS.spec
    terminal = Feature("terminal", "request", "categorical", ("5411", "5812"), "missing", missing=True)
    roles = (*spec.roles, Role("device_id", missing=True), Role("channel", missing=True))
    decoder = RowDecoder(FeatureSpec("transaction", (*spec.features, terminal), roles), max_ahead_ms=300_000)
    row = decoder.decode(json.dumps(PAYMENT | sent).encode(), "$", NOW_MS)
    same = decoder.decode(json.dumps(PAYMENT | means).encode(), "$", NOW_MS)
    np.testing.assert_array_equal(row.values, same.values)
    assert (row.transaction_id, row.event_time_ms, row.customer_id, row.amount, row.roles) == (
        same.transaction_id,
        same.event_time_ms,
        same.customer_id,
        same.amount,
        same.roles,
    )


TIME = 'send RFC 3339 with a zone, such as "2026-01-31T12:30:00Z"'


@pytest.mark.parametrize(
    ("change", "message", "field"),
    [
        ({"amount": None}, "Expected `float`, got `null`; null arrived", ".amount"),
        ({"amount": 0}, "Expected `float` > 0.0; 0 arrived", ".amount"),
        ({"amount": -3}, "Expected `float` > 0.0; -3 arrived", ".amount"),
        ({"amount": "12.5"}, 'Expected `float`, got `str`; "12.5" arrived', ".amount"),
        ({"amount": True}, "Expected `float`, got `bool`; true arrived", ".amount"),
        ({"customer_id": ""}, 'Expected `str` of length >= 1; "" arrived', ".customer_id"),
        ({"customer_id": [7]}, "Expected `str`, got `array`; [7] arrived", ".customer_id"),
        ({"customer_id": True}, "Expected `str`, got `bool`; true arrived", ".customer_id"),
        ({"customer_id": 7, "amount": 0}, "Expected `float` > 0.0; 0 arrived", ".amount"),
        ({"customer_id": 7.5}, "7.5 is no whole number; send an id as text or as a whole number", ".customer_id"),
        (
            {"customer_id": 2.0**53},
            "9007199254740992.0 is at or above 2**53, where floats skip whole numbers; send the id as text",
            ".customer_id",
        ),
        (
            {"customer_id": "4.5E+15"},
            "'4.5E+15' is in scientific notation, which drops digits of an id; send all its digits",
            ".customer_id",
        ),
        ({"strong": 2}, "Expected `bool | null`, got `int`; 2 arrived", ".strong"),
        ({"category": 5411}, "unknown category '5411'; allowed: fuel, grocery, travel", ".category"),
        (
            {"merchant_id": "m" * 129},
            f'Expected `str` of length <= 128; "{"m" * 59}… arrived',
            ".merchant_id",
        ),
        ({"customer_id": "c\0"}, "an id may not hold the characters U+0000 and U+001F", ".customer_id"),
        ({"merchant_id": "m\x1f1"}, "an id may not hold the characters U+0000 and U+001F", ".merchant_id"),
        (
            {"event_time": "2026-01-31T12:30:00"},
            f'Expected `datetime` with a timezone component; {TIME}; "2026-01-31T12:30:00" arrived',
            ".event_time",
        ),
        ({"event_time": "yesterday"}, f'Invalid RFC3339 encoded datetime; {TIME}; "yesterday" arrived', ".event_time"),
        ({"event_time": "1969-12-31T23:59:59Z"}, "event_time 1969-12-31T23:59:59+00:00 is before 1970", ".event_time"),
        (
            {"event_time": "2026-01-31T11:36:00Z"},
            "event_time 2026-01-31T11:36:00+00:00 is more than 300 s ahead of the server's clock, "
            "2026-01-31T11:30:00+00:00",
            ".event_time",
        ),
        (
            {"category": "feul"},
            "unknown category 'feul'; allowed: fuel, grocery, travel (did you mean 'fuel'?)",
            ".category",
        ),
        ({"age": 121}, "Expected `float` <= 120.0; 121 arrived", ".age"),
        ({"strong": "yes"}, 'Expected `bool | null`, got `str`; "yes" arrived', ".strong"),
        ({"latitude": 91}, "Expected `float` <= 90.0; 91 arrived", ".latitude"),
    ],
)
def test_a_bad_field_is_named_with_what_arrived_and_what_is_allowed(
    change: dict[str, Any], message: str, field: str
) -> None:
    with pytest.raises(RequestError) as refused:
        PAYMENTS.decode(json.dumps(PAYMENT | change).encode(), "$.instances[2]", NOW_MS)
    assert refused.value.message == message
    assert refused.value.path == f"$.instances[2]{field}"
    assert (refused.value.http_status, refused.value.code) == (422, "invalid_request")


def test_all_that_is_missing_is_listed_at_once() -> None:
    without = {k: v for k, v in PAYMENT.items() if k not in {"amount", "merchant_id"}} | {"amuont": 12.5}
    with pytest.raises(RequestError) as refused:
        PAYMENTS.decode(json.dumps(without).encode(), "$.instances[0]")
    assert refused.value.message == "missing amount, merchant_id; did you mean 'amount' for 'amuont'"
    assert refused.value.path == "$.instances[0]"


@pytest.mark.parametrize("raw", [b"3", b"[]", b'"t-1"', b"null"])
def test_an_instance_is_an_object(raw: bytes) -> None:
    with pytest.raises(RequestError, match=r"^an instance must be a JSON object of finite values: Expected `object`"):
        LOANS.decode(raw, "$.instances[0]")


def test_a_number_beyond_float64_is_refused() -> None:
    with pytest.raises(RequestError, match="of finite values: Number out of range"):
        LOANS.decode(json.dumps(LOAN).replace("24", "1e999").encode(), "$")


@pytest.mark.parametrize(
    ("body", "status", "message", "path"),
    [
        (b"", 400, "the body is not JSON (which has no NaN or Infinity): Input data was truncated", None),
        (b'{"instances": [{"amount": NaN}]}', 400, "the body is not JSON (which has no NaN or Infinity): JSON", None),
        (b'{"instances": [{"amount": Infinity}]}', 400, "the body is not JSON (which has no NaN", None),
        (b'{"instances": [{]}', 400, "the body is not JSON", None),
        (b"\xff\xfe", 400, "the body is not JSON", None),
        (b"[]", 422, 'Expected `object`, got `array`; send {"instances": [{...}]}', None),
        (b"{}", 422, "0 instances arrived; 1 to 1000 a call are allowed", "$.instances"),
        (b'{"instances": []}', 422, "0 instances arrived; 1 to 1000 a call are allowed", "$.instances"),
        (
            b'{"income": 5, "owner": true}',
            422,
            "0 instances arrived; 1 to 1000 a call are allowed: each row is an object in the list of "
            '{"instances": [{...}]}',
            "$.instances",
        ),
        (b'{"instances": {}}', 422, "Expected `array`, got `object`; send", "$.instances"),
        (b'{"instances": [{}], "model": 3}', 422, "Expected `str | null`, got `int`; send", "$.model"),
        (b'{"instances": [' + b"{}," * 1000 + b"{}]}", 422, "1001 instances arrived; 1 to 1000 a call", "$.instances"),
    ],
)
def test_a_bad_body_is_refused_whole(body: bytes, status: int, message: str, path: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        decode_envelope(body)
    assert refused.value.message.startswith(message)
    assert refused.value.path == path
    assert refused.value.http_status == status
    assert isinstance(refused.value, MalformedJson) == (status == 400)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(("1001", "1001"), ("1001.0", "1001"), ("1001.000", "1001"), (1001, "1001"), (1001.0, "1001")),
        *(("007", "007"), ("007.0", "007"), ("-3.0", "-3"), (-3.0, "-3"), (-0.0, "0"), (2**63, str(2**63))),
        *(("12e5", "12e5"), ("1.5", "1.5"), ("c.0", "c.0"), ("1.0.0", "1.0.0"), ("+49 30", "+49 30"), ("", "")),
        (2.0**53 - 1, "9007199254740991"),
    ],
)
def test_an_id_has_one_text_wherever_it_comes_from(value: str | float, text: str) -> None:
    assert id_text(value) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("4.53202E+15", "'4.53202E+15' is in scientific notation, which drops digits of an id; send all its digits"),
        ("4E+15", "'4E+15' is in scientific notation, which drops digits of an id; send all its digits"),
        ("4.5e15", "'4.5e15' is in scientific notation, which drops digits of an id; send all its digits"),
        (2.0**53, "9007199254740992.0 is at or above 2**53, where floats skip whole numbers; send the id as text"),
        (1.5, "1.5 is no whole number; send an id as text or as a whole number"),
        (float("nan"), "nan is no whole number; send an id as text or as a whole number"),
    ],
)
def test_values_that_stand_for_several_ids_are_refused(value: str | float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        id_text(value)


@pytest.mark.parametrize("said", ['"5411.0"', '"5411"', "5411", "5411.0"])
def test_codes_and_devices_have_one_text_as_in_a_table(said: str) -> None:
    features = (Feature("amount", "history"), Feature("category", "request", "categorical", ("5411", "5812")))
    decoder = RowDecoder(FeatureSpec("transaction", features, (Role("category"), Role("device_id"))))
    row = decoder.decode(
        f'{{"transaction_id":"t","event_time":"2025-01-01T00:00:00Z","customer_id":{said},"amount":1,'
        f'"category":{said},"device_id":{said}}}'.encode(),
        "$",
    )
    assert (row.customer_id, row.roles, row.values) == ("5411", {"category": "5411", "device_id": "5411"}, (0.0,))
