"""The rule sets that one worker applies: the one in force for each model, checked against every version it serves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.lists import Lists
from fraud.decisions.rules.sets import Rules, RuleSet
from fraud.models.rule_sets import RuleSets

if TYPE_CHECKING:  # a worker imports it when it loads
    from fraud.models.scorer import Scorer


class ActiveRules:
    """The sets in force, and their rules ready for each model version.

    Parameters
    ----------
    bentoml_home : Path
    max_share : float
        The share of transactions above which a rule is stopped.
    on_stop : callable
        Is called with the model's name and the id of a rule that is stopped.
    hashed : callable, optional
        Returns the keyed hash of an id, where lists hold hashes.

    Attributes
    ----------
    lists : Lists
        What all rules of this worker look into; whoever follows the store changes it, on the event loop.
    """

    def __init__(
        self,
        bentoml_home: Path,
        max_share: float,
        on_stop: Callable[[str, str], None],
        hashed: Callable[[str], str] | None = None,
    ) -> None:
        self.sets = RuleSets(bentoml_home)
        self.lists = Lists(hashed)
        self._max_share = max_share
        self._on_stop = on_stop
        self._in_force: dict[str, RuleSet] = {}
        self._ready: dict[tuple[str, str], RulesInForce] = {}
        self._served: set[tuple[str, str]] = set()

    def wanted(self, models: Iterable[str]) -> dict[str, str]:
        """Return the digests of the sets that the registry has in force, by model."""
        digests = {name: self.sets.in_force(name) for name in models}
        return {name: digest for name, digest in digests.items() if digest is not None}

    def load(self, model: str, digest: str, scorers: Iterable[Scorer]) -> Callable[[], None]:
        """Read a set, check it against these versions of its model, and return what puts it in force.

        Raises
        ------
        RegistryError
            It cannot be read.
        RuleError
            One of the versions cannot decide one of its rules.
        """
        rule_set = self.sets.read(digest)
        ready = {(model, scorer.name.digest): self._prepared(rule_set, scorer) for scorer in scorers}
        return lambda: self._take(model, rule_set, ready)

    def prepare(self, scorer: Scorer) -> None:
        """Check the set in force against a version that is about to be served; raises `RuleError` naming the rule."""
        name = scorer.name
        rule_set = self._in_force.get(name.name)
        if rule_set is not None and (name.name, name.digest) not in self._ready:
            self._ready[name.name, name.digest] = self._prepared(rule_set, scorer)

    def by_version(self, scorers: Iterable[Scorer]) -> Mapping[str, RulesInForce]:
        """Return the rules by the digest of a version: of those that are served, and of those that were until now.

        Rows that a version read before it was replaced are decided by it, and by its rules. Others are forgotten.
        """
        served = {(scorer.name.name, scorer.name.digest) for scorer in scorers}
        self._ready = {key: rules for key, rules in self._ready.items() if key in served | self._served}
        self._served = served
        return {digest: rules for (_, digest), rules in self._ready.items()}

    def _prepared(self, rule_set: RuleSet, scorer: Scorer) -> RulesInForce:
        name = scorer.name.name
        rules = Rules(rule_set, scorer.spec)
        return RulesInForce(rules, self._max_share, lambda rule: self._on_stop(name, rule), self.lists)

    def drop(self, model: str) -> None:
        """Let the model alone decide again."""
        self._in_force.pop(model, None)
        self._ready = {key: rules for key, rules in self._ready.items() if key[0] != model}

    def _take(self, model: str, rule_set: RuleSet, ready: dict[tuple[str, str], RulesInForce]) -> None:
        self._in_force[model] = rule_set
        self._ready = self._ready | ready
