"""The shared hot store: states and recent decisions in one Redis.

One round trip reads all that a batch needs, one writes all it changes. The write is a script that Redis
runs as one step: it writes only if no decision of the batch is there yet and every state still is the one
that was read; otherwise it answers with what is there now, and the change is made again on top of that.

Several keys are changed in one step, so all of them live on one server: no Redis Cluster.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from itertools import count
from typing import Any, TypeVar, cast

import msgspec
import redis.asyncio
import redis.exceptions
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterCrossSlotError,
    NoPermissionError,
)
from redis.retry import Retry

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest, SettingsError, StoreDown, StoreError
from fraud.features.featurizer import Records
from fraud.history.encoding import decode, encode
from fraud.history.profile import Profile
from fraud.history.state import CUSTOMER
from fraud.stores.protocol import Recalled, Recorded, States, StoreHealth, StoreStats
from fraud.stores.redis_labels import (
    PREFIX,
    STAMP_BYTES,
    RedisLabels,
    customer_key,
    frauds_of,
    merchant_key,
    migrate,
    stamped,
    state_of,
)
from fraud.stores.states import Blobs, Change, Written, histories_of
from fraud.stores.urls import checked, scheme_of

UNRECORDED = f"{PREFIX}unrecorded"
"""A hash of the decisions made while the store of record was off, by their keys."""
HELD_AT_ONCE = 200
# KEYS: the n decisions that must be new, then the states.
# ARGV: n, seconds a mark lives, seconds a state lives, the n marks, the stamps read, the states to write.
RECORD = """
local n, mark_s, state_s = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local states = #KEYS - n
local current = true
for i = 1, n do
  current = current and redis.call('EXISTS', KEYS[i]) == 0
end
for i = 1, states do
  current = current and redis.call('GETRANGE', KEYS[n + i], 0, 7) == ARGV[3 + n + i]
end
if not current then
  return redis.call('MGET', unpack(KEYS))
end
for i = 1, n do
  redis.call('SET', KEYS[i], ARGV[3 + i], 'EX', mark_s)
end
for i = 1, states do
  redis.call('SET', KEYS[n + i], ARGV[3 + n + states + i], 'EX', state_s)
  redis.call('EXPIRE', 'fraud:1:k:' .. string.sub(KEYS[n + i], 9), state_s)
end
return false
"""

# KEYS and ARGV as above without stamps. A decision on record replaces what stands there; a state is written if it was
# has more updates than the one that is there.
REFRESH = """
local n, mark_s, state_s = tonumber(ARGV[1]), ARGV[2], ARGV[3]
for i = 1, n do
  redis.call('SET', KEYS[i], ARGV[3 + i], 'EX', mark_s)
end
for i = n + 1, #KEYS do
  local header = redis.call('GETRANGE', KEYS[i], 8, 11)
  if header == '' or struct.unpack('>I4', header) < struct.unpack('>I4', string.sub(ARGV[3 + i], 9, 12)) then
    redis.call('SET', KEYS[i], ARGV[3 + i], 'EX', state_s)
  end
end
"""

UNREACHABLE = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError)
PERMANENT = (AuthenticationError, AuthorizationError, NoPermissionError, AskError, ClusterCrossSlotError)
"""A wrong password, a right that lacks, a Redis Cluster: an operator has to change something."""

T = TypeVar("T")
_decode_record = msgspec.msgpack.Decoder(DecisionRecord).decode
_encode_record = msgspec.msgpack.Encoder().encode
_decode_held = msgspec.msgpack.Decoder(tuple[DecisionRecord, bytes]).decode


class RedisStore:
    """The store in Redis; see `fraud.stores.protocol.Store`. Knows no budget: `Resilient` and `Tiered` hold it to one.

    Parameters
    ----------
    url : str
        ``redis://[user:password@]host:port/db``, ``rediss://`` with TLS, or ``unix://path``.
    history_ttl_days : float
        After how many days without news a state is forgotten.
    decision_ttl_days : float
        For how many days a transaction id is recalled, and its label taken.
    """

    name = "redis"

    def __init__(self, url: str, *, history_ttl_days: float = 90.0, decision_ttl_days: float = 7.0) -> None:
        try:
            self._redis = redis.asyncio.Redis.from_url(
                checked(url), protocol=2, retry=Retry(NoBackoff(), 0), retry_on_error=[], socket_connect_timeout=1.0
            )
            self._redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # which reads the options, and connects to nothing
        except (TypeError, ValueError) as error:
            raise SettingsError(f"the store's URL ({scheme_of(url)}://…) has an option that is not known") from error
        self._state_s = int(history_ttl_days * 86_400)
        self._mark_s = int(decision_ttl_days * 86_400)
        self._record_script = self._redis.register_script(RECORD)
        self._refresh_script = self._redis.register_script(REFRESH)
        self._labels = RedisLabels(self._redis, self._state_s, self._mark_s)

    async def open(self) -> None:
        """Bring what is there to this release's schema."""
        await self.ping()
        await self._answered(migrate(self._redis, self._labels))

    async def ping(self) -> None:
        """Write two keys as `record` does: a replica, a server without memory and a cluster answer a plain ping."""
        await self._answered(self._refresh_script(keys=[f"{PREFIX}ping:{i}" for i in "ab"], args=[2, 60, 60, b"", b""]))

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        wanted = [*map(_decision, keys), *map(customer_key, customer_ids), *map(merchant_key, merchant_ids)]
        values: list[Any] = list(await self._answered(self._redis.mget(wanted))) if wanted else []
        n, m = len(keys), len(keys) + len(customer_ids)
        decided = {key: _decode_record(value) for key, value in zip(keys, values[:n], strict=True) if value}
        base = dict(zip(customer_ids, values[n:m], strict=True)), dict(zip(merchant_ids, values[m:], strict=True))
        customers, merchants = ({name: state_of(value) for name, value in some.items()} for some in base)
        histories, unread = histories_of(customer_ids, merchant_ids, customers, merchants)
        return Recalled(decided, histories, base=base, unread=unread)

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        known: dict[str, DecisionRecord] = {}
        customers: Blobs
        merchants: Blobs
        customers, merchants = (recalled and recalled.base) or ({}, {})
        for attempt in count(1):
            fresh = [i for i, d in enumerate(decided) if d.key not in known]
            if not fresh:
                break
            if attempt > 3 and len(fresh) > 1:  # others are at the same states: smaller steps find their turn
                return await self._record_halves(decided, transactions)
            change = None
            if transactions is not None:
                change = Change.of([decided[i] for i in fresh], transactions[fresh])
            marks = {_decision(decided[i].key): _encode_record(decided[i]) for i in fresh}
            written, values = await self._write(marks, change, customers, merchants)
            if values is None:
                return Recorded([known.get(d.key, d) for d in decided], written=written)
            known |= {decided[i].key: _decode_record(v) for i, v in zip(fresh, values, strict=False) if v is not None}
            if change is not None:
                customers, merchants = _read(change, values[len(fresh) :])
        return Recorded([known[d.key] for d in decided])

    async def _record_halves(self, decided: Sequence[DecisionRecord], transactions: Records | None) -> Recorded:
        half = len(decided) // 2
        first = await self.record(decided[:half], None if transactions is None else transactions[:half])
        second = await self.record(decided[half:], None if transactions is None else transactions[half:])
        written = first.written[0] | second.written[0], first.written[1] | second.written[1]
        return Recorded(first.decided + second.decided, written=written)

    async def refresh(self, decided: Sequence[DecisionRecord], customers: Written, merchants: Written) -> None:
        """Write states that a store of record holds, where it has more updates; and decisions that it has on record."""
        marks = {_decision(d.key): _encode_record(d) for d in decided}
        blobs = {customer_key(k): v for k, v in customers.items()} | {merchant_key(k): v for k, v in merchants.items()}
        await self._answered(
            self._refresh_script(
                keys=[*marks, *blobs],
                args=[len(marks), self._mark_s, self._state_s, *marks.values(), *map(stamped, blobs.values())],
            )
        )

    async def hold(self, decided: Sequence[DecisionRecord], transactions: Records | None) -> None:
        """Keep decisions for the store of record, with the updates of the states, until `let_go`."""
        told = [b""] * len(decided) if transactions is None else [t.tobytes() for t in transactions]
        held = {d.key: msgspec.msgpack.encode((d, some)) for d, some in zip(decided, told, strict=True)}
        await self._answered(self._redis.hset(UNRECORDED, mapping=cast(Any, held)))

    async def held(self, cursor: int) -> tuple[int, list[tuple[DecisionRecord, bytes]]]:
        """Return some of the decisions that are held, and the cursor of the next ones, 0 after the last."""
        answer: Any = await self._answered(self._redis.hscan(UNRECORDED, cursor, count=HELD_AT_ONCE))
        cursor, found = answer
        return cursor, [_decode_held(value) for value in found.values()]

    async def let_go(self, keys: Sequence[str]) -> None:
        """Hold decisions no longer: they are on record."""
        await self._answered(self._redis.hdel(UNRECORDED, *keys))

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        recorded = (await self.recall([label.key for label in labels], [], [])).decided
        outcomes: list[LabelOutcome] = []
        for label in labels:  # one at a time: they are few
            record = recorded.get(label.key)
            if record is None:
                outcomes.append("unknown")
            else:
                outcomes.append(await self._answered(self._labels.apply(label, record)))
        return outcomes

    async def labels(self, key: str) -> list[Label]:
        return await self._answered(self._labels.of(key))

    async def find(self, query: DecisionQuery) -> Page:
        raise InvalidRequest(
            "Redis alone finds a decision by its transaction id, for FRAUD_DECISION_TTL_DAYS; for other queries "
            "set FRAUD_STORE to sqlite: or postgresql://…, or FRAUD_COLD_STORE to a postgresql:// behind it"
        )

    async def profile(self, customer_id: str) -> Profile | None:
        value: Any = await self._answered(self._redis.get(customer_key(customer_id)))
        return None if value is None else Profile(customer_id, decode([state_of(value)], CUSTOMER))

    async def reset(self, customer_id: str) -> bool:
        await self._answered(self._redis.delete(frauds_of(customer_key(customer_id))))
        return bool(await self._answered(self._redis.delete(customer_key(customer_id))))

    async def backfill(self, states: States) -> None:
        for key_of, names, records in (
            (customer_key, states.customer_ids, states.customers),
            (merchant_key, states.merchant_ids, states.merchants),
        ):
            for start in range(0, len(names), 1000):
                pipe = self._redis.pipeline(transaction=False)
                for name, record in zip(names[start : start + 1000], records[start : start + 1000], strict=True):
                    pipe.set(key_of(name), stamped(encode(record)), ex=self._state_s)
                    pipe.delete(frauds_of(key_of(name)))
                await self._answered(pipe.execute())
        await self._answered(self._labels.keep(states.frauds))

    async def expire(self, before_ms: int) -> int:
        """Do nothing: Redis forgets by itself."""
        return 0

    def stats(self) -> StoreStats:
        return StoreStats()

    def health(self) -> StoreHealth:
        return StoreHealth()

    async def close(self) -> None:
        await self._redis.aclose()

    async def _write(
        self, marks: Written, change: Change | None, customers: Blobs, merchants: Blobs
    ) -> tuple[tuple[Written, Written], list[bytes | None] | None]:
        """Try to write; return the states written, and what is there instead if they were not."""
        written: tuple[Written, Written] = ({}, {})
        keys: list[str] = []
        stamps: list[bytes] = []
        if change is not None:
            written = change.apply(
                {k: state_of(customers.get(k)) for k in change.customer_ids},
                {k: state_of(merchants.get(k)) for k in change.merchant_ids},
            )
            keys = [*map(customer_key, change.customer_ids), *map(merchant_key, change.merchant_ids)]
            stamps = [(customers.get(k) or b"")[:STAMP_BYTES] for k in change.customer_ids]
            stamps += [(merchants.get(k) or b"")[:STAMP_BYTES] for k in change.merchant_ids]
        blobs = [stamped(blob) for blob in (*written[0].values(), *written[1].values())]
        values = await self._answered(
            self._record_script(
                keys=[*marks, *keys],
                args=[len(marks), self._mark_s, self._state_s, *marks.values(), *stamps, *blobs],
            )
        )
        return written, values

    async def _answered(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except (redis.exceptions.RedisError, OSError) as error:
            raise _translated(error) from error


def _translated(error: Exception) -> StoreError:
    """Return what an error means: a server that refuses is off as one that is gone, whatever its reason.

    Only a key that somebody else gave a value of another kind is a matter of its own batch alone.
    """
    text = str(error)
    if "WRONGTYPE" in text:
        return StoreError(f"redis refused: {text}")
    is_permanent = isinstance(error, PERMANENT) or "Invalid Database" in text or "DB index" in text
    refuses = is_permanent or not isinstance(error, UNREACHABLE) or isinstance(error, BusyLoadingError)
    return StoreDown(f"redis {'refuses' if refuses else 'cannot be reached'}: {text}", is_permanent=is_permanent)


def _decision(key: str) -> str:
    return f"{PREFIX}d:{key}"


def _read(change: Change, values: Sequence[Any]) -> tuple[Blobs, Blobs]:
    n = len(change.customer_ids)
    return dict(zip(change.customer_ids, values[:n], strict=True)), dict(
        zip(change.merchant_ids, values[n:], strict=True)
    )
