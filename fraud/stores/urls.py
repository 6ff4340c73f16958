"""Strict parsing of store URLs: an ambiguous URL is refused before a client library quotes parts of it.

Otherwise part of a password with `@` or `/` would be read as host or port, and appear in an error message.
"""

from __future__ import annotations

import re

from fraud.errors import SettingsError

REDIS = ("redis", "rediss", "unix")
POSTGRESQL = ("postgresql", "postgres")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@]*)(?::[0-9]{1,5})?")
_ENCODING = "write %40 for @, %2F for /, %3A for :, %25 for %, %3F for ?, %23 for #"


def scheme_of(url: str) -> str:
    return url.partition(":")[0]


def checked(url: str, name: str = "the store's URL") -> str:
    """Return the URL of a Redis or PostgreSQL if it can be read in one way only.

    Parameters
    ----------
    url : str
        ``scheme://[user[:password]@]host[:port][,host…][/path][?options]``, percent-encoded.
    name : str
        What to call it in an error.

    Raises
    ------
    SettingsError
        States the fault, and shows only the scheme of the URL: what looks like a host may be a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise SettingsError(f"{name} begins with no {scheme_of(url)}://; give scheme://user:password@host:port/name")
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    path = rest[len(authority) :]
    shown = f"{name} ({scheme}://…)"
    if _BAD_ESCAPE.search(rest):
        raise SettingsError(f"{shown} has a % that encodes nothing; in user and password {_ENCODING}")
    hosts = authority.rpartition("@")[2].split(",")
    if "@" in path or "#" in path or authority.count("@") > 1 or not all(map(_HOST.fullmatch, hosts)):
        raise SettingsError(f"{shown} cannot be read in one way only; in user and password {_ENCODING}")
    if scheme in REDIS[:2] and not re.fullmatch(r"/?[0-9]{0,5}", path.partition("?")[0]):
        raise SettingsError(f"{shown} names a database of Redis that is no number; give {scheme}://host:port/0")
    return url
