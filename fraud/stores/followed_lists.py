"""The lists of a worker, kept current with a store: what another worker changed is seen within two seconds."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from fraud.decisions.rules.lists import ListEntry, Lists
from fraud.errors import StoreError
from fraud.stores.lists import AT_ONCE, ListStore

logger = logging.getLogger("fraud.stores.lists")

LOOK_S = 1.0
"""Between two looks at the store, seconds, give or take 20%."""


class FollowedLists:
    """Looks for changes each second, and applies them on the event loop.

    Parameters
    ----------
    store : ListStore
    lists : Lists
    """

    def __init__(self, store: ListStore, lists: Lists) -> None:
        self.store = store
        self.lists = lists
        self._error = ""
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Read all lists, and follow them from now on; a store that is off is tried again."""
        await self._look()
        self._task = asyncio.get_running_loop().create_task(self._follow())

    async def change(self, entries: Sequence[ListEntry]) -> int:
        """Change lists in the store and, at once, in this worker; return the revision of the last change.

        Raises
        ------
        StoreError
            The store does not take them.
        """
        async with self._lock:  # a store is used by one thread at a time
            revision = await asyncio.to_thread(self.store.change, entries)
        await self.refresh()
        return revision

    async def entries(self, name: str, after: str, limit: int) -> list[ListEntry]:
        """Return entries of a list by value, those after one."""
        async with self._lock:
            return await asyncio.to_thread(self.store.entries, name, after, limit)

    async def refresh(self) -> None:
        """Apply every change that there is by now; raises `StoreError`."""
        async with self._lock:
            while True:
                changes = await asyncio.to_thread(self.store.since, self.lists.revision)
                self.lists.apply(changes)
                if len(changes) < AT_ONCE:
                    break
        self.lists.expire(time.time_ns() // 1_000_000)

    def describe(self) -> dict[str, Any]:
        """Return what ``/readyz`` shows: up to which change the lists are known, and whether the last look failed."""
        return {"revision": self.lists.revision, "failed": bool(self._error)}

    async def close(self) -> None:
        """Stop following."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.to_thread(self.store.close)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S * random.uniform(0.8, 1.2))
            await self._look()

    async def _look(self) -> None:
        try:
            await self.refresh()
        except StoreError as error:
            if not self._error:
                logger.error("lists cannot be read; those of revision %d stay: %s", self.lists.revision, error.message)
            self._error = error.message
        else:
            if self._error:
                logger.info("lists are read again")
            self._error = ""
