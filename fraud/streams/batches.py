"""From a batch of records to what is to be written of them: each is decided, applied as a label, or a dead letter."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import msgspec
from confluent_kafka import Message

from fraud.decisions.labels import Label
from fraud.errors import FraudError, PastVersion, RequestError, StoreError, UnknownTransaction
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.labels import apply_labels, read_label
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import Decision, Outcome, PendingRow, Rejection
from fraud.stores.protocol import RECORD
from fraud.stream_settings import StreamSettings
from fraud.streams.dead_letters import dead_letter
from fraud.streams.sink import Headers, Outgoing
from fraud.streams.values import REQUEST_ID_HEADER, expect_usable, headers_of, in_record, key_of, read_record, time_of
from fraud.streams.verdicts import encoded, needs_a_look, verdict_on

logger = logging.getLogger("fraud.streams")


class Answered(NamedTuple):
    """A record, what is written of it, and the code of its error where that is a dead letter."""

    message: Message
    written: list[Outgoing]
    code: str = ""


class NotDecided(FraudError):
    """A batch cannot be decided now, because the store is away; it can be decided again."""

    http_status = 503
    code = "store"


class Unforeseen(FraudError):
    """A record made this program fail, as no other record of its batch did."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"this record made the service fail: {type(error).__name__}; the log has the traceback")


class Batches:
    """Decides on batches of records.

    Parameters
    ----------
    pipeline : Pipeline
    load_past : callable
        Loads a version of a model that is served no more, by name and digest, to explain what it decided.
    stream : StreamSettings
    threshold : float
        The anomaly score above which a transaction is an anomaly.
    max_ahead_ms : int
        How far a label's time may be ahead of the clock, ms.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        load_past: Callable[[str, str], Awaitable[None]],
        stream: StreamSettings,
        *,
        threshold: float,
        max_ahead_ms: int,
    ) -> None:
        self._pipeline = pipeline
        self._load_past = load_past
        self._stream = stream
        self._threshold = threshold
        self._max_ahead_ms = max_ahead_ms

    async def decide(self, messages: Sequence[Message]) -> list[Answered]:
        """Decide on transactions and apply labels; return each record with what is to be written of it, in order.

        Every decision is on record when this returns. Calling it again with the same records changes nothing.

        Raises
        ------
        NotDecided
            The store is away.
        """
        answered: dict[int, Answered] = {}
        labels: list[tuple[int, Label]] = []
        rows: list[tuple[int, ScoreRequest]] = []
        now_ms = time.time_ns() // 1_000_000
        for i, message in enumerate(messages):
            try:
                if message.topic() == self._stream.labels:
                    labels.append((i, self._label(message, now_ms)))
                else:
                    rows.append((i, read_record(self._pipeline, message, now_ms, explain=True)))
            except RequestError as error:
                answered[i] = self._dead(message, error)
            except Exception as error:
                answered[i] = self._unforeseen(message, error)
        outcomes = await self._outcomes([request for _, request in rows]) if rows else []
        for (i, request), outcome in zip(rows, outcomes, strict=True):
            answered[i] = self._answered(messages[i], request, outcome)
        await self._apply(messages, labels, answered)
        return [answered[i] for i in range(len(messages))]

    def _label(self, message: Message, now_ms: int) -> Label:
        """Read a label; without a time of its own it is known since its record's timestamp."""
        arrived_ms = min(time_of(message, now_ms), now_ms)
        label = read_label(expect_usable(message), "$", arrived_ms, self._max_ahead_ms, source="stream")
        if isinstance(label, RequestError):
            raise label
        return label

    async def _outcomes(self, requests: list[ScoreRequest]) -> list[Outcome]:
        outcomes = await self._decided(requests)
        past = [i for i, outcome in enumerate(outcomes) if _needs_past(outcome)]
        for name, digest in {_past_of(outcomes[i]) for i in past}:
            await self._load_past(name, digest)
        for explain in (True, False):  # a version that is gone for good explains nothing
            again = [i for i in past if _needs_past(outcomes[i])]
            if again:
                some = [requests[i].only([_pending(requests[i], explain)]) for i in again]
                for i, outcome in zip(again, await self._decided(some), strict=True):
                    outcomes[i] = outcome
        store = next((o.error for o in outcomes if isinstance(o, Rejection) and isinstance(o.error, StoreError)), None)
        if store is not None:
            raise NotDecided(store.message)
        if any(isinstance(outcome, Decision) and RECORD in outcome.degraded for outcome in outcomes):
            raise NotDecided("decisions are not on record yet")
        return outcomes

    async def _decided(self, requests: list[ScoreRequest]) -> list[Outcome]:
        """Decide together; if that fails as a whole, one by one, so that only the faulty record fails."""
        try:
            return [outcome for (outcome,) in await self._pipeline.decide_requests(requests)]
        except Exception as error:
            if len(requests) == 1:
                logger.error("a record made the pipeline fail", exc_info=error)
                return [Rejection(None, Unforeseen(error))]
            logger.error("a batch of %d records failed; deciding one by one: %s", len(requests), error)
        return [outcome for request in requests for outcome in await self._decided([request])]

    def _answered(self, message: Message, request: ScoreRequest, outcome: Outcome) -> Answered:
        if isinstance(outcome, Rejection):
            return self._dead(message, in_record(outcome.error, request.contract))
        row = request.rows[0]
        assert isinstance(row, PendingRow)
        now_ms = time.time_ns() // 1_000_000
        verdict = verdict_on(outcome, row, time_of(message, now_ms), now_ms, self._threshold)
        key, headers = key_of(message), _with_request_id(headers_of(message), request.request_id)
        value = encoded(verdict)
        written = [Outgoing(self._stream.decisions, key, value, headers)]
        if needs_a_look(verdict):
            written.append(Outgoing(self._stream.anomalies, key, value, headers))
        return Answered(message, written)

    async def _apply(
        self, messages: Sequence[Message], labels: Sequence[tuple[int, Label]], answered: dict[int, Answered]
    ) -> None:
        """Apply labels after the transactions of the batch; one of an unknown transaction is a dead letter."""
        places = iter(labels)
        try:
            async for some, outcomes in apply_labels(self._pipeline.store, [label for _, label in labels]):
                for outcome in outcomes:
                    i, _ = next(places)
                    self._pipeline.counts[f"labels_{outcome}"] += 1
                    unknown = outcome == "unknown"
                    answered[i] = (
                        self._dead(messages[i], UnknownTransaction()) if unknown else Answered(messages[i], [])
                    )
                logger.info("labels applied: %d of %d", outcomes.count("applied"), len(some))
        except StoreError as error:
            raise NotDecided(error.message) from None

    def _dead(self, message: Message, error: FraudError) -> Answered:
        letter = dead_letter(message, error, self._stream.dead, self._stream.max_message_bytes)
        return Answered(message, [letter], error.code)

    def _unforeseen(self, message: Message, error: Exception) -> Answered:
        logger.error("a record made the reading fail", exc_info=error)
        return self._dead(message, Unforeseen(error))


def _needs_past(outcome: Outcome) -> bool:
    return isinstance(outcome, Rejection) and isinstance(outcome.error, PastVersion)


def _past_of(outcome: Outcome) -> tuple[str, str]:
    assert isinstance(outcome, Rejection)
    assert isinstance(outcome.error, PastVersion)
    return outcome.error.name, outcome.error.digest


def _pending(request: ScoreRequest, explain: bool) -> PendingRow:
    row = request.rows[0]
    assert isinstance(row, PendingRow)
    return msgspec.structs.replace(row, explain=explain)


def _with_request_id(headers: Headers, request_id: str) -> Headers:
    if any(name.lower() == REQUEST_ID_HEADER for name, _ in headers):
        return headers
    return [*headers, ("X-Request-ID", request_id.encode())]
