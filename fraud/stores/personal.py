"""Pseudonymization: a wrapper around a store that replaces personal ids by keyed hashes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from hashlib import blake2b

import msgspec

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Histories, Records
from fraud.history.profile import Profile
from fraud.stores.protocol import KnownFraud, Recalled, Recorded, States, Store, StoreHealth, StoreStats

_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def keyed_hash(key: str) -> Callable[[str], str]:
    """Return what gives the keyed hash of an id: 32 hexadecimal digits."""
    digest = blake2b(key.encode()).digest()
    return lambda text: blake2b(text.encode(), digest_size=16, key=digest).hexdigest()


def hash_of(fields: Collection[str], key: str) -> Callable[[str], str] | None:
    """Return the hash of ids where there are personal fields, else None."""
    return keyed_hash(key) if fields else None


class Pseudonymous:
    """Replaces ids by hashes on the way to a store, and hashes by ids on the way back.

    Features do not change: they are computed from the ids that the caller sent. A customer has one history under one
    hash; with another key every customer is new.

    Parameters
    ----------
    store : Store
    fields : collection of str
        ``customer_id``, ``merchant_id``, and further fields of the transaction.
    key : str
        Secret; without one, a reader of the store could test guessed ids.
    """

    def __init__(self, store: Store, fields: Collection[str], key: str) -> None:
        self.store = store
        self._fields = frozenset(fields)
        self._customers = "customer_id" in fields
        self._merchants = "merchant_id" in fields
        self.hashed = keyed_hash(key)

    async def open(self) -> None:
        await self.store.open()

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        recalled = await self.store.recall(keys, self._of_customers(customer_ids), self._of_merchants(merchant_ids))
        histories = recalled.histories
        named = Histories(customer_ids, merchant_ids, histories.customers, histories.merchants)
        return replace(recalled, histories=named)

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        known = {} if recalled is None else recalled.decided  # which has the hashes already
        hidden = [d if known.get(d.key) is d else self._hide(d) for d in decided]
        given = {id(h): d for h, d in zip(hidden, decided, strict=True)}
        recorded = await self.store.record(hidden, transactions, recalled)
        return replace(recorded, decided=[given.get(id(d), d) for d in recorded.decided])

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return await self.store.apply_labels(labels)

    async def labels(self, key: str) -> list[Label]:
        return await self.store.labels(key)

    async def find(self, query: DecisionQuery) -> Page:
        customer, merchant = query.customer_id, query.merchant_id
        return await self.store.find(
            replace(
                query,
                customer_id=customer if customer is None else self._of_customers([customer])[0],
                merchant_id=merchant if merchant is None else self._of_merchants([merchant])[0],
            )
        )

    async def profile(self, customer_id: str) -> Profile | None:
        profile = await self.store.profile(self._of_customers([customer_id])[0])
        return None if profile is None else replace(profile, customer_id=customer_id)

    async def reset(self, customer_id: str) -> bool:
        return await self.store.reset(self._of_customers([customer_id])[0])

    async def backfill(self, states: States) -> None:
        await self.store.backfill(
            replace(
                states,
                customer_ids=self._of_customers(states.customer_ids),
                merchant_ids=self._of_merchants(states.merchant_ids),
                frauds=[self._hide_fraud(fraud) for fraud in states.frauds],
            )
        )

    async def expire(self, before_ms: int) -> int:
        return await self.store.expire(before_ms)

    def stats(self) -> StoreStats:
        return self.store.stats()

    def health(self) -> StoreHealth:
        return self.store.health()

    async def close(self) -> None:
        await self.store.close()

    def _hide(self, decided: DecisionRecord) -> DecisionRecord:
        merchant = decided.merchant_id
        return msgspec.structs.replace(
            decided,
            customer_id=self._of_customers([decided.customer_id])[0] if decided.customer_id else "",
            merchant_id=merchant if merchant is None else self._of_merchants([merchant])[0],
            transaction=self._hide_fields(decided.transaction),
        )

    def _hide_fields(self, transaction: bytes) -> bytes:
        """Return the JSON of a transaction with its personal fields replaced by hashes."""
        if not transaction:
            return transaction
        said = _decode_fields(transaction)
        for name in self._fields & said.keys():
            value = bytes(said[name])
            text = msgspec.json.decode(value) if value.startswith(b'"') else value.decode()
            said[name] = msgspec.Raw(msgspec.json.encode(self.hashed(text)))
        return msgspec.json.encode(said)

    def _hide_fraud(self, fraud: KnownFraud) -> KnownFraud:
        merchant = fraud.merchant_id
        return fraud._replace(
            customer_id=self._of_customers([fraud.customer_id])[0],
            merchant_id=merchant if merchant is None else self._of_merchants([merchant])[0],
        )

    def _of_customers(self, ids: Sequence[str]) -> list[str]:
        return [self.hashed(name) for name in ids] if self._customers else list(ids)

    def _of_merchants(self, ids: Sequence[str]) -> list[str]:
        return [self.hashed(name) for name in ids] if self._merchants else list(ids)
