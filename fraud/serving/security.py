"""Access control: API keys, their scopes and their rate limits.

A key is ``fk_<id>_<secret>``, made by `fraud keys create`; the service knows only the hash of it. A plain key of an
earlier system (API_KEYS) has the beginning of its hash as its id. A secret of `fraud keys create`
has 256 bits from the operating system, so one pass of SHA-256 is as good as a slow hash, and costs a
request one microsecond instead of a tenth of a second.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from ipaddress import IPv6Network
from typing import Any, Protocol

from fraud.errors import Forbidden, RateLimited, SettingsError, Unauthenticated
from fraud.serving.scopes import KEYLESS, SCOPES, Scope
from fraud.settings import Settings

MAX_CALLERS = 10_000
MAX_ADDRESS_LENGTH = 64
FAILURES_AT_ONCE = 30.0
"""Requests without a right key that an address may make at once."""
_KEY = re.compile(r"fk_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_LINE = re.compile(
    r"([0-9a-f]{8}):([0-9a-f]{64}):((?:{0})(?:\+(?:{0}))*)(?::([0-9.]+)(?::([0-9.]+))?)?".replace(
        "{0}", "|".join(SCOPES)
    )
)


@dataclass(frozen=True)
class ApiKey:
    """A key as the service knows it; `rate` and `burst` in requests a second and requests, None for the default."""

    id: str
    sha256: str
    scopes: frozenset[Scope]
    rate: float | None = None
    burst: float | None = None

    def line(self) -> str:
        """Return the key as one entry of the setting FRAUD_API_KEYS."""
        scopes = "+".join(scope for scope in SCOPES if scope in self.scopes)
        given = [limit for limit in (self.rate, self.burst) if limit is not None]
        limits = "".join(f":{limit:.6f}".rstrip("0").rstrip(".") for limit in given)
        return f"{self.id}:{self.sha256}:{scopes}{limits}"


def new_key(scopes: Iterable[Scope], rate: float | None = None, burst: float | None = None) -> tuple[str, ApiKey]:
    """Make a key; the first part of the answer is the only copy of its secret."""
    identity = secrets.token_hex(4)
    secret = f"fk_{identity}_{secrets.token_urlsafe(32)}"
    return secret, ApiKey(identity, _sha256(secret), frozenset(scopes), rate, burst)


def parse_keys(text: str) -> list[ApiKey]:
    """Read keys, ``id:sha256:scope+scope[:rate[:burst]]``, separated by commas or white space; # comments a line.

    Raises
    ------
    SettingsError
        Says which entry cannot be read, and shows none of it.
    """
    keys: list[ApiKey] = []
    entries = re.split(r"[\s,]+", re.sub(r"#.*", "", text).strip())
    for number, entry in enumerate(filter(None, entries), 1):
        match = _LINE.fullmatch(entry)
        if match is None:
            raise SettingsError(
                f"API key {number} of {len(entries)} is not id:sha256:scope+scope[:rate[:burst]] with the scopes "
                f"{', '.join(SCOPES)}; `fraud keys create` prints such an entry"
            )
        identity, digest, scopes, rate, burst = match.groups()
        if identity in {key.id for key in keys}:
            raise SettingsError(f"API key {identity} is given twice")
        keys.append(
            ApiKey(
                identity,
                digest,
                frozenset(scope for scope in SCOPES if scope in scopes.split("+")),
                None if rate is None else _positive(rate, identity),
                None if burst is None else _positive(burst, identity),
            )
        )
    return keys


class TokenBucket:
    """A token bucket of one caller: `burst` requests at once, refilled at `rate` a second."""

    __slots__ = ("_burst", "_rate", "_then", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = max(burst, 1.0)
        self._tokens = self._burst
        self._then = now

    def take(self, now: float) -> float:
        """Use one token; return 0, or the seconds until there is one."""
        self._tokens = min(self._burst, self._tokens + (now - self._then) * self._rate)
        self._then = now
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self._rate


class Buckets:
    """The token buckets of the latest `MAX_CALLERS` callers, which bounds the memory."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, caller: str, rate: float, burst: float) -> None:
        """Use one token of a caller.

        Raises
        ------
        RateLimited
            No token is left.
        """
        now = self._clock()
        bucket = self._buckets.get(caller)
        if bucket is None:
            bucket = self._buckets[caller] = TokenBucket(rate, burst, now)
            if len(self._buckets) > MAX_CALLERS:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(caller)
        wait_s = bucket.take(now)
        if wait_s:
            raise RateLimited(wait_s)


class Scoped(Protocol):
    """The part of a route that access control reads."""

    @property
    def scope(self) -> Scope | None: ...


class RequestHead(Protocol):
    """The part of a request that access control reads; `fraud.serving.http.Call` has it."""

    @property
    def route(self) -> Scoped: ...

    @property
    def headers(self) -> Mapping[bytes, bytes]: ...

    @property
    def scope(self) -> MutableMapping[str, Any]: ...


class AccessControl:
    """Authorizes a request or raises; called once per request, before its body is read.

    Parameters
    ----------
    keys : iterable of ApiKey
    required : bool
        Whether routes with a scope in `KEYLESS` need a key too. Routes of other scopes always do.
    rate, burst : float
        Requests a second, and at once, of one caller: a key, or an address without one. 0 for no limit.
    failures : float
        Requests a second without a right key where one is needed, of one address; 0 for no limit. A right key passes
        whatever its address did.
    clock : callable
        Seconds, monotonic.

    Notes
    -----
    Each worker counts for itself. Keys, addresses and failures are counted apart, so that none displaces another.
    """

    def __init__(
        self,
        keys: Iterable[ApiKey],
        *,
        required: bool = False,
        rate: float = 0.0,
        burst: float = 0.0,
        failures: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = {key.id: key for key in keys}
        self._required = required
        self._rate = rate
        self._burst = burst or rate
        self._failures = failures
        self._of_keys, self._of_addresses, self._of_failures = Buckets(clock), Buckets(clock), Buckets(clock)

    @classmethod
    def of(cls, settings: Settings) -> AccessControl:
        """Return the access control that the settings describe.

        Raises
        ------
        SettingsError
            A key cannot be read, or keys are required and there is none.
        """
        keys = parse_keys(settings.access.api_keys.get_secret_value())
        if settings.access.require_keys and not keys:
            raise SettingsError("FRAUD_REQUIRE_KEYS is on and FRAUD_API_KEYS has no key; `fraud keys create` makes one")
        return cls(
            keys,
            required=settings.access.require_keys,
            rate=settings.access.rate_limit_per_s,
            burst=settings.access.rate_limit_burst,
            failures=settings.access.failed_keys_per_s,
        )

    def __call__(self, call: RequestHead) -> None:
        """Check one request.

        Raises
        ------
        Unauthenticated
            No key, or an unknown one.
        Forbidden
            The key lacks the scope of the route.
        RateLimited
            The caller is over its rate.
        """
        scope = call.route.scope
        if scope is None:
            return
        presented = presented_key(call.headers)
        if presented is None and not self._required and scope in KEYLESS:
            if self._rate:
                self._of_addresses.take(address_of(call.scope), self._rate, self._burst)
            return
        try:
            key = self.identify(presented)
        except Unauthenticated:
            if self._failures:
                self._of_failures.take(address_of(call.scope), self._failures, FAILURES_AT_ONCE)
            raise
        call.scope["fraud.key_id"] = key.id
        self._limit(key)
        if scope not in key.scopes:
            raise Forbidden(
                f"the key {key.id} has the scope {'+'.join(sorted(key.scopes))}; this path asks for {scope}"
            )

    def identify(self, presented: bytes | None) -> ApiKey:
        """Return the key that was presented, or raise `Unauthenticated`; takes the same time for any wrong secret."""
        if presented is None:
            raise Unauthenticated("no API key arrived; send it as Authorization: Bearer fk_… or as X-API-Key")
        text = presented.decode("latin-1")
        match, digest = _KEY.fullmatch(text), _sha256(text)
        key = self._keys.get(match[1] if match else digest[:8])
        known = hmac.compare_digest(digest, key.sha256 if key else "0" * 64)
        if key is None or not known:
            raise Unauthenticated("this API key is not known here")
        return key

    def _limit(self, key: ApiKey) -> None:
        rate = self._rate if key.rate is None else key.rate
        if rate:
            burst = key.burst if key.burst is not None else self._burst if rate == self._rate else rate
            self._of_keys.take(key.id, rate, burst)


def address_of(scope: Mapping[str, Any]) -> str:
    """Return the address that is counted as one caller: an IPv4 address, or the /64 network of an IPv6 address."""
    client = scope.get("client")
    host = str(client[0])[:MAX_ADDRESS_LENGTH] if client else "unknown"
    if ":" not in host:
        return host
    try:
        return str(IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host


def presented_key(headers: Mapping[bytes, bytes]) -> bytes | None:
    """Return the key in a request's headers; their names are in lower case."""
    authorization = headers.get(b"authorization")
    if authorization is not None:
        kind, _, value = authorization.partition(b" ")
        return value.strip() if kind.lower() == b"bearer" else b""
    return headers.get(b"x-api-key")


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _positive(text: str, identity: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise SettingsError(f"API key {identity}: a rate or burst of {text} is not a number above zero")
    return value
