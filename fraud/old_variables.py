"""The environment names of the systems whose clients this service takes over, and what each means here.

An old name counts where the product's own variable is not set. Nothing here reads the environment: callers pass it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from fraud.errors import SettingsError

LEVELS = {"WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR", "TRACE": "DEBUG", "NOTSET": "DEBUG"}
REFUSED = {
    "MODEL_PATH": "a pickled model is never loaded, since loading one runs whatever code it holds; train one with "
    "`fraud train`, then import and promote it, and unset this variable",
    "S3_BUCKET": "models come from the Bento store of this machine or from W&B, not from a bucket; see `fraud import`, "
    "`fraud pull` and `fraud follow`, and unset this variable",
}
"""Variables that stop the service, with advice."""
_VERSION = re.compile(r"v?(\d{1,9})|(?:sha256:)?[0-9a-f]{12,64}|latest")


class Reading(NamedTuple):
    """An old variable that is set: the product's own that it stands for, and what to say of it."""

    name: str
    own: str
    is_used: bool
    remark: str

    def value(self, environ: Mapping[str, str]) -> str:
        """Return its value as the product's own variable would have it.

        Raises
        ------
        SettingsError
            It cannot be read; the message names the variable, and shows no secret.
        """
        return ALTERNATIVES[self.name].read(self.name, environ[self.name])


class Alternative(NamedTuple):
    """An old variable: the product's own that it stands for, how its value is read, and how the docs say it."""

    own: str
    read: Callable[[str, str], str]
    meaning: str


def readings(environ: Mapping[str, str]) -> Iterator[Reading]:
    """Return a reading of every old variable that is set and not empty."""
    taken: dict[str, str] = {}
    for name in ALTERNATIVES:
        if not environ.get(name):
            continue
        own = _own_of(name, environ, taken)
        winner = next((found for found in _set_by(own) if found in environ), taken.get(own))
        if winner is None and name == "MODEL_VERSION" and ":" in environ.get("FRAUD_MODEL", "").partition(",")[0]:
            winner = "FRAUD_MODEL"
        if winner is not None:
            yield Reading(name, own, False, f"{name} is not used: {winner} is set, and comes first")
            continue
        taken[own] = name
        yield Reading(name, own, True, f"{name} is read as {own}")


def _own_of(name: str, environ: Mapping[str, str], taken: Mapping[str, str]) -> str:
    """The product's own variable: that of the table, but for a database behind a Redis, or a version by its alias."""
    if name == "DATABASE_URL" and taken.get("FRAUD_STORE") == "REDIS_URL":
        return "FRAUD_COLD_STORE"
    if name == "MODEL_VERSION" and not _VERSION.fullmatch(_as_it_is(name, environ[name])):
        return "FRAUD_MODEL_ALIASES"
    return ALTERNATIVES[name].own


def _set_by(own: str) -> tuple[str, str]:
    return own, f"{own}_FILE"


def _as_it_is(_: str, value: str) -> str:
    return value.strip()


def _list(name: str, value: str) -> str:
    """A list with commas, or one of JSON, as text with commas."""
    text = value.strip()
    if not text.startswith("["):
        return text
    try:
        items = json.loads(text)
    except ValueError:
        items = None
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise SettingsError(f'{name} begins with [ and is no JSON list of texts; give a, b or ["a", "b"]')
    return ",".join(items)


def _hashed_keys(name: str, value: str) -> str:
    """Plain keys as entries of FRAUD_API_KEYS: a key's id is the beginning of its hash."""
    keys = dict.fromkeys(key.strip() for key in _list(name, value).split(","))
    keys.pop("", None)
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise SettingsError(f"{name}: a key holds a space or another character than printable ASCII")
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return ",".join(f"{digest[:8]}:{digest}:admin" for digest in digests)


def _level(_: str, value: str) -> str:
    upper = value.strip().upper()
    return LEVELS.get(upper, upper)


def _database(name: str, value: str) -> str:
    """A URL as SQLAlchemy has it, such as postgresql+asyncpg://… or sqlite:///fraud.db, as a store's URL."""
    scheme, separator, rest = value.strip().partition("://")
    kind = scheme.partition("+")[0]
    if separator and kind in ("postgresql", "postgres"):
        return f"postgresql://{rest}"
    if separator and kind == "sqlite" and rest.startswith("/") and len(rest) > 1:
        return f"sqlite:{rest[1:]}"
    shown = f"{scheme[:30]}://…" if separator else "a text without ://"
    raise SettingsError(f"{name} is {shown}; allowed are postgresql://user@host/db and sqlite:///path")


def _version(_: str, value: str) -> str:
    text = value.strip()
    number = _VERSION.fullmatch(text)
    return f"v{number[1]}" if number and number[1] else "" if text == "latest" else text.lower()


ALTERNATIVES: dict[str, Alternative] = {
    "WORKERS": Alternative("FRAUD_WORKERS", _as_it_is, "the same"),
    "PORT": Alternative("BENTOML_PORT", _as_it_is, "the same"),
    "LOG_LEVEL": Alternative("FRAUD_LOG_LEVEL", _level, "in any case; `warn` is WARNING, `critical` is ERROR"),
    "API_KEYS": Alternative(
        "FRAUD_API_KEYS", _hashed_keys, "plain keys, with commas or as a JSON list; hashed when read, scope admin"
    ),
    "CORS_ORIGINS": Alternative("FRAUD_CORS_ORIGINS", _list, "with commas or as a JSON list"),
    "ALLOWED_ORIGINS": Alternative("FRAUD_CORS_ORIGINS", _list, "likewise, behind `CORS_ORIGINS`"),
    "REDIS_URL": Alternative("FRAUD_STORE", _as_it_is, "the same"),
    "DATABASE_URL": Alternative(
        "FRAUD_STORE",
        _database,
        "PostgreSQL, also as `postgres://` or `postgresql+driver://`, or `sqlite:///path`; beside `REDIS_URL` it is "
        "`FRAUD_COLD_STORE`",
    ),
    "MODEL_VERSION": Alternative(
        "FRAUD_MODEL_VERSION",
        _version,
        "`v3` or `3`, or a digest; `latest` pins nothing; another name is an alias, `FRAUD_MODEL_ALIASES`",
    ),
    "KAFKA_BOOTSTRAP_SERVERS": Alternative("FRAUD_KAFKA_BOOTSTRAP_SERVERS", _list, "with commas or as a JSON list"),
    "ANOMALY_THRESHOLD": Alternative("FRAUD_ANOMALY_THRESHOLD", _as_it_is, "the same"),
}
"""In the order in which they are read: of two that stand for one variable, the first counts."""
