"""A model's input: its ordered features, and the JSON rows that carry them.

A bundle states its kind. A *transaction* model takes raw transactions, whose history the service looks up; a *features*
model takes rows of ready features. Both are checked against the bundle's own specification, so one release of the
service serves models of any columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, cast

import msgspec
import numpy as np

from fraud.columns.table import Table, TableReader
from fraud.currencies import Currency, history_amount
from fraud.errors import InvalidRequest
from fraud.forms import (
    MAX_OBJECT_BYTES,
    Form,
    as_category,
    as_flag,
    as_id,
    as_it_is,
    as_moment,
    as_number,
    checked_id,
    empty_is_missing,
    fields_of,
    in_other_forms,
    one_text,
    time_ms,
)
from fraud.refusals import listed, unknown_category

MAX_ID_LENGTH = 128
MAX_INSTANCES = 1000


Kind = Literal["transaction", "features"]
"""What a row is: a raw transaction, or a row of ready features."""
TEXT_ROLES = ("merchant_id", "category", "channel", "device_id")
POSITION_ROLES = ("latitude", "longitude", "merchant_latitude", "merchant_longitude")
POSITION_LIMITS = {"latitude": 90.0, "merchant_latitude": 90.0, "longitude": 180.0, "merchant_longitude": 180.0}
ID_FIELDS = ("transaction_id", "customer_id", "merchant_id")
ESCAPE = b"\\"
"""Without a backslash in its JSON, no id can hold a control character."""
TRANSACTION_FIELDS = ("transaction_id", "event_time", "customer_id", "amount", *TEXT_ROLES, *POSITION_ROLES)


class Feature(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One column of `X`: its source and its allowed values."""

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
    currencies: dict[str, Currency] | msgspec.UnsetType = msgspec.UNSET
    """The currencies that amounts may be in, with their scales; unset where amounts count as they are."""
    table: Table | msgspec.UnsetType = msgspec.UNSET
    """The columns of the table that trained the model; unset in bundles of earlier releases."""

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


Reading = Literal["table"]
"""How a row was read: with the names and value forms of the table that trained the model."""


class Row(msgspec.Struct, gc=False):
    """One valid instance: the caller's fields, and the columns of `X` that they fill.

    `raw` is its JSON under the product's own names, and `reading` says how it arrived, if not so.
    """

    transaction_id: str | None
    values: tuple[float, ...]
    raw: bytes
    event_time_ms: int = 0
    customer_id: str = ""
    amount: float = 0.0
    roles: Mapping[str, Said] = {}
    n_extra: int = 0
    scaled_amount: float | None = None
    """The amount on its currency's scale, where the model has such scales."""
    reading: Reading | msgspec.UnsetType = msgspec.UNSET

    def text_role(self, name: str) -> str | None:
        """Return the text of a role; None where the row lacks it."""
        text = self.roles.get(name)
        return text if isinstance(text, str) else None

    @property
    def history_amount(self) -> float:
        """The amount in the unit of histories and features."""
        return self.amount if self.scaled_amount is None else self.scaled_amount


Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID_LENGTH)]
Moment: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]


Datatype = Literal["BOOL", "BYTES", "FP64"]
"""What a field of a row is, in the words of the Open Inference Protocol."""
NUMBER_FORMS = (as_it_is, as_number)
NO_ID = (b"null", b'""')
"""An id that says that there is none, as JSON."""


Said: TypeAlias = str | float | None
"""A value of a feature or role as a row carries it: text, a number, a flag, or none."""


class _Field(NamedTuple):
    name: str
    annotation: Any  # a type expression, of which Python has no type
    form: Form
    optional: bool = False


class RowDecoder:
    """Reads and checks single instances against a feature specification.

    Parameters
    ----------
    spec : FeatureSpec
    max_ahead_ms : int
        How far an event time may lie ahead of the clock, ms: a date in the far future would push all earlier
        transactions out of a customer's windows.
    """

    def __init__(self, spec: FeatureSpec, max_ahead_ms: int = 86_400_000) -> None:
        self.spec = spec
        self.max_ahead_ms = max_ahead_ms
        fields = (
            self._transaction_fields() if spec.kind == "transaction" else [_Field("transaction_id", Id, as_id, True)]
        )
        role_names = {field.name for field in fields}
        fields += [_feature_field(feature) for feature in spec.requested if feature.name not in role_names]
        self._known = frozenset(field.name for field in fields)
        self._required = [field.name for field in fields if not field.optional]
        self._forms = {field.name: empty_is_missing(field.form) if field.optional else field.form for field in fields}
        attributes = {field.name: f"f{i}" for i, field in enumerate(fields)}  # any name will do in a table
        columns = [
            (
                attributes[field.name],
                field.annotation | None if field.optional else field.annotation,
                msgspec.field(name=field.name, default=None if field.optional else msgspec.NODEFAULT),
            )
            for field in fields
        ]
        self._type = msgspec.defstruct("Instance", columns, kw_only=True, gc=False)
        self._decode = msgspec.json.Decoder(self._type).decode
        nothing_else = msgspec.defstruct("Instance", columns, kw_only=True, gc=False, forbid_unknown_fields=True)
        self._decode_known = msgspec.json.Decoder(nothing_else).decode
        self._ids = [(name, attributes[name]) for name in ID_FIELDS if name in attributes]
        self._ids_of = _all_of([attribute for _, attribute in self._ids])
        self._values_of = _all_of([attributes[f.name] for f in spec.requested])
        self._converted = [(i, f, _codes(f)) for i, f in enumerate(spec.requested) if f.missing or f.type != "numeric"]
        self._roles = [(role.name, attributes[role.name]) for role in spec.roles]
        self._text_roles = [role.name for role in spec.roles if role.name not in POSITION_LIMITS]
        self._currencies = {} if spec.currencies is msgspec.UNSET else spec.currencies
        self.datatypes: dict[str, Datatype] = {
            field.name: "BOOL" if field.form is as_flag else "FP64" if field.form in NUMBER_FORMS else "BYTES"
            for field in fields
        }
        """The fields that a row may have."""
        self._table = None if spec.table is msgspec.UNSET else TableReader(spec.table, self._known, self._required)
        self._id_names = {"transaction_id", *(self._table.columns_of("transaction_id") if self._table else ())}
        self._conflicts = [
            (attributes[name], conflicts) for name, conflicts in (self._table.conflicts if self._table else ())
        ]

    def decode(
        self,
        raw: bytes | memoryview | msgspec.Raw,
        path: str,
        now_ms: int | None = None,
        transaction_id: str | None = None,
    ) -> Row:
        """Return one checked row.

        Parameters
        ----------
        raw : bytes
            The instance as JSON.
        path : str
            Its path in the request, such as ``$.instances[2]``.
        now_ms : int, optional
            The clock, ms since the epoch; event times too far ahead of it are refused.
        transaction_id : str, optional
            The id of an instance that carries none; its `Row.raw` carries it from then on.

        Raises
        ------
        InvalidRequest
            States what arrived, what is allowed, and the field's path.
        """
        said = bytes(raw) if transaction_id is None else self._with_id(bytes(raw), path, transaction_id)
        instance, n_extra = self._instance(said, path)
        if instance is None:
            return self._of_table(said, path, now_ms)
        return self._row(instance, said, n_extra, path, now_ms)

    def _with_id(self, said: bytes, path: str, transaction_id: str) -> bytes:
        fields = fields_of(said, path)
        if any(bytes(fields.get(name, b"null")) not in NO_ID for name in self._id_names):
            return said
        return msgspec.json.encode({**fields, "transaction_id": transaction_id})

    def _of_table(self, said: bytes, path: str, now_ms: int | None) -> Row:
        """Return a row that has the names of the table that trained the model."""
        assert self._table is not None
        own = self._table.own_row(said, path)
        try:
            instance, n_extra = self._own_instance(own, path)
            row = self._row(instance, own, n_extra, path, now_ms)
        except InvalidRequest as error:
            error.path = self._table.place(path, error.path)
            raise
        row.reading = "table"
        return row

    def _row(self, instance: msgspec.Struct, said: bytes, n_extra: int, path: str, now_ms: int | None) -> Row:
        """Check an instance further than its types."""
        escaped = said.find(ESCAPE) >= 0
        for value in self._ids_of(instance):
            if isinstance(value, str) and (escaped or "." in value or "+" in value):
                self._check_ids(instance, path)
                break
        values = self._values_of(instance)
        if self._converted:
            values = self._as_numbers(values, path)
        numbers = cast("tuple[float, ...]", values)
        if self.spec.kind == "features":
            return Row(_own_id(instance), numbers, said, n_extra=n_extra)
        transaction_id, event_time, customer_id, amount = _transaction(instance)
        event_time_ms = time_ms(event_time, "event_time", path, now_ms, self.max_ahead_ms)
        roles: dict[str, Said] = {name: getattr(instance, attribute) for name, attribute in self._roles}
        for name in self._text_roles:
            text = roles[name]
            if isinstance(text, str) and ".0" in text:
                roles[name] = one_text(text)
        scaled = None
        if self._currencies:
            code = str(roles.get("currency") or next(iter(self._currencies)))
            currency = self._currencies.get(code)
            if currency is None:
                raise unknown_category(code, tuple(self._currencies), f"{path}.currency", "currency")
            scaled = history_amount(amount, currency)
        return Row(transaction_id, numbers, said, event_time_ms, customer_id, amount, roles, n_extra, scaled)

    def _instance(self, said: bytes, path: str) -> tuple[msgspec.Struct | None, int]:
        """Return one instance, and how many of its fields the model does not read; None for a row of the table.

        Most rows hold what the model reads, in the first form, and nothing else: these are read once. All others are
        taken apart first, which tells what is wrong with them.
        """
        if len(said) <= MAX_OBJECT_BYTES:
            try:
                instance = self._decode_known(said)
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass  # read again below
            else:
                if self._conflicts and any(means(getattr(instance, name)) for name, means in self._conflicts):
                    return None, 0
                return instance, 0
        if self._table is None:
            return self._own_instance(said, path)
        if self._table.takes(fields_of(said, path)):
            return None, 0
        try:
            return self._own_instance(said, path)
        except InvalidRequest as error:
            if error.path == path and error.message.startswith("missing "):
                error.message += f"; a row with the table's column names has {listed(self._table.names)}"
            raise

    def _own_instance(self, said: bytes, path: str) -> tuple[msgspec.Struct, int]:
        """Return one instance under the product's own names, and how many of its fields the model does not read."""
        fields = fields_of(said, path)
        n_extra = len(fields.keys() - self._known)
        try:
            return self._decode(said), n_extra
        except msgspec.ValidationError:
            return in_other_forms(self._type, self._forms, fields, path, self._required), n_extra

    def _as_numbers(self, values: tuple[Said, ...], path: str) -> tuple[Said, ...]:
        """Return the columns of `X` for the values of an instance: flags, codes of categories, NaN for missing."""
        numbers = [*values]
        for i, feature, codes in self._converted:
            value = values[i]
            if codes is None:
                numbers[i] = np.nan if value is None else float(value)
                continue
            assert value is None or isinstance(value, str)
            if value in codes:
                numbers[i] = codes[value]
            elif (text := one_text(value)) in codes:
                numbers[i] = codes[text]
            elif feature.unknown == "missing":
                numbers[i] = np.nan
            else:
                raise unknown_category(value or "", feature.categories, f"{path}.{feature.name}")
        return tuple(numbers)

    def _check_ids(self, instance: msgspec.Struct, path: str) -> None:
        """Convert each id to its canonical text, or refuse it."""
        for name, attribute in self._ids:
            value = getattr(instance, attribute)
            if value is not None:
                setattr(instance, attribute, checked_id(value, f"{path}.{name}"))

    def _transaction_fields(self) -> list[_Field]:
        fields = [
            _Field("transaction_id", Id, as_id),
            _Field("event_time", Moment, as_moment),
            _Field("customer_id", Id, as_id),
            _Field("amount", Annotated[float, msgspec.Meta(gt=0)], as_it_is),
        ]
        for role in self.spec.roles:
            limit = POSITION_LIMITS.get(role.name)
            if limit is None:
                fields.append(_Field(role.name, Id, as_category, role.missing))
            else:
                position = Annotated[float, msgspec.Meta(ge=-limit, le=limit)]
                fields.append(_Field(role.name, position, as_it_is, role.missing))
        return fields


_own_id: Callable[[msgspec.Struct], str | None] = attrgetter("f0")
_transaction: Callable[[msgspec.Struct], tuple[str, datetime, str, float]] = attrgetter("f0", "f1", "f2", "f3")


def _all_of(attributes: Sequence[str]) -> Callable[[msgspec.Struct], tuple[Said, ...]]:
    """Return what reads some attributes of an instance at once."""
    match attributes:
        case []:
            return lambda instance: ()
        case [attribute]:
            return lambda instance: (getattr(instance, attribute),)
    return attrgetter(*attributes)


def _codes(feature: Feature) -> dict[str | None, float] | None:
    """Return the code of each value of a categorical feature; NaN for a missing value, if allowed."""
    if feature.type != "categorical":
        return None
    missing: dict[str | None, float] = {None: np.nan, "": np.nan} if feature.missing else {}
    return missing | {value: float(code) for code, value in enumerate(feature.categories)}


def _feature_field(feature: Feature) -> _Field:
    match feature.type:
        case "numeric":
            number = Annotated[float, msgspec.Meta(ge=feature.minimum, le=feature.maximum)]
            return _Field(feature.name, number, as_number, feature.missing)
        case "boolean":
            return _Field(feature.name, bool, as_flag, feature.missing)
        case "categorical":
            return _Field(feature.name, str, as_category, feature.missing)
