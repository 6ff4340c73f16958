"""Hourly counts of decisions, in a small SQLite file beside the store's."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fraud.errors import StoreError

_TABLES = """
create table if not exists places (layout text primary key, place integer not null);
create table if not exists counts (
    layout text not null, hour integer not null, counts blob not null, primary key (layout, hour)
) without rowid;
"""


class SqliteHourlyCounts:
    """Counts by hour, added up as the decision log grows.

    Parameters
    ----------
    path : Path
        The file; made if it is not there.
    shape : tuple of int
        Of one hour's counts.

    Raises
    ------
    StoreError
        The file is no database, or cannot be opened.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._shape = shape
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise StoreError(f"{path} cannot be used for hourly counts: {error}; move it away to count anew") from None

    def place(self, key: str) -> int:
        """Return up to which row of the decision log a layout has been counted; 0 at first."""
        found = self._db.execute("select place from places where layout = ?", (key,)).fetchone()
        return int(found[0]) if found else 0

    def add(self, key: str, after: int, place: int, counts: Mapping[int, NDArray[np.int64]]) -> None:
        """Add counts of the log's rows after one place up to another, all or nothing.

        Raises
        ------
        StoreError
            The layout has been counted up to another place than `after`: another process counts too.
        """
        self._db.execute("begin immediate")
        try:
            if (found := self.place(key)) != after:
                raise StoreError(f"decisions were counted up to row {found} by another process; let one of them count")
            for hour, more in counts.items():
                before = self._db.execute(
                    "select counts from counts where layout = ? and hour = ?", (key, hour)
                ).fetchone()
                total = more if before is None else more + self._decoded(before[0])
                blob = total.astype("<u4").tobytes()
                self._db.execute("insert or replace into counts values (?, ?, ?)", (key, hour, blob))
            self._db.execute("insert or replace into places values (?, ?)", (key, place))
            self._db.execute("commit")
        except BaseException:
            self._db.execute("rollback")
            raise

    def read(self, key: str) -> dict[int, NDArray[np.int64]]:
        """Return the counts of a layout by hour since 1970."""
        rows = self._db.execute("select hour, counts from counts where layout = ? order by hour", (key,))
        return {hour: self._decoded(blob) for hour, blob in rows}

    def close(self) -> None:
        self._db.close()

    def _decoded(self, blob: bytes) -> NDArray[np.int64]:
        return np.frombuffer(blob, "<u4").astype(np.int64).reshape(self._shape)
