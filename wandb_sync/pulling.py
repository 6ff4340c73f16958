"""Brings versions from W&B into the local Bento store and registry: once, or by polling."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from fraud.errors import BundleError, FraudError, RegistryError
from fraud.models import gate
from fraud.models.bundle import PREPROCESSOR_FILES, model_files, read_manifest, short
from fraud.models.lifecycle import Lifecycle
from wandb_sync.client import WandbClient, WandbMissing, WandbOffline, WandbUnreachable
from wandb_sync.scratch import scratch
from wandb_sync.settings import WandbSettings

DIGEST = re.compile(r"(sha256:)?[0-9a-f]{12,64}")
log = logging.getLogger(__name__)


class Pulling:
    """Imports versions; on any failure, store and registry stay as they were."""

    def __init__(self, settings: WandbSettings, local: Lifecycle, client: WandbClient) -> None:
        self.settings = settings
        self.local = local
        self.registry = local.registry
        self.store = local.store
        self.client = client

    def pull(self, name: str, reference: str) -> str:
        """Bring a version into the Bento store and the local registry; returns its store tag.

        `reference` is an alias, ``vN`` or a digest: W&B's where it answers, else the local registry's. A version in the
        store is not downloaded again; for a digest in the store W&B is not asked.
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

    def follow(self, name: str) -> str:
        """Look up the version that the alias in force names, on W&B or here, and import it; returns its store tag.

        For a running service: the time is bounded, and on any error store and registry stay as they were and the
        registry records the error. A local change not yet sent to W&B takes precedence over W&B.
        """
        try:
            tag, unanswered = self._follow(name)
        except FraudError as error:
            self.registry.note_following(name, error.message)
            raise
        self.registry.note_following(name, unanswered)
        return tag

    def _follow(self, name: str) -> tuple[str, str]:
        """The store tag to serve, and why W&B gave no answer; empty if it did."""
        unanswered = ""
        if not any(item.name == name and item.kind == "alias" for item in self.registry.pending()):
            try:
                targets = self._in_force(name)
            except (WandbOffline, WandbUnreachable) as error:
                unanswered = error.message
                log.warning("following the local registry: %s", unanswered)
            else:
                if targets:
                    self.registry.adopt(name, targets, who="W&B", why="its alias was moved")
        alias = self.registry.alias_in_force(name)
        known = self.registry.resolve(name, alias)
        if not self.store.holds(name, known.digest):
            raise BundleError(f"{known} is not in the Bento store, or is damaged there: fraud pull {name}:{alias}")
        return f"{name}:{short(known.digest)}", unanswered

    def _in_force(self, name: str) -> dict[str, str | None]:
        """Where W&B's aliases point, up to the one in force: ``{alias: digest or None}``; empty if none is there."""
        order = self.registry.order
        alias = order[0]
        if len(order) > 1:
            alias = self.client.look_up("first_alias", name=name, aliases=list(order)) or order[0]
        found = self._fetch(name, [alias, "previous"])
        return {**dict.fromkeys(order[: order.index(alias)]), **found} if found[alias] is not None else {}

    def _held(self, name: str, reference: str) -> str | None:
        """The store tag of a version that registry and store have, or None."""
        try:
            known = self.registry.resolve(name, reference)
        except RegistryError:
            return None
        return f"{name}:{short(known.digest)}" if self.store.holds(name, known.digest) else None

    def _fetch(self, name: str, references: list[str]) -> dict[str, str | None]:
        """Bundle digests of W&B's versions, each of them now in the store and the registry; None: no such version."""
        with scratch(self.settings.home) as folder:
            found = self._download(name, references, self.store.versions(name), folder)
            damaged = [
                reference
                for reference, version in found.items()
                if version and not (folder / str(version["bundle_digest"])).is_dir()
                if not self.store.holds(name, str(version["bundle_digest"]))
            ]
            if damaged:
                self._download(name, damaged, [], folder)
            for version in found.values():
                if version is not None:
                    self._take(name, version, folder)
        return {ref: None if version is None else str(version["bundle_digest"]) for ref, version in found.items()}

    def _download(
        self, name: str, references: list[str], held: list[str], folder: Path
    ) -> dict[str, dict[str, Any] | None]:
        found: dict[str, dict[str, Any] | None] = self.client.transfer(
            "fetch",
            name=name,
            references=references,
            held=held,
            into=str(folder),
            files={"model": model_files(), "preprocessor": list(PREPROCESSOR_FILES)},
        )
        return found

    def _take(self, name: str, found: dict[str, Any], downloads: Path) -> None:
        """Import a downloaded version unless the store has it, and register its W&B metadata."""
        digest, metadata = found["bundle_digest"], found["metadata"]
        if not isinstance(digest, str):
            raise BundleError(f"{name}:{found['version']} on W&B was not pushed by this project: no bundle digest")
        model, preprocessor = downloads / digest / "model", downloads / digest / "preprocessor"
        labels = {"run": metadata.get("run", ""), "wandb": f"{name}:{found['version']}"}
        tag = f"{name}:{short(digest)}"
        if model.is_dir():
            self.local.import_parts(name, digest, model, preprocessor, labels)
        self.store.label(tag, labels)
        _, manifest = read_manifest(self.store.bundle_paths(tag)[0])
        self.registry.register(
            name,
            digest,
            manifest.preprocessor_digest,
            run=metadata.get("run", ""),
            metrics=metadata["metrics"],
            facts=gate.facts_of(manifest),
            who="W&B",
            aliases=(),
            wandb_version=found["version"],
        )
