"""The life of a model version: published, pulled, promoted, rolled back, followed.

Each action is done on this machine first, in the Bento store and the local registry, and W&B is told
afterwards; what it cannot be told now waits in the outbox, in order.
"""

from __future__ import annotations

import fcntl
import getpass
import logging
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fraud.bundle import MANIFEST, MODEL_FILES, PREPROCESSOR_FILES, read_manifest, short
from fraud.errors import BundleError, FraudError, RegistryError
from fraud.registry import Event, Pending, Registry, Version
from wandb_sync import gate
from wandb_sync.client import WandbClient, WandbError, WandbMissing, WandbOffline, WandbUnreachable
from wandb_sync.runs import Outbox, RunFolder, read_run
from wandb_sync.scratch import scratch
from wandb_sync.settings import WandbSettings
from wandb_sync.store import BentoStore

DIGEST = re.compile(r"(sha256:)?[0-9a-f]{12,64}")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What W&B was told, and what still waits and why."""

    delivered: list[Pending]
    waiting: list[Pending]
    reason: str


class Models:
    """Models of one machine: its Bento store, its registry and its outbox, and W&B where there is a key."""

    def __init__(self, settings: WandbSettings) -> None:
        self.settings = settings
        self.registry = Registry(settings.home / "registry.db")
        self.store = BentoStore(settings.bentoml_home)
        self.client = WandbClient(settings)
        self.outbox = Outbox(settings, self.client)

    # From training to the registry

    def log_run(self, run_folder: Path) -> None:
        """Queue a finished run for W&B, without making its model a version of this machine; asks no network."""
        run = read_run(run_folder)
        self.outbox.keep(run)
        self._queue(run, ())

    def publish(self, run_folder: Path, aliases: tuple[str, ...] = ("candidate",)) -> Version:
        """Import a finished run's bundle, register it and queue it for W&B; asks no network.

        An unchanged bundle makes no new version. May be repeated after an interruption at any point.
        """
        run = read_run(run_folder)
        manifest = run.bundle.manifest
        if not self.store.holds(manifest.name, run.bundle.digest):
            verify(run.bundle_path)
            self.store.import_bundle(run.bundle_path, {"run": run.run_id})
        self.outbox.keep(run)
        published = self.registry.register(
            manifest.name,
            run.bundle.digest,
            manifest.preprocessor_digest,
            run=run.run_id,
            metrics=run.facts["metrics"],
            facts=gate.facts_of(manifest),
            who=who_am_i(),
            aliases=aliases,
        )
        self._queue(run, aliases)
        return published

    def _queue(self, run: RunFolder, aliases: tuple[str, ...]) -> None:
        payload = {"key": run.run_id, "aliases": list(aliases), "digest": run.bundle.digest}
        self.registry.pend_run(run.bundle.manifest.name, payload)

    def record_use(self, name: str, reference: str, job_type: str, facts: dict[str, Any]) -> None:
        """Queue a run for W&B that used a version of this machine: a backtest, say, with what came of it."""
        used = self.registry.resolve(name, reference)
        payload = {"key": secrets.token_hex(6), "kind": job_type, "digest": used.digest, "facts": facts}
        self.registry.pend_use(name, payload)

    def send_pending(self) -> Sent:
        """Tell W&B what waits, oldest first, each once.

        Nothing overtakes an earlier change of the same model, except that a run may pass a move that waits for
        it; where W&B does not answer, all the rest waits.
        """
        delivered: list[Pending] = []
        failed: dict[str, Pending] = {}
        reasons: list[str] = []
        with self._sending() as alone:
            if not alone:
                return Sent([], self.registry.pending(), "another process is sending")
            for item in self.registry.pending():
                earlier = failed.get(item.name)
                if earlier is not None and (earlier.kind == "run" or item.kind != "run"):
                    continue
                try:
                    self._send(item)
                except WandbError as error:
                    self.registry.failed(item.id, error.message)
                    reasons.append(error.message)
                    failed[item.name] = item
                    if isinstance(error, (WandbOffline, WandbUnreachable)):
                        break
                else:
                    self.registry.delivered(item.id)
                    if item.kind == "run":
                        self.outbox.drop(item.payload["key"])
                    delivered.append(item)
        return Sent(delivered, self.registry.pending(), "; ".join(reasons))

    def _send(self, item: Pending) -> None:
        if item.kind == "run":
            key, digest = item.payload["key"], item.payload["digest"]
            wandb_version = self.outbox.deliver(key, item.payload["aliases"])
            self.registry.set_wandb_version(item.name, digest, wandb_version)
            if self._held(item.name, digest):
                self.store.label(f"{item.name}:{short(digest)}", {"wandb": f"{item.name}:{wandb_version}"})
        elif item.kind == "alias":
            record = {k: item.payload[k] for k in ("kind", "who", "why", "forced", "at", "aliases")}
            self.client.transfer(
                "move_aliases",
                name=item.name,
                targets=item.payload["aliases"],
                run_id=run_id_of(item.payload["key"]),
                record=record | {"model": item.name},
            )
        else:
            self.client.transfer(
                "log_use",
                run_id=item.payload["key"],
                job_type=item.payload["kind"],
                name=item.name,
                reference=item.payload["digest"],
                config=item.payload["facts"],
            )

    @contextmanager
    def _sending(self) -> Iterator[bool]:
        self.settings.home.mkdir(parents=True, exist_ok=True)
        with (self.settings.home / "send.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    # From W&B to the Bento store

    def pull(self, name: str, reference: str) -> str:
        """Bring a version into the Bento store and the local registry; returns its store tag.

        `reference` is an alias, ``vN`` or a digest: W&B's where it answers, else the local registry's. Nothing
        is downloaded that the store has already, and a digest that it has is not even asked for.
        """
        if DIGEST.fullmatch(reference) and (tag := self._held(name, reference)):
            return tag
        try:
            taken = self._fetch(name, [reference])
        except (WandbOffline, WandbUnreachable) as error:
            tag = self._held(name, reference)
            if tag is None:
                raise
            log.info("the local registry answers for %s:%s: %s", name, reference, error.message)
            return tag
        digest = taken[reference]
        if digest is None:
            raise WandbMissing(f"W&B has no {name}:{reference} in project {self.settings.project}")
        return f"{name}:{short(digest)}"

    def follow(self, name: str, alias: str = "production") -> str:
        """Learn where `alias` points now, on W&B or here, and bring that version in; returns its store tag.

        For a running service: bounded, and whatever it raises, what was in store and registry stays and the
        registry knows what went wrong. A change made here that W&B has not been told yet is newer than what
        W&B says.
        """
        try:
            tag = self._follow(name, alias)
        except FraudError as error:
            self.registry.note_following(name, error.message)
            raise
        self.registry.note_following(name, "")
        return tag

    def _follow(self, name: str, alias: str) -> str:
        if not any(item.name == name for item in self.registry.pending()):
            try:
                targets = self._fetch(name, [alias, "previous"])
            except (WandbOffline, WandbUnreachable) as error:
                log.info("following the local registry: %s", error.message)
            else:
                if targets[alias] is not None:
                    self.registry.adopt(name, targets, who="W&B", why="its alias was moved")
        known = self.registry.resolve(name, alias)
        if not self.store.holds(name, known.digest):
            raise BundleError(f"{known} is not in the Bento store, or is damaged there: fraud pull {name}:{alias}")
        return f"{name}:{short(known.digest)}"

    def _held(self, name: str, reference: str) -> str | None:
        """The store tag of a version that registry and store have, or None."""
        try:
            known = self.registry.resolve(name, reference)
        except RegistryError:
            return None
        return f"{name}:{short(known.digest)}" if self.store.holds(name, known.digest) else None

    def _fetch(self, name: str, references: list[str]) -> dict[str, str | None]:
        """Bundle digests of W&B's versions, each of them now in the store and the registry; None: no such version."""
        held = [version.digest for version in self.registry.versions(name) if self.store.holds(name, version.digest)]
        with scratch(self.settings.home) as folder:
            found: dict[str, dict[str, Any] | None] = self.client.transfer(
                "fetch",
                name=name,
                references=references,
                held=[short(digest) for digest in held],
                into=str(folder),
                files={"model": [MANIFEST, *MODEL_FILES], "preprocessor": list(PREPROCESSOR_FILES)},
            )
            for version in found.values():
                if version is not None:
                    self._take(name, version, folder)
        return {name: None if version is None else str(version["bundle_digest"]) for name, version in found.items()}

    def _take(self, name: str, found: dict[str, Any], downloads: Path) -> None:
        """Import a downloaded version, unless the store has it, and register what W&B says of it."""
        digest, metadata = found["bundle_digest"], found["metadata"]
        if not isinstance(digest, str):
            raise BundleError(f"{name}:{found['version']} on W&B was not pushed by this project: no bundle digest")
        model, preprocessor = downloads / digest / "model", downloads / digest / "preprocessor"
        labels = {"wandb": f"{name}:{found['version']}"}
        tag = f"{name}:{short(digest)}"
        if model.is_dir():
            arrived, manifest = read_manifest(model)
            if arrived != digest or manifest.name != name:
                raise BundleError(f"{name}:{found['version']} should be bundle {digest}; {arrived} arrived")
            verify(model, preprocessor)
            self.store.import_bundle(model, labels, preprocessor)
        self.store.label(tag, labels)
        _, manifest = read_manifest(self.store.bundle_paths(tag)[0])
        self.registry.register(
            name,
            digest,
            manifest.preprocessor_digest,
            run=metadata.get("run", ""),
            metrics=metadata["metrics"],
            facts=gate.facts_of(manifest),
            who=who_am_i(),
            aliases=(),
            wandb_version=found["version"],
        )

    # Aliases

    def challenge(self, name: str, reference: str, *, why: str) -> Version:
        """Let ``challenger`` name a version: the one to compare with production next."""
        return self.registry.move(name, reference, "challenger", who=who_am_i(), why=why)

    def promote(
        self, name: str, reference: str, *, why: str, force: bool = False, metric: str = "average_precision"
    ) -> Version:
        """Move ``production`` to a version of this machine that passes the gate, or is forced for a reason.

        Raises
        ------
        GateFailed
            The version is worse than the one in production, or does not fit it or this machine.
        """
        candidate = self.registry.resolve(name, reference)
        if not self.store.holds(name, candidate.digest):
            raise BundleError(f"{candidate} is not in the Bento store, or is damaged there: fraud pull {candidate}")
        if force and not why.strip():
            raise RegistryError("a forced promotion needs a reason: --why")
        in_production = self.registry.digest_of(name, "production")
        production = self.registry.resolve(name, in_production) if in_production else None
        reasons = gate.check(candidate, production, installed_libraries(), metric)
        if reasons and not force:
            raise gate.GateFailed(candidate, reasons)
        recorded = f"{why} (gate: {'; '.join(reasons)})" if reasons else why
        return self.registry.move(
            name, candidate.digest, "production", who=who_am_i(), why=recorded, forced=bool(reasons)
        )

    def rollback(self, name: str, *, why: str) -> Version:
        """Put the version before back into production; it must be in the Bento store, whole."""
        digest = self.registry.digest_of(name, "previous")
        if digest is not None and not self.store.holds(name, digest):
            previous = self.registry.resolve(name, digest)
            raise BundleError(f"{previous} is not in the Bento store, or is damaged there: fraud pull {previous}")
        return self.registry.rollback(name, who=who_am_i(), why=why)

    def history(self, name: str) -> list[dict[str, Any]]:
        """Who moved an alias, when and why, newest first: from W&B where it answers, and from here."""
        events = [as_record(event) for event in self.registry.events(name) if event.alias]
        seen = {(event["kind"], event["at"]) for event in events}
        try:
            moves = self.client.look_up("moves", name=name)
        except WandbError as error:
            log.info("history of this machine alone: %s", error.message)
        else:
            events += [move for move in moves if (move["kind"], move["at"]) not in seen]
        return sorted(events, key=lambda event: str(event["at"]), reverse=True)

    def lineage(self, name: str) -> list[dict[str, Any]]:
        """Each version on W&B with the run that made it, what that run used, and the runs that use it."""
        found: list[dict[str, Any]] = self.client.look_up("versions", name=name)
        return found


def verify(bundle: Path, preprocessor: Path | None = None) -> None:
    """Audit a bundle and score its golden rows; warn of libraries other than in training.

    Raises
    ------
    BundleError
        A file is missing, changed or foreign, or a golden row comes out otherwise than in training.
    """
    from fraud.scorer import Scorer  # takes a second to import, and a rollback needs none of it

    scorer = Scorer.load(bundle, preprocessor)
    installed = installed_libraries()
    for name, trained in gate.mismatches(scorer.bundle.manifest.libraries, installed).items():
        log.warning(
            "%s was trained with %s %s, installed is %s; its golden rows come out the same",
            scorer.bundle.manifest.name,
            name,
            trained,
            installed.get(name, "none"),
        )


def installed_libraries() -> dict[str, str]:
    """Versions of the libraries that scoring depends on; one that is not installed is left out."""
    found = {}
    for name in gate.LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def who_am_i() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def run_id_of(key: str) -> str:
    """A W&B run id from an outbox key: letters, digits and - only."""
    return "".join(c if c.isalnum() else "-" for c in key)


def as_record(event: Event) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "alias": event.alias,
        "version": None if event.version is None else f"v{event.version}",
        "before": None if event.before is None else f"v{event.before}",
        "who": event.who,
        "why": event.why,
        "forced": event.forced,
        "at": event.at,
    }
