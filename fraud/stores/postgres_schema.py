"""The tables of the PostgreSQL store, and the steps that bring an older database to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fraud.decisions.chain import Anchor, Logged
from fraud.decisions.labels import Label
from fraud.decisions.marks import Writer, place_mark
from fraud.stores.migrations import check_adopted, first_label, steps_after
from fraud.stores.postgres_labels import Connection, add_search_rows, append_labels, keep_frauds
from fraud.stores.protocol import KnownFraud
from fraud.stores.rows import decode_record

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


async def _labels(db: Connection, audit_key: bytes) -> None:
    """Keep labels one by one, each with a link, and the frauds that the states contain; make decisions searchable.

    Takes about a minute for a million decisions, which are read one by one.
    """
    await db.execute(
        """
        CREATE TABLE fraud.labels (
            seq bigint PRIMARY KEY, key text NOT NULL, label bytea NOT NULL, link bytea NOT NULL
        );
        CREATE INDEX labels_by_key ON fraud.labels (key);
        INSERT INTO fraud.chain (place, seq, link) VALUES ('labels', 0, decode(repeat('00', 32), 'hex'));
        CREATE TABLE fraud.known_frauds (
            id bigserial PRIMARY KEY, key text UNIQUE, customer bigint, merchant bigint,
            event_time_ms bigint NOT NULL, amount double precision NOT NULL, known_ms bigint NOT NULL
        );
        CREATE INDEX known_frauds_by_customer ON fraud.known_frauds (customer) WHERE customer IS NOT NULL;
        CREATE INDEX known_frauds_by_merchant ON fraud.known_frauds (merchant) WHERE merchant IS NOT NULL;
        CREATE TABLE fraud.models (
            id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, digest text NOT NULL,
            UNIQUE (name, digest)
        );
        CREATE TABLE fraud.search (
            id bigint PRIMARY KEY, time_ms bigint NOT NULL, customer bigint, merchant bigint,
            decision smallint NOT NULL, model int NOT NULL, label smallint NOT NULL
        );
        """
    )
    cursor = await db.execute("SELECT key, label_time_ms FROM fraud.frauds")
    told = dict(await cursor.fetchall())
    labels: list[Label] = []
    after = 0
    while True:
        cursor = await db.execute(
            "SELECT id, key, record FROM fraud.decisions WHERE id > %b ORDER BY id LIMIT 2000", [after], binary=True
        )
        rows = [(number, key, decode_record(blob)) for number, key, blob in await cursor.fetchall()]
        if not rows:
            break
        after = rows[-1][0]
        await add_search_rows(db, [(number, record, int(key in told)) for number, key, record in rows])
        for _, key, record in rows:
            if key in told:
                labels.append(first_label(record, told[key]))
                event = record.event_time_ms
                fraud = KnownFraud(
                    event, record.history_amount, max(event, told[key]), record.customer_id, record.merchant_id
                )
                await keep_frauds(db, [fraud], key)
    await append_labels(db, labels, audit_key)
    await db.execute(
        """
        CREATE INDEX search_by_time ON fraud.search (time_ms, id);
        CREATE INDEX search_by_customer ON fraud.search (customer, time_ms, id) WHERE customer IS NOT NULL;
        CREATE INDEX search_by_merchant ON fraud.search (merchant, time_ms, id) WHERE merchant IS NOT NULL;
        CREATE INDEX search_by_decision ON fraud.search (decision, time_ms, id) WHERE decision > 0;
        CREATE INDEX search_by_model ON fraud.search (model, time_ms, id);
        CREATE INDEX search_by_label ON fraud.search (label, time_ms, id) WHERE label > 0;
        DROP TABLE fraud.frauds;
        """
    )


STEPS: tuple[Step, ...] = (_first, _marks, _labels)


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
