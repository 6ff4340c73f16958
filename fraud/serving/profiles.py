"""What is kept of one customer: read it, reset it. Who did so is in the log.

Reading asks for the scope read, resetting for admin (`fraud.serving.security`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from hashlib import blake2b
from urllib.parse import unquote

import orjson

from fraud.errors import InvalidRequest, UnknownCustomer
from fraud.history.profile import readable_profile
from fraud.schema import MAX_ID_LENGTH, refuse_controls
from fraud.serving.http import Answer, Call, Handler
from fraud.stores.protocol import Store

logger = logging.getLogger("fraud.serving.profiles")

PROFILES = ("/v1/users/", "/profile")
"""What stands before and after the customer's id in the path."""


def profile_routes(store: Callable[[], Store]) -> dict[tuple[str, str], Mapping[str, Handler]]:
    """`GET` and `DELETE /v1/users/{id}/profile`, by what their paths begin and end with."""

    async def show(call: Call) -> Answer:
        customer_id = customer_of(call)
        profile = await store().profile(customer_id)
        _note("read", call, customer_id, found=profile is not None)
        if profile is None:
            raise UnknownCustomer
        return Answer(orjson.dumps(readable_profile(profile)))

    async def reset(call: Call) -> Answer:
        customer_id = customer_of(call)
        known = await store().reset(customer_id)
        _note("reset", call, customer_id, found=known)
        if not known:
            raise UnknownCustomer
        return Answer(orjson.dumps({"customer_id": customer_id, "reset": True}))

    return {PROFILES: {"GET": show, "DELETE": reset}}


def customer_of(call: Call) -> str:
    """Return the customer's id in the path.

    Raises
    ------
    InvalidRequest
        It is empty or too long, no UTF-8, or holds a character that no id may.
    """
    raw = call.scope.get("raw_path") or call.scope["path"].encode()
    middle = raw.decode("latin-1").removeprefix(PROFILES[0]).removesuffix(PROFILES[1])
    try:
        customer_id = unquote(middle, errors="strict")
    except UnicodeDecodeError:
        raise InvalidRequest("the customer's id in the path is no UTF-8", "$.id") from None
    if not 1 <= len(customer_id) <= MAX_ID_LENGTH:
        raise InvalidRequest(
            f"the customer's id has {len(customer_id)} characters; 1 to {MAX_ID_LENGTH} are allowed", "$.id"
        )
    refuse_controls(customer_id, "$.id")
    return customer_id


def _note(action: str, call: Call, customer_id: str, *, found: bool) -> None:
    """Log who looked at or reset whose profile; the id itself is personal and stays out of the log."""
    logger.info(
        "profile %s: customer %s, key %s, found %s, request %s",
        action,
        blake2b(customer_id.encode(), digest_size=8).hexdigest(),
        call.scope.get("fraud.key_id", "none"),
        found,
        call.request_id,
    )
