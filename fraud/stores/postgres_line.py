"""Connections to PostgreSQL, and the schema they find there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import psycopg

from fraud.errors import StoreDown, StoreError
from fraud.stores.postgres_schema import Connection, migrate

T = TypeVar("T")


async def connect(url: str, *, durable: bool, audit_key: bytes = b"") -> Connection:
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
        await migrate(db, audit_key)
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
