"""The rows of the local registry: their SQL and their types."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

# Each step brings the file from the format before to its own; a released step is never changed.
FORMATS = (
    """
create table versions (
    name text not null, version integer not null, digest text not null, preprocessor_digest text not null,
    run text not null, wandb_version text, metrics text not null, facts text not null, created text not null,
    primary key (name, version), unique (name, digest)
) strict;
create table aliases (
    name text not null, alias text not null, version integer not null,
    primary key (name, alias), foreign key (name, version) references versions (name, version)
) strict;
create table events (
    id integer primary key, name text not null, kind text not null, alias text not null,
    version integer, before integer, who text not null, why text not null, forced integer not null,
    at text not null
) strict;
create table pending (
    id integer primary key, name text not null, kind text not null, payload text not null,
    created text not null, attempts integer not null default 0, last_error text not null default ''
) strict
""",
    """
create table following (
    name text primary key, checked text not null, error text not null
) strict
""",
)

EventKind = Literal["register", "promote", "rollback", "follow", "alias", "use"]


@dataclass(frozen=True)
class Version:
    """One version of a model; `metrics` is ``{name: {"value", "low", "high"}}``."""

    name: str
    version: int
    digest: str
    preprocessor_digest: str
    run: str
    wandb_version: str | None
    metrics: dict[str, dict[str, float]]
    facts: dict[str, Any]
    created: str
    aliases: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}:v{self.version}"


@dataclass(frozen=True)
class Event:
    """Who moved an alias, from which version to which, when and why; `why` of a use is the key of its run.

    The kinds promote, rollback and follow change the version in service: `before` is the one that was.
    """

    name: str
    kind: EventKind
    alias: str
    version: int | None
    before: int | None
    who: str
    why: str
    forced: bool
    at: str


@dataclass(frozen=True)
class InForce:
    """The alias that decides what is served, and the digest of the bundle that it names."""

    alias: str
    digest: str


@dataclass(frozen=True)
class Pending:
    """A change that has not been sent to W&B yet."""

    id: int
    name: str
    kind: Literal["run", "alias", "use"]
    payload: dict[str, Any]
    created: str
    attempts: int
    last_error: str


@dataclass(frozen=True)
class FollowStatus:
    """The last look at W&B's aliases: its time and its error (empty if it succeeded)."""

    checked: str
    error: str


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def find(db: sqlite3.Connection, name: str, reference: str) -> list[int]:
    if re.fullmatch(r"v\d+", reference):
        rows = db.execute("select version from versions where name = ? and version = ?", (name, int(reference[1:])))
    elif re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", reference):
        pattern = f"sha256:{reference.removeprefix('sha256:')}*"
        rows = db.execute("select version from versions where name = ? and digest glob ?", (name, pattern))
    else:
        rows = db.execute("select version from aliases where name = ? and alias = ?", (name, reference))
    return [row["version"] for row in rows]


def digests_beginning(db: sqlite3.Connection, name: str, digits: str) -> list[str]:
    rows = db.execute("select digest from versions where name = ? and digest glob ?", (name, f"sha256:{digits}*"))
    return [row["digest"] for row in rows]


def names_with(db: sqlite3.Connection, aliases: Sequence[str]) -> list[str]:
    """Names of the models of which one of these aliases names a version."""
    marks = ", ".join("?" * len(aliases))
    found = db.execute(f"select distinct name from aliases where alias in ({marks}) order by name", tuple(aliases))
    return [row["name"] for row in found]


def in_force(db: sqlite3.Connection, name: str, order: Sequence[str]) -> tuple[str, int | None]:
    """The first of these aliases that names a version, and that version; the first and None if none does."""
    versions = {row["alias"]: row["version"] for row in db.execute("select * from aliases where name = ?", (name,))}
    alias = next((alias for alias in order if alias in versions), order[0])
    return alias, versions.get(alias)


def target(db: sqlite3.Connection, name: str, alias: str) -> int | None:
    row = db.execute("select version from aliases where name = ? and alias = ?", (name, alias)).fetchone()
    return None if row is None else int(row["version"])


def point(db: sqlite3.Connection, name: str, alias: str, version: int | None) -> None:
    if version is None:
        db.execute("delete from aliases where name = ? and alias = ?", (name, alias))
    else:
        db.execute("insert or replace into aliases values (?, ?, ?)", (name, alias, version))


def read(db: sqlite3.Connection, name: str, version: int) -> Version:
    row = db.execute("select * from versions where name = ? and version = ?", (name, version)).fetchone()
    aliases = db.execute("select alias from aliases where name = ? and version = ? order by 1", (name, version))
    return Version(
        row["name"],
        row["version"],
        row["digest"],
        row["preprocessor_digest"],
        row["run"],
        row["wandb_version"],
        json.loads(row["metrics"]),
        json.loads(row["facts"]),
        row["created"],
        tuple(r["alias"] for r in aliases),
    )


def event_of(row: sqlite3.Row) -> Event:
    moved = (row["name"], row["kind"], row["alias"], row["version"], row["before"])
    return Event(*moved, who=row["who"], why=row["why"], forced=bool(row["forced"]), at=row["at"])


def pending_of(row: sqlite3.Row) -> Pending:
    waits = (row["id"], row["name"], row["kind"], json.loads(row["payload"]))
    return Pending(*waits, created=row["created"], attempts=row["attempts"], last_error=row["last_error"])


def record(db: sqlite3.Connection, event: Event) -> int:
    cursor = db.execute(
        "insert into events (name, kind, alias, version, before, who, why, forced, at) values (?,?,?,?,?,?,?,?,?)",
        (
            *(event.name, event.kind, event.alias, event.version, event.before),
            *(event.who, event.why, int(event.forced), event.at),
        ),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def is_recorded(db: sqlite3.Connection, name: str, key: str) -> bool:
    found = db.execute("select 1 from events where name = ? and kind = 'use' and why = ?", (name, key))
    return found.fetchone() is not None


def pend(db: sqlite3.Connection, name: str, kind: str, payload: dict[str, Any]) -> int:
    cursor = db.execute(
        "insert into pending (name, kind, payload, created) values (?, ?, ?, ?)",
        (name, kind, json.dumps(payload), now()),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def served_stack(db: sqlite3.Connection, name: str) -> list[int]:
    """The stack of versions in service that a rollback goes back through, oldest first."""
    rows = db.execute(
        "select kind, version, before from events where name = ? and kind in ('promote', 'rollback', 'follow') "
        "order by id",
        (name,),
    )
    stack: list[int] = []
    for row in rows:
        if not stack and row["before"] is not None:
            stack.append(row["before"])
        if row["version"] in stack[:-1] and row["kind"] != "promote":
            del stack[stack.index(row["version"]) + 1 :]
        else:
            stack.append(row["version"])
    return stack
