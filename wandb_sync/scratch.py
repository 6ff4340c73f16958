"""Folders for unfinished things, that a killed process does not leave behind for good."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOCK = ".in-use"


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A new folder under ``<home>/scratch``, gone after the block."""
    parent = home / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "making.lock").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        for left in parent.iterdir():
            if left.is_dir() and not _is_held(left):
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(dir=parent))
        in_use = _take(folder)
    with in_use:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Mark a folder as in use by this process, for as long as it lives at most."""
    with _take(folder):
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def was_abandoned(folder: Path) -> bool:
    """Whether the process that held a folder ended without saying so."""
    return (folder / _LOCK).is_file() and not _is_held(folder)


def _take(folder: Path) -> IO[str]:
    lock = (folder / _LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _is_held(folder: Path) -> bool:
    if not (folder / _LOCK).is_file():
        return False
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
