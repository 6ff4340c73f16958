"""Routes to read and change the lists that rules look into, and to snooze a rule."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fraud.decisions.rules.lists import SNOOZE, ListEntry, ListName, Lists, stored_value
from fraud.errors import InvalidRequest
from fraud.forms import readable_time
from fraud.schema import MAX_ID_LENGTH, MAX_INSTANCES, Moment
from fraud.serving.bodies import decode_body, expect_count
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters
from fraud.stores.followed_lists import FollowedLists

logger = logging.getLogger("fraud.serving.lists")

LIST = "/v1/lists/{name}"
RuleId = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,63}$", description="the id of a rule")]
Value = Annotated[str, Meta(min_length=1, max_length=MAX_ID_LENGTH)]
Reason = Annotated[str, Meta(max_length=500)]


class ListWanted(msgspec.Struct):
    """Which entries of a list are wanted, by value."""

    name: Annotated[ListName, Meta(description="The list.")]
    after: Annotated[str, Meta(description="Only entries behind this value, the last of an earlier answer.")] = ""
    limit: Annotated[int, Meta(ge=1, le=1000, description="How many at most.")] = 100


class ListNamed(msgspec.Struct):
    """Which list is changed."""

    name: Annotated[ListName, Meta(description="The list.")]


class NewEntry(msgspec.Struct, forbid_unknown_fields=True):
    """One value to put on a list."""

    value: Annotated[Value, Meta(description="an id, a network such as 10.0.0.0/8, or an e-mail domain: @example.com")]
    reason: Reason = ""
    until: Annotated[Moment | None, Meta(description="when it ends by itself, RFC 3339 with a zone")] = None


class ListChange(msgspec.Struct, forbid_unknown_fields=True):
    """Values to put on a list, and values to take off it."""

    add: list[NewEntry] = []
    remove: list[Value] = []


class ListChanged(msgspec.Struct):
    """The lists are changed, in every worker within two seconds."""

    revision: Annotated[int, Meta(description="of the last change; answers record up to which they knew the lists")]


class EntryShown(msgspec.Struct):
    """One entry of a list."""

    value: Annotated[str, Meta(description="its keyed hash where ids are personal")]
    reason: str
    author: str
    added: str
    until: str | None


class ListAnswer(msgspec.Struct):
    """Entries of a list, by value."""

    entries: Sequence[EntryShown]
    size: Annotated[int, Meta(description="how many entries the list has in this worker")]


class RuleNamed(msgspec.Struct):
    """Which rule is snoozed."""

    rule: RuleId


class SnoozeRequest(msgspec.Struct, forbid_unknown_fields=True):
    """For whom a rule is snoozed, and until when; a time in the past ends it."""

    field: Literal["customer_id", "merchant_id", "device_id"]
    value: Value
    until: Annotated[Moment, Meta(description="RFC 3339 with a zone")]
    reason: Reason = ""


_change = msgspec.json.Decoder(ListChange)
_snooze = msgspec.json.Decoder(SnoozeRequest)
_encode = msgspec.json.Encoder().encode


def list_routes(lists: Callable[[], FollowedLists]) -> list[Route]:
    """`GET` and `POST /v1/lists/{name}`, `POST /v1/rules/{rule}/snooze`."""

    async def show(call: Call) -> Answer:
        wanted = parameters(call, ListWanted)
        followed = lists()
        found = await followed.entries(wanted.name, wanted.after, wanted.limit)
        return Answer(_encode(ListAnswer([_shown(entry) for entry in found], followed.lists.size(wanted.name))))

    async def change(call: Call) -> Answer:
        name = parameters(call, ListNamed).name
        asked = decode_body(_change, await call.json_body(), '{"add": [{"value": "c1", "reason": "..."}]}')
        expect_count(len(asked.add) + len(asked.remove), "add and remove")
        followed = lists()
        entries = [
            _entry(followed.lists, name, new.value, call, f"$.add[{i}]", new.until, new.reason)
            for i, new in enumerate(asked.add)
        ]
        entries += [
            msgspec.structs.replace(_entry(followed.lists, name, value, call, f"$.remove[{i}]"), removed=True)
            for i, value in enumerate(asked.remove)
        ]
        return await _changed(followed, entries, call)

    async def snooze(call: Call) -> Answer:
        rule = parameters(call, RuleNamed).rule
        example = '{"field": "customer_id", "value": "c1", "until": "2030-01-01T00:00:00Z"}'
        asked = decode_body(_snooze, await call.json_body(), example)
        followed, value = lists(), f"{asked.field}:{asked.value}"
        entry = _entry(followed.lists, SNOOZE + rule, value, call, "$", asked.until, asked.reason)
        return await _changed(followed, [entry], call)

    return [
        Route(
            "GET",
            LIST,
            "rules",
            show,
            "The entries of a list that rules look into.",
            answer=ListAnswer,
            parameters=ListWanted,
            tag="Rules",
        ),
        Route(
            "POST",
            LIST,
            "rules",
            change,
            f"Put values on a list and take values off it, 1 to {MAX_INSTANCES} a call, all or none.",
            request=ListChange,
            answer=ListChanged,
            parameters=ListNamed,
            tag="Rules",
        ),
        Route(
            "POST",
            "/v1/rules/{rule}/snooze",
            "rules",
            snooze,
            "Silence a rule for one customer, merchant or device until a time.",
            request=SnoozeRequest,
            answer=ListChanged,
            parameters=RuleNamed,
            tag="Rules",
        ),
    ]


def _entry(
    lists: Lists, name: str, value: str, call: Call, path: str, until: datetime | None = None, reason: str = ""
) -> ListEntry:
    try:
        stored = stored_value(value, lists.hashed)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, path) from None
    until_ms = None if until is None else int(until.timestamp() * 1000)
    author = str(call.scope.get("fraud.key_id", ""))
    return ListEntry(name, stored, until_ms, reason, author, time.time_ns() // 1_000_000)


async def _changed(followed: FollowedLists, entries: list[ListEntry], call: Call) -> Answer:
    revision = await followed.change(entries)
    logger.info(
        "list %s: %d entries changed by key %s, revision %d, request %s",
        entries[0].list,
        len(entries),
        entries[0].author or "none",
        revision,
        call.request_id,
    )
    return Answer(_encode(ListChanged(revision)))


def _shown(entry: ListEntry) -> EntryShown:
    until = None if entry.until_ms is None else readable_time(entry.until_ms)
    return EntryShown(entry.value, entry.reason, entry.author, readable_time(entry.changed_ms), until)
