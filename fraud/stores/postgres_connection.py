"""Connections to PostgreSQL, and the schema they find there.

Nothing is asked of a connection that a pool such as PgBouncer does not give: no options at the start, no state that
outlives a transaction, and behind a pool neither prepared statements, whose names its servers would mix up, nor
pipelining.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from fraud.errors import SettingsError, StoreDown, StoreError
from fraud.stores.postgres_labels import Connection
from fraud.stores.postgres_schema import migrate
from fraud.stores.urls import checked, scheme_of

BAD_VALUES = ("22", "23")
"""Classes of SQLSTATE: data exceptions, integrity constraint violations."""
PERMANENT = ("3D000", "42501")
"""No such database, no such right: an operator has to change something."""
PERMANENT_WORDS = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "no such user",
    "no such database",
    "SASL authentication failed",
)
"""What PostgreSQL and PgBouncer say to a connection that they refuse for good: it comes without its SQLSTATE."""

T = TypeVar("T")


def check_conninfo(url: str) -> None:
    """Raise `SettingsError` for a URL that libpq would not take, or not as it is meant; none of it is shown."""
    try:
        conninfo_to_dict(checked(url))
    except psycopg.ProgrammingError:
        raise SettingsError(
            f"the store's URL ({scheme_of(url)}://…) has an option that PostgreSQL's client does not know"
        ) from None


async def connect(url: str, audit_key: bytes = b"") -> Connection:
    """Return a connection to a database whose schema is of this release."""
    db = await psycopg.AsyncConnection.connect(
        url, autocommit=True, connect_timeout=2, tcp_user_timeout=5000, application_name="fraud-bento"
    )
    try:
        cursor = await db.execute("SELECT pg_backend_pid()", prepare=False)
        if await cursor.fetchone() != (db.info.backend_pid,):
            db.prepare_threshold = None  # a pool is between: each transaction may meet another server
        await migrate(db, audit_key)
    except BaseException:  # a caller that waits no longer, as well
        await db.close()
        raise
    return db


def pipelined(db: Connection) -> AbstractAsyncContextManager[object]:
    """Return a block whose statements are sent without waiting for each one's answer.

    Behind a pool each waits: PgBouncer before 1.21 may take the answer to one for the end of all, and then gives the
    server connection away within a transaction, or to nobody for ever (its issue 759).
    """
    return nullcontext() if is_pooled(db) else db.pipeline()


def is_pooled(db: Connection) -> bool:
    """Return whether a pool is between, as `connect` noticed."""
    return db.prepare_threshold is None


class PostgresConnection:
    """One connection, made when it is needed and made anew after a failure, used by one at a time.

    Not a `psycopg_pool`: its callers wait until their timeout for a server that refuses, and learn no reason; it tries
    again by itself, beside the circuit breaker that does so here.
    """

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
                if isinstance(error, (psycopg.Error, OSError)):
                    raise translated(error) from error
                raise

    async def close(self) -> None:
        if self._db is not None:
            await self._db.close()


def translated(error: psycopg.Error | OSError) -> StoreError:
    """Return what an error means: a server that refuses is off as one that is gone, whatever its reason.

    Only values that it cannot store are a matter of their own batch alone.
    """
    text = " ".join(str(error).split())
    state = getattr(error, "sqlstate", None) or ""
    if state[:2] in BAD_VALUES:
        return StoreError(f"postgresql refused: {text}")
    is_permanent = state[:2] == "28" or state in PERMANENT
    is_permanent |= not state and any(words in text for words in PERMANENT_WORDS)
    refuses = is_permanent or state[:2] not in ("", "08", "57")
    return StoreDown(f"postgresql {'refuses' if refuses else 'cannot be reached'}: {text}", is_permanent=is_permanent)


async def fetch_all(db: Connection, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """Return every row that a query answers with."""
    cursor = await db.execute(query.encode(), values, binary=True)
    return await cursor.fetchall()
