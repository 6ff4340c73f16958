"""The hash chain of the decision log: it detects a changed, missing or moved row.

Each row is kept as the bytes that were recorded, with a link: a hash of those bytes and of the link before.
Processes append one at a time, under the store's write lock, so all rows form one chain. The links are keyed: someone
who can write to the database but does not have the key cannot recompute them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

LINK_BYTES = 32
GENESIS = bytes(LINK_BYTES)
"""What the first row is linked to."""


class Logged(NamedTuple):
    """One row of the log; `sequence` counts from 1 without a gap."""

    sequence: int
    record: bytes
    link: bytes


class Anchor(NamedTuple):
    """Where a chain begins: before its first row, or after rows that retention removed."""

    sequence: int = 0
    link: bytes = GENESIS


class Break(NamedTuple):
    """The first row that differs from what was recorded."""

    sequence: int
    reason: str


def audit_key_of(secret: str) -> bytes:
    """Return the bytes of the audit key that a setting holds; empty for none."""
    return blake2b(secret.encode()).digest() if secret else b""


def link_of(before: bytes, record: bytes, key: bytes = b"") -> bytes:
    """Return the 32-byte hash that links a record to all records before it.

    Parameters
    ----------
    before : bytes
        The link of the row before, `GENESIS` for the first.
    record : bytes
        The row's bytes exactly as they are stored.
    key : bytes
        From `audit_key_of`; empty for a chain that anyone may compute.
    """
    return blake2b(before + record, digest_size=LINK_BYTES, key=key, person=b"fraud-link").digest()


def first_link_of(before: bytes, record: bytes, key: bytes = b"") -> bytes:
    """Return the link as the first release computed it; used only to verify rows of that release.

    As the two differ, a log with marks (`fraud.decisions.marks`) cannot pass for one of the first release, which
    had none.
    """
    return blake2b(before + record, digest_size=LINK_BYTES, key=key).digest()


def extend(anchor: Anchor, records: Iterable[bytes], key: bytes = b"") -> Iterator[Logged]:
    """Yield records with their place and link after `anchor`, the last row of the chain."""
    sequence, link = anchor
    for record in records:
        sequence, link = sequence + 1, link_of(link, record, key)
        yield Logged(sequence, record, link)


class Verifier:
    """Walks a log from its anchor; stops at the first break.

    A log may begin with rows of the first release; `in_first_release` is true up to the last of them.
    """

    def __init__(self, anchor: Anchor, key: bytes = b"") -> None:
        self.head = anchor
        self.in_first_release = True
        self._key = key

    def check(self, row: Logged) -> Break | None:
        """Check the next row; return its break, or None."""
        expected = self.head.sequence + 1
        if row.sequence != expected:
            return Break(expected, f"row {expected} is missing: row {row.sequence} follows {expected - 1}")
        link = link_of(self.head.link, row.record, self._key)
        if self.in_first_release and link != row.link:
            link = first_link_of(self.head.link, row.record, self._key)
        else:
            self.in_first_release = False
        if link != row.link:
            return Break(row.sequence, f"row {row.sequence} is not what was recorded, or the key is another one")
        self.head = Anchor(row.sequence, link)
        return None
