"""Scopes: what an API key may do. A route names the one scope that opens it.

Scopes are flat: none includes another, so a key opens exactly what it names. A key may have several of them.
"""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["score", "read", "analyst", "rules", "supervisor", "admin"]

SCOPES: dict[Scope, str] = {
    "score": "have transactions scored and explained, and send labels",
    "read": "see decisions, profiles, metrics and the API's document",
    "analyst": "work cases",
    "rules": "change rules and lists",
    "supervisor": "reopen cases that were resolved",
    "admin": "look after models, and have a customer forgotten",
}
"""Every scope and what it is for, in the order in which a key lists them."""

KEYLESS: frozenset[Scope] = frozenset({"score", "read"})
"""The scopes whose routes need no key if FRAUD_REQUIRE_KEYS is off; routes of all others always need one."""

assert tuple(SCOPES) == get_args(Scope)
