"""From a record to a row: a value is a row as `/predict` takes it, or the envelope of `/v1/inference`."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Message

from fraud.errors import FraudError, InvalidRequest
from fraud.forms import fields_of, readable_time
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.envelope import InferenceBody, in_contract, row_of
from fraud.pipeline.requests import ScoreRequest
from fraud.streams.sink import Headers

MAX_HEADER_BYTES = 32_768
"""Of a record's key and headers together, which its verdict carries on."""
LAST_MS = 253_402_300_799_999
"""The end of the year 9999, ms since the epoch: no later time can be written."""
ENVELOPE = "anomaly-inference"
MODEL_HEADER, REQUEST_ID_HEADER = "model", "x-request-id"
_SAFE_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch
_ROW = "$.instances[0]"
_encode = msgspec.json.Encoder().encode


def headers_of(message: Message) -> Headers:
    """Return a record's headers, in their order."""
    headers = message.headers() or ()
    return list(headers.items()) if isinstance(headers, dict) else list(headers)


def header(headers: Headers, name: str) -> bytes | None:
    """Return the first header of a name, in any case."""
    found = next((value for given, value in headers if given.lower() == name), None)
    return found.encode() if isinstance(found, str) else found


def key_of(message: Message) -> bytes | None:
    """Return a record's key."""
    key = message.key()
    return key.encode() if isinstance(key, str) else key


def value_bytes(message: Message) -> bytes | None:
    """Return a record's value; None for a tombstone."""
    value = message.value()
    return value.encode() if isinstance(value, str) else value


def place_of(message: Message) -> str:
    """Return topic, partition and offset of a record as one text, which no other record of the cluster has."""
    return f"{message.topic()}-{message.partition()}-{message.offset()}"


def time_of(message: Message, now_ms: int) -> int:
    """Return a record's timestamp, ms since the epoch; it is the same each time the record is read."""
    kind, ms = message.timestamp()
    return now_ms if kind == TIMESTAMP_NOT_AVAILABLE else ms


def request_id_of(message: Message, headers: Headers) -> str:
    """Return the header X-Request-ID where it is short and plain, else the record's place."""
    given = header(headers, REQUEST_ID_HEADER)
    if given is not None and _SAFE_REQUEST_ID(given):
        return given.decode("ascii")
    return place_of(message)


def carried_bytes(message: Message) -> int:
    """Return the length of a record's key and headers, bytes."""
    key = key_of(message)
    return sum([len(name) + len(value or b"") for name, value in headers_of(message)]) + len(key or b"")


def expect_usable(message: Message) -> bytes:
    """Return the value of a record.

    Raises
    ------
    InvalidRequest
        It has none, its timestamp is no time from 1970 to 9999, or its key and headers are too long to be carried on.
    """
    kind, timestamp = message.timestamp()
    if kind != TIMESTAMP_NOT_AVAILABLE and not 0 <= timestamp <= LAST_MS:
        allowed = f"0 to {LAST_MS}, ms since 1970"
        raise InvalidRequest(f"a record with the timestamp {timestamp} arrived; allowed: {allowed}", "$")
    value = value_bytes(message)
    if value is None:
        raise InvalidRequest("a record without a value arrived; send a JSON object", "$")
    n_bytes = carried_bytes(message)
    if n_bytes > MAX_HEADER_BYTES:
        raise InvalidRequest(f"a key and headers of {n_bytes} bytes arrived; {MAX_HEADER_BYTES} are allowed", "$")
    return value


def read_record(pipeline: Pipeline, message: Message, now_ms: int, *, explain: bool) -> ScoreRequest:
    """Return a record as a request of one row, read.

    A row without an id gets the record's place as its id, and an envelope without a time the record's timestamp, so
    that a record that is read again is the same transaction.

    Raises
    ------
    InvalidRequest
        It cannot be read.
    UnknownModel
        Its header `model` names a model that is not served.
    """
    value = expect_usable(message)
    headers = headers_of(message)
    model = header(headers, MODEL_HEADER)
    enveloped = _enveloped(value)
    contract = ""
    if enveloped is not None:
        contract = ENVELOPE
        row = row_of(enveloped)
        if "event_time" not in row:
            row = {**row, "event_time": msgspec.Raw(_encode(readable_time(time_of(message, now_ms))))}
        value = _encode(row)
    return pipeline.read(
        [value],
        model=model.decode(errors="replace") if model else None,
        explain=explain,
        now_ms=now_ms,
        request_id=request_id_of(message, headers),
        contract=contract,
        transaction_id=place_of(message),
    )


def _enveloped(value: bytes) -> InferenceBody | None:
    """Return a value as an envelope, if it is an object with a user and a transaction."""
    if b'"user_id"' not in value or b'"transaction"' not in value:
        return None
    fields: Mapping[str, msgspec.Raw] = fields_of(value, "$", "a transaction")
    user, transaction = fields.get("user_id"), fields.get("transaction")
    if user is None or transaction is None or bytes(transaction)[:1] != b"{":
        return None
    return InferenceBody(user, transaction)


def in_record(error: FraudError, contract: str) -> FraudError:
    """Return the refusal of a row with the path that its field has in the record."""
    if contract == ENVELOPE and isinstance(error, InvalidRequest):
        return in_contract(error)
    if error.path is not None and error.path.startswith(_ROW):
        error.path = "$" + error.path.removeprefix(_ROW)
    return error
