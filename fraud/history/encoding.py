"""The encoding of states in stores: version, number of updates, record. Earlier versions are upgraded when read."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fraud.errors import StoreError
from fraud.history.state import CUSTOMER, empty_state

ENCODING_VERSION = 2


def encode(state: np.void, updates: int | None = None) -> bytes:
    """Return one state as bytes: the encoding's version, the number of updates, then the record.

    Parameters
    ----------
    updates : int, optional
        The number of updates, withdrawn labels included; it grows with each one, so the newer of two copies is known.
        By default the number of transactions and frauds.
    """
    updates = int(state["count"]) + int(state["fraud_count"]) if updates is None else updates
    return _HEADER.pack(ENCODING_VERSION, updates & 0xFFFFFFFF) + state.tobytes()


def updates_of(blob: bytes) -> int:
    """Return the number of updates of an encoded state of a version known here."""
    updates: int = _HEADER.unpack_from(upgraded(blob))[1]
    return updates


def upgraded(blob: bytes) -> bytes:
    """Return an encoded state in this release's encoding; one of a later release is unchanged."""
    while blob[0] in UPGRADERS:
        blob = UPGRADERS[blob[0]](blob)
    return blob


def decode(
    blobs: Sequence[bytes | None], dtype: np.dtype[np.void], unread: list[int] | None = None
) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return the states in `blobs`; None is a new customer or merchant.

    Parameters
    ----------
    unread : list of int, optional
        Receives the indices of blobs that a later release wrote; their states come back empty.

    Raises
    ------
    StoreError
        A blob was written by a later release and `unread` is not given, or it is damaged.
    """
    nobody = empty_state(dtype)
    parts = []
    for place, blob in enumerate(blobs):
        if blob is None:
            parts.append(nobody)
            continue
        blob = upgraded(blob)
        if blob[0] > ENCODING_VERSION and unread is not None:
            unread.append(place)
            parts.append(nobody)
            continue
        if blob[0] != ENCODING_VERSION or len(blob) != _HEADER.size + dtype.itemsize:
            raise StoreError(
                f"a stored state has version {blob[0]} and {len(blob)} bytes; this release reads version "
                f"{ENCODING_VERSION} of {_HEADER.size + dtype.itemsize} bytes, and those before it"
            )
        parts.append(blob[_HEADER.size :])
    return np.frombuffer(bytearray(b"".join(parts)), dtype)


def is_readable(blob: bytes) -> bool:
    """Return whether this release or an earlier one wrote an encoded state."""
    return blob[0] <= ENCODING_VERSION


def last_time_of(blob: bytes) -> int:
    """Return the event time of the latest transaction in an encoded state, ms."""
    at = _HEADER.size + _TIME_AT
    return int.from_bytes(upgraded(blob)[at : at + 8], "little", signed=True)


def _from_version_1(blob: bytes) -> bytes:
    """The first release wrote the record alone; the number of updates follows from its counters."""
    count, frauds = (int.from_bytes(blob[1 + at : 5 + at], "little") for at in _COUNTS_AT)
    return _HEADER.pack(2, (count + frauds) & 0xFFFFFFFF) + blob[1:]


_HEADER = struct.Struct("<BI")
_FIELDS: Any = CUSTOMER.fields  # the first fields of both kinds of state are the same
_TIME_AT: int = _FIELDS["last_time"][1]
_COUNTS_AT: list[int] = [_FIELDS[name][1] for name in ("count", "fraud_count")]
UPGRADERS: dict[int, Callable[[bytes], bytes]] = {1: _from_version_1}
"""By the version of an encoded state, what brings it to the next one. None is ever removed."""
