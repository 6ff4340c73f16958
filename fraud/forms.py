"""Alternative forms of a value, converted to the canonical one: integer ids, 0 and 1 for flags, times without seconds.

A row whose values are all canonical (text, numbers, true and false, RFC 3339) skips this module: see `RowDecoder`. Each
function returns the canonical form, or the value itself, which is then refused with the usual message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TypeVar

import msgspec

from fraud.errors import InvalidRequest
from fraud.refusals import explained, refuse_controls

MAX_WHOLE_FLOAT = 2.0**53
"""Below it, float64 holds every whole number."""
_DECIMAL_OF_AN_INTEGER = re.compile(r"([+-]?\d+)\.0+")
_SCIENTIFIC = re.compile(r"[+-]?\d+\.\d*[eE][+-]?\d+|[+-]?\d+[eE]\+\d+")
_MAX_TIME_LENGTH = 40

T = TypeVar("T")
Value = str | int | float | bool | None | list[object] | dict[str, object] | datetime
Form = Callable[[Value], Value]

_decode_scalar = msgspec.json.Decoder(str | int | float | bool | None).decode


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
