"""Folders for unfinished things, that a killed process does not leave behind for good."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = ".in-use"


@contextmanager
def scratch(home: Path) -> Iterator[Path]:
    """A new folder under ``<home>/scratch``, gone after the block.

    Its lock is held while this process lives, so the next call knows which folders nobody needs any more.
    """
    parent = home / "scratch"
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / "making.lock").open("w") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        for left in parent.iterdir():
            if left.is_dir() and _abandoned(left):
                shutil.rmtree(left)
        folder = Path(tempfile.mkdtemp(dir=parent))
        in_use = (folder / _LOCK).open("w")
        fcntl.flock(in_use, fcntl.LOCK_EX)
    with in_use:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _abandoned(folder: Path) -> bool:
    if not (folder / _LOCK).is_file():
        return True
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
