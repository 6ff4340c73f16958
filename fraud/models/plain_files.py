"""Untrusted files: read once, with a size limit, and only if they are plain files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fraud.errors import BundleError

KIB, MIB = 1024, 1024 * 1024


def read_plain(path: Path, most_bytes: int) -> bytes:
    """Return the content of a plain file.

    Raises
    ------
    BundleError
        It is missing, a link, not a plain file (a folder, pipe or device), or larger than `most_bytes`.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        what = "a link" if path.is_symlink() else "missing" if isinstance(error, FileNotFoundError) else str(error)
        raise BundleError(f"{path} is {what}; a bundle holds plain files") from None
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode):
            raise BundleError(f"{path} is no plain file; a bundle holds nothing else")
        if found.st_size > most_bytes:
            raise BundleError(f"{path} has {found.st_size} bytes; {most_bytes} are allowed")
        with open(file, "rb", closefd=False) as opened:
            content = opened.read(most_bytes + 1)
    finally:
        os.close(file)
    if len(content) > most_bytes:
        raise BundleError(f"{path} grew while it was read; {most_bytes} bytes are allowed")
    return content


def expect_plain_tree(folder: Path, most_bytes: int) -> None:
    """Raise `BundleError` if a folder holds anything but plain files, or more than `most_bytes` in total."""
    total = 0
    for directory, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(directory) / name
            found = path.lstat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise BundleError(f"{path} is {'a link' if path.is_symlink() else 'no plain file'}")
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    if total > most_bytes:
        raise BundleError(f"{folder} holds {total} bytes; {most_bytes} are allowed")
