"""The parameters of a call: path and query as one typed struct, and the header Idempotency-Key."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import parse_qsl, unquote

import msgspec

from fraud.errors import InvalidRequest
from fraud.forms import checked_id
from fraud.refusals import listed, shown, split_path
from fraud.schema import MAX_ID_LENGTH
from fraud.serving.http import Call

T = TypeVar("T", bound=msgspec.Struct)

IDEMPOTENCY_KEY = "header Idempotency-Key"


def parameters(call: Call, kind: type[T]) -> T:
    """Return the parameters of a call: path parameters by name, all other fields from the query.

    Raises
    ------
    InvalidRequest
        One is missing, unknown, given twice, not UTF-8, or not of the type and limits in `kind`.
    """
    try:
        given = {n: unquote(value, errors="strict") if "%" in value else value for n, value in call.names.items()}
        said = call.scope.get("query_string", b"").decode("ascii")
        query = parse_qsl(said, keep_blank_values=True, errors="strict") if said else []
    except UnicodeDecodeError:
        raise InvalidRequest("the path and the query must be percent-encoded UTF-8") from None
    fields = kind.__struct_fields__
    for name, value in query:
        if name not in fields or name in call.names:
            allowed = listed([field for field in fields if field not in call.names]) or "none"
            raise InvalidRequest(f"unknown parameter {shown(name)!r}; allowed: {allowed}")
        if name in given:
            raise InvalidRequest("this parameter is given twice", f"$.{name}")
        given[name] = value
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        message, path = split_path(str(error))
        name = (path or "$.")[2:]
        arrived = f"; {shown(given[name])!r} arrived" if name in given else ""
        raise InvalidRequest(message + arrived, path) from None


def idempotency_key(call: Call) -> str | None:
    """Return the header Idempotency-Key, the id of a transaction whose body has none; without its quotes, if it has.

    Raises
    ------
    InvalidRequest
        It is empty, too long, not ASCII, or no id.
    """
    given = call.headers.get(b"idempotency-key")
    if given is None:
        return None
    try:
        key = given.decode("ascii").strip()
    except UnicodeDecodeError:
        raise InvalidRequest("an idempotency key must be ASCII", IDEMPOTENCY_KEY) from None
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 0 < len(key) <= MAX_ID_LENGTH:
        raise InvalidRequest(
            f"an idempotency key of {len(key)} characters arrived; 1 to {MAX_ID_LENGTH} are allowed", IDEMPOTENCY_KEY
        )
    return checked_id(key, IDEMPOTENCY_KEY)
