"""The decision log for auditors: read row by row in chain order, beside the running service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from fraud.decisions.chain import Anchor, Logged, Verifier
from fraud.decisions.marks import is_marked
from fraud.errors import StoreError
from fraud.stores.rows import decode_record as decode_record

FORGET_AT_ONCE = 5000
_CHANGED = (
    "the decision log was changed where it begins or ends, or FRAUD_AUDIT_KEY is not the service's; nothing was "
    "removed: look at it with `fraud audit verify`"
)


class Entry(NamedTuple):
    """One row of the log: its record in the chain, and its key."""

    logged: Logged
    key: str


class Place(NamedTuple):
    """The stored anchor or head of the chain.

    `writers` says how far each writer was linked, where records are linked behind their commit; `has_marks` is false
    in a log that only the first release has opened.
    """

    anchor: Anchor
    mark: bytes | None
    writers: bytes = b""
    has_marks: bool = True


class DecisionLog(ABC):
    """A log that can be read in the order of its chain.

    Parameters
    ----------
    audit_key : bytes
        Key of the chain, for `forget`.
    """

    def __init__(self, audit_key: bytes) -> None:
        self.audit_key = audit_key

    def anchor(self) -> Anchor:
        """Return where the chain begins."""
        return self.place("anchor").anchor

    def head(self) -> Anchor:
        """Return the head that the log itself stores."""
        return self.place("head").anchor

    def misplaced(self, key: bytes) -> str | None:
        """Return the place (``anchor``, ``head`` or ``labels``) whose mark is invalid; None if all are valid."""
        for name in ("anchor", "head", "labels"):
            place = self.place(name)
            if place.has_marks and not is_marked(name, place.anchor, place.mark, key, place.writers):
                return name
        return None

    @abstractmethod
    def place(self, place: str) -> Place:
        """Return the place ``anchor`` or ``head``, or the end of the ``labels``, which have a chain of their own."""

    @abstractmethod
    def labels(self) -> Iterator[Entry]:
        """Yield all labels, encoded, in chain order."""

    @abstractmethod
    def beyond(self, key: bytes) -> str | None:
        """Return the first fault of the rows after the chain's head, or None."""

    @abstractmethod
    def rows(self, after: int = 0, until: int | None = None) -> Iterator[Entry]:
        """Yield the rows after one place up to another, in order; rows written meanwhile may be missed."""

    def forget(self, before_ms: int) -> int:
        """Remove the oldest decisions up to the first that was made at `before_ms` or later.

        The chain begins after them from then on. A forgotten transaction counts as new when it comes again. Works in
        small steps, so that a running service is not blocked.

        Returns
        -------
        int
            How many were removed.

        Raises
        ------
        StoreError
            The rows were changed, or the audit key is another one; nothing is removed then.
        """
        removed = 0
        if self.misplaced(self.audit_key) is not None:
            raise StoreError(_CHANGED)
        while True:
            verifier = Verifier(self.anchor(), self.audit_key)
            last = verifier.head
            keys: list[str] = []
            for logged, key in self.rows():
                wrong = verifier.check(logged)
                if wrong is not None:
                    raise StoreError(f"{wrong.reason}; {removed} rows were removed before it")
                if len(keys) == FORGET_AT_ONCE or decode_record(logged.record).processing_time_ms >= before_ms:
                    break
                last = verifier.head
                keys.append(key)
            if not keys:
                return removed
            self._remove(last, keys)
            removed += len(keys)

    @abstractmethod
    def _remove(self, last: Anchor, keys: list[str]) -> None:
        """Remove the rows up to `last`, which have these keys, and let the chain begin after them."""
