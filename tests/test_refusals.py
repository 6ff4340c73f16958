"""Whatever the size and the bytes of what a caller sends: a short refusal of its own row, in little processor time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fraud.errors import InvalidRequest, RequestError, UnknownModel
from fraud.forms import MAX_FIELDS, MAX_OBJECT_BYTES
from fraud.pipeline.labels import read_label
from fraud.pipeline.requests import CHUNK_BYTES, transaction_id_of
from fraud.refusals import closest, listed, shown_json
from fraud.schema import Feature, FeatureSpec, RowDecoder
from fraud.serving.bodies import decode_body
from fraud.serving.scoring import decode_envelope

FEATURES = tuple(Feature(f"customer_index_{i}", "request", missing=i > 300) for i in range(390))
CITIES = tuple(f"city of {'x' * 30} number {i}" for i in range(200))
WIDE = RowDecoder(FeatureSpec("features", (*FEATURES, Feature("city", "request", "categorical", CITIES))))
NOW_MS = 1_769_859_000_000


def refusal(decode: Callable[[], Any]) -> str:
    """Return the message of a refusal, which is short and came within 20 ms of processor time."""
    started = time.thread_time()
    try:
        found = decode()
    except RequestError as error:
        found = error
    took_s = time.thread_time() - started
    assert isinstance(found, InvalidRequest)
    assert took_s < 0.02
    assert len(found.message) < 1500
    found.message.encode()  # no part of a character
    return found.message


def row(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def test_sixty_thousand_unknown_keys_are_refused_at_once() -> None:
    many = row({f"customer_ix{i}": 1 for i in range(60_000)})
    message = refusal(lambda: WIDE.decode(many, "$.instances[0]"))
    assert message == f"an instance of {len(many)} bytes arrived; {MAX_OBJECT_BYTES} are allowed"


def test_more_fields_than_allowed_are_refused() -> None:
    many = {f"k{i}": 1 for i in range(MAX_FIELDS + 1)}
    assert refusal(lambda: WIDE.decode(row(many), "$")) == "an instance of 1001 fields arrived; 1000 are allowed"
    assert refusal(lambda: read_label(row(many), "$", NOW_MS, 0)) == "a label of 1001 fields arrived; 1000 are allowed"


def test_as_many_misspelled_fields_as_allowed_get_a_few_hints() -> None:
    message = refusal(lambda: WIDE.decode(row({f"customer_indexx_{i}": 1 for i in range(MAX_FIELDS)}), "$"))
    assert message.startswith("missing customer_index_0, customer_index_1, ")
    assert " and 290 more; did you mean 'customer_index_0' for 'customer_indexx_0', " in message
    assert message.count(" for ") == 5


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"city": "city of " + "x" * 50_000}, "unknown category 'city of xxxxx"),
        ({"city": "é" * 8_000}, "unknown category 'é"),
        ({"city": ["x" * 1000] * 50}, 'Expected `str`, got `array`; ["xxx'),
        ({"customer_index_3": "9" * 50_000}, 'Expected `float`, got `str`; "999'),
        ({"transaction_id": "t" * 50_000}, 'Expected `str` of length <= 128; "ttt'),
    ],
)
def test_long_values_are_shown_in_part(change: dict[str, Any], start: str) -> None:
    good = {feature.name: 1 for feature in FEATURES} | {"city": CITIES[0]}
    message = refusal(lambda: WIDE.decode(row(good | change), "$"))
    assert message.startswith(start)
    assert "…" in message


def test_long_numbers_are_refused_or_read() -> None:
    good = row({feature.name: 1 for feature in FEATURES} | {"city": CITIES[0], "customer_index_3": 0})
    huge = good.replace(b'"customer_index_3": 0', b'"customer_index_3": ' + b"1" * 50_000)
    assert "finite values: Integer value out of range; 1111" in refusal(lambda: WIDE.decode(huge, "$"))
    assert "finite values" in refusal(lambda: WIDE.decode(good.replace(b'_3": 0', b'_3": 1e400'), "$"))
    assert WIDE.decode(good.replace(b'_3": 0', b'_3": 0.' + b"1" * 50_000), "$").values[3] == pytest.approx(1 / 9)
    assert WIDE.decode(good.replace(b'_3": 0', b'_3": -0'), "$").values[3] == 0.0
    assert WIDE.decode(good[:-1] + b', "customer_index_3": 7, "unknown": 1e400}', "$").values[3] == 7.0  # the last one


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"\xff": 1}', "an instance must be JSON in UTF-8: byte 0xff at position 2 is not"),
        (
            b'{"transaction_id": 7, "note": "caf\xe9"}',
            "an instance must be JSON in UTF-8: byte 0xe9 at position 34 is not",
        ),
        (b'{"a": "\xed\xa0\x80"}', "an instance must be JSON in UTF-8: byte 0xed at position 7 is not"),
        (b'{"\\ud800": 1}', "an instance is not JSON: "),
        (b'{"a": "\\udc00"}', "an instance is not JSON: JSON is malformed: invalid utf-16 surrogate pair"),
        (b'{"a": "\\q"}', "an instance is not JSON: JSON is malformed: invalid esc"),
        (b'{"a": "\x00"}', "an instance is not JSON: JSON is malformed: invalid character"),
        (b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "an instance is nested too deeply to be read"),
        (b'{"a": ' + b'{"b":' * 10_000 + b"1" + b"}" * 10_000 + b"}", "an instance is nested too deeply to be read"),
    ],
)
def test_bytes_that_are_no_json_text_are_refused_with_their_row(raw: bytes, reason: str) -> None:
    assert refusal(lambda: WIDE.decode(raw, "$")).startswith(reason)
    label = refusal(lambda: read_label(raw, "$", NOW_MS, 0))
    assert label.startswith(reason.replace("an instance", "a label"))


def test_the_good_rows_beside_broken_bytes_are_read() -> None:
    decoder = RowDecoder(FeatureSpec("features", (Feature("income", "request"),)))
    broken = [
        b'{"income": 1, "\xff": 2}',
        b'{"transaction_id": "t-2", "income": "\xff\xfe"}',
        b'{"transaction_id": "\xff"}',
    ]
    raws, _ = decode_envelope(b'{"instances": [{"income": 5}, ' + b", ".join(broken) + b"]}")
    assert decoder.decode(raws[0], "$").values == (5.0,)
    for raw in raws[1:]:
        assert "must be JSON in UTF-8" in refusal(lambda raw=raw: decoder.decode(raw, "$"))  # type: ignore[misc]
    assert [transaction_id_of(raw) for raw in raws] == [None, None, "t-2", None]
    ids = [b"17", b"17.0", b"1.5", b"[1]", b"9" * 200, b'"4.5E+15"', b"true"]
    assert [transaction_id_of(b'{"transaction_id": ' + i + b"}") for i in ids] == ["17", "17", *[None] * 5]


def test_a_batch_of_the_worst_rows_keeps_the_processor_for_little_time() -> None:
    worst = row({f"customer_indexx_{i}": 1 for i in range(MAX_FIELDS)})
    started = time.thread_time()
    for _ in range(CHUNK_BYTES // len(worst) + 1):  # as many as are decoded before others have their turn
        with pytest.raises(InvalidRequest):
            WIDE.decode(worst, "$")
    assert time.thread_time() - started < 0.02


def test_names_that_are_the_callers_are_cut() -> None:
    label = row({"transaction_id": "t", "is_fraud": True, "n" * 60_000: 1})
    assert refusal(lambda: read_label(label, "$", NOW_MS, 0)) == f"Object contains unknown field `{'n' * 60}…`"
    assert len(UnknownModel("m" * 1_000_000, ["a"]).message) < 200
    with pytest.raises(InvalidRequest) as refused:
        decode_body(msgspec.json.Decoder(dict[str, int]), b'{"' + b"k" * 9000 + b'": []}', "{}")
    assert len(refused.value.message) < 200


def test_a_label_may_come_in_the_forms_of_a_table() -> None:
    sent = b'{"transaction_id": 17.0, "is_fraud": 1, "label_time": "2026-01-31T11:30Z"}'
    same = b'{"transaction_id": "17", "is_fraud": true, "label_time": "2026-01-31T11:30:00Z"}'
    assert read_label(sent, "$", NOW_MS, 86_400_000) == read_label(same, "$", NOW_MS, 86_400_000)
    assert refusal(lambda: read_label(sent.replace(b"label_time", b"labelTime"), "$", NOW_MS, 0)) == (
        "Object contains unknown field `labelTime`"
    )
    assert refusal(lambda: read_label(sent.replace(b": 1,", b": 2,"), "$", NOW_MS, 86_400_000)).endswith("2 arrived")


def test_close_names_are_found() -> None:
    assert closest("amuont", ["category", "amount"]) == "amount"
    assert closest("zzz", ["category", "amount"]) is None
    assert closest("x", []) is None
    assert listed([str(i) for i in range(14)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more"
    assert shown_json(msgspec.Raw(b'"' + "€".encode() * 100 + b'"')) == '"' + "€" * 59 + "…"
