"""The local registry: which versions of a model exist, and which of them each alias names.

It has the semantics of W&B's artifact registry (one alias names one version, an unchanged bundle makes no new version),
works without a network, and is read by running services. One SQLite file, safe under several processes and a kill at
any point: each public call is one transaction.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fraud.errors import RegistryError
from fraud.models import registry_rows as rows
from fraud.models.names import RULES, checked_name, is_rules
from fraud.models.registry_rows import Event, FollowStatus, InForce, Pending, Version

__all__ = ["Event", "FollowStatus", "InForce", "Pending", "Registry", "Version"]

PRODUCTION = ("production",)
NOT_SERVED = ("candidate", "challenger")
"""Aliases that can be set and never decide what is served."""


class Registry:
    """The registry in the SQLite file `path`, made on first use.

    Parameters
    ----------
    path : Path
        Beside the Bento store: ``$BENTOML_HOME/fraud/registry.db``.
    order : sequence of str
        Aliases of the version to serve: the first that names a version is in force.
    """

    def __init__(self, path: Path, order: Sequence[str] = PRODUCTION) -> None:
        self.path = path
        self.order = tuple(order)

    @classmethod
    def beside(cls, bentoml_home: Path, order: Sequence[str] = PRODUCTION) -> Registry:
        """Return the registry of the Bento store of a BENTOML_HOME."""
        return cls(bentoml_home / "fraud" / "registry.db", order)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()  # with the rights that the umask gives; SQLite alone would keep its write from the group
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        try:
            db.row_factory = sqlite3.Row
            db.execute("pragma foreign_keys = on")
            db.execute("begin immediate")
            found = db.execute("pragma user_version").fetchone()[0]
            if found > len(rows.FORMATS):
                raise RegistryError(f"{self.path} has format {found}, this release reads {len(rows.FORMATS)}")
            for step in rows.FORMATS[found:]:
                for statement in step.split(";\n"):
                    db.execute(statement)
            db.execute(f"pragma user_version = {len(rows.FORMATS)}")
            yield db
            db.execute("commit")
        except BaseException:
            if db.in_transaction:
                db.execute("rollback")
            raise
        finally:
            db.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
        """A connection to read from, or None where nothing was ever registered.

        It may write: SQLite rolls back a killed writer's transaction when the file is next opened.
        """
        if not self.path.is_file():
            yield None
            return
        with contextlib.closing(sqlite3.connect(f"{self.path.as_uri()}?mode=rw", uri=True, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            yield db if db.execute("pragma user_version").fetchone()[0] else None

    def register(
        self,
        name: str,
        digest: str,
        preprocessor_digest: str,
        *,
        run: str = "",
        metrics: dict[str, dict[str, float]] | None = None,
        facts: dict[str, Any] | None = None,
        who: str,
        aliases: tuple[str, ...] = ("candidate",),
        wandb_version: str | None = None,
    ) -> Version:
        """Add a version, or return the one that already has `digest`; `aliases` then name it.

        Parameters
        ----------
        digest, preprocessor_digest : str
            ``"sha256:<hex>"`` of the bundle and of its preprocessor part.
        run : str
            Name of the run that made it; empty when unknown.
        facts : dict
            What the promotion gate compares: kind, features_digest, libraries.
        """
        checked_name(name.removesuffix(RULES))
        with self._transaction() as db:
            row = db.execute("select version from versions where name = ? and digest = ?", (name, digest)).fetchone()
            if row is None:
                last = db.execute("select max(version) from versions where name = ?", (name,)).fetchone()[0]
                version = 0 if last is None else last + 1
                db.execute(
                    "insert into versions values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(name, version, digest, preprocessor_digest, run, wandb_version),
                        *(json.dumps(metrics or {}), json.dumps(facts or {}), rows.now()),
                    ),
                )
                rows.record(db, Event(name, "register", "", version, None, who, run, False, rows.now()))
            else:
                version = row["version"]
            if wandb_version is not None:
                db.execute(
                    "update versions set wandb_version = ? where name = ? and version = ?",
                    (wandb_version, name, version),
                )
            for alias in aliases:
                rows.point(db, name, alias, version)
            return rows.read(db, name, version)

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, by name and newest first; those of rule sets only by their name."""
        with self._reading() as db:
            if db is None:
                return []
            found = db.execute(
                "select name, version from versions where name = ifnull(?, name) order by name, version desc",
                (name,),
            ).fetchall()
            return [rows.read(db, row["name"], row["version"]) for row in found if name or not is_rules(row["name"])]

    def resolve(self, name: str, reference: str) -> Version:
        """The version that `reference` names: an alias, ``vN``, or a digest of at least 12 hex digits.

        Raises
        ------
        RegistryError
            No version, or more than one, matches it.
        """
        with self._reading() as db:
            found = [] if db is None else rows.find(db, name, reference)
            if db is None or len(found) != 1:
                raise self._unresolved(db, name, reference, found)
            return rows.read(db, name, found[0])

    def digest_of(self, name: str, alias: str) -> str | None:
        """Digest of the bundle that `alias` names, or None: one indexed read, for a service to poll."""
        with self._reading() as db:
            if db is None:
                return None
            row = db.execute(
                "select digest from aliases join versions using (name, version) where name = ? and alias = ?",
                (name, alias),
            ).fetchone()
            return None if row is None else str(row["digest"])

    def digest_beginning(self, name: str, version: str) -> str | None:
        """Digest of a model's bundle that begins with the hexadecimal digits `version`, or None if unknown.

        Raises
        ------
        RegistryError
            Two bundles begin like this.
        """
        with self._reading() as db:
            found = [] if db is None else rows.digests_beginning(db, name, version)
        if len(found) > 1:
            raise RegistryError(f"{name}:{version} could be any of {', '.join(found)}")
        return found[0] if found else None

    def names_in_production(self) -> list[str]:
        """Models of which an alias that decides what is served names a version, by name."""
        with self._reading() as db:
            return [] if db is None else [name for name in rows.names_with(db, self.order) if not is_rules(name)]

    def in_force(self, name: str) -> InForce | None:
        """The alias in force and the digest of its bundle, or None if there is none: for a service to poll."""
        with self._reading() as db:
            if db is None:
                return None
            alias, version = rows.in_force(db, name, self.order)
            return None if version is None else InForce(alias, rows.read(db, name, version).digest)

    def alias_in_force(self, name: str) -> str:
        """The alias that promote and rollback move: the one in force, or the first of all if there is none."""
        found = self.in_force(name)
        return self.order[0] if found is None else found.alias

    def set_wandb_version(self, name: str, digest: str, wandb_version: str) -> None:
        with self._transaction() as db:
            db.execute(
                "update versions set wandb_version = ? where name = ? and digest = ?",
                (wandb_version, name, digest),
            )

    def _unresolved(self, db: sqlite3.Connection | None, name: str, reference: str, found: list[int]) -> RegistryError:
        if len(found) > 1:
            versions = ", ".join(f"v{v}" for v in found)
            return RegistryError(f"{name}:{reference} could be any of {versions}; give more digits")
        names = [] if db is None else [r["name"] for r in db.execute("select distinct name from versions")]
        if name not in names:
            return RegistryError(f"no model {name!r} in the registry; known: {', '.join(sorted(names)) or 'none'}")
        assert db is not None
        aliases = [r["alias"] for r in db.execute("select alias from aliases where name = ? order by 1", (name,))]
        return RegistryError(f"{name} has no version {reference!r}; its aliases: {', '.join(aliases) or 'none'}")

    # Aliases

    def move(
        self,
        name: str,
        reference: str,
        alias: str,
        *,
        who: str,
        why: str,
        forced: bool = False,
    ) -> Version:
        """Let `alias` name the version of `reference`; if that changes what is served, ``previous`` names what was.

        If it already names that version, nothing changes and nothing is recorded.
        """
        if alias not in (*NOT_SERVED, *self.order):
            allowed = ", ".join([*NOT_SERVED, *self.order])
            raise RegistryError(f"alias {alias!r} cannot be set; allowed: {allowed} (FRAUD_MODEL_ALIASES)")
        with self._transaction() as db:
            found = rows.find(db, name, reference)
            if len(found) != 1:
                raise self._unresolved(db, name, reference, found)
            version, before = found[0], rows.target(db, name, alias)
            if version != before:
                _, served = rows.in_force(db, name, self.order)
                rows.point(db, name, alias, version)
                if rows.in_force(db, name, self.order)[1] == served:
                    event = Event(name, "alias", alias, version, before, who, why, forced, rows.now())
                else:
                    event = Event(name, "promote", alias, version, served, who, why, forced, rows.now())
                    if served is not None:
                        rows.point(db, name, "previous", served)
                self._moved(db, event)
            return rows.read(db, name, version)

    def rollback(self, name: str, *, who: str, why: str) -> Version:
        """Let the alias in force name the previous version; ``previous`` then names the one before it.

        Raises
        ------
        RegistryError
            There is no earlier version to go back to.
        """
        with self._transaction() as db:
            alias, before = rows.in_force(db, name, self.order)
            version = rows.target(db, name, "previous")
            if before is None or version is None:
                raise RegistryError(f"{name} has no previous version to roll back to")
            rows.point(db, name, alias, version)
            stack = rows.served_stack(db, name)
            earlier = stack[-3] if len(stack) >= 3 else None
            if earlier is None:
                db.execute("delete from aliases where name = ? and alias = 'previous'", (name,))
            else:
                rows.point(db, name, "previous", earlier)
            self._moved(db, Event(name, "rollback", alias, version, before, who, why, False, rows.now()))
            return rows.read(db, name, version)

    def adopt(self, name: str, targets: dict[str, str | None], *, who: str, why: str) -> bool:
        """Move the aliases as W&B has them: ``{alias: digest or None}``, of registered digests.

        Does nothing while a local move, which is newer, still waits to be sent. Returns whether anything moved.
        """
        with self._transaction() as db:
            if db.execute("select 1 from pending where name = ? and kind = 'alias'", (name,)).fetchone():
                return False
            _, before = rows.in_force(db, name, self.order)
            changed = False
            for alias, digest in targets.items():
                found = [None] if digest is None else rows.find(db, name, digest)
                if found[0] != rows.target(db, name, alias):
                    changed = True
                    rows.point(db, name, alias, found[0])
            alias, version = rows.in_force(db, name, self.order)
            if version not in (before, None):
                rows.record(db, Event(name, "follow", alias, version, before, who, why, False, rows.now()))
            return changed

    def events(self, name: str | None = None) -> list[Event]:
        """What happened, newest first."""
        with self._reading() as db:
            if db is None:
                return []
            found = db.execute("select * from events where name = ifnull(?, name) order by id desc", (name,)).fetchall()
        return [rows.event_of(row) for row in found]

    def note_following(self, name: str, error: str) -> None:
        """Record a look at where W&B's aliases point, for a service to show; `error` is empty when it went well."""
        with self._transaction() as db:
            db.execute("insert or replace into following values (?, ?, ?)", (name, rows.now(), error))

    def following(self, name: str) -> FollowStatus | None:
        """The last look at W&B's aliases of this model, or None if there was none."""
        with self._reading() as db:
            if db is None or not db.execute("select 1 from sqlite_master where name = 'following'").fetchone():
                return None
            row = db.execute("select checked, error from following where name = ?", (name,)).fetchone()
            return None if row is None else FollowStatus(row["checked"], row["error"])

    # What has not been sent to W&B yet

    def pend_run(self, name: str, payload: dict[str, Any]) -> int:
        """Queue a run with its artifacts, once by its ``payload["key"]``; the caller put its files in the outbox."""
        with self._transaction() as db:
            known = db.execute(
                "select id from pending where kind = 'run' and payload ->> 'key' = ?", (payload["key"],)
            ).fetchone()
            if known is None:
                return rows.pend(db, name, "run", payload)
            db.execute("update pending set payload = ? where id = ?", (json.dumps(payload), known["id"]))
            return int(known["id"])

    def record_use(
        self, name: str, reference: str, kind: str, facts: dict[str, Any], *, who: str, key: str = ""
    ) -> bool:
        """Queue the record of a run that used a version: a backtest, or a service in production.

        Parameters
        ----------
        key : str
            Recorded only once per registry under this key; empty: recorded each time.

        Returns
        -------
        bool
            Whether it is new.

        Raises
        ------
        RegistryError
            There is no such version.
        """
        used = self.resolve(name, reference)
        key = key or secrets.token_hex(6)
        with self._reading() as db:
            if db is not None and rows.is_recorded(db, name, key):
                return False
        with self._transaction() as db:
            if rows.is_recorded(db, name, key):
                return False
            rows.record(db, Event(name, "use", "", used.version, None, who, key, False, rows.now()))
            rows.pend(db, name, "use", {"key": key, "kind": kind, "digest": used.digest, "facts": facts})
            return True

    def pending(self) -> list[Pending]:
        """The queued changes, in the order to send them."""
        with self._reading() as db:
            found = [] if db is None else db.execute("select * from pending order by id").fetchall()
        return [rows.pending_of(row) for row in found]

    def delivered(self, pending_id: int) -> None:
        with self._transaction() as db:
            db.execute("delete from pending where id = ?", (pending_id,))

    def failed(self, pending_id: int, error: str) -> None:
        with self._transaction() as db:
            db.execute("update pending set attempts = attempts + 1, last_error = ? where id = ?", (error, pending_id))

    def _moved(self, db: sqlite3.Connection, event: Event) -> None:
        event_id = rows.record(db, event)
        if is_rules(event.name):
            return  # rule sets stay on this machine
        digests: dict[str, str | None] = {}
        for alias in (event.alias,) if event.kind == "alias" else (event.alias, "previous"):
            target = rows.target(db, event.name, alias)
            digests[alias] = None if target is None else rows.read(db, event.name, target).digest
        payload = {
            "key": f"{event.kind}-{event_id}-{event.at}",
            "kind": event.kind,
            "aliases": digests,
            "who": event.who,
            "why": event.why,
            "forced": event.forced,
            "at": event.at,
        }
        rows.pend(db, event.name, "alias", payload)
