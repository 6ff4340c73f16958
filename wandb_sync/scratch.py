"""Temporary folders, which are cleaned up even after a killed process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

_LOCK = ".in-use"


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A new folder under ``<home>/scratch``, gone after the block."""
    parent = home / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / "making.lock"):
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


def _take(folder: Path) -> AbstractContextManager[BaseFileLock]:
    return FileLock(folder / _LOCK).acquire()


def _is_held(folder: Path) -> bool:
    if not (folder / _LOCK).is_file():
        return False
    try:
        with FileLock(folder / _LOCK, blocking=False):
            return False
    except Timeout:
        return True
