"""Routes to read and reset a customer's profile. Each access is logged with its key."""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import blake2b
from typing import Annotated, Literal

import msgspec

from fraud.errors import UnknownCustomer
from fraud.forms import checked_id
from fraud.history.profile import ReadableProfile, readable_profile
from fraud.schema import MAX_ID_LENGTH
from fraud.serving.http import Answer, Call, Route
from fraud.serving.parameters import parameters
from fraud.stores.protocol import Store

logger = logging.getLogger("fraud.serving.profiles")

PROFILE = "/v1/users/{id}/profile"
UNKNOWN = {404: "Nothing is known of this customer."}


class Customer(msgspec.Struct):
    """The customer id in the path."""

    id: Annotated[
        str,
        msgspec.Meta(
            min_length=1,
            max_length=MAX_ID_LENGTH,
            description="The customer's id, percent-encoded as a path asks for.",
        ),
    ]


class ResetAnswer(msgspec.Struct):
    """The customer's history is forgotten."""

    customer_id: str
    reset: Literal[True] = True


_encode = msgspec.json.Encoder().encode


def profile_routes(store: Callable[[], Store]) -> list[Route]:
    """`GET` and `DELETE /v1/users/{id}/profile`."""

    async def show(call: Call) -> Answer:
        customer_id = customer_of(call)
        profile = await store().profile(customer_id)
        _note("read", call, customer_id, found=profile is not None)
        if profile is None:
            raise UnknownCustomer
        return Answer(_encode(readable_profile(profile)))

    async def reset(call: Call) -> Answer:
        customer_id = customer_of(call)
        known = await store().reset(customer_id)
        _note("reset", call, customer_id, found=known)
        if not known:
            raise UnknownCustomer
        return Answer(_encode(ResetAnswer(customer_id)))

    return [
        Route(
            "GET",
            PROFILE,
            "read",
            show,
            "What is kept of a customer, readable.",
            answer=ReadableProfile,
            parameters=Customer,
            fails=UNKNOWN,
            tag="History",
        ),
        Route(
            "DELETE",
            PROFILE,
            "admin",
            reset,
            "Forget a customer's history; decisions stay on record.",
            answer=ResetAnswer,
            parameters=Customer,
            fails=UNKNOWN,
            tag="History",
        ),
    ]


def customer_of(call: Call) -> str:
    """Return the customer's id in the path.

    Raises
    ------
    InvalidRequest
        It is empty, too long, not UTF-8, or holds a character that is not allowed in ids.
    """
    return checked_id(parameters(call, Customer).id, "$.id")


def _note(action: str, call: Call, customer_id: str, *, found: bool) -> None:
    """Log who read or reset which profile; the customer's id is logged as a hash."""
    logger.info(
        "profile %s: customer %s, key %s, found %s, request %s",
        action,
        blake2b(customer_id.encode(), digest_size=8).hexdigest(),
        call.scope.get("fraud.key_id", "none"),
        found,
        call.request_id,
    )
