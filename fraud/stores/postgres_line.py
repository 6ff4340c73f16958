"""Connections to PostgreSQL, and the schema they find there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psycopg

from fraud.errors import StoreDown, StoreError

MIGRATIONS = (
    """
    CREATE TABLE fraud.customers (
        key bigint PRIMARY KEY, id text NOT NULL, state bytea NOT NULL, changed_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE fraud.merchants (LIKE fraud.customers INCLUDING ALL);
    CREATE TABLE fraud.decisions (
        id bigserial PRIMARY KEY, key text NOT NULL UNIQUE, record bytea NOT NULL, seq bigint UNIQUE, link bytea
    );
    CREATE INDEX unlinked ON fraud.decisions (id) WHERE seq IS NULL;
    CREATE TABLE fraud.chain (place text PRIMARY KEY, seq bigint NOT NULL, link bytea NOT NULL);
    INSERT INTO fraud.chain SELECT place, 0, decode(repeat('00', 32), 'hex') FROM unnest(ARRAY['anchor', 'head']) place;
    CREATE TABLE fraud.frauds (key text PRIMARY KEY, label_time_ms bigint NOT NULL);
    ALTER TABLE fraud.customers ALTER state SET STORAGE EXTERNAL;
    ALTER TABLE fraud.merchants ALTER state SET STORAGE EXTERNAL;
    """,
)
"""Each brings the schema to the next version; one that has been released is never changed."""

SCHEMA_LOCK = 0x46524155

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]


async def connect(url: str, *, durable: bool) -> Connection:
    """Return a connection to a database whose schema is of this release."""
    db = await psycopg.AsyncConnection.connect(
        url,
        autocommit=True,
        connect_timeout=2,
        tcp_user_timeout=5000,
        application_name="fraud-bento",
        options="" if durable else "-c synchronous_commit=off",
    )
    try:
        await _migrate(db)
    except BaseException:  # a caller that waits no longer, as well
        await db.close()
        raise
    return db


class Line:
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
