"""Keyed marks beside the chain: on each record before it is linked, and on the chain's anchor and head.

The links of `fraud.decisions.chain` protect rows that are in the chain. Marks protect the rest against someone who can
write to the database but does not have the key:

- A record that is linked behind its commit carries the mark of its *writer*, one run of one worker, which counts its
  records without a gap. A record without a valid mark is never linked; a linked record is not linked again; a record
  deleted before it was linked leaves a gap in its writer's count.
- The head of the chain carries a mark over its place, its link and how far each writer has been linked, and the anchor
  over its place and link: neither can be set back to a place that the service did not write.

Marks cannot detect a database that was restored as a whole to an earlier state. For that, note
the head that ``fraud audit verify`` prints and give it to a later run.
"""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from hmac import compare_digest
from typing import NamedTuple

import msgspec

from fraud.decisions.chain import Anchor

WRITER = struct.Struct(">Q8s")
"""A writer's name: when it began, ms since the epoch, and random bytes."""
NUMBERED = struct.Struct(">16sQ")
"""The bytes before a mark's hash: the writer, and the record's number in its count."""
MARK_BYTES = 32
WRITER_LASTS_MS = 86_400_000
WRITER_KEPT_MS = 3 * WRITER_LASTS_MS
"""How long the head remembers a writer after its start: longer than any writer runs, or any record waits."""


class Writer:
    """One run of one worker, which numbers its records from 1 without a gap."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.renew()

    def renew(self) -> None:
        """Begin a new count after a failure, when it is unknown which records were committed."""
        self.began_ms = time.time_ns() // 1_000_000
        self.name = WRITER.pack(self.began_ms, secrets.token_bytes(8))
        self.number = 0

    def marks(self, records: Iterable[tuple[str, bytes]]) -> list[bytes]:
        """Return the marks of records that follow those up to `number`, each given with the key it is found by."""
        if time.time_ns() // 1_000_000 - self.began_ms > WRITER_LASTS_MS:
            self.renew()
        return [
            record_mark(self.name, number, found_by, record, self._key)
            for number, (found_by, record) in enumerate(records, self.number + 1)
        ]


def record_mark(writer: bytes, number: int, found_by: str, record: bytes, key: bytes) -> bytes:
    """Return the 56 bytes that bind a record, and the key it is found by, to its number in a writer's count."""
    numbered = NUMBERED.pack(writer, number)
    name = found_by.encode()
    said = numbered + struct.pack(">I", len(name)) + name + record
    return numbered + _hash(said, b"fraud-record", key)


def void_mark(writer: bytes, number: int, key: bytes) -> bytes:
    """Return the mark of a number without a record, because another worker had recorded the transaction."""
    numbered = NUMBERED.pack(writer, number)
    return numbered + _hash(numbered, b"fraud-void", key)


def place_mark(place: str, anchor: Anchor, key: bytes, writers: bytes = b"") -> bytes:
    """Return the 32-byte mark which proves that the service wrote a place of the chain, ``anchor`` or ``head``."""
    said = msgspec.msgpack.encode((place, anchor.sequence, anchor.link, writers))
    return _hash(said, b"fraud-place", key)


def is_marked(place: str, anchor: Anchor, mark: bytes | None, key: bytes, writers: bytes = b"") -> bool:
    """Return whether the service wrote a place of the chain; the place before the first row needs no mark."""
    if anchor == Anchor() and not writers:
        return True
    return mark is not None and compare_digest(mark, place_mark(place, anchor, key, writers))


class Unlinked(NamedTuple):
    """A record that waits for its place in the chain."""

    number: int
    found_by: str
    record: bytes
    mark: bytes | None


@dataclass
class Turns:
    """How far each writer's records have been linked.

    Attributes
    ----------
    numbers : dict of bytes to int
        The last number that was linked of each writer.
    floor_ms : int
        Writers that began before and are not in `numbers` have been forgotten, and may not come back.
    """

    numbers: dict[bytes, int] = field(default_factory=dict)
    floor_ms: int = 0

    @classmethod
    def decode(cls, blob: bytes | None) -> Turns:
        if not blob:
            return cls()
        floor_ms, numbers = msgspec.msgpack.decode(blob, type=tuple[int, dict[bytes, int]])
        return cls(numbers, floor_ms)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode((self.floor_ms, self.numbers))

    def refused(self, row: Unlinked, voids: Collection[bytes], key: bytes) -> str | None:
        """Accept a record in its turn, or return why it may not be linked.

        Parameters
        ----------
        row : Unlinked
        voids : collection of bytes
            Marks of the numbers that stand for no record.
        """
        if row.mark is None or len(row.mark) != NUMBERED.size + MARK_BYTES:
            return "it carries no mark"
        writer, number = NUMBERED.unpack_from(row.mark)
        if not compare_digest(row.mark, record_mark(writer, number, row.found_by, row.record, key)):
            return "its mark does not fit: it is not what was recorded, or the key is another one"
        last = self.passed(writer, voids, key)
        if number <= last:
            return "it was linked before, and its place was taken from it"
        if writer not in self.numbers and WRITER.unpack(writer)[0] < self.floor_ms:
            return "its writer ended long ago"
        if number != last + 1:
            return f"record {last + 1} of its writer is missing"
        self.numbers[writer] = number
        return None

    def passed(self, writer: bytes, voids: Collection[bytes], key: bytes) -> int:
        """Return the last number of a writer whose record is linked or void."""
        last = self.numbers.get(writer, 0)
        while voids and void_mark(writer, last + 1, key) in voids:
            last += 1
        return last

    def has_passed(self, mark: bytes) -> bool:
        """Return whether a writer has been linked past the number of a mark, or is forgotten."""
        writer, number = NUMBERED.unpack_from(mark)
        return bool(number <= self.numbers.get(writer, 0) or WRITER.unpack(writer)[0] < self.floor_ms)

    def forget(self, now_ms: int) -> None:
        """Forget writers that ended long ago; only while no record waits to be linked."""
        floor_ms = now_ms - WRITER_KEPT_MS
        old = [writer for writer in self.numbers if WRITER.unpack(writer)[0] < floor_ms]
        if old:
            self.floor_ms = max(self.floor_ms, floor_ms)
        for writer in old:
            del self.numbers[writer]


def in_turn(
    rows: Iterable[Unlinked], turns: Turns, voids: Collection[bytes], key: bytes
) -> tuple[list[Unlinked], Mapping[int, str]]:
    """Return the records that may be linked, in order, and the reason for each of the others, by row number."""
    taken: list[Unlinked] = []
    refused: dict[int, str] = {}
    for row in rows:
        reason = turns.refused(row, voids, key)
        if reason is None:
            taken.append(row)
        else:
            refused[row.number] = reason
    return taken, refused


def _hash(said: bytes, kind: bytes, key: bytes) -> bytes:
    return blake2b(said, digest_size=MARK_BYTES, key=key, person=kind).digest()
