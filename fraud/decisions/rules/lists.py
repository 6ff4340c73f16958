"""Lists that rules look into, as a worker holds them in memory, and for whom rules are snoozed.

An entry is a value as the request says it, a network such as ``10.0.0.0/8``, which holds for every address in it, or
an e-mail domain such as ``@example.com``, which holds for every address under it. A snooze is an entry too: of a list
named after its rule, with the field and value that it silences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.errors import InvalidRequest
from fraud.schema import MAX_ID_LENGTH, Row

SNOOZE = "snooze:"
"""Before the id of a rule: the list of whom it is silenced for."""
SNOOZED_FIELDS = ("customer_id", "merchant_id", "device_id")
ListName = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,63}$")]


class ListEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry as it is now.

    Attributes
    ----------
    list : str
    value : str
    until_ms : int, optional
        When it ends by itself, ms since the epoch.
    reason, author : str
    changed_ms : int
        When it was added, changed or removed, ms since the epoch.
    removed : bool
        Whether it is on the list no more.
    revision : int
        Its place among all changes of all lists of a store.
    """

    list: str
    value: str
    until_ms: int | None = None
    reason: str = ""
    author: str = ""
    changed_ms: int = 0
    removed: bool = False
    revision: int = 0


Hash = Callable[[str], str]


def stored_value(value: str, hashed: Hash | None) -> str:
    """Return a value as a store keeps it: canonical, and hashed where ids are personal.

    Networks and e-mail domains are kept as they are.

    Raises
    ------
    InvalidRequest
        It is empty, too long, or a network that is none.
    """
    value = value.strip()
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise InvalidRequest(f"a value of {len(value)} characters; 1 to {MAX_ID_LENGTH} are allowed", "$.value")
    if value.startswith("@"):
        return value.lower()
    if network := _network(value):
        return network
    return value if hashed is None else hashed(value)


def _network(value: str) -> str | None:
    """Return a network in its one form; None for what is no address with a prefix."""
    try:
        return str(ip_network(value, strict=False)) if "/" in value else None
    except ValueError:
        return None


class Lists:
    """The lists of a worker.

    Parameters
    ----------
    hashed : callable, optional
        Returns the keyed hash of an id, where stores keep hashes.

    Attributes
    ----------
    revision : int
        Up to which change of the store they are current.
    """

    def __init__(self, hashed: Hash | None = None) -> None:
        self.revision = 0
        self.hashed = hashed
        self._entries: dict[str, dict[str, int | None]] = {}
        self._prefixes: dict[str, set[tuple[int, int]]] = {}
        self._expiring: set[tuple[str, str]] = set()

    def apply(self, entries: Iterable[ListEntry]) -> None:
        """Take over changes, in the order of their revisions."""
        for entry in entries:
            self.revision = max(self.revision, entry.revision)
            values = self._entries.setdefault(entry.list, {})
            self._expiring.discard((entry.list, entry.value))
            if entry.removed:
                values.pop(entry.value, None)
                continue
            values[entry.value] = entry.until_ms
            if entry.until_ms is not None:
                self._expiring.add((entry.list, entry.value))
            if "/" in entry.value and (network := _network(entry.value)):
                found = ip_network(network)
                self._prefixes.setdefault(entry.list, set()).add((found.version, found.prefixlen))

    def expire(self, now_ms: int) -> None:
        """Drop the entries that have ended."""
        for name, value in [*self._expiring]:
            until_ms = self._entries[name].get(value)
            if until_ms is not None and until_ms <= now_ms:
                del self._entries[name][value]
                self._expiring.discard((name, value))

    def size(self, name: str) -> int:
        """Return how many entries a list has."""
        return len(self._entries.get(name, ()))

    def holds(self, name: str, text: str) -> bool:
        """Return whether a text, or what it is the hash of, is on a list: itself, its network or its e-mail domain."""
        values = self._entries.get(name)
        if not values:
            return False
        if text in values or (self.hashed is not None and self.hashed(text) in values):
            return True
        if "@" in text and "@" + text.rpartition("@")[2].lower() in values:
            return True
        prefixes = self._prefixes.get(name)
        return prefixes is not None and _in_network(text, values, prefixes)

    def snoozed(self, rule: str, row: Row) -> bool:
        """Return whether a rule is silenced for the customer, the merchant or the device of a row."""
        name = SNOOZE + rule
        if not self._entries.get(name):
            return False
        said = {"customer_id": row.customer_id or None, **row.roles}
        return any(
            said.get(field) is not None and self.holds(name, f"{field}:{said[field]}") for field in SNOOZED_FIELDS
        )


def _in_network(text: str, values: dict[str, int | None], prefixes: set[tuple[int, int]]) -> bool:
    try:
        address = ip_address(text)
    except ValueError:
        return False
    return any(
        str(ip_network(f"{address}/{length}", strict=False)) in values
        for version, length in prefixes
        if version == address.version
    )
