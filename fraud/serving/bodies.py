"""Bodies of requests: gzip and byte order mark, and JSON with an error that shows what may be sent."""

from __future__ import annotations

import codecs
import zlib
from typing import TypeVar

import msgspec

from fraud.errors import InvalidRequest, MalformedJson, PayloadTooLarge, UnsupportedEncoding
from fraud.refusals import shown_reason, split_path
from fraud.schema import MAX_INSTANCES

T = TypeVar("T")

GZIP_WINDOW = 31
"""zlib's code of a gzip stream with the largest window."""


def plain(body: bytes, encoding: bytes | None, limit: int) -> bytes:
    """Return a body decompressed and without a byte order mark.

    Parameters
    ----------
    body : bytes
    encoding : bytes, optional
        The header Content-Encoding.
    limit : int
        Largest size after decompression, bytes.

    Raises
    ------
    UnsupportedEncoding
        It has another compression than gzip.
    PayloadTooLarge
        It is longer than `limit`.
    MalformedJson
        It is declared as gzip, but is not valid or complete gzip.
    """
    if encoding is not None:
        match encoding.strip().lower():
            case b"" | b"identity":
                pass
            case b"gzip" | b"x-gzip":
                body = _decompressed(body, limit)
            case other:
                raise UnsupportedEncoding(other.decode("latin-1")[:100])
    return body[3:] if body.startswith(codecs.BOM_UTF8) else body


def _decompressed(body: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(GZIP_WINDOW)
    try:
        content = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedJson(f"the body is not gzip, as its content encoding says: {error}") from None
    if len(content) > limit:
        raise PayloadTooLarge(limit)
    if not stream.eof:
        raise MalformedJson("the body is gzip that ends too early")
    if stream.unused_data:
        raise MalformedJson("the body goes on after its gzip stream; send one stream")
    return content


def takes_gzip(accepted: str) -> bool:
    """Return whether a caller accepts gzip, by its header Accept-Encoding."""
    for entry in accepted.lower().split(","):
        name, _, parameter = entry.partition(";")
        if name.strip() == "gzip":
            weight = parameter.replace(" ", "").removeprefix("q=")
            try:
                return not parameter or float(weight) > 0
            except ValueError:
                return False
    return False


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes, example: str) -> T:
    """Decode a whole body; `example` is shown to the caller in errors.

    Raises
    ------
    MalformedJson
        The body is no JSON.
    InvalidRequest
        It is JSON of another form.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, path = split_path(str(error))
        raise InvalidRequest(f"{shown_reason(message)}; send {example}", path) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedJson(f"the body is not JSON (which has no NaN or Infinity): {error}") from None
    except RecursionError:
        raise MalformedJson("the body is nested too deeply to be read") from None


def expect_count(n: int, name: str) -> None:
    """Raise `InvalidRequest` unless a body has 1 to 1000 elements."""
    if not 1 <= n <= MAX_INSTANCES:
        raise InvalidRequest(f"{n} {name} arrived; 1 to {MAX_INSTANCES} a call are allowed", f"$.{name}")
