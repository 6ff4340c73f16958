"""The durable shared store: profiles, decisions and labels in PostgreSQL.

A batch is recorded in two round trips: lock the states it changes, insert what is new and read; write and
commit. Locks are taken on the ids and in one order, so that the first transaction of a new customer is as
safe as the hundredth and no two workers wait for each other.

The chain of decisions is made behind the answer: see `fraud.stores.postgres_linker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.marks import Writer, void_mark
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.errors import InvalidRequest, StoreError
from fraud.features.featurizer import Records
from fraud.history.encoding import decode, encode
from fraud.history.profile import Profile
from fraud.history.state import CUSTOMER
from fraud.stores.postgres_connection import PostgresConnection, check_conninfo, connect, fetch_all, pipelined
from fraud.stores.postgres_labels import (
    Connection,
    add_search_rows,
    apply_label,
    forget_frauds_of,
    keep_frauds,
    labels_of,
)
from fraud.stores.postgres_linker import Linker
from fraud.stores.protocol import Recalled, Recorded, States, StoreHealth, StoreStats, distinct
from fraud.stores.rows import decode_record, encode_record, row_key
from fraud.stores.search import SEARCH_S, TOO_WIDE, conditions, page_of
from fraud.stores.states import Blobs, Change, Written, histories_of

MERCHANT_LOCKS = 0x5F3759DF
LABEL_LOCKS = 0x4C41424C
LOCK = "SELECT pg_advisory_xact_lock(k) FROM (SELECT unnest(%b::bigint[]) AS k ORDER BY 1) AS locks"
DECIDE = """
INSERT INTO fraud.decisions (key, record, mark) SELECT * FROM unnest(%b::text[], %b::bytea[], %b::bytea[])
ON CONFLICT (key) DO NOTHING RETURNING key, id
"""
DECIDED = "SELECT key, record FROM fraud.decisions WHERE key = ANY (%b::text[])"
READ = {
    table: f"SELECT id, state FROM fraud.{table} WHERE key = ANY (%b::bigint[])" for table in ("customers", "merchants")
}
WRITE = {
    table: f"""
    INSERT INTO fraud.{table} (key, id, state) SELECT * FROM unnest(%b::bigint[], %b::text[], %b::bytea[])
    ON CONFLICT (key) DO UPDATE SET state = excluded.state, changed_at = now()
    """
    for table in ("customers", "merchants")
}


class PostgresStore:
    """The store in PostgreSQL; see `fraud.stores.protocol.Store`. Knows no budget: `Resilient` holds it to one.

    Parameters
    ----------
    url : str
        ``postgresql://user@host/db``; its user may create the schema ``fraud``, or finds it there.
    durable : bool
        Whether a commit waits for the server's disk.
    audit_key : bytes
        Key of the decisions' chain; see `fraud.decisions.chain`.
    """

    name = "postgresql"

    def __init__(self, url: str, *, durable: bool = True, audit_key: bytes = b"") -> None:
        self._audit_key = audit_key
        check_conninfo(url)
        self._durable = durable
        self._writer = Writer(audit_key)
        self._linker = Linker(PostgresConnection(lambda: connect(url, audit_key)), self._writer, audit_key)
        self._reading = PostgresConnection(lambda: connect(url, audit_key))
        self._searching = PostgresConnection(lambda: connect(url, audit_key))
        self._writing = PostgresConnection(lambda: connect(url, audit_key))

    async def open(self) -> None:
        await self.ping()
        self._linker.link_soon()  # what a worker that died has left

    async def ping(self) -> None:
        """Write as `record` does, and take it back: a server that is read-only or short of a right answers a read."""
        await self._reading.use(_select_one)
        await self._writing.use(_write_nothing)

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        async def read(db: Connection) -> tuple[list[Any], Blobs, Blobs]:
            async with pipelined(db):
                decided = await db.execute(DECIDED, [list(keys)], binary=True) if keys else None
                customers = await _ask(db, "customers", customer_ids)
                merchants = await _ask(db, "merchants", merchant_ids)
            return await decided.fetchall() if decided else [], await _got(customers), await _got(merchants)

        rows, customers, merchants = await self._reading.use(read)
        histories, unread = histories_of(customer_ids, merchant_ids, customers, merchants)
        return Recalled({key: decode_record(record) for key, record in rows}, histories, unread=unread)

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        in_order = sorted(range(len(decided)), key=lambda i: decided[i].key)  # two workers, the same ids: no deadlock
        keys = [decided[i].key for i in in_order]
        records = [encode_record(decided[i]) for i in in_order]
        whole = None if transactions is None else Change.of(decided, transactions)

        async def write(db: Connection) -> Recorded:  # one at a time: a writer's numbers are committed in order
            marks = self._writer.marks(zip(keys, records, strict=True))
            async with pipelined(db):
                await self._begin(db)
                if whole is not None:
                    await _lock(db, whole.customer_ids, whole.merchant_ids)
                inserted = await db.execute(DECIDE, [keys, records, marks], binary=True)
                states = await _ask_states(db, whole) if whole is not None else None
            new = dict(await inserted.fetchall())
            known: dict[str, DecisionRecord] = {}
            if len(new) < len(keys):
                cursor = await db.execute(DECIDED, [[key for key in keys if key not in new]], binary=True)
                known = {key: decode_record(record) for key, record in await cursor.fetchall()}
                lost = [key for key in keys if key not in new and key not in known]
                if lost:
                    raise StoreError(f"postgresql neither recorded {len(lost)} decisions nor has them on record")
            written: tuple[Written, Written] = ({}, {})
            fresh = [i for i, d in enumerate(decided) if d.key in new]
            async with pipelined(db):
                await add_search_rows(db, [(new[decided[i].key], decided[i], 0) for i in fresh])
                if fresh and transactions is not None and states is not None:
                    change = Change.of([decided[i] for i in fresh], transactions[fresh])
                    written = change.apply(await _got(states[0]), await _got(states[1]))
                    await _write(db, written)
                if known:
                    voids = [
                        void_mark(self._writer.name, self._writer.number + i, self._audit_key)
                        for i, key in enumerate(keys, 1)
                        if key in known
                    ]
                    await db.execute("INSERT INTO fraud.voids SELECT unnest(%b::bytea[])", [voids])
                await db.execute("COMMIT")
            self._writer.number += len(keys)
            return Recorded([known.get(d.key, d) for d in decided], written=written)

        try:
            recorded = await self._writing.use(write)
        except BaseException:  # a caller that waits no longer, as well: the commit may have been done
            self._writer.renew()
            raise
        self._linker.link_soon()
        return recorded

    async def _begin(self, db: Connection) -> None:
        await db.execute("BEGIN")
        await self._relax(db)

    async def _relax(self, db: Connection) -> None:
        if not self._durable:
            await db.execute("SET LOCAL synchronous_commit = off")

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        return (await self.tell(labels))[0]

    async def tell(self, labels: Sequence[Label]) -> tuple[list[LabelOutcome], tuple[Written, Written]]:
        """Add labels, and return the states that changed as well."""

        async def write(db: Connection) -> tuple[list[LabelOutcome], tuple[Written, Written]]:
            cursor = await db.execute(DECIDED, [[label.key for label in labels]], binary=True)
            recorded = {key: decode_record(record) for key, record in await cursor.fetchall()}
            written: tuple[Written, Written] = ({}, {})
            if not recorded:
                return ["unknown"] * len(labels), written
            async with db.transaction():
                await self._relax(db)
                await _lock(
                    db,
                    distinct(record.customer_id or None for record in recorded.values()),
                    distinct(record.merchant_id for record in recorded.values()),
                    list(recorded),
                )
                outcomes: list[LabelOutcome] = []
                for label in labels:
                    record = recorded.get(label.key)
                    if record is None:
                        outcomes.append("unknown")
                        continue
                    outcome, states = await apply_label(db, label, record, self._audit_key)
                    outcomes.append(outcome)
                    for kept, some in zip(written, states, strict=True):
                        kept |= some
            return outcomes, written

        return await self._writing.use(write)

    async def labels(self, key: str) -> list[Label]:
        return await self._reading.use(lambda db: labels_of(db, key))

    async def blobs(self, customer_ids: list[str], merchant_ids: list[str]) -> tuple[Blobs, Blobs]:
        """Return the encoded states of those that have one."""

        async def read(db: Connection) -> tuple[Blobs, Blobs]:
            return await _got(await _ask(db, "customers", customer_ids)), await _got(
                await _ask(db, "merchants", merchant_ids)
            )

        return await self._reading.use(read)

    async def find(self, query: DecisionQuery) -> Page:
        where, values = conditions(query, "id", "fraud.models", "%b")
        statement = (
            "SELECT s.id, s.time_ms, s.label, d.record FROM fraud.search AS s JOIN fraud.decisions AS d ON d.id = s.id "
            f"WHERE {where} ORDER BY s.time_ms DESC, s.id DESC LIMIT %b"
        )

        async def read(db: Connection) -> list[Any] | None:
            try:
                async with db.transaction():
                    await db.execute(f"SET LOCAL statement_timeout = {round(SEARCH_S * 1000)}".encode())
                    return await fetch_all(db, statement, [*values, query.limit + 1])
            except psycopg.errors.QueryCanceled:
                return None

        rows = await self._searching.use(read)
        if rows is None:
            raise InvalidRequest(TOO_WIDE)
        return page_of(rows, query)

    async def profile(self, customer_id: str) -> Profile | None:
        async def read(db: Connection) -> Blobs:
            return await _got(await _ask(db, "customers", [customer_id]))

        blob = (await self._reading.use(read)).get(customer_id)
        return None if blob is None else Profile(customer_id, decode([blob], CUSTOMER))

    async def reset(self, customer_id: str) -> bool:
        async def write(db: Connection) -> bool:
            async with db.transaction():
                await _lock(db, [customer_id], [])
                await forget_frauds_of(db, "customer", [row_key(customer_id)])
                cursor = await db.execute("DELETE FROM fraud.customers WHERE key = %b", [row_key(customer_id)])
            return cursor.rowcount > 0

        return await self._writing.use(write)

    async def backfill(self, states: States) -> None:
        async def write(db: Connection) -> None:
            for table, names, records in (
                ("customers", states.customer_ids, states.customers),
                ("merchants", states.merchant_ids, states.merchants),
            ):
                for start in range(0, len(names), 5000):
                    some = names[start : start + 5000]
                    blobs = [encode(record) for record in records[start : start + 5000]]
                    await db.execute(WRITE[table], [[row_key(name) for name in some], list(some), blobs])
                    await forget_frauds_of(db, table[:-1], [row_key(name) for name in some])
            for start in range(0, len(states.frauds), 5000):
                await keep_frauds(db, states.frauds[start : start + 5000])

        await self._writing.use(write)

    async def expire(self, before_ms: int) -> int:
        forgotten = 0
        for table in ("customers", "merchants"):
            while n := await self._writing.use(lambda db: _expire(db, table, before_ms)):  # noqa: B023
                forgotten += n
        return forgotten

    def stats(self) -> StoreStats:
        return StoreStats()

    def health(self) -> StoreHealth:
        return StoreHealth()

    async def link(self) -> int:
        """See `Linker.link`."""
        return await self._linker.link()

    async def close(self) -> None:
        await self._linker.close()
        await self._reading.close()
        await self._searching.close()
        await self._writing.close()


async def _expire(db: Connection, table: str, before_ms: int) -> int:
    """Delete some states that have not changed since; those in use are left for the next time."""
    async with db.transaction():
        cursor = await db.execute(
            f"""
            DELETE FROM fraud.{table} WHERE key IN (
                SELECT key FROM fraud.{table} WHERE changed_at < to_timestamp(%b / 1000.0)
                LIMIT 1000 FOR UPDATE SKIP LOCKED
            ) RETURNING key
            """,
            [before_ms],
        )
        keys = [key for (key,) in await cursor.fetchall()]
        await forget_frauds_of(db, table[:-1], keys)
    return len(keys)


async def _select_one(db: Connection) -> None:
    await db.execute("SELECT 1")


async def _write_nothing(db: Connection) -> None:
    async with db.transaction(force_rollback=True):
        await db.execute(WRITE["customers"], [[0], [""], [b""]])


async def _lock(
    db: Connection, customer_ids: Sequence[str], merchant_ids: Sequence[str], keys: Sequence[str] = ()
) -> None:
    locks = [row_key(name) for name in customer_ids]
    locks += [row_key(name) ^ MERCHANT_LOCKS for name in merchant_ids]
    locks += [row_key(key) ^ LABEL_LOCKS for key in keys]
    await db.execute(LOCK, [locks])


async def _ask(db: Connection, table: str, names: list[str]) -> psycopg.AsyncCursor[Any] | None:
    if not names:
        return None
    return await db.execute(READ[table], [[row_key(name) for name in names]], binary=True)


async def _ask_states(db: Connection, change: Change) -> list[psycopg.AsyncCursor[Any] | None]:
    return [await _ask(db, "customers", change.customer_ids), await _ask(db, "merchants", change.merchant_ids)]


async def _got(cursor: psycopg.AsyncCursor[Any] | None) -> Blobs:
    return {} if cursor is None else dict(await cursor.fetchall())


async def _write(db: Connection, written: tuple[Written, Written]) -> None:
    for table, blobs in zip(("customers", "merchants"), written, strict=True):
        if blobs:
            await db.execute(WRITE[table], [[row_key(name) for name in blobs], list(blobs), list(blobs.values())])
