"""How a worker follows W&B's aliases through the registry, and reports the versions it serves.

The service does not load the W&B SDK. `fraud follow` beside it, or a process started for one look, imports versions.
The report that a version serves here is queued in the registry until `fraud follow` or `fraud push --pending` sends it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fraud.environment import with_sources
from fraud.errors import FraudError
from fraud.models.registry import FollowStatus, Registry

logger = logging.getLogger("fraud.serving.following")

ASKED = "asked"
LOOK_LIMIT_S = 120.0
SOURCES = Path(__file__).parents[2]


class AliasFollower:
    """Follows W&B's aliases for one worker.

    Parameters
    ----------
    registry : Registry
    names : sequence of str
        Models whose version comes from the registry, neither pinned nor packed.
    limit_s : float
        How long one look may take, seconds.

    Attributes
    ----------
    looks : dict of str to fraud.models.registry.FollowStatus
        How the last look at W&B went, by model, as of the last `read`.
    """

    def __init__(self, registry: Registry, names: Sequence[str], limit_s: float = LOOK_LIMIT_S) -> None:
        self.looks: dict[str, FollowStatus] = {}
        self._registry = registry
        self._names = names
        self._limit_s = limit_s
        self._told: set[tuple[str, str]] = set()
        self._asking: asyncio.Task[str] | None = None

    def read(self, names: Iterable[str]) -> None:
        """Read the status of the last looks from the registry; its errors are raised."""
        looks = {name: self._registry.following(name) for name in names}
        self.looks = {name: look for name, look in looks.items() if look is not None}

    def record_served(self, digests: Mapping[str, str]) -> None:
        """Queue, for each model's digest, one run that records that this host serves it; repeated calls add none.

        If the registry fails, the error is logged.
        """
        for name, digest in digests.items():
            if (name, digest) in self._told:
                continue
            self._told.add((name, digest))
            host = socket.gethostname()
            key = hashlib.sha256(f"production {host} {name} {digest}".encode()).hexdigest()[:12]
            facts = {"host": host, "since": datetime.now(UTC).isoformat(timespec="seconds")}
            try:
                self._registry.record_use(name, digest, "production", facts, who=host, key=key)
            except (FraudError, OSError, sqlite3.Error) as error:
                level = logging.INFO if isinstance(error, FraudError) else logging.WARNING
                logger.log(level, "W&B will not be told that %s %s serves on %s: %s", name, digest, host, error)

    async def look(self) -> str:
        """Look up W&B's aliases once and import the versions they name; returns ``asked``, or why it was not asked.

        Concurrent calls share one look.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._look())
        return await asyncio.shield(self._asking)

    async def close(self) -> None:
        """Cancel a look in progress."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _look(self) -> str:
        if not self._names:
            return "not asked: every model here is pinned or packed"
        if not all(importlib.util.find_spec(name) for name in ("wandb", "wandb_sync")):
            return "not asked: wandb is not installed here"
        process = subprocess.Popen(  # in a millisecond; uvloop's way copies the page tables, and takes 16
            [sys.executable, "-m", "wandb_sync.look", *self._names],
            env=with_sources(SOURCES),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._limit_s):
                said, errors = await asyncio.to_thread(process.communicate)
        except TimeoutError:
            return await self._failed(f"the look took more than {self._limit_s:g} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            return await self._failed(f"the look ended with exit code {process.returncode}: {last[0]}")
        if said.split() == [b"off"]:
            return "not asked: W&B is off here (no WANDB_API_KEY, or WANDB_MODE=offline)"
        return ASKED

    async def _failed(self, reason: str) -> str:
        logger.error("W&B was not heard, what is served stays: %s", reason)
        await asyncio.to_thread(self._note, reason)
        return f"failed: {reason}"

    def _note(self, reason: str) -> None:
        try:
            for name in self._names:
                self._registry.note_following(name, reason)
        except (FraudError, OSError, sqlite3.Error) as error:
            logger.error("the registry does not take a note of it: %s", error)
