"""The durable shared store: profiles, decisions and labels in PostgreSQL.

A batch is recorded in two round trips: lock the states it changes, insert what is new and read; write and
commit. Locks are taken on the ids and in one order, so that the first transaction of a new customer is as
safe as the hundredth and no two workers wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import psycopg

from fraud.errors import StoreDown, StoreError
from fraud.events import Decided
from fraud.features import Histories, Records
from fraud.history import CUSTOMER, MERCHANT, decode, encode
from fraud.stores import Figures, Fraud, Profile, Recalled, Recorded, States, Told
from fraud.stores.states import Blobs, Change, Written, row_key

MIGRATIONS = (
    """
    CREATE TABLE fraud.customers (
        key bigint PRIMARY KEY, id text NOT NULL, state bytea NOT NULL, changed_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE fraud.merchants (LIKE fraud.customers INCLUDING ALL);
    CREATE TABLE fraud.decisions (seq bigserial PRIMARY KEY, key text NOT NULL UNIQUE, record bytea NOT NULL);
    CREATE TABLE fraud.frauds (key text PRIMARY KEY, label_time_ms bigint NOT NULL);
    ALTER TABLE fraud.customers ALTER state SET STORAGE EXTERNAL;
    ALTER TABLE fraud.merchants ALTER state SET STORAGE EXTERNAL;
    """,
)
"""Each brings the schema to the next version; one that has been released is never changed."""

MERCHANT_LOCKS = 0x5F3759DF
SCHEMA_LOCK = 0x46524155
LOCK = "SELECT pg_advisory_xact_lock(k) FROM (SELECT unnest(%b::bigint[]) AS k ORDER BY 1) AS locks"
DECIDE = """
INSERT INTO fraud.decisions (key, record) SELECT * FROM unnest(%b::text[], %b::bytea[])
ON CONFLICT (key) DO NOTHING RETURNING key
"""
DECIDED = "SELECT key, record FROM fraud.decisions WHERE key = ANY (%b::text[])"
TELL = """
INSERT INTO fraud.frauds SELECT * FROM unnest(%b::text[], %b::bigint[])
ON CONFLICT (key) DO NOTHING RETURNING key
"""
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

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]
_decode_record = msgspec.msgpack.Decoder(Decided).decode
_encode_record = msgspec.msgpack.Encoder().encode


class PostgresStore:
    """The store in PostgreSQL; see `fraud.stores.Store`. Knows no budget: `Resilient` holds it to one.

    Parameters
    ----------
    url : str
        ``postgresql://user@host/db``; its user may create the schema ``fraud``, or finds it there.
    durable : bool
        Whether a commit waits for the server's disk.
    """

    name = "postgresql"

    def __init__(self, url: str, *, durable: bool = True) -> None:
        self._url = url
        self._options = "" if durable else "-c synchronous_commit=off"
        self._reading = _Line(self._connect)
        self._writing = _Line(self._connect)

    async def open(self) -> None:
        await self.ping()

    async def ping(self) -> None:
        for line in (self._reading, self._writing):
            await line.use(_select_one)

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        async def read(db: Connection) -> tuple[list[Any], Blobs, Blobs]:
            async with db.pipeline():
                decided = await db.execute(DECIDED, [list(keys)], binary=True) if keys else None
                customers = await _ask(db, "customers", customer_ids)
                merchants = await _ask(db, "merchants", merchant_ids)
            return await decided.fetchall() if decided else [], await _got(customers), await _got(merchants)

        rows, customers, merchants = await self._reading.use(read)
        histories = Histories(
            customer_ids,
            merchant_ids,
            decode([customers.get(name) for name in customer_ids], CUSTOMER),
            decode([merchants.get(name) for name in merchant_ids], MERCHANT),
        )
        return Recalled({key: _decode_record(record) for key, record in rows}, histories)

    async def record(
        self, decided: Sequence[Decided], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        in_order = sorted(range(len(decided)), key=lambda i: decided[i].key)  # two workers, the same ids: no deadlock
        keys = [decided[i].key for i in in_order]
        records = [_encode_record(decided[i]) for i in in_order]
        whole = None if transactions is None else Change.of_transactions(decided, transactions)

        async def write(db: Connection) -> Recorded:
            async with db.pipeline():
                await db.execute("BEGIN")
                if whole is not None:
                    await _lock(db, whole)
                inserted = await db.execute(DECIDE, [keys, records], binary=True)
                states = await _ask_states(db, whole) if whole is not None else None
            new = {key for (key,) in await inserted.fetchall()}
            known: dict[str, Decided] = {}
            if len(new) < len(keys):
                cursor = await db.execute(DECIDED, [[key for key in keys if key not in new]], binary=True)
                known = {key: _decode_record(record) for key, record in await cursor.fetchall()}
            written: tuple[Written, Written] = ({}, {})
            fresh = [i for i, d in enumerate(decided) if d.key in new]
            async with db.pipeline():
                if fresh and transactions is not None and states is not None:
                    change = Change.of_transactions([decided[i] for i in fresh], transactions[fresh])
                    written = change.apply(await _got(states[0]), await _got(states[1]))
                    await _write(db, written)
                await db.execute("COMMIT")
            return Recorded([known.get(d.key, d) for d in decided], written=written)

        return await self._writing.use(write)

    async def tell_frauds(self, frauds: Sequence[Fraud]) -> list[Told]:
        return (await self.tell(frauds))[0]

    async def tell(self, frauds: Sequence[Fraud]) -> tuple[list[Told], tuple[Written, Written]]:
        """Tell the states of frauds, and return the states that changed as well."""

        async def write(db: Connection) -> tuple[list[Told], tuple[Written, Written]]:
            cursor = await db.execute(DECIDED, [[fraud.transaction_id for fraud in frauds]], binary=True)
            recorded = {key: _decode_record(record) for key, record in await cursor.fetchall()}
            at = {f.transaction_id: f.label_time_ms for f in sorted(frauds, key=lambda f: f.transaction_id)}
            ids = [key for key in at if key in recorded]
            if not ids:
                return ["unknown"] * len(frauds), ({}, {})
            async with db.pipeline():
                await db.execute("BEGIN")
                await _lock(db, Change.of_frauds([recorded[i] for i in ids], [at[i] for i in ids]))
                inserted = await db.execute(TELL, [ids, [at[i] for i in ids]], binary=True)
            new = {key for (key,) in await inserted.fetchall()}
            told = [i for i in ids if i in new]
            written: tuple[Written, Written] = ({}, {})
            if told:
                change = Change.of_frauds([recorded[i] for i in told], [at[i] for i in told])
                async with db.pipeline():
                    states = await _ask_states(db, change)
                written = change.apply(await _got(states[0]), await _got(states[1]))
            async with db.pipeline():
                await _write(db, written)
                await db.execute("COMMIT")
            outcomes: list[Told] = []
            for fraud in frauds:
                key = fraud.transaction_id
                outcomes.append("unknown" if key not in recorded else "told" if key in new else "known")
                new.discard(key)  # the same one twice in a call is told once
            return outcomes, written

        return await self._writing.use(write)

    async def profile(self, customer_id: str) -> Profile | None:
        async def read(db: Connection) -> Blobs:
            return await _got(await _ask(db, "customers", [customer_id]))

        blob = (await self._reading.use(read)).get(customer_id)
        return None if blob is None else Profile(customer_id, decode([blob], CUSTOMER))

    async def reset(self, customer_id: str) -> bool:
        async def write(db: Connection) -> bool:
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

        await self._writing.use(write)

    async def expire(self, before_ms: int) -> int:
        forgotten = 0
        for table in ("customers", "merchants"):
            while n := await self._writing.use(lambda db: _expire(db, table, before_ms)):  # noqa: B023
                forgotten += n
        return forgotten

    def figures(self) -> Figures:
        return Figures()

    async def close(self) -> None:
        await self._reading.close()
        await self._writing.close()

    async def _connect(self) -> Connection:
        db = await psycopg.AsyncConnection.connect(
            self._url,
            autocommit=True,
            connect_timeout=2,
            tcp_user_timeout=5000,
            application_name="fraud-bento",
            options=self._options,
        )
        await _migrate(db)
        return db


class _Line:
    """One connection, made when it is needed and made anew after a failure, used by one at a time."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._db: Connection | None = None
        self._turn = asyncio.Lock()

    async def use(self, job: Callable[[Connection], Awaitable[T]]) -> T:
        async with self._turn:
            db = self._db
            try:
                if db is None or db.closed:
                    db = self._db = await self._connect()
                return await job(db)
            except BaseException as error:
                self._db = None  # whatever transaction it was in ends with it
                if db is not None:
                    await db.close()
                if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError, OSError)):
                    raise StoreDown(f"postgresql cannot be reached: {error}") from error
                if isinstance(error, psycopg.Error):
                    raise StoreError(f"postgresql refused: {error}") from error
                raise

    async def close(self) -> None:
        if self._db is not None:
            await self._db.close()


async def _migrate(db: Connection) -> None:
    async with db.transaction():
        await db.execute("SELECT pg_advisory_xact_lock(%s)", [SCHEMA_LOCK])
        cursor = await db.execute("SELECT to_regclass('fraud.migrations')")
        (exists,) = await cursor.fetchone() or (None,)
        version = 0
        if exists is None:
            await db.execute("CREATE SCHEMA IF NOT EXISTS fraud")
            await db.execute(
                "CREATE TABLE fraud.migrations (version int PRIMARY KEY, applied_at timestamptz DEFAULT now())"
            )
        else:
            cursor = await db.execute("SELECT coalesce(max(version), 0) FROM fraud.migrations")
            (version,) = await cursor.fetchone() or (0,)
        if version > len(MIGRATIONS):
            raise StoreError(f"the database has schema {version}; this release knows {len(MIGRATIONS)}")
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            await db.execute(migration.encode())
            await db.execute("INSERT INTO fraud.migrations (version) VALUES (%s)", [number])


async def _expire(db: Connection, table: str, before_ms: int) -> int:
    """Delete some states that have not changed since; those in use are left for the next time."""
    cursor = await db.execute(
        f"""
        DELETE FROM fraud.{table} WHERE key IN (
            SELECT key FROM fraud.{table} WHERE changed_at < to_timestamp(%b / 1000.0) LIMIT 1000 FOR UPDATE SKIP LOCKED
        )
        """,
        [before_ms],
    )
    return cursor.rowcount


async def _select_one(db: Connection) -> None:
    await db.execute("SELECT 1")


async def _lock(db: Connection, change: Change) -> None:
    locks = [row_key(name) for name in change.customer_ids]
    locks += [row_key(name) ^ MERCHANT_LOCKS for name in change.merchant_ids]
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
