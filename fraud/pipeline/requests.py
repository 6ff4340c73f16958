"""A caller's request: rows of JSON for one model version, read in chunks, each into a pending row or a rejection."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict

import msgspec

from fraud.errors import RequestError
from fraud.forms import id_text
from fraud.models.scorer import Scorer
from fraud.pipeline.rows import Outcome, PendingRow, Rejection
from fraud.schema import MAX_ID_LENGTH

CHUNK_ROWS = 64
"""Rows read before the event loop gets a turn."""
CHUNK_BYTES = 65_536
"""Bytes after which no further row is read before the event loop gets a turn."""


class RequestOptions(TypedDict, total=False):
    """What a caller asks for and says of itself: parameters of `ScoreRequest`."""

    explain: bool
    now_ms: int | None
    request_id: str
    contract: str
    transaction_id: str | None
    reasons: bool


class ScoreRequest:
    """The rows of one caller; `is_read` is true once all are read.

    Parameters
    ----------
    scorer : Scorer
        The model version that decides on all rows.
    raws : sequence of bytes or msgspec.Raw
        The rows, each a JSON object.
    explain : bool
        Whether the decisions are to carry their explanations.
    now_ms : int, optional
        When the request arrived, ms since the epoch; the clock by default.
    request_id : str
    contract : str
        The contract by which it came, recorded with its decisions; empty for the product's own.
    transaction_id : str, optional
        The id of a row that carries none, such as an idempotency key; each of several rows gets it with its position.
    reasons : bool
        Whether the decisions are to carry their reasons.

    Attributes
    ----------
    rows : list of PendingRow or Rejection
        Those read so far, in order.
    queued_at : float
        `time.perf_counter` when the request was ready to be queued, seconds.
    """

    __slots__ = (
        "contract",
        "explain",
        "n_rows",
        "now_ms",
        "queued_at",
        "raws",
        "reasons",
        "request_id",
        "rows",
        "scorer",
        "transaction_id",
    )

    def __init__(
        self,
        scorer: Scorer,
        raws: Sequence[bytes | msgspec.Raw],
        *,
        explain: bool = False,
        now_ms: int | None = None,
        request_id: str = "",
        contract: str = "",
        transaction_id: str | None = None,
        reasons: bool = False,
    ) -> None:
        self.scorer = scorer
        self.raws = raws
        self.n_rows = len(raws)
        self.explain = explain
        self.now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        self.request_id = request_id
        self.contract = contract
        self.transaction_id = transaction_id
        self.reasons = reasons
        self.rows: list[PendingRow | Rejection] = []
        self.queued_at = 0.0

    @property
    def is_read(self) -> bool:
        return len(self.rows) == self.n_rows

    @property
    def is_rejected(self) -> bool:
        """Whether all rows are read and none can be scored."""
        return self.is_read and all(isinstance(row, Rejection) for row in self.rows)

    def read_some(self) -> list[RequestError]:
        """Read the next rows, up to `CHUNK_ROWS` or about `CHUNK_BYTES`; a bad row becomes a rejection.

        Returns the errors of these rejections.
        """
        errors: list[RequestError] = []
        scorer, explain, now_ms = self.scorer, self.explain, self.now_ms
        request_id, contract, transaction_id = self.request_id, self.contract, self.transaction_id
        reasons = self.reasons
        decode = scorer.decoder.decode
        n_bytes = 0
        for i in range(len(self.rows), min(len(self.rows) + CHUNK_ROWS, self.n_rows)):
            raw, path = self.raws[i], f"$.instances[{i}]"
            own = transaction_id if transaction_id is None or self.n_rows == 1 else f"{transaction_id}:{i}"
            try:
                row = decode(raw, path, now_ms, own)
            except RequestError as error:
                errors.append(error)
                self.rows.append(Rejection(transaction_id_of(raw), error.kept()))
                n_bytes += memoryview(raw).nbytes
            else:
                self.rows.append(PendingRow(row, scorer, now_ms, explain, request_id, path, contract, reasons))
                n_bytes += len(row.raw)
            if n_bytes >= CHUNK_BYTES:
                break
        self.queued_at = time.perf_counter()
        return errors

    def of(self, scorer: Scorer, raws: Sequence[bytes | msgspec.Raw]) -> ScoreRequest:
        """Return a request of the same caller for another version, or of other rows."""
        return ScoreRequest(
            scorer,
            raws,
            explain=self.explain,
            now_ms=self.now_ms,
            request_id=self.request_id,
            contract=self.contract,
            transaction_id=self.transaction_id,
            reasons=self.reasons,
        )

    def only(self, rows: list[PendingRow]) -> ScoreRequest:
        """Return a request of some of the rows, which have been read."""
        some = self.of(self.scorer, ())
        some.rows.extend(rows)
        some.n_rows = len(rows)
        some.queued_at = time.perf_counter()
        return some


DecideRequests = Callable[[Sequence[ScoreRequest]], Awaitable[list[list[Outcome]]]]
"""`Pipeline.decide_requests`, or what is wrapped around it to time or to trace it."""


class _Named(msgspec.Struct):
    transaction_id: str | int | float | None = None


_decode_name = msgspec.json.Decoder(_Named).decode


def transaction_id_of(raw: bytes | msgspec.Raw) -> str | None:
    """Return the id of a bad row, if it has a usable one."""
    try:
        name = _decode_name(raw).transaction_id
        text = None if name is None else id_text(name)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return text if text is not None and len(text) <= MAX_ID_LENGTH else None
