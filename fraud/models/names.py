"""The rules for names of models, versions and files, checked here and nowhere else.

A name becomes a folder of the Bento store, a tag of BentoML (63 characters, lower case), a collection of W&B
(128 characters) and a row of the registry; the name of the preprocessor beside it is 13 characters longer.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

import msgspec

from fraud.errors import RegistryError

MAX_NAME_LENGTH = 50
NAME = r"[a-z0-9](?:[a-z0-9_-]{0,48}[a-z0-9])?"
VERSION = r"[0-9a-f]{16}"
DIGEST = r"sha256:[0-9a-f]{64}"
RULES = "-rules"
PARTS = ("-preprocessor", "-dataset", RULES)
"""What W&B and the Bento store hold beside a model, by the end of its name."""

Digest = Annotated[str, msgspec.Meta(pattern=f"^{DIGEST}$")]

_NAME, _VERSION = (re.compile(pattern) for pattern in (NAME, VERSION))


class BadName(RegistryError):
    """A name that the Bento store, the registry or W&B could not hold."""


class Tag(NamedTuple):
    """A model of the Bento store: its name, and the first 16 hexadecimal digits of its bundle's digest."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}"


def checked_name(name: str, *, what: str = "model name") -> str:
    """Return a model's name, if it is one.

    Raises
    ------
    BadName
    """
    if not _NAME.fullmatch(name):
        lower = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name[:MAX_NAME_LENGTH]).lower())
        instead = lower.strip("-")
        hint = f"; {instead!r} would do" if _NAME.fullmatch(instead) and not instead.endswith(PARTS) else ""
        raise BadName(
            f"{what} {name[:100]!r}: allowed are at most {MAX_NAME_LENGTH} lower-case letters, digits, - and _, "
            f"a letter or digit at either end{hint}"
        )
    if name.endswith(PARTS):
        kept = f"{', '.join(PARTS[:-1])} and {PARTS[-1]}"
        raise BadName(f"{what} {name!r}: {kept} at its end are kept for what stands beside a model")
    return name


def checked_tag(tag: str) -> Tag:
    """Return the name and version of a Bento store's tag.

    Raises
    ------
    BadName
        It is not ``name:version``, a version being 16 hexadecimal digits.
    """
    name, _, version = tag.partition(":")
    checked_name(name)
    if not _VERSION.fullmatch(version):
        raise BadName(
            f"{tag[:100]!r} is no tag: after the name comes : and the first 16 hexadecimal digits of a digest"
        )
    return Tag(name, version)


def is_name(text: str) -> bool:
    """Whether this is a valid model name."""
    return _NAME.fullmatch(text) is not None and not text.endswith(PARTS)


def is_rules(name: str) -> bool:
    """Whether this is the name of a model's rule sets."""
    return name.endswith(RULES)
