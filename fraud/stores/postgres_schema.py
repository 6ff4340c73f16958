"""The tables of the PostgreSQL store, and the steps that bring an older database to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.marks import Writer, place_mark
from fraud.stores.migrations import check_adopted, steps_after

Connection = psycopg.AsyncConnection[Any]
Step = Callable[[Connection, bytes], Awaitable[None]]

SCHEMA_LOCK = 0x46524155


async def _first(db: Connection, audit_key: bytes) -> None:
    await db.execute(
        """
        CREATE TABLE fraud.customers (
            key bigint PRIMARY KEY, id text NOT NULL, state bytea NOT NULL,
            changed_at timestamptz NOT NULL DEFAULT now()
        );
        CREATE TABLE fraud.merchants (LIKE fraud.customers INCLUDING ALL);
        CREATE TABLE fraud.decisions (
            id bigserial PRIMARY KEY, key text NOT NULL UNIQUE, record bytea NOT NULL, seq bigint UNIQUE, link bytea
        );
        CREATE INDEX unlinked ON fraud.decisions (id) WHERE seq IS NULL;
        CREATE TABLE fraud.chain (place text PRIMARY KEY, seq bigint NOT NULL, link bytea NOT NULL);
        INSERT INTO fraud.chain
            SELECT place, 0, decode(repeat('00', 32), 'hex') FROM unnest(ARRAY['anchor', 'head']) place;
        CREATE TABLE fraud.frauds (key text PRIMARY KEY, label_time_ms bigint NOT NULL);
        ALTER TABLE fraud.customers ALTER state SET STORAGE EXTERNAL;
        ALTER TABLE fraud.merchants ALTER state SET STORAGE EXTERNAL;
        """
    )


async def _marks(db: Connection, audit_key: bytes) -> None:
    """Mark where the chain begins and ends, and what waits for its place."""
    await db.execute(
        """
        ALTER TABLE fraud.decisions ADD mark bytea;
        ALTER TABLE fraud.chain ADD mark bytea, ADD writers bytea NOT NULL DEFAULT '';
        CREATE TABLE fraud.voids (mark bytea PRIMARY KEY);
        """
    )
    cursor = await db.execute("SELECT place, seq, link FROM fraud.chain", binary=True)
    places = {place: Anchor(sequence, link) for place, sequence, link in await cursor.fetchall()}
    cursor = await db.execute(
        "SELECT seq, record, link FROM fraud.decisions WHERE seq IS NOT NULL ORDER BY seq DESC LIMIT 2", binary=True
    )
    last = [Logged(*row) for row in await cursor.fetchall()]
    check_adopted(places["anchor"], places["head"], last, audit_key, "PostgreSQL")
    for place, anchor in places.items():
        mark = place_mark(place, anchor, audit_key)
        await db.execute("UPDATE fraud.chain SET mark = %b WHERE place = %b", [mark, place])
    cursor = await db.execute("SELECT id, key, record FROM fraud.decisions WHERE seq IS NULL ORDER BY id", binary=True)
    waiting = await cursor.fetchall()
    if waiting:
        marks = Writer(audit_key).marks((key, record) for _, key, record in waiting)
        await db.execute(
            """
            UPDATE fraud.decisions AS d SET mark = marked.mark
            FROM unnest(%b::bigint[], %b::bytea[]) AS marked (id, mark) WHERE d.id = marked.id
            """,
            [[number for number, _, _ in waiting], marks],
        )


STEPS: tuple[Step, ...] = (_first, _marks)


async def migrate(db: Connection, audit_key: bytes) -> None:
    """Bring a database to this release's schema, in one transaction and under a lock.

    Raises
    ------
    StoreError
        A later release wrote it, or its decision log is not what it says.
    """
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
        for number, step in steps_after(version, STEPS, "the PostgreSQL database"):
            await step(db, audit_key)
            await db.execute("INSERT INTO fraud.migrations (version) VALUES (%s)", [number])
