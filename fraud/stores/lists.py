"""Where lists are kept: SQLite, PostgreSQL or Redis, as the decisions are. Every change has a revision.

A worker reads the changes since the last revision that it saw, each second, and holds all lists in memory; so it
decides by them also while the store is off. Calls block: they are made in a thread, or by a command.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol, cast

import msgspec
import psycopg
import redis

from fraud.decisions.rules.lists import ListEntry
from fraud.errors import StoreDown, StoreError
from fraud.stores.opening import StoreOptions
from fraud.stores.redis_labels import PREFIX
from fraud.stores.side_tables import PostgresTables, opened_file
from fraud.stores.urls import POSTGRESQL, REDIS, checked

AT_ONCE = 5000
"""Changes that are read in one call."""


class ListStore(Protocol):
    """Keeps the entries of lists."""

    def change(self, entries: Sequence[ListEntry]) -> int:
        """Add, change or remove entries, together and in order; return the revision of the last one.

        Raises
        ------
        StoreError
            The store does not take them; nothing is changed.
        """

    def since(self, revision: int) -> list[ListEntry]:
        """Return the entries that changed after a revision, in their order, at most `AT_ONCE` of them."""

    def entries(self, name: str, after: str = "", limit: int = 1000) -> list[ListEntry]:
        """Return entries of a list by value, those after one."""

    def close(self) -> None:
        """Let go of connections."""


def open_lists(url: str, options: StoreOptions) -> ListStore:
    """Return the lists of the store that a URL names, as for `fraud.stores.opening.open_store`.

    With SQLite they are in a file of their own, ``lists.db`` beside the store's, so that they never wait for its lock;
    behind Redis, in the PostgreSQL that `options.cold_store` names.
    """
    scheme, _, rest = url.partition(":")
    if options.cold_store is not None:
        return PostgresLists(options.cold_store)
    if scheme in POSTGRESQL:
        return PostgresLists(url)
    if scheme in REDIS:
        return RedisLists(url)
    folder = Path(rest.removeprefix("//")).parent if rest else options.state_dir
    return SqliteLists(folder / "lists.db")


_COLUMNS = "list, value, until_ms, reason, author, changed_ms, removed, revision"


class SqliteLists:
    """Lists in one SQLite file, shared by all workers of one server."""

    STEPS = (
        (
            """
            CREATE TABLE entries (
                list TEXT NOT NULL, value TEXT NOT NULL, until_ms INTEGER, reason TEXT NOT NULL, author TEXT NOT NULL,
                changed_ms INTEGER NOT NULL, removed INTEGER NOT NULL, revision INTEGER NOT NULL,
                PRIMARY KEY (list, value)
            ) WITHOUT ROWID
            """,
            "CREATE UNIQUE INDEX by_revision ON entries (revision)",
        ),
    )

    def __init__(self, path: Path) -> None:
        self._path = path

    def change(self, entries: Sequence[ListEntry]) -> int:
        try:
            with closing(opened_file(self._path, self.STEPS)) as db:
                db.execute("BEGIN IMMEDIATE")
                (last,) = db.execute("SELECT coalesce(max(revision), 0) FROM entries").fetchone()
                rows = [_row(entry, last + i) for i, entry in enumerate(entries, 1)]
                marks = ", ".join("?" * 8)
                db.executemany(f"INSERT OR REPLACE INTO entries ({_COLUMNS}) VALUES ({marks})", rows)
                db.execute("COMMIT")
                return int(last) + len(rows)
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the lists in {self._path} cannot be changed: {error}") from error

    def since(self, revision: int) -> list[ListEntry]:
        return self._read(
            f"SELECT {_COLUMNS} FROM entries WHERE revision > ? ORDER BY revision LIMIT ?", revision, AT_ONCE
        )

    def entries(self, name: str, after: str = "", limit: int = 1000) -> list[ListEntry]:
        query = f"SELECT {_COLUMNS} FROM entries WHERE list = ? AND value > ? AND NOT removed ORDER BY value LIMIT ?"
        return self._read(query, name, after, limit)

    def close(self) -> None:
        """Nothing is kept open."""

    def _read(self, query: str, *values: object) -> list[ListEntry]:
        if not self._path.is_file():
            return []
        try:
            with closing(opened_file(self._path, self.STEPS)) as db:
                return [_entry(row) for row in db.execute(query, values)]
        except (sqlite3.Error, OSError) as error:
            raise StoreDown(f"the lists in {self._path} cannot be read: {error}") from error


class PostgresLists:
    """Lists in PostgreSQL, beside the decisions."""

    STEPS = (
        """
        CREATE TABLE fraud.lists (
            list text NOT NULL, value text NOT NULL, until_ms bigint, reason text NOT NULL, author text NOT NULL,
            changed_ms bigint NOT NULL, removed boolean NOT NULL, revision bigint NOT NULL UNIQUE,
            PRIMARY KEY (list, value)
        )
        """,
    )
    LOCK = 0x4652414C

    def __init__(self, url: str) -> None:
        self._tables = PostgresTables(url, self.STEPS, "list_migrations", self.LOCK, "the lists in PostgreSQL")

    def change(self, entries: Sequence[ListEntry]) -> int:
        try:
            with self._tables.alone() as db:  # revisions are given and seen in one order
                found = db.execute("SELECT coalesce(max(revision), 0) FROM fraud.lists").fetchone() or (0,)
                last = cast(int, found[0])
                marks = ", ".join(["%s"] * 8)
                changed = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS.split(", ")[2:])
                with db.cursor() as cursor:
                    cursor.executemany(
                        f"INSERT INTO fraud.lists ({_COLUMNS}) VALUES ({marks}) "
                        f"ON CONFLICT (list, value) DO UPDATE SET {changed}",
                        [_row(entry, last + i) for i, entry in enumerate(entries, 1)],
                    )
                return last + len(entries)
        except psycopg.Error as error:
            raise StoreError(f"the lists in PostgreSQL cannot be changed: {error}") from error

    def since(self, revision: int) -> list[ListEntry]:
        query = f"SELECT {_COLUMNS} FROM fraud.lists WHERE revision > %s ORDER BY revision LIMIT %s"
        return self._read(query, revision, AT_ONCE)

    def entries(self, name: str, after: str = "", limit: int = 1000) -> list[ListEntry]:
        query = (
            f"SELECT {_COLUMNS} FROM fraud.lists WHERE list = %s AND value > %s AND NOT removed ORDER BY value LIMIT %s"
        )
        return self._read(query, name, after, limit)

    def close(self) -> None:
        self._tables.close()

    def _read(self, query: str, *values: object) -> list[ListEntry]:
        try:
            with self._tables.transaction() as db:
                return [_entry(row) for row in db.execute(query, values).fetchall()]
        except psycopg.Error as error:
            raise StoreDown(f"the lists in PostgreSQL cannot be read: {error}") from error


class RedisLists:
    """Lists in Redis: a hash for each list, and all changes by revision."""

    REVISION = f"{PREFIX}lists:revision"
    CHANGES = f"{PREFIX}lists:changes"
    # KEYS: revision, changes. ARGV: the key prefix of a list, then list, value and entry of each change.
    CHANGE = """
    local revision
    for i = 2, #ARGV, 3 do
      revision = redis.call('INCR', KEYS[1])
      redis.call('HSET', ARGV[1] .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
      redis.call('ZADD', KEYS[2], revision, cjson.encode({ARGV[i], ARGV[i + 1]}))
    end
    return revision
    """

    def __init__(self, url: str) -> None:
        self._redis = redis.Redis.from_url(checked(url), protocol=2, socket_timeout=5.0, socket_connect_timeout=5.0)
        self._change = self._redis.register_script(self.CHANGE)

    def change(self, entries: Sequence[ListEntry]) -> int:
        try:
            revision = 0
            for start in range(0, len(entries), 1000):
                given = [
                    part
                    for entry in entries[start : start + 1000]
                    for part in (entry.list, entry.value, msgspec.msgpack.encode(entry))
                ]
                revision = cast(int, self._change(keys=[self.REVISION, self.CHANGES], args=[self._key(""), *given]))
            return revision
        except redis.RedisError as error:
            raise StoreError(f"the lists in Redis cannot be changed: {error}") from error

    def since(self, revision: int) -> list[ListEntry]:
        try:
            found = cast(
                "list[tuple[bytes, float]]",
                self._redis.zrangebyscore(self.CHANGES, f"({revision}", "+inf", 0, AT_ONCE, withscores=True),
            )
            pipe = self._redis.pipeline(transaction=False)
            for member, _ in found:
                name, value = msgspec.json.decode(member, type=tuple[str, str])
                pipe.hget(self._key(name), value)
            blobs = cast("list[bytes]", pipe.execute())
        except redis.RedisError as error:
            raise StoreDown(f"the lists in Redis cannot be read: {error}") from error
        return [
            msgspec.structs.replace(_decode(blob), revision=int(score))
            for (_, score), blob in zip(found, blobs, strict=True)
        ]

    def entries(self, name: str, after: str = "", limit: int = 1000) -> list[ListEntry]:
        try:
            blobs = cast("list[bytes]", self._redis.hvals(self._key(name)))
        except redis.RedisError as error:
            raise StoreDown(f"the lists in Redis cannot be read: {error}") from error
        found = [entry for entry in map(_decode, blobs) if not entry.removed and entry.value > after]
        return sorted(found, key=lambda entry: entry.value)[:limit]

    def close(self) -> None:
        self._redis.close()

    @staticmethod
    def _key(name: str) -> str:
        return f"{PREFIX}list:{name}"


_decode = msgspec.msgpack.Decoder(ListEntry).decode


def _row(entry: ListEntry, revision: int) -> tuple[object, ...]:
    return (
        *(entry.list, entry.value, entry.until_ms, entry.reason, entry.author, entry.changed_ms),
        *(entry.removed, revision),
    )


def _entry(row: Sequence[object]) -> ListEntry:
    return msgspec.convert(dict(zip(ListEntry.__struct_fields__, row, strict=True)), ListEntry, strict=False)
