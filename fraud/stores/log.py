"""The decision log as auditors read it: row by row in the order of its chain, beside the running service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.record import DecisionRecord

FORGET_AT_ONCE = 5000
decode_record = msgspec.msgpack.Decoder(DecisionRecord).decode


class Entry(NamedTuple):
    """One row of the log: what the chain holds, and the key it is found by."""

    logged: Logged
    key: str


class DecisionLog(ABC):
    """A log that can be read in the order of its chain."""

    def anchor(self) -> Anchor:
        """Return where the chain begins."""
        return self._place("anchor")

    def head(self) -> Anchor:
        """Return the last place that was written, as the log itself says."""
        return self._place("head")

    @abstractmethod
    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        """Yield the rows after one place up to another, in order; what is written meanwhile may be missed."""

    def forget(self, before_ms: int) -> int:
        """Remove the oldest decisions up to the first that was made at `before_ms` or later.

        The chain begins after them from then on. A transaction forgotten counts as new when it comes again.
        Works in small steps, so that a running service waits for none of them.

        Returns
        -------
        int
            How many were removed.
        """
        removed = 0
        while True:
            last = self.anchor()
            keys: list[str] = []
            for logged, key in self.rows():
                if len(keys) == FORGET_AT_ONCE or decode_record(logged.record).processing_time_ms >= before_ms:
                    break
                last = Anchor(logged.sequence, logged.link)
                keys.append(key)
            if not keys:
                return removed
            self._remove(last, keys)
            removed += len(keys)

    @abstractmethod
    def _place(self, place: str) -> Anchor: ...

    @abstractmethod
    def _remove(self, last: Anchor, keys: list[str]) -> None:
        """Remove the rows up to `last`, which have these keys, and let the chain begin after them."""
