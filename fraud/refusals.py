"""The text of refusals: what arrived, what is allowed and where.

A message stays short and takes microseconds, whatever the caller sends: values and lists of names are truncated, and
similar names are searched among a few.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice

import msgspec
from rapidfuzz import fuzz, process

from fraud.errors import InvalidRequest

SHOWN_CHARACTERS = 60
"""Of a caller's value in a message."""
SHOWN_NAMES = 12
"""In one list of names."""
HINTS = 5
"""Names for which a close one is looked for."""
CANDIDATES = 50
"""Unknown names of a caller among which it is looked for."""
MOMENTS = ("event_time", "label_time")


def closest(word: str, known: Iterable[str]) -> str | None:
    """Return the name most similar to a word, if one is similar enough.

    Examples
    --------
    >>> closest("amuont", ["amount", "category"])
    'amount'
    """
    found = process.extractOne(word[:SHOWN_CHARACTERS], list(known), scorer=fuzz.ratio, score_cutoff=60)
    return None if found is None else found[0]


def shown(value: str) -> str:
    """Return a caller's text for a message, truncated to `SHOWN_CHARACTERS`."""
    return value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "…"


def shown_json(raw: msgspec.Raw) -> str:
    """Return JSON as it arrived, truncated to `SHOWN_CHARACTERS`."""
    first = bytes(memoryview(raw)[: 4 * SHOWN_CHARACTERS + 4])  # a character takes up to four bytes
    return shown(first.decode("utf-8", "replace"))


def listed(names: Sequence[str]) -> str:
    """Return names for a message, at most `SHOWN_NAMES`."""
    more = len(names) - SHOWN_NAMES
    return ", ".join(map(shown, names[:SHOWN_NAMES])) + (f" and {more} more" if more > 0 else "")


def unknown_category(value: str, allowed: Sequence[str], path: str, what: str = "category") -> InvalidRequest:
    """Return the refusal of a category, or another named value, that is not allowed."""
    near = closest(value, allowed)
    hint = f" (did you mean {near!r}?)" if near else ""
    return InvalidRequest(f"unknown {what} {shown(value)!r}; allowed: {listed(allowed)}{hint}", path)


def explained(
    arrived: Mapping[str, msgspec.Raw],
    path: str,
    reason: str,
    required: Sequence[str],
    known: Set[str],
    what: str = "an instance",
) -> InvalidRequest:
    """Name all missing fields of an object at once; otherwise give the decoder's first `reason`."""
    missing = [name for name in required if name not in arrived]
    if missing:
        unknown = list(islice((shown(name) for name in arrived if name not in known), CANDIDATES))
        close = {name: near for name in missing[:HINTS] if (near := closest(name, unknown))}
        hint = "; did you mean " + ", ".join(f"{k!r} for {v!r}" for k, v in close.items()) if close else ""
        return InvalidRequest(f"missing {listed(missing)}{hint}", path)
    message, field = split_path(reason)
    message = shown_reason(message)
    name = (field or "$")[2:]
    if message.endswith("out of range"):
        message = f"{what} must be a JSON object of finite values: {message}"
    if name in MOMENTS:
        message += '; send RFC 3339 with a zone, such as "2026-01-31T12:30:00Z"'
    if name in arrived:
        message += f"; {shown_json(arrived[name])} arrived"
    return InvalidRequest(message, path + (field or "$")[1:])


def split_path(reason: str) -> tuple[str, str | None]:
    """Split msgspec's "message - at `$.path`"."""
    match = re.fullmatch(r"(.*) - at `(.*)`", reason, re.DOTALL)
    return (match[1], match[2]) if match else (reason, None)


def shown_reason(message: str) -> str:
    """Return msgspec's message; the name of an unknown field comes from the caller and is truncated."""
    match = re.fullmatch(r"(Object contains unknown field )`(.*)`", message, re.DOTALL)
    return f"{match[1]}`{shown(match[2])}`" if match else message


def refuse_controls(value: str | None, path: str) -> None:
    """Raise `InvalidRequest` for an id with U+0000, which stores cannot keep, or U+001F, which separates joined ids."""
    if value is not None and ("\0" in value or "\x1f" in value):
        raise InvalidRequest("an id may not hold the characters U+0000 and U+001F", path)
