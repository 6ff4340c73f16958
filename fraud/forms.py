"""Alternative forms of a value, converted to the canonical one: integer ids, 0 and 1 for flags, times without seconds.

A row whose values are all canonical (text, numbers, true and false, RFC 3339) skips this module: see `RowDecoder`. Each
function returns the canonical form, or the value itself, which is then refused with the usual message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import msgspec

from fraud.errors import AheadOfClock, InvalidRequest
from fraud.refusals import explained, refuse_controls

MAX_OBJECT_BYTES = 65_536
"""Of one instance or label."""
MAX_FIELDS = 1000
"""Of one instance or label, those that a model does not read included."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
MAX_WHOLE_FLOAT = 2.0**53
"""Below it, float64 holds every whole number."""
_DECIMAL_OF_AN_INTEGER = re.compile(r"([+-]?\d+)\.0+", re.ASCII)
_SCIENTIFIC = re.compile(r"[+-]?\d+\.\d*[eE][+-]?\d+|[+-]?\d+[eE]\+\d+", re.ASCII)
_MAX_TIME_LENGTH = 40

T = TypeVar("T")
Value = str | int | float | bool | None | list[object] | dict[str, object] | datetime
Form = Callable[[Value], Value]

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_scalar = msgspec.json.Decoder(str | int | float | bool | None).decode


def fields_of(said: bytes, path: str, what: str = "an instance") -> Mapping[str, msgspec.Raw]:
    """Return the fields of one JSON object, undecoded; the last one of a repeated name counts.

    Raises
    ------
    InvalidRequest
        It is longer than `MAX_OBJECT_BYTES`, not UTF-8, not an object, nested too deeply, or has more than
        `MAX_FIELDS`.
    """
    if len(said) > MAX_OBJECT_BYTES:
        raise InvalidRequest(f"{what} of {len(said)} bytes arrived; {MAX_OBJECT_BYTES} are allowed", path)
    try:
        if not said.isascii():
            said.decode()
        fields = _decode_fields(said)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{what} must be a JSON object of finite values: {error}", path) from None
    except UnicodeDecodeError as error:
        bad = f"byte 0x{said[error.start]:02x} at position {error.start}"
        raise InvalidRequest(f"{what} must be JSON in UTF-8: {bad} is not", path) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{what} is not JSON: {error}", path) from None
    except RecursionError:
        raise InvalidRequest(f"{what} is nested too deeply to be read", path) from None
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(f"{what} of {len(fields)} fields arrived; {MAX_FIELDS} are allowed", path)
    return fields


def value_of(raw: msgspec.Raw) -> Value:
    """Return a JSON value; an array or an object comes back empty.

    Raises
    ------
    msgspec.ValidationError
        A number beyond float64.
    """
    match bytes(memoryview(raw)[:1]):
        case b"[":
            return []
        case b"{":
            return {}
    value: Value = _decode_scalar(raw)
    return value


def id_text(value: str | int | float) -> str:
    """Return the canonical text of an id that arrives as text, an integer or a float.

    ``1001``, ``1001.0`` and ``"1001.0"`` are the same id, ``"1001"``. Any other text stays as it is: ``"007"`` keeps
    its zeros.

    Raises
    ------
    ValueError
        The value stands for several ids: text in scientific notation (``4.53202E+15``), or a float that is no whole
        number or is at or above 2**53, where floats skip whole numbers.

    Examples
    --------
    >>> id_text(1001.0), id_text("1001.00"), id_text("007")
    ('1001', '1001', '007')
    """
    if isinstance(value, str):
        if "." not in value and "+" not in value:
            return value
        if _SCIENTIFIC.fullmatch(value):
            raise ValueError(f"{value!r} is in scientific notation, which drops digits of an id; send all its digits")
        integral = _DECIMAL_OF_AN_INTEGER.fullmatch(value)
        return integral[1] if integral else value
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value!r} is no whole number; send an id as text or as a whole number")
        if abs(value) >= MAX_WHOLE_FLOAT:
            raise ValueError(f"{value!r} is at or above 2**53, where floats skip whole numbers; send the id as text")
        value = int(value)
    return str(value)


def checked_id(value: str, path: str) -> str:
    """Return the canonical text of an id. Raises
    ------
    InvalidRequest
        It holds a character that is not allowed in ids, or could mean several ids.
    """
    refuse_controls(value, path)
    try:
        return id_text(value)
    except ValueError as error:
        raise InvalidRequest(str(error), path) from None


def one_text(value: str | None) -> str | None:
    """Return a whole number without its decimal point, as `id_text` does; other text is unchanged."""
    integral = _DECIMAL_OF_AN_INTEGER.fullmatch(value) if isinstance(value, str) else None
    return integral[1] if integral else value


def as_id(value: Value) -> Value:
    """A whole number becomes its digits, with or without a decimal point."""
    return id_text(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def as_category(value: Value) -> Value:
    """A code becomes its digits, a flag ``true`` or ``false``, as in a table."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return as_id(value)


def as_flag(value: Value) -> Value:
    """1 is true and 0 is false."""
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def as_number(value: Value) -> Value:
    """true is 1 and false is 0."""
    return float(value) if isinstance(value, bool) else value


def as_moment(value: Value) -> Value:
    """Any notation of ISO 8601 with a zone, such as ``2026-01-31T12:30Z``."""
    if isinstance(value, str) and len(value) <= _MAX_TIME_LENGTH:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return value
        return value if moment.tzinfo is None else moment
    return value


def as_it_is(value: Value) -> Value:
    return value


def in_other_forms(
    kind: type[T],
    forms: Mapping[str, Form],
    fields: Mapping[str, msgspec.Raw],
    path: str,
    required: Sequence[str],
    what: str = "an instance",
) -> T:
    """Return an object some of whose values arrived in an alternative form.

    Parameters
    ----------
    kind : type
        The struct to make.
    forms : mapping of str to Form
        The form of every known field.
    fields : mapping of str to msgspec.Raw
        The fields that arrived; unknown ones are ignored.
    path : str
        Its path, such as ``$.instances[2]``.
    required : sequence of str
    what : str
        For messages.

    Raises
    ------
    InvalidRequest
        A value has none of the allowed forms, or a required one is missing.
    """
    arrived: dict[str, Value] = {}
    for name, form in forms.items():
        if name in fields:
            try:
                arrived[name] = form(value_of(fields[name]))
            except msgspec.ValidationError as error:
                raise explained(fields, path, f"{error} - at `$.{name}`", required, forms.keys(), what) from None
            except ValueError as error:
                raise InvalidRequest(str(error), f"{path}.{name}") from None
    try:
        return msgspec.convert(arrived, kind)
    except msgspec.ValidationError as error:
        raise explained(fields, path, str(error), required, forms.keys(), what) from None


def empty_is_missing(form: Form) -> Form:
    """Read empty text as a missing value, as in a table."""
    return lambda value: None if value == "" else form(value)


def time_ms(moment: datetime, name: str, path: str, now_ms: int | None, max_ahead_ms: int) -> int:
    """Return a field's time in ms since the epoch.

    Raises
    ------
    InvalidRequest
        It lies before 1970, or (`AheadOfClock`) more than `max_ahead_ms` after `now_ms`.
    """
    ms = (moment - EPOCH) // MILLISECOND
    if ms < 0:
        raise InvalidRequest(f"{name} {moment.isoformat()} is before 1970", f"{path}.{name}")
    if now_ms is not None and ms > now_ms + max_ahead_ms:
        now = datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="seconds")
        raise AheadOfClock(
            f"{name} {moment.isoformat()} is more than {max_ahead_ms / 1000:g} s ahead of the server's clock, {now}",
            f"{path}.{name}",
        )
    return ms


def readable_time(ms: int) -> str:
    """Return a time in RFC 3339, UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
