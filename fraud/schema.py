"""What a model takes: its ordered features, and the rows of JSON that carry them.

A bundle says of what kind it is. A *transaction* model takes raw transactions, whose history the service
looks up; a *features* model takes rows of ready features. Both are checked against the bundle's own
specification, so one release of the service serves models of any columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np

from fraud.errors import InvalidRequest, MalformedJson
from fraud.refusals import explained, shown_reason, split_path, unknown_category

MAX_ID_LENGTH = 128
MAX_WHOLE_FLOAT = 2.0**53
"""Below it, float64 holds every whole number."""
MAX_INSTANCES = 1000
MAX_OBJECT_BYTES = 65_536
"""Of one instance or label."""
MAX_FIELDS = 1000
"""Of one instance or label, those that a model does not read included."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)

T = TypeVar("T")
Kind = Literal["transaction", "features"]
TEXT_ROLES = ("merchant_id", "category", "channel", "device_id")
POSITION_ROLES = ("latitude", "longitude", "merchant_latitude", "merchant_longitude")
POSITION_LIMITS = {"latitude": 90.0, "merchant_latitude": 90.0, "longitude": 180.0, "merchant_longitude": 180.0}
ID_FIELDS = ("transaction_id", "customer_id", "merchant_id")
ESCAPE = b"\\"
"""Without a backslash in its JSON, no id can hold a control character, so the check is skipped."""
TRANSACTION_FIELDS = ("transaction_id", "event_time", "customer_id", "amount", *TEXT_ROLES, *POSITION_ROLES)


class Feature(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One column of `X`: where it comes from and what values it may take."""

    name: str
    source: Literal["history", "request"]
    type: Literal["numeric", "boolean", "categorical"] = "numeric"
    categories: tuple[str, ...] = ()
    unknown: Literal["refuse", "missing"] = "refuse"
    minimum: float | None = None
    maximum: float | None = None
    missing: bool = False
    meaning: str = ""


class Role(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """An optional field of a transaction that this model was trained with."""

    name: str
    missing: bool = False


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ordered feature specification, `features.json` of a bundle.

    History features come first, in the order of `X`; the features read from the request follow.
    """

    kind: Kind
    features: tuple[Feature, ...]
    roles: tuple[Role, ...] = ()
    format_version: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self.features)

    @property
    def requested(self) -> tuple[Feature, ...]:
        """The features that a caller sends, in the order of their columns, the last ones of `X`."""
        return tuple(feature for feature in self.features if feature.source == "request")

    @property
    def derived(self) -> tuple[str, ...]:
        """The names of the features computed from history, in the order of their columns."""
        return tuple(feature.name for feature in self.features if feature.source == "history")


class Row(msgspec.Struct):
    """One valid instance: the caller's fields, and the columns of `X` it carries itself."""

    transaction_id: str | None
    values: tuple[float, ...]
    raw: bytes
    event_time_ms: int = 0
    customer_id: str = ""
    amount: float = 0.0
    roles: dict[str, Any] = {}
    n_extra: int = 0


Id: Any = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]
Moment: Any = Annotated[datetime, msgspec.Meta(tz=True)]


class _Field(NamedTuple):
    name: str
    annotation: Any
    optional: bool = False


class _Envelope(msgspec.Struct):
    instances: list[msgspec.Raw] = []
    model: str | None = None


_envelope_decoder = msgspec.json.Decoder(_Envelope)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def decode_envelope(body: bytes) -> tuple[list[msgspec.Raw], str | None]:
    """Return a request's instances, each still JSON, and the name of the model it asks for.

    Raises
    ------
    MalformedJson
        The body is no JSON.
    InvalidRequest
        It is, but is no object with 1 to 1000 instances.
    """
    envelope = decode_body(_envelope_decoder, body, '{"instances": [{...}]}')
    expect_count(len(envelope.instances), "instances")
    return envelope.instances, envelope.model


def decode_body(decoder: msgspec.json.Decoder[T], body: bytes, example: str) -> T:
    """Return a whole body as a decoder reads it; `example` shows the caller what it reads.

    Raises
    ------
    MalformedJson
        The body is no JSON.
    InvalidRequest
        It is, but not of that form.
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
    """Raise `InvalidRequest` unless a body carries 1 to 1000 of what it is a list of."""
    if not 1 <= n <= MAX_INSTANCES:
        raise InvalidRequest(f"{n} {name} arrived; 1 to {MAX_INSTANCES} a call are allowed", f"$.{name}")


class RowDecoder:
    """Reads and checks single instances against a feature specification.

    Parameters
    ----------
    spec : FeatureSpec
    max_ahead_ms : int
        How far an event time may lie ahead of the clock, ms: a date in the far future would age a
        customer's whole history.
    """

    def __init__(self, spec: FeatureSpec, max_ahead_ms: int = 86_400_000) -> None:
        self.spec = spec
        self.max_ahead_ms = max_ahead_ms
        codes = {
            feature.name: {value: float(code) for code, value in enumerate(feature.categories)}
            for feature in spec.requested
            if feature.type == "categorical"
        }
        fields = self._transaction_fields() if spec.kind == "transaction" else [_Field("transaction_id", Id, True)]
        role_names = {field.name for field in fields}
        fields += [_feature_field(feature) for feature in spec.requested if feature.name not in role_names]
        self._known = frozenset(field.name for field in fields)
        self._required = [field.name for field in fields if not field.optional]
        attributes = {field.name: f"f{i}" for i, field in enumerate(fields)}  # any name will do in a table
        self._decoder = msgspec.json.Decoder(
            msgspec.defstruct(
                "Instance",
                [
                    (
                        attributes[field.name],
                        field.annotation | None if field.optional else field.annotation,
                        msgspec.field(name=field.name, default=None if field.optional else msgspec.NODEFAULT),
                    )
                    for field in fields
                ],
                kw_only=True,
            )
        )
        self._ids = [(name, attributes[name]) for name in ID_FIELDS if name in attributes]
        self._columns = [(attributes[f.name], f.name, codes.get(f.name)) for f in spec.requested]
        self._roles = [(role.name, attributes[role.name]) for role in spec.roles]
        self._refusing = {
            f.name: f.categories for f in spec.requested if f.type == "categorical" and f.unknown == "refuse"
        }

    def decode(self, raw: bytes | memoryview | msgspec.Raw, path: str, now_ms: int | None = None) -> Row:
        """Return one checked row.

        Parameters
        ----------
        raw : bytes
            The instance as JSON.
        path : str
            Where it stood in the request, such as ``$.instances[2]``.
        now_ms : int, optional
            The clock, ms since the epoch; event times too far ahead of it are refused.

        Raises
        ------
        InvalidRequest
            What arrived, what is allowed, and the path of the field.
        """
        said = bytes(raw)
        fields = fields_of(said, path)
        try:
            instance: Any = self._decoder.decode(said)
        except msgspec.ValidationError as error:
            raise explained(fields, path, str(error), self._required, self._known) from None
        if ESCAPE in said:
            for name, attribute in self._ids:
                refuse_controls(getattr(instance, attribute), f"{path}.{name}")
        values = []
        for attribute, name, codes in self._columns:
            value = getattr(instance, attribute)
            if codes is None:
                values.append(np.nan if value is None else float(value))
            elif value in codes:
                values.append(codes[value])
            elif value is None or name not in self._refusing:
                values.append(np.nan)
            else:
                raise unknown_category(value, self._refusing[name], f"{path}.{name}")
        n_extra = len(fields.keys() - self._known)
        if self.spec.kind == "features":
            return Row(instance.f0, tuple(values), said, n_extra=n_extra)
        transaction_id, event_time, customer_id, amount = instance.f0, instance.f1, instance.f2, instance.f3
        event_time_ms = time_ms(event_time, "event_time", path, now_ms, self.max_ahead_ms)
        roles = {name: getattr(instance, attribute) for name, attribute in self._roles}
        return Row(transaction_id, tuple(values), said, event_time_ms, customer_id, amount, roles, n_extra)

    def _transaction_fields(self) -> list[_Field]:
        fields = [
            _Field("transaction_id", Id),
            _Field("event_time", Moment),
            _Field("customer_id", Id),
            _Field("amount", Annotated[float, msgspec.Meta(gt=0)]),
        ]
        for role in self.spec.roles:
            limit = POSITION_LIMITS.get(role.name)
            annotation = Id if limit is None else Annotated[float, msgspec.Meta(ge=-limit, le=limit)]
            fields.append(_Field(role.name, annotation, role.missing))
        return fields


_DECIMAL_OF_AN_INTEGER = re.compile(r"([+-]?\d+)\.0+")
_SCIENTIFIC = re.compile(r"[+-]?\d+\.\d*[eE][+-]?\d+|[+-]?\d+[eE]\+\d+")


def id_text(value: str | int | float) -> str:
    """Return the one text of an id, whether it arrives as text, as an integer or as a float.

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


def refuse_controls(value: str | None, path: str) -> None:
    """Raise `InvalidRequest` for an id that stores cannot keep (U+0000), or that looks like two (U+001F)."""
    if value is not None and ("\0" in value or "\x1f" in value):
        raise InvalidRequest("an id may not hold the characters U+0000 and U+001F", path)


def time_ms(moment: datetime, name: str, path: str, now_ms: int | None, max_ahead_ms: int) -> int:
    """Return a field's moment in ms since the epoch.

    Raises
    ------
    InvalidRequest
        It lies before 1970, or more than `max_ahead_ms` after `now_ms`.
    """
    ms = (moment - EPOCH) // MILLISECOND
    if ms < 0:
        raise InvalidRequest(f"{name} {moment.isoformat()} is before 1970", f"{path}.{name}")
    if now_ms is not None and ms > now_ms + max_ahead_ms:
        raise InvalidRequest(
            f"{name} {moment.isoformat()} is more than {max_ahead_ms / 1000:g} s ahead of the server's clock",
            f"{path}.{name}",
        )
    return ms


def fields_of(said: bytes, path: str, what: str = "an instance") -> Mapping[str, msgspec.Raw]:
    """Return the fields of one JSON object, each still JSON; of a name that comes twice, the last.

    Raises
    ------
    InvalidRequest
        It is longer than `MAX_OBJECT_BYTES`, no UTF-8, no object, nested too deeply, or has more than `MAX_FIELDS`.
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


def _feature_field(feature: Feature) -> _Field:
    annotation: Any = Annotated[float, msgspec.Meta(ge=feature.minimum, le=feature.maximum)]
    if feature.type != "numeric":
        annotation = str if feature.type == "categorical" else bool
    return _Field(feature.name, annotation, feature.missing)
