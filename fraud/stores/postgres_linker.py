"""The chain of decisions in PostgreSQL: who gives the recorded decisions their places in it.

It is made behind the answer, within a second, by one worker at a time: made with the commit, it would let only one
worker of all commit at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from fraud.decisions.chain import Anchor, extend
from fraud.decisions.marks import Turns, Unlinked, Writer, in_turn, is_marked, place_mark
from fraud.errors import StoreDown, StoreError
from fraud.stores.postgres_connection import PostgresConnection, fetch_all
from fraud.stores.postgres_labels import Connection

CHAIN_LOCK = 0x4348414E
CLOSE_S = 5.0
LINK_AFTER_S = 0.2
LINK_AT_ONCE = 500
UNLINKED = f"""
SELECT id, key, record, mark FROM fraud.decisions WHERE seq IS NULL AND id > %b ORDER BY id LIMIT {LINK_AT_ONCE}
"""
VOIDS = "SELECT mark FROM fraud.voids"
LINK = """
UPDATE fraud.decisions AS d SET seq = linked.seq, link = linked.link
FROM unnest(%b::bigint[], %b::bigint[], %b::bytea[]) AS linked (id, seq, link) WHERE d.id = linked.id
"""

logger = logging.getLogger("fraud.stores")


class Linker:
    """Links the decisions of one store, after they were recorded.

    Parameters
    ----------
    connection : PostgresConnection
        Its own: to link takes longer than a decision may wait.
    writer : Writer
        The store's, whose records must all come to be linked.
    audit_key : bytes
        Key of the chain; see `fraud.decisions.chain`.

    Attributes
    ----------
    task : asyncio.Task or None
        What links, or linked last.
    """

    def __init__(self, connection: PostgresConnection, writer: Writer, audit_key: bytes) -> None:
        self._connection = connection
        self._writer = writer
        self._audit_key = audit_key
        self._seen = Anchor()
        self._refused: dict[int, str] = {}
        self._has_unlinked = False
        self.task: asyncio.Task[None] | None = None

    async def link(self) -> int:
        """Give the decisions recorded so far their places in the chain; return how many got one.

        Returns 0 while another worker is at it.

        Raises
        ------
        StoreError
            The chain's end is not what a service with this key wrote, or went back: nothing is linked behind it.
        """
        linked, after = 0, 0
        while True:
            n, after = await self._connection.use(lambda db: self._link_some(db, after))  # noqa: B023
            linked += n
            if not after:
                return linked

    def link_soon(self) -> None:
        """Link in the background, soon."""
        self._has_unlinked = True
        if self.task is None or self.task.done():
            self.task = asyncio.ensure_future(self._link_until_done())

    async def _link_until_done(self) -> None:
        while self._has_unlinked:
            self._has_unlinked = False
            await asyncio.sleep(LINK_AFTER_S)
            try:
                await self.link()
            except StoreDown as error:  # what is unlinked stays so until the next decision, or the next worker
                logger.warning("the chain of decisions waits: %s", error.message)
            except StoreError as error:
                logger.error("the chain of decisions waits: %s", error.message)

    async def _link_some(self, db: Connection, after: int) -> tuple[int, int]:
        """Link some rows after one; return how many got a place, and the last one looked at or 0 at the end."""
        own, written = self._writer.name, self._writer.number
        async with db.transaction():
            cursor = await db.execute("SELECT pg_try_advisory_xact_lock(%b)", [CHAIN_LOCK])
            if (await cursor.fetchone() or (False,))[0] is False:
                self._has_unlinked = True
                return 0, 0
            head, turns = await self._head(db)
            rows = [Unlinked(*row) for row in await fetch_all(db, UNLINKED, [after])]
            voids = {mark for (mark,) in await fetch_all(db, VOIDS)}
            taken, refused = in_turn(rows, turns, voids, self._audit_key)
            self._report(refused)
            if taken:
                chained = list(extend(head, [row.record for row in taken], self._audit_key))
                numbers = [row.number for row in taken]
                await db.execute(LINK, [numbers, [row.sequence for row in chained], [row.link for row in chained]])
                head = Anchor(chained[-1].sequence, chained[-1].link)
            is_end = len(rows) < LINK_AT_ONCE
            if is_end and not refused and turns.passed(own, voids, self._audit_key) < written:
                self._report({0: f"records of this worker up to its {written}th were deleted before they were linked"})
            if is_end and not refused:
                turns.forget(time.time_ns() // 1_000_000)
            if taken:
                writers = turns.encode()
                await db.execute(
                    "UPDATE fraud.chain SET seq = %b, link = %b, mark = %b, writers = %b WHERE place = 'head'",
                    [*head, place_mark("head", head, self._audit_key, writers), writers],
                )
                passed = [mark for mark in voids if turns.has_passed(mark)]
                if passed:
                    await db.execute("DELETE FROM fraud.voids WHERE mark = ANY (%b::bytea[])", [passed])
        self._seen = max(self._seen, head)
        return len(taken), 0 if is_end else rows[-1].number

    async def _head(self, db: Connection) -> tuple[Anchor, Turns]:
        """Return where the chain ends and how far each writer has been linked."""
        rows = await fetch_all(db, "SELECT seq, link, mark, writers FROM fraud.chain WHERE place = 'head'")
        if not rows:
            raise StoreError("the chain of decisions has no head: the table fraud.chain was changed")
        sequence, link, mark, writers = rows[0]
        head = Anchor(sequence, link)
        if not is_marked("head", head, mark, self._audit_key, writers):
            raise StoreError(
                f"the chain of decisions was changed at its end, row {sequence}, or FRAUD_AUDIT_KEY is another one: "
                "nothing is linked behind it"
            )
        if sequence < self._seen.sequence:
            raise StoreError(
                f"the chain of decisions went back from row {self._seen.sequence} to row {sequence}: nothing is "
                "linked behind it until the service is started anew"
            )
        return head, Turns.decode(writers)

    def _report(self, refused: Mapping[int, str]) -> None:
        """Log each row that may not be linked, once."""
        for number, reason in refused.items():
            if self._refused.get(number) != reason:
                self._refused[number] = reason
                logger.error("a decision is not linked (fraud.decisions, id %d): %s", number, reason)

    async def close(self) -> None:
        """Link what is left, for a few seconds at most."""
        if self.task is not None:
            self.task.cancel()
            linked = asyncio.ensure_future(self.link())
            await asyncio.wait({linked}, timeout=CLOSE_S)
            if not linked.done():
                linked.cancel()  # not awaited: the server may be frozen
            error = linked.exception() if linked.done() else None
            if isinstance(error, StoreError) and not isinstance(error, StoreDown):
                logger.error("the chain of decisions waits: %s", error.message)
            elif error is not None or not linked.done():
                logger.warning("the chain of decisions waits for the next worker")
        await self._connection.close()
