"""The file of a SQLite store: its lock, whether it still is the file that was opened, and what its errors mean."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fraud.errors import StoreDown, StoreError

START_WAIT_S = 30.0
"""Longest wait for the lock at the start, when another worker may bring the file to this release."""
MOST_WAL_PAGES = 20_000
"""Pages of the write-ahead log, of 4 KiB, after which a commit copies them into the file itself."""


class StoreFile:
    """A database's file and its lock, which processes take in turns and the kernel lets go of when one dies.

    Attributes
    ----------
    give_up_at : float
        By `time.monotonic`, when nobody waits any more for what is being written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock_path = Path(f"{path}-lock")
        # by the umask, so that another user of the group can go on: SQLite alone would keep its write from the group
        self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        path.touch()
        self._opened: tuple[tuple[int, int], ...] | None = None
        self.give_up_at = float("inf")

    def remember(self) -> None:
        """Take the file that is there now for the one that is open."""
        self._opened = self._found()

    def expect_same(self) -> None:
        """Raise `StoreDown` if the file was removed or replaced: what is written to the open one would be lost."""
        if self._opened is not None and self._found() != self._opened:
            raise StoreDown(
                f"the store {self.path} was removed or replaced while it was open; put it back and restart the service",
                is_permanent=True,
            )

    def _found(self) -> tuple[tuple[int, int], ...] | None:
        try:
            found = [os.stat(path) for path in (self.path, self._lock_path)]
        except OSError:
            return None
        return tuple((file.st_dev, file.st_ino) for file in found)

    @contextmanager
    def locked_at_start(self) -> Iterator[None]:
        """Hold the lock; raises `StoreError` if another process keeps it."""
        deadline = time.monotonic() + START_WAIT_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(f"another process keeps the lock {self._lock_path}; end it") from None
                time.sleep(0.02)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock; raises `StoreDown` where it came too late.

        The kernel hands it over at once. `filelock`, which other locks are, asks again every 50 ms: of two busy writers
        one waited for 1.6 s, here for 28 ms.
        """
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self.expect_time()
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def expect_time(self) -> None:
        """Raise `StoreDown` if those who wait for what is being written have been told that it failed."""
        if time.monotonic() > self.give_up_at:
            raise StoreDown(f"another process kept the store {self.path} locked")

    def close(self) -> None:
        os.close(self._lock)


def configure(connection: sqlite3.Connection, *, durable: bool) -> None:
    """Set what a connection of a store has: a write-ahead log, which each commit syncs if it is durable."""
    for setting in (
        "journal_mode = WAL",
        f"synchronous = {'FULL' if durable else 'NORMAL'}",
        "cache_size = -16384",
        f"wal_autocheckpoint = {MOST_WAL_PAGES}",
        "mmap_size = 1073741824",
    ):
        connection.execute(f"PRAGMA {setting}")


def checkpoint(connection: sqlite3.Connection) -> int:
    """Copy what it can of the write-ahead log into the file, and sync it; nobody waits for it, and it for nobody.

    Returns the pages of the log, which begins anew once all of them are copied.
    """
    _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages)


def translated(path: Path, error: sqlite3.Error) -> StoreError:
    """Return what an error means: a file that cannot be used now is off; other errors are a matter of their batch."""
    text = f"the store {path} failed: {error}"
    if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError | sqlite3.DataError):
        return StoreError(text)
    needs_operator = any(said in str(error) for said in ("readonly", "malformed", "not a database"))
    return StoreDown(text, is_permanent=needs_operator)


def select_in(
    db: sqlite3.Connection, query: str, values: Sequence[object], at_once: int = 512
) -> Iterable[tuple[str, bytes]]:
    """Run a query over values, the last one repeated up to a power of two: so few statements are compiled and kept."""
    for start in range(0, len(values), at_once):
        some = list(values[start : start + at_once])
        some += some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))
        yield from db.execute(query.format(",".join("?" * len(some))), some)
