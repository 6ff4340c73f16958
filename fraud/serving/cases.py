"""`/v1/cases`: see, claim, resolve and reopen cases. The actor is the id of the API key.

Whoever may read decisions may read cases; scope analyst works them, supervisor reopens what is resolved.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.cases.case import Case, CaseTransaction, Resolution, Status, TrailEntry
from fraud.forms import readable_time
from fraud.serving.bodies import decode_body
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters
from fraud.stores.cases import CaseStore

logger = logging.getLogger("fraud.serving.cases")

CASES = "/v1/cases"
MAX_CASES = 200
CaseId = Annotated[int, Meta(ge=1, le=2**53, description="The number of the case.")]


class CasesWanted(msgspec.Struct):
    """Which cases are wanted, the greatest expected loss first."""

    status: Annotated[Status | None, Meta(description="Of this status; of all without.")] = None
    transaction_id: Annotated[
        Annotated[str, Meta(min_length=1, max_length=128)] | None, Meta(description="With this transaction.")
    ] = None
    limit: Annotated[int, Meta(ge=1, le=MAX_CASES, description="How many at most.")] = 50


class CaseNamed(msgspec.Struct):
    """Which case."""

    id: CaseId


class ResolveRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What the analyst found, at the revision of the case that they saw."""

    resolution: Resolution
    revision: Annotated[int, Meta(ge=1, description="as the case was shown; 409 if it has changed since")]


class NoteRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A note for the trail of a case."""

    text: Annotated[str, Meta(min_length=1, max_length=4000)]


class ShownCase(msgspec.Struct):
    """A case as it is now."""

    id: int
    status: Annotated[Status, Meta(description="resolving: it can be undone; settling: its labels are being written")]
    revision: Annotated[int, Meta(description="counts changes; to be sent with a resolution")]
    customer_id: Annotated[str | None, Meta(description="null for a decision of a features model")]
    transactions: Annotated[int, Meta(description="how many it has")]
    expected_loss: Annotated[float, Meta(description="the sum of score times amount, by which cases are ordered")]
    opened: str
    changed: str
    claimed_by: str | None
    claimed_until: str | None
    resolution: Resolution | None
    resolved_by: str | None
    labels_due: Annotated[str | None, Meta(description="until when a resolution can be undone")]


class ShownTransaction(msgspec.Struct):
    """A reviewed transaction of a case; `GET /v1/decisions/{transaction_id}` has all of it."""

    transaction_id: str
    model: str | None
    event_time: str
    processing_time: str
    merchant_id: str | None
    amount: float
    score: Annotated[float, Meta(description="the probability, or the anomaly score of a model without one")]
    expected_loss: float
    decided_by: str
    rules_hit: Sequence[str]
    reasons: Sequence[tuple[str, float]]


class ShownStep(msgspec.Struct):
    """One change of a case."""

    number: int
    time: str
    actor: str
    step: str
    detail: str


class CasesAnswer(msgspec.Struct):
    """Cases, the greatest expected loss first."""

    cases: Sequence[ShownCase]


class CaseAnswer(msgspec.Struct):
    """A case with its transactions, in the order of the decision log, and every change."""

    case: ShownCase
    transactions: Sequence[ShownTransaction]
    trail: Sequence[ShownStep]


class CaseChanged(msgspec.Struct):
    """The case after the change; null if there was none to claim."""

    case: ShownCase | None


_resolve = msgspec.json.Decoder(ResolveRequest)
_note = msgspec.json.Decoder(NoteRequest)
_encode = msgspec.json.Encoder().encode
_UNKNOWN = {404: "There is no such case."}
_CONFLICT = {**_UNKNOWN, 409: "The case is not in the state that this needs, or another analyst has it."}


def case_routes(cases: Callable[[], CaseStore]) -> list[Route]:
    """`GET /v1/cases` and `/v1/cases/{id}`, `POST /v1/next-case` and `/v1/cases/{id}/…`."""

    async def find(call: Call) -> Answer:
        wanted, store = parameters(call, CasesWanted), cases()
        if wanted.transaction_id is None:
            found = await asyncio.to_thread(store.find, wanted.status, wanted.limit)
        else:
            found = await asyncio.to_thread(store.of_transaction, wanted.transaction_id)
            found = [case for case in found if wanted.status in (None, case.status)][: wanted.limit]
        return Answer(_encode(CasesAnswer([shown_case(case) for case in found])))

    async def show(call: Call) -> Answer:
        case, transactions, trail = await asyncio.to_thread(cases().whole, parameters(call, CaseNamed).id)
        shown = CaseAnswer(shown_case(case), list(map(_transaction, transactions)), list(map(_step, trail)))
        return Answer(_encode(shown))

    async def next_case(call: Call) -> Answer:
        return _changed(await asyncio.to_thread(cases().claim_next, _actor(call)), call)

    async def claim(call: Call) -> Answer:
        return _changed(await asyncio.to_thread(cases().claim, parameters(call, CaseNamed).id, _actor(call)), call)

    async def release(call: Call) -> Answer:
        return _changed(await asyncio.to_thread(cases().release, parameters(call, CaseNamed).id, _actor(call)), call)

    async def undo(call: Call) -> Answer:
        return _changed(await asyncio.to_thread(cases().undo, parameters(call, CaseNamed).id, _actor(call)), call)

    async def reopen(call: Call) -> Answer:
        return _changed(await asyncio.to_thread(cases().reopen, parameters(call, CaseNamed).id, _actor(call)), call)

    async def resolve(call: Call) -> Answer:
        case_id = parameters(call, CaseNamed).id
        asked = decode_body(_resolve, await call.json_body(), '{"resolution": "confirmed_fraud", "revision": 3}')
        given = (case_id, _actor(call), asked.resolution, asked.revision)
        return _changed(await asyncio.to_thread(cases().resolve, *given), call)

    async def note(call: Call) -> Answer:
        case_id = parameters(call, CaseNamed).id
        asked = decode_body(_note, await call.json_body(), '{"text": "the customer was called"}')
        return _changed(await asyncio.to_thread(cases().note, case_id, _actor(call), asked.text), call)

    named = f"{CASES}/{{id}}"
    return [
        Route(
            "GET",
            CASES,
            "read",
            find,
            "Cases, the greatest expected loss first.",
            answer=CasesAnswer,
            parameters=CasesWanted,
            tag="Cases",
        ),
        Route(
            "GET",
            named,
            "read",
            show,
            "A case with its transactions and its trail.",
            answer=CaseAnswer,
            parameters=CaseNamed,
            fails=_UNKNOWN,
            tag="Cases",
        ),
        Route(
            "POST",
            "/v1/next-case",
            "analyst",
            next_case,
            "Claim the open case with the greatest expected loss.",
            answer=CaseChanged,
            tag="Cases",
        ),
        *[
            Route(
                "POST",
                f"{named}/{step}",
                "supervisor" if step == "reopen" else "analyst",
                handler,
                summary,
                request=request,
                answer=CaseChanged,
                parameters=CaseNamed,
                fails=_UNKNOWN if step == "note" else _CONFLICT,
                tag="Cases",
            )
            for step, handler, summary, request in (
                ("claim", claim, "Claim a case, or hold a claim for longer.", None),
                ("release", release, "Give up a claim.", None),
                ("note", note, "Add a note to the trail of a case.", NoteRequest),
                (
                    "resolve",
                    resolve,
                    "Resolve a claimed case; its labels are written ten seconds later.",
                    ResolveRequest,
                ),
                ("undo", undo, "Take a resolution back before its labels are written.", None),
                ("reopen", reopen, "Open a resolved case again; its next resolution corrects the labels.", None),
            )
        ],
    ]


def shown_case(case: Case) -> ShownCase:
    """Return a case as callers read it."""
    status = case.status_at(time.time_ns() // 1_000_000)
    is_claimed = status == "claimed"
    return ShownCase(
        case.id,
        status,
        case.revision,
        case.customer_id,
        case.transactions,
        case.expected_loss,
        readable_time(case.opened_ms),
        readable_time(case.changed_ms),
        case.claimed_by if is_claimed else None,
        readable_time(case.claimed_until_ms) if is_claimed else None,
        case.resolution,
        case.resolved_by or None,
        readable_time(case.due_ms) if status == "resolving" else None,
    )


def _transaction(of: CaseTransaction) -> ShownTransaction:
    times = readable_time(of.event_time_ms), readable_time(of.processing_time_ms)
    return ShownTransaction(
        *(of.transaction_id, of.model, *times, of.merchant_id, of.amount),
        *(of.score, of.expected_loss, of.decided_by, of.rules_hit, of.reasons),
    )


def _step(entry: TrailEntry) -> ShownStep:
    return ShownStep(entry.number, readable_time(entry.time_ms), entry.actor, entry.step, entry.detail)


def _actor(call: Call) -> str:
    return str(call.scope.get("fraud.key_id", ""))


def _changed(case: Case | None, call: Call) -> Answer:
    if case is not None:
        logger.info(
            "%s: case %d, key %s, request %s", call.route.path, case.id, _actor(call) or "none", call.request_id
        )
    return Answer(_encode(CaseChanged(None if case is None else shown_case(case))))
