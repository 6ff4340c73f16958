"""The features of an application as its contract takes them: numbers, numeric strings, flags and named categories."""

from __future__ import annotations

import json
import logging
import math

import msgspec

from fraud.errors import RequestError
from fraud.forms import MAX_OBJECT_BYTES, fields_of
from fraud.refusals import listed, shown
from fraud.schema import Feature, FeatureSpec, Said

logger = logging.getLogger("fraud.serving.contracts")

EMAIL = "email_domain_category"
EMAIL_CODES = {"major_provider": 0, "canadian_provider": 1, "business": 2, "disposable": 3, "unknown": 4}
"""The named categories of `EMAIL`, and the codes that they had in a model of numbers alone."""
UNKNOWN = "unknown"
JSON_TYPES = {list: "array", dict: "object", type(None): "null"}
MAX_NAMED = 100
"""Missing features that an error names."""
MAX_EXTRAS = 1000
"""Names of extra features that are remembered as logged."""

_encode = msgspec.json.Encoder().encode


class BadFeatures(RequestError):
    """The features cannot be scored; the contract answers 400."""

    http_status = 400
    code = "bad_features"

    @classmethod
    def value(cls, name: str, problem: object) -> BadFeatures:
        return cls(f"Invalid value for feature {shown(name)}: {problem}")


class FeatureReader:
    """Reads features into rows as `/predict` takes them; logs each name of an extra feature once."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def row(self, raw: msgspec.Raw, spec: FeatureSpec) -> tuple[bytes, int]:
        """Return the row of a model of ready features, and how many of the features it does not read.

        Raises
        ------
        BadFeatures
            A feature is missing, or its value is none that the contract allows.
        """
        try:
            arrived = fields_of(bytes(raw), "$.features", "a map of features")
        except RequestError as error:
            raise BadFeatures(error.message) from None
        missing = [name for name in spec.names if name not in arrived]
        if missing:
            raise BadFeatures(f"Missing features: {missing[:MAX_NAMED]}")
        extra = arrived.keys() - set(spec.names)
        self._log(extra)
        row = {feature.name: _value(feature, _python(arrived[feature.name])) for feature in spec.features}
        return _encode(row), len(extra)

    def _log(self, extra: set[str]) -> None:
        new = extra - self._logged
        if new and len(self._logged) < MAX_EXTRAS:
            self._logged |= new
            logger.warning("extra features are ignored: %s", listed(sorted(new)))


def refuse_non_finite(body: bytes) -> None:
    """Raise `BadFeatures` if a body is JSON but for NaN or Infinity among its features, as Python writes them."""
    if len(body) > MAX_OBJECT_BYTES or not (b"NaN" in body or b"Infinity" in body):
        return
    try:
        features = json.loads(body.decode())["features"]
        items = [*features.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    for name, value in items:
        if isinstance(value, float) and not math.isfinite(value):
            raise BadFeatures.value(name, value)


def _python(raw: msgspec.Raw) -> object:
    """Return a value of JSON as Python has it; a number beyond float64 is infinite, and what is nested is empty."""
    text = bytes(raw).decode()
    if text[0] in "[{":
        return [] if text[0] == "[" else {}
    try:
        return json.loads(text)
    except ValueError:  # more digits than Python reads
        return math.inf


def _value(feature: Feature, value: object) -> Said:
    """Return the value of a feature as a row carries it."""
    if value is None and feature.missing:
        return None
    if not isinstance(value, bool | int | float | str):
        raise BadFeatures(f"Unsupported data type for feature {feature.name}: {JSON_TYPES[type(value)]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadFeatures.value(feature.name, value)
    said = _email(feature, value) if feature.name == EMAIL else value
    if feature.type != "categorical" and said is not None:
        return _number(feature.name, said)
    return str(said) if type(said) is int else said


def _email(feature: Feature, value: bool | float | str) -> Said:
    """Return the category of an e-mail domain as the model names or numbers it; an unknown name counts as unknown."""
    categories = feature.categories
    if not isinstance(value, str):
        named = next((name for name, code in EMAIL_CODES.items() if code == value), None)
        return named if named in categories else value
    if feature.type != "categorical":
        return EMAIL_CODES.get(value, EMAIL_CODES[UNKNOWN])
    for name in (value, UNKNOWN):
        for known in (name, str(EMAIL_CODES.get(name))):
            if known in categories:
                return known
    return None if feature.missing and feature.unknown == "refuse" else value


def _number(name: str, value: bool | int | float | str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except ValueError:
        raise BadFeatures(f"Cannot encode categorical feature {name} with value {shown(str(value))}") from None
    if not math.isfinite(number):
        raise BadFeatures.value(name, number)
    return number
