"""`POST /v1/labels`: labels of scored transactions. The log says which API key sent which.

The scope is score: whoever may score transactions may label them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.decisions.labels import Label, LabelOutcome
from fraud.errors import RequestError
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.labels import LabelRequest, apply_labels, read_label
from fraud.pipeline.requests import CHUNK_BYTES, transaction_id_of
from fraud.schema import MAX_INSTANCES
from fraud.serving.answers import RowsRefused
from fraud.serving.bodies import decode_body, expect_count
from fraud.serving.contract import Either, Problem, Refused, described_by
from fraud.serving.http import Answer, Call, Route

logger = logging.getLogger("fraud.serving.labels")

LABELS = "/v1/labels"


class LabelsRequest(msgspec.Struct):
    """Labels; each is checked by itself."""

    labels: Annotated[
        list[Annotated[msgspec.Raw, described_by(LabelRequest)]],
        Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_INSTANCES}),
    ] = []


class LabelResult(msgspec.Struct, frozen=True):
    """What was done with one label."""

    transaction_id: str
    outcome: Annotated[
        LabelOutcome,
        Meta(
            description="applied: now in effect; known: the same was in effect before; superseded: kept, but a label "
            "with a later label_time is in effect; unknown: the transaction is not on record"
        ),
    ]


class LabelsAnswer(msgspec.Struct):
    """One element for each label, in order."""

    labels: Sequence[Either[LabelResult, Refused]]


_decode_envelope = msgspec.json.Decoder(LabelsRequest)
_encode = msgspec.json.Encoder().encode


def label_routes(pipeline: Callable[[], Pipeline], max_ahead_ms: int) -> list[Route]:
    """`POST /v1/labels`; a label's time may be at most `max_ahead_ms` after the clock."""

    async def take(call: Call) -> Answer:
        raws = decode_labels(await call.json_body())
        store, counts = pipeline().store, pipeline().counts
        now_ms = time.time_ns() // 1_000_000
        actor = str(call.scope.get("fraud.key_id", ""))
        rows: list[Label | RequestError] = []
        n_bytes = 0
        for i, raw in enumerate(raws):
            rows.append(read_label(raw, f"$.labels[{i}]", now_ms, max_ahead_ms, actor=actor))
            n_bytes += memoryview(raw).nbytes
            if n_bytes >= CHUNK_BYTES:
                n_bytes = 0
                await asyncio.sleep(0)
        problems = [row for row in rows if isinstance(row, RequestError)]
        counts["labels_refused"] += len(problems)
        if len(problems) == len(rows):
            raise RowsRefused(problems)
        outcomes: list[LabelOutcome] = []
        async for some, results in apply_labels(store, [row for row in rows if isinstance(row, Label)]):
            for outcome, n in Counter(results).items():
                counts[f"labels_{outcome}"] += n
            _log(call, some, results)
            outcomes += results
        in_order = iter(outcomes)
        answers = [
            LabelResult(row.transaction_id, next(in_order))
            if isinstance(row, Label)
            else Refused(transaction_id_of(raw), Problem(row.code, row.message, row.path))
            for raw, row in zip(raws, rows, strict=True)
        ]
        return Answer(_encode(LabelsAnswer(answers)))

    return [
        Route(
            "POST",
            LABELS,
            "score",
            take,
            "Label scored transactions as fraud or legitimate, or withdraw their labels; the histories follow.",
            request=LabelsRequest,
            answer=LabelsAnswer,
            tag="History",
        )
    ]


def decode_labels(body: bytes) -> list[msgspec.Raw]:
    """Return the labels of a body, each as JSON.

    Raises
    ------
    MalformedJson
        The body is not JSON.
    InvalidRequest
        It is not an object with 1 to 1000 labels.
    """
    labels = decode_body(_decode_envelope, body, '{"labels": [{"transaction_id": "t-1", "is_fraud": true}]}').labels
    expect_count(len(labels), "labels")
    return labels


def _log(call: Call, labels: Sequence[Label], outcomes: Sequence[LabelOutcome]) -> None:
    """Log which API key labelled which transactions; the log has their ids as hashes."""
    logger.info(
        "labels applied: %d of %d, transactions %s, key %s, request %s",
        outcomes.count("applied"),
        len(outcomes),
        ",".join(
            blake2b(label.transaction_id.encode(), digest_size=8).hexdigest()
            for label, outcome in zip(labels, outcomes, strict=True)
            if outcome == "applied"
        )
        or "none",
        call.scope.get("fraud.key_id", "none"),
        call.request_id,
    )
