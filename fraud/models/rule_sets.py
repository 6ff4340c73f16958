"""The rule sets of one machine: files under their digests, versions and aliases in the registry.

The set of a model is registered under the model's name and `RULES`, and lives as a model does: saved as candidate,
promoted to production, rolled back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fraud.decisions.rules.sets import Rules, RuleSet, read_rule_set
from fraud.errors import RegistryError, RuleError
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import short
from fraud.models.names import RULES, checked_name
from fraud.models.registry import PRODUCTION, Registry
from fraud.models.registry_rows import Version
from fraud.schema import FeatureSpec


class RuleSets:
    """Saves, promotes and reads rule sets.

    Parameters
    ----------
    bentoml_home : Path
        Files are in its folder ``fraud/rules``, the registry is ``fraud/registry.db``.
    order : sequence of str
        Aliases of the model version to serve, as in `Registry`; a set in force always has the alias ``production``.
    """

    def __init__(self, bentoml_home: Path, order: Sequence[str] = PRODUCTION) -> None:
        self.folder = bentoml_home / "fraud" / "rules"
        self.registry = Registry.beside(bentoml_home)
        self._models = Registry.beside(bentoml_home, order)
        self.store = BentoStore(bentoml_home)

    def read(self, digest: str) -> RuleSet:
        """Return the set with a digest.

        Raises
        ------
        RegistryError
            It is not here, or its file is not what was saved.
        """
        path = self._path(digest)
        try:
            found = read_rule_set(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, RuleError) as error:
            raise RegistryError(f"the rule set {digest} cannot be read: {error}") from None
        if found.digest != digest:
            raise RegistryError(f"the rule set in {path} is not {digest}: its file was changed")
        return found

    def save(self, rule_set: RuleSet, *, who: str) -> Version:
        """Check a set against its model, store it, and register it as candidate; an unchanged one makes no new version.

        Raises
        ------
        RuleError
            The model cannot decide one of its rules.
        RegistryError
            There is no version of the model to check it against.
        """
        checked_name(rule_set.model, what="model of the rule set")
        self.check(rule_set)
        path = self._path(rule_set.digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(rule_set.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        return self.registry.register(rule_set.model + RULES, rule_set.digest, "", who=who)

    def check(self, rule_set: RuleSet) -> Rules:
        """Return a set checked against the version of its model that is in force, or else the latest one."""
        name = rule_set.model
        served = self._models.in_force(name)
        return Rules(rule_set, self.specification(name, self._latest(name) if served is None else served.digest))

    def specification(self, name: str, digest: str) -> FeatureSpec:
        """Return the feature specification of a model version in the Bento store."""
        return self.store.read(f"{name}:{short(digest)}", digest).spec

    def in_force(self, model: str) -> str | None:
        """Return the digest of the set that decides on a model's transactions, or None."""
        return self.registry.digest_of(model + RULES, "production")

    def promote(self, model: str, reference: str, *, who: str, why: str) -> Version:
        """Put a set in force, once it is checked against the model in production.

        Raises
        ------
        RuleError
            The model cannot decide one of its rules.
        """
        wanted = self.registry.resolve(model + RULES, reference)
        self.check(self.read(wanted.digest))
        return self.registry.move(wanted.name, wanted.digest, "production", who=who, why=why)

    def rollback(self, model: str, *, who: str, why: str) -> Version:
        """Put the set before back in force."""
        previous = self.registry.digest_of(model + RULES, "previous")
        if previous is not None:
            self.check(self.read(previous))
        return self.registry.rollback(model + RULES, who=who, why=why)

    def expect_names(self, model: str, digest: str) -> None:
        """Refuse a model version that lacks what the set in force uses.

        Raises
        ------
        RegistryError
            Names the rules that it cannot decide.
        """
        in_force = self.in_force(model)
        if in_force is None:
            return
        try:
            Rules(self.read(in_force), self.specification(model, digest))
        except RuleError as error:
            raise RegistryError(
                f"{model}:{short(digest)} cannot decide the rules in force ({in_force}): {error.message}"
            ) from None

    def _latest(self, name: str) -> str:
        versions = self.registry.versions(name)
        if not versions:
            raise RegistryError(
                f"no version of the model {name!r} is registered here, to check its rules against; "
                "import one, or check the file against a bundle with --bundle"
            )
        return versions[0].digest

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest.removeprefix('sha256:')}.json"
