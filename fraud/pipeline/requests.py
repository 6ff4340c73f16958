"""What callers ask: a request with its rows, and each row's way to its place in the answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from fraud.decisions.record import DecisionRecord, fingerprint, key_of
from fraud.errors import IdempotencyConflict, RequestError
from fraud.models.scorer import Scorer
from fraud.pipeline.answers import Prediction, RowsRefused
from fraud.schema import MAX_ID_LENGTH, Row

CHUNK_ROWS = 64
"""Rows decoded or encoded before the event loop gets a turn."""
CHUNK_BYTES = 65_536
"""Bytes after which no further row is decoded before the event loop gets a turn."""
INLINE_ROWS = 64
"""Rows scored on the event loop itself; more of them go to a thread."""


class ScoreRequest:
    """One caller's rows, decoded as far as `decoded` says, with the model version that answers them all."""

    __slots__ = (
        "decoded_at",
        "explain",
        "is_second_try",
        "n_rows",
        "now_ms",
        "raws",
        "request_id",
        "rows",
        "scorer",
    )

    def __init__(
        self, scorer: Scorer, raws: Sequence[msgspec.Raw], explain: bool, now_ms: int, request_id: str
    ) -> None:
        self.scorer = scorer
        self.raws = raws
        self.n_rows = len(raws)
        self.explain = explain
        self.now_ms = now_ms
        self.request_id = request_id
        self.rows: list[Row | RequestError] = []
        self.decoded_at = 0.0
        self.is_second_try = False

    @property
    def decoded(self) -> bool:
        return len(self.rows) == self.n_rows

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to recall, to record or to explain: a few good rows of ready features."""
        if self.explain or self.n_rows > INLINE_ROWS or self.scorer.spec.kind != "features":
            return False
        return all(isinstance(row, Row) and row.transaction_id is None for row in self.rows)

    def decode_some(self) -> None:
        """Decode the next rows, up to `CHUNK_ROWS` or about `CHUNK_BYTES`; a bad one is kept as its error."""
        decode = self.scorer.decoder.decode
        n_bytes = 0
        for i in range(len(self.rows), min(len(self.rows) + CHUNK_ROWS, self.n_rows)):
            raw = self.raws[i]
            try:
                self.rows.append(decode(raw, f"$.instances[{i}]", self.now_ms))
            except RequestError as error:
                self.rows.append(error.kept())
            n_bytes += memoryview(raw).nbytes
            if n_bytes >= CHUNK_BYTES:
                break
        if self.decoded and all(isinstance(row, RequestError) for row in self.rows):
            raise RowsRefused([row for row in self.rows if isinstance(row, RequestError)])


class Task:
    """One valid row on its way to its place in its caller's answer.

    Parameters
    ----------
    name_it : bool
        Whether a row without a transaction id is given one, to be recorded under.
    """

    __slots__ = (
        "at",
        "contributions",
        "decided",
        "error",
        "explanation",
        "fingerprint",
        "is_named",
        "key",
        "lacks",
        "request",
        "row",
    )

    def __init__(self, request: ScoreRequest, at: int, row: Row, name_it: bool = False) -> None:
        self.request = request
        self.at = at
        self.row = row
        self.is_named = row.transaction_id is not None
        if name_it and not self.is_named:
            row.transaction_id = given_id()
        self.key: str | None = None
        self.fingerprint = b""
        if row.transaction_id is not None:
            scope = None if row.customer_id else request.scorer.name.name
            self.key = key_of(row.transaction_id, scope)
            self.fingerprint = fingerprint(row)
        self.decided: DecisionRecord | None = None
        self.contributions: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self.explanation: Prediction | None = None
        self.error: RequestError | None = None
        self.lacks: tuple[str, ...] = ()
        """What became of the decision after it was made, or rather did not: ``record``, as long as it is not on it."""

    @property
    def scorer(self) -> Scorer:
        return self.request.scorer

    def take(self, decided: DecisionRecord) -> None:
        """Answer with a decision on record, if it was made of the same row."""
        self.decided = self.contributions = None
        if decided.said_the_same(self.fingerprint, self.scorer.name.digest):
            self.decided = decided
        else:
            assert self.row.transaction_id is not None
            self.error = IdempotencyConflict(self.row.transaction_id, f"$.instances[{self.at}].transaction_id")


def given_id() -> str:
    """Return an id for a row that came without one."""
    return f"given-{secrets.token_hex(12)}"


class _Named(msgspec.Struct):
    transaction_id: str | None = None


_decode_name = msgspec.json.Decoder(_Named).decode


def transaction_id_of(raw: bytes | msgspec.Raw) -> str | None:
    """Return the id of a bad row where it has a usable one."""
    try:
        name = _decode_name(raw).transaction_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return name if name is not None and len(name) <= MAX_ID_LENGTH else None
