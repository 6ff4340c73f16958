"""Labels in the Redis store, the frauds that its states contain, and the steps that bring an older Redis to them."""

from __future__ import annotations

import os
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
import redis.asyncio

from fraud.decisions.labels import Label, LabelOutcome, known_since
from fraud.decisions.record import DecisionRecord
from fraud.history.encoding import updates_of
from fraud.history.state import CUSTOMER, MERCHANT
from fraud.stores.labelling import Fraud, effect_of, labelled, needs_others
from fraud.stores.migrations import first_label, steps_after
from fraud.stores.protocol import KnownFraud
from fraud.stores.rows import decode_record

PREFIX = "fraud:1:"
SCHEMA = "fraud:schema"
"""Holds the number of the schema; a Redis without it is at that of the first release, or empty."""
MIGRATION_LOCK = "fraud:migrating"
STAMP_BYTES = 8
HEADER = struct.Struct(">8sI")
"""Before a state: a stamp that no other write has, and the number of updates of the state."""

# KEYS: a decision's labels, its customer's and its merchant's state, and the frauds of each.
# ARGV: the labels and the stamps that were read, seconds that labels and states live, the labels and the states to
# write, the field of the fraud in the lists, and the fraud or nothing.
LABEL = """
local n = (#KEYS - 1) / 2
local labels = redis.call('GET', KEYS[1])
if (labels or '') ~= ARGV[1] then
  return 0
end
for i = 1, n do
  if redis.call('GETRANGE', KEYS[1 + i], 0, 7) ~= ARGV[1 + i] then
    return 0
  end
end
local mark_s, state_s, field, fraud = ARGV[n + 2], ARGV[n + 3], ARGV[2 * n + 5], ARGV[2 * n + 6]
redis.call('SET', KEYS[1], ARGV[n + 4], 'EX', mark_s)
for i = 1, n do
  redis.call('SET', KEYS[1 + i], ARGV[n + 4 + i], 'EX', state_s)
  if fraud == '' then
    redis.call('HDEL', KEYS[1 + n + i], field)
  else
    redis.call('HSET', KEYS[1 + n + i], field, fraud)
    redis.call('EXPIRE', KEYS[1 + n + i], state_s)
  end
end
return 1
"""

_encode = msgspec.msgpack.Encoder().encode
_decode_labels = msgspec.msgpack.Decoder(list[Label]).decode
_decode_fraud = msgspec.msgpack.Decoder(tuple[int, float, int]).decode


class RedisLabels:
    """The labels of the decisions in one Redis.

    Parameters
    ----------
    client : Redis
    state_s, label_s : int
        How long states and labels live, seconds.
    """

    def __init__(self, client: redis.asyncio.Redis, state_s: int, label_s: int) -> None:
        self._redis = client
        self._state_s = state_s
        self._label_s = label_s
        self._script = client.register_script(LABEL)

    async def of(self, key: str) -> list[Label]:
        """Return the labels of a decision, in the order in which they arrived."""
        blob: Any = await self._redis.get(labels_key(key))
        return [] if blob is None else _decode_labels(blob)

    async def apply(self, label: Label, record: DecisionRecord) -> LabelOutcome:
        """Add a label; the states of its customer and its merchant follow the one in effect."""
        owners = [(customer_key(record.customer_id), CUSTOMER)] if record.customer_id else []
        owners += [(merchant_key(record.merchant_id), MERCHANT)] if owners and record.merchant_id else []
        keys = [labels_key(label.key), *(key for key, _ in owners)]
        lists = [frauds_of(key) for key, _ in owners]
        while True:  # until nobody changed a state in between
            blob, *values = await _read(self._redis, keys)
            before = [] if blob is None else _decode_labels(blob)
            since = known_since(before)
            known_ms = None if since is None else max(record.event_time_ms, since)
            effect = effect_of(label, record, before, known_ms)
            if not effect.is_new:
                return effect.outcome
            states = []
            for (_, dtype), of_one, value in zip(owners, lists, values, strict=True):
                state = state_of(value)
                frauds: dict[Any, Any] = {}
                contains = bool(await self._redis.hexists(of_one, label.key)) if effect.before is not None else False
                if contains and needs_others(state, dtype, effect):
                    frauds = await self._redis.hgetall(of_one)
                    frauds.pop(label.key.encode(), None)
                others: list[Fraud] = [_decode_fraud(fraud) for fraud in frauds.values()]
                states.append(stamped(labelled(state, dtype, effect, contains, lambda: others)))  # noqa: B023
            arguments: list[bytes | str | int] = [
                blob or b"",
                *((value or b"")[:STAMP_BYTES] for value in values),
                *(self._label_s, self._state_s, _encode([*before, label])),
                *states,
                *(label.key, b"" if effect.after is None else _encode(effect.after)),
            ]
            if await self._script(keys=[*keys, *lists], args=arguments):
                return effect.outcome

    async def keep(self, frauds: Iterable[KnownFraud]) -> None:
        """Keep the frauds that the states of a backfill contain, so that they can be withdrawn."""
        pipe = self._redis.pipeline(transaction=False)
        for i, (event, amount, known, customer, merchant) in enumerate(frauds):
            for key in (customer_key(customer), *(() if merchant is None else (merchant_key(merchant),))):
                pipe.hset(frauds_of(key), f"\x1f{i}", _encode((event, amount, known)))
                pipe.expire(frauds_of(key), self._state_s)
        await pipe.execute()

    async def adopt(self, label: Label, record: DecisionRecord) -> None:
        """Write the one label that the first release kept of a decision, whose states contain it."""
        fraud = _encode((record.event_time_ms, record.history_amount, max(record.event_time_ms, label.label_time_ms)))
        pipe = self._redis.pipeline(transaction=True)
        pipe.set(labels_key(label.key), _encode([label]), keepttl=True)
        for key in (
            customer_key(record.customer_id),
            *(() if record.merchant_id is None else (merchant_key(record.merchant_id),)),
        ):
            pipe.hset(frauds_of(key), label.key, fraud)
            pipe.expire(frauds_of(key), self._state_s)
        await pipe.execute()


async def _labels(client: redis.asyncio.Redis, labels: RedisLabels) -> None:
    """Turn the time that the first release kept of a fraud into a label; twice changes nothing."""
    async for name in client.scan_iter(f"{PREFIX}f:*", count=1000):
        key = name.decode().removeprefix(f"{PREFIX}f:")
        value, decision = await _read(client, [name.decode(), f"{PREFIX}d:{key}"])
        if value is not None and value.isdigit() and decision is not None:
            record = decode_record(decision)
            await labels.adopt(first_label(record, int(value)), record)


async def _first(client: redis.asyncio.Redis, labels: RedisLabels) -> None:
    """The schema of the first release, which wrote no number."""


STEPS: tuple[Callable[[redis.asyncio.Redis, RedisLabels], Awaitable[None]], ...] = (_first, _labels)


async def migrate(client: redis.asyncio.Redis, labels: RedisLabels) -> None:
    """Bring a Redis to this release's schema, under a lock.

    Raises
    ------
    StoreError
        A later release wrote it.
    """
    found: Any = await client.get(SCHEMA)
    if not steps_after(int(found or 0), STEPS, "Redis"):
        return
    async with client.lock(MIGRATION_LOCK, timeout=60, blocking_timeout=60):
        found = await client.get(SCHEMA)
        for number, step in steps_after(int(found or 0), STEPS, "Redis"):
            await step(client, labels)
            await client.set(SCHEMA, number)


async def _read(client: redis.asyncio.Redis, keys: list[str]) -> list[bytes | None]:
    values: Any = await client.mget(keys)
    return list(values)


def customer_key(name: str) -> str:
    return f"{PREFIX}c:{name}"


def merchant_key(name: str) -> str:
    return f"{PREFIX}m:{name}"


def labels_key(key: str) -> str:
    return f"{PREFIX}f:{key}"


def frauds_of(state_key: str) -> str:
    """Return the key of the frauds that a state contains."""
    return f"{PREFIX}k:{state_key.removeprefix(PREFIX)}"


def stamped(blob: bytes) -> bytes:
    """Return an encoded state as Redis holds it."""
    return HEADER.pack(os.urandom(STAMP_BYTES), updates_of(blob)) + blob


def state_of(value: bytes | None) -> bytes | None:
    """Return the encoded state in what Redis holds."""
    return None if value is None else value[HEADER.size :]
