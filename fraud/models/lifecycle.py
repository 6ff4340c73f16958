"""The life of a model version on this machine: imported, promoted, challenged, rolled back; works without a network."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fraud.errors import BundleError, RegistryError
from fraud.models import gate
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import read_manifest
from fraud.models.libraries import installed_libraries
from fraud.models.registry import PRODUCTION, Event, Registry, Version
from fraud.models.rule_sets import RuleSets
from fraud.models.run_folder import RunFolder


class Lifecycle:
    """The Bento store and the registry of one machine, changed together.

    Parameters
    ----------
    bentoml_home : Path
        The store is its folder ``models``, the registry is ``fraud/registry.db``.
    order : sequence of str
        Aliases of the version to serve; the first that names a version is in force.
    """

    def __init__(self, bentoml_home: Path, order: Sequence[str] = PRODUCTION) -> None:
        self.registry = Registry.beside(bentoml_home, order)
        self.store = BentoStore(bentoml_home)
        self.rule_sets = RuleSets(bentoml_home, order)

    def import_run(self, run: RunFolder) -> None:
        """Verify a finished run's bundle and import it into the store; repeating changes nothing.

        Raises
        ------
        BundleError
            It is damaged, or scores differently than in training.
        """
        manifest = run.bundle.manifest
        if not self.store.holds(manifest.name, run.bundle.digest):
            _verify(run.bundle_path)
            self.store.import_bundle(run.bundle_path, {"run": run.run_id})

    def register_run(self, run: RunFolder, aliases: tuple[str, ...]) -> Version:
        """Register an imported bundle as a version with these aliases; an unchanged one makes no new version."""
        manifest = run.bundle.manifest
        return self.registry.register(
            manifest.name,
            run.bundle.digest,
            manifest.preprocessor_digest,
            run=run.run_id,
            metrics=run.facts["metrics"],
            facts=gate.facts_of(manifest),
            who=who_am_i(),
            aliases=aliases,
        )

    def import_parts(self, name: str, digest: str, model: Path, preprocessor: Path, labels: Mapping[str, str]) -> None:
        """Verify a bundle in two folders, which must be `digest` of `name`, and import it into the store.

        Raises
        ------
        BundleError
            It is damaged, another bundle, or scores differently than in training.
        """
        arrived, manifest = read_manifest(model)
        if arrived != digest or manifest.name != name:
            raise BundleError(f"this should be {name}, bundle {digest}; {manifest.name}, bundle {arrived} arrived")
        _verify(model, preprocessor)
        self.store.import_bundle(model, labels, preprocessor)

    def challenge(self, name: str, reference: str, *, why: str) -> Version:
        """Let ``challenger`` name the version to compare with production."""
        return self.registry.move(name, reference, "challenger", who=who_am_i(), why=why)

    def promote(
        self,
        name: str,
        reference: str,
        *,
        why: str,
        force: bool = False,
        metric: str = "average_precision",
        alias: str | None = None,
    ) -> Version:
        """Move the alias in force, or `alias`, to a local version that passes the gate, or is forced with a reason.

        The gate compares it with the version that is served now, whichever alias moves.

        Raises
        ------
        GateFailed
            The version is worse than the one in production, or incompatible with it or with this machine.
        RegistryError
            It lacks what the rules in force use; --force does not help: change the rules first.
        """
        candidate = self.registry.resolve(name, reference)
        if not self.store.holds(name, candidate.digest):
            raise BundleError(f"{candidate} is not in the Bento store, or is damaged there: fraud pull {candidate}")
        self.rule_sets.expect_names(name, candidate.digest)
        if force and not why.strip():
            raise RegistryError("a forced promotion needs a reason: --why")
        in_force = self.registry.in_force(name)
        production = self.registry.resolve(name, in_force.digest) if in_force else None
        reasons = gate.check(candidate, production, installed_libraries(), metric)
        if reasons and not force:
            raise gate.GateFailed(candidate, reasons)
        recorded = f"{why} (gate: {'; '.join(reasons)})" if reasons else why
        moved = alias or self.registry.alias_in_force(name)
        return self.registry.move(name, candidate.digest, moved, who=who_am_i(), why=recorded, forced=bool(reasons))

    def rollback(self, name: str, *, why: str) -> Version:
        """Put the previous version back into production; whole in the Bento store, and fit for the rules in force."""
        digest = self.registry.digest_of(name, "previous")
        if digest is not None and not self.store.holds(name, digest):
            previous = self.registry.resolve(name, digest)
            raise BundleError(f"{previous} is not in the Bento store, or is damaged there: fraud pull {previous}")
        if digest is not None:
            self.rule_sets.expect_names(name, digest)
        return self.registry.rollback(name, who=who_am_i(), why=why)

    def moves(self, name: str) -> list[dict[str, Any]]:
        """Who moved an alias of a model on this machine, when and why, newest first."""
        return [as_record(event) for event in self.registry.events(name) if event.alias]


def _verify(bundle: Path, preprocessor: Path | None = None) -> None:
    """Check a bundle and score its golden rows; raises `BundleError`."""
    from fraud.models.scorer import Scorer  # takes a second to import, and a rollback needs none of it

    Scorer.load(bundle, preprocessor)


def who_am_i() -> str:
    """Return who moves an alias: user and host."""
    return f"{user_name()}@{socket.gethostname()}"


def user_name() -> str:
    """Return the user's name; the user's number if it has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


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
