"""Bodies in gzip and with a byte order mark; who takes a compressed answer."""

from __future__ import annotations

import gzip
import time
import zlib

import pytest

from fraud.errors import MalformedJson, PayloadTooLarge, UnsupportedEncoding
from fraud.serving.bodies import plain, takes_gzip

BODY = b'{"instances": [{"amount": 1}]}'
LIMIT = 4_000_000


@pytest.mark.parametrize("encoding", [None, b"", b"identity", b" Identity "])
def test_a_plain_body_is_what_it_is(encoding: bytes | None) -> None:
    assert plain(BODY, encoding, LIMIT) == BODY


@pytest.mark.parametrize("encoding", [b"gzip", b"GZIP", b"x-gzip"])
def test_gzip_is_read(encoding: bytes) -> None:
    assert plain(gzip.compress(BODY), encoding, LIMIT) == BODY


def test_a_byte_order_mark_is_left_out() -> None:
    assert plain(b"\xef\xbb\xbf" + BODY, None, LIMIT) == BODY
    assert plain(gzip.compress(b"\xef\xbb\xbf" + BODY), b"gzip", LIMIT) == BODY


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"deflate", b"gzip, gzip", b"x" * 5000, b"\xff"])
def test_another_encoding_is_refused_with_what_is_read(encoding: bytes) -> None:
    with pytest.raises(UnsupportedEncoding, match=r"is not read here; send gzip or none$") as refused:
        plain(BODY, encoding, LIMIT)
    assert refused.value.http_status == 415
    assert len(refused.value.message) < 250


def test_a_bomb_is_refused_at_the_limit() -> None:
    bomb = gzip.compress(b"0" * 100_000_000, 9)
    assert len(bomb) < 100_000
    started = time.thread_time()
    with pytest.raises(PayloadTooLarge, match="4000000 bytes"):
        plain(bomb, b"gzip", LIMIT)
    assert time.thread_time() - started < 0.05
    assert plain(gzip.compress(b"0" * LIMIT), b"gzip", LIMIT) == b"0" * LIMIT


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BODY, "the body is not gzip, as its content encoding says: "),
        (b"", "the body is gzip that ends too early"),
        (gzip.compress(BODY)[:-6], "the body is gzip that ends too early"),
        (zlib.compress(BODY), "the body is not gzip"),
        (gzip.compress(BODY) * 2, "the body goes on after its gzip stream; send one stream"),
        (gzip.compress(BODY)[:-8] + b"\0" * 8, "the body is not gzip, as its content encoding says: "),
    ],
    ids=["plain", "empty", "cut", "zlib", "two streams", "wrong checksum"],
)
def test_broken_gzip_is_malformed(body: bytes, reason: str) -> None:
    with pytest.raises(MalformedJson) as refused:
        plain(body, b"gzip", LIMIT)
    assert refused.value.message.startswith(reason)


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("gzip", True),
        ("br, GZIP", True),
        ("gzip;q=0.5, identity", True),
        ("gzip; q=1", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000, br", False),
        ("gzip;q=none", False),
        ("br, deflate", False),
        ("xgzip", False),
        ("", False),
    ],
)
def test_who_takes_gzip(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) is takes
