"""Recorded traffic decided again under another rule set, to show what the set would have done."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import TypeVar

import msgspec
import numpy as np

from fraud.decisions.costs import decision_costs
from fraud.decisions.labels import Label, label_in_effect
from fraud.decisions.record import DecisionRecord
from fraud.decisions.rules.effect import (
    FRAUD,
    LEGITIMATE,
    UNKNOWN,
    Indices,
    Numbers,
    Outcome,
    Redecided,
    RuleEffect,
    joined,
    outcome_of,
    redecide,
    rule_effects,
)
from fraud.decisions.rules.lists import Hash, Lists
from fraud.decisions.rules.names import outputs_of
from fraud.decisions.rules.sets import Rules, RuleSet
from fraud.decisions.verdict import ACTIONS
from fraud.errors import DataError, FraudError, RequestError
from fraud.models.bundle import Bundle
from fraud.schema import Row, RowDecoder, Said
from fraud.stores.log import DecisionLog
from fraud.stores.rows import decode_label, decode_record

AT_ONCE = 16_384
DAY_MS = 86_400_000
EXAMPLES = 5
T = TypeVar("T")


class Change(msgspec.Struct):
    """Transactions that would have been decided otherwise, and the ids of some."""

    before: str
    after: str
    count: int
    frauds: int
    legitimate: int
    examples: list[str]


class Effect(msgspec.Struct):
    """What a rule set would have done.

    Attributes
    ----------
    transactions, labelled, frauds : int
    days : float
        From the first to the last of them, at least a day's worth.
    left_out : dict of str to str
        Why decisions of some model versions were left out, by digest.
    before, after : Outcome
        What was decided, and what the set would have decided.
    rules : list of RuleEffect
    changes : list of Change
        The largest first.
    """

    transactions: int
    labelled: int
    frauds: int
    days: float
    left_out: dict[str, str]
    before: Outcome
    after: Outcome
    rules: list[RuleEffect]
    changes: list[Change]


class _Version:
    """A model version, with the rules checked against it."""

    def __init__(self, rule_set: RuleSet, bundle: Bundle, hashed: Hash | None) -> None:
        self.rules = Rules(rule_set, bundle.spec)
        if hashed is not None:  # records have the hashes of personal ids
            for codes in self.rules.literals.values():
                codes |= {hashed(literal): code for literal, code in codes.items()}
        self.policy = bundle.policy
        self.n_features = len(bundle.spec.features)
        self.spec = bundle.spec
        self.decoder = RowDecoder(bundle.spec, max_ahead_ms=2**62)
        self.reads_roles = any(
            text not in ("amount", "hour", "weekday", "customer_id", "merchant_id")
            for fact in self.rules.asked
            for text in ((fact.name, fact.other) if fact.kind == "same" else (fact.name,))
        )

    def row(self, record: DecisionRecord) -> Row:
        """Return a recorded transaction as the rules read it."""
        roles: Mapping[str, Said] = {"merchant_id": record.merchant_id}
        if self.reads_roles:
            with suppress(RequestError):  # a record of an earlier release has no transaction
                roles = self.decoder.decode(record.transaction, "$").roles
        scaled = None if record.scaled_amount is msgspec.UNSET else record.scaled_amount
        return Row(
            record.transaction_id, (), b"", record.event_time_ms, record.customer_id, record.amount, roles, 0, scaled
        )


def rule_effect(
    log: DecisionLog,
    rule_set: RuleSet,
    bundle_of: Callable[[str, str], Bundle],
    rules_of: Callable[[str], RuleSet],
    lists: Lists,
    since_ms: int = 0,
) -> Effect:
    """Decide recorded transactions of a set's model again under it, and compare.

    A membership in a list that the record has is taken from there; others from the lists as they are now.

    Parameters
    ----------
    bundle_of : callable
        Returns the bundle of (name, digest); raises a `FraudError` that says why it cannot.
    rules_of : callable
        Returns the rule set of a digest, in the same way.
    since_ms : int
        Only decisions made at this time or later, ms since the epoch.

    Raises
    ------
    DataError
        There is no such decision.
    """
    past = PastDecisions(rule_set, bundle_of, rules_of, lists)
    past.read(log, since_ms)
    return past.effect()


class PastDecisions:
    """Decisions decided again under a rule set, part by part, so that a million of them fit into memory.

    The parameters are those of `rule_effect`.

    Attributes
    ----------
    ids : list of str
        The transactions, in the order of `redecided`.
    left_out : dict of str to str
        Why decisions of some model versions were left out, by digest.
    """

    def __init__(
        self,
        rule_set: RuleSet,
        bundle_of: Callable[[str, str], Bundle],
        rules_of: Callable[[str], RuleSet],
        lists: Lists,
    ) -> None:
        self.ids: list[str] = []
        self.left_out: dict[str, str] = {}
        self._rule_set = rule_set
        self._bundle_of = bundle_of
        self._rules_of = rules_of
        self._lists = lists
        self._versions: dict[str, _Version] = {}
        self._then: dict[tuple[str, str], dict[int, int]] = {}
        self._parts: list[Redecided] = []
        self._labels: list[int] = []
        self._amounts: list[float] = []
        self._before: list[int] = []
        self._costs: list[Numbers | None] = []
        self._span = (2**62, 0)

    def read(self, log: DecisionLog, since_ms: int = 0) -> None:
        """Decide again what a log has of the set's model since a time, ms since the epoch."""
        labels = _labels(log)
        entries = ((decode_record(logged.record), key) for logged, key in log.rows())
        of_model = (
            (record, key)
            for record, key in entries
            if record.model_name == self._rule_set.model and record.processing_time_ms >= since_ms
        )
        with _without_collector():
            for some in _parts(of_model, AT_ONCE):
                self._take_all(some, labels)

    def redecided(self) -> Redecided:
        """Return what all of them are under the set."""
        return joined(self._parts)

    def _take_all(self, some: Sequence[tuple[DecisionRecord, str]], labels: dict[str, Label]) -> None:
        for digest in dict.fromkeys(record.model_digest for record, _ in some):
            version = self._version(digest)
            group = [(record, key) for record, key in some if record.model_digest == digest]
            if version is not None:
                self._take(version, [row for row in group if len(row[0].features) == 8 * version.n_features], labels)

    def _take(self, version: _Version, group: Sequence[tuple[DecisionRecord, str]], labels: dict[str, Label]) -> None:
        if not group:
            return
        records = [record for record, _ in group]
        score = np.array([record.decision_score for record in records])
        self._parts.append(redecide(version.rules, version.policy, self._columns(version, records), score))
        label = [_value(labels.get(key)) for _, key in group]
        amount = np.array([record.history_amount for record in records])
        self._costs.append(_costs(np.array(label), amount, version.policy.costs))
        self._labels += label
        self._amounts += amount.tolist()
        self._before += [ACTIONS.index(record.decision) for record in records]
        self.ids += [record.transaction_id or "" for record in records]
        times = [record.processing_time_ms for record in records]
        self._span = min(self._span[0], *times), max(self._span[1], *times)

    def _columns(self, version: _Version, records: Sequence[DecisionRecord]) -> Numbers:
        rules = version.rules
        columns = np.empty((len(records), rules.width + rules.n_facts))
        X = np.frombuffer(b"".join([record.features for record in records]), "<f8").reshape(len(records), -1)
        columns[:, : version.n_features] = X
        columns[:, version.n_features : rules.width] = [
            outputs_of(record.fraud_probability, record.anomaly) for record in records
        ]
        if rules.n_facts:
            columns[:, rules.width :] = [
                self._facts(version, record, x) for record, x in zip(records, X.tolist(), strict=True)
            ]
        return columns

    def _facts(self, version: _Version, record: DecisionRecord, x: list[float]) -> list[float]:
        facts = version.rules.facts(version.row(record), x, self._lists)
        if record.ruling is not msgspec.UNSET and record.ruling.facts:
            for at, then in self._recorded(version, record.model_digest, record.ruling.rules).items():
                facts[at] = record.ruling.facts[then]
        return facts

    def _recorded(self, version: _Version, model: str, digest: str) -> dict[int, int]:
        """Return which memberships a record has, decided under the set `digest`: place here to place there."""
        known = self._then.get((model, digest))
        if known is None:
            known = {}
            try:
                then = Rules(self._rules_of(digest), version.spec)
            except FraudError:
                pass  # today's lists stand in
            else:
                for fact, column in version.rules.asked.items():
                    if fact.kind == "member" and fact in then.asked:
                        known[column - version.rules.width] = then.asked[fact] - then.width
            self._then[model, digest] = known
        return known

    def _version(self, digest: str) -> _Version | None:
        if digest not in self._versions and digest not in self.left_out:
            try:
                bundle = self._bundle_of(self._rule_set.model, digest)
                self._versions[digest] = _Version(self._rule_set, bundle, self._lists.hashed)
            except FraudError as error:
                self.left_out[digest] = error.message
        return self._versions.get(digest)

    def effect(self) -> Effect:
        if not self._parts:
            why = "; ".join(f"{digest}: {reason}" for digest, reason in self.left_out.items())
            raise DataError(f"there is no decision of {self._rule_set.model} to decide again{': ' * bool(why)}{why}")
        now = self.redecided()
        label, amount, before = np.array(self._labels), np.array(self._amounts), np.array(self._before)
        known = [costs for costs in self._costs if costs is not None]
        costs = np.concatenate(known, axis=1) if len(known) == len(self._costs) else None
        days = max((self._span[1] - self._span[0]) / DAY_MS, 1.0)
        rules = next(iter(self._versions.values())).rules
        return Effect(
            len(label),
            int((label != UNKNOWN).sum()),
            int((label == FRAUD).sum()),
            days,
            self.left_out,
            outcome_of(before, label, amount, costs, days),
            outcome_of(now.action, label, amount, costs, days),
            rule_effects(rules, now, label, amount, costs, days),
            self._changes(before, now.action, label),
        )

    def _changes(self, before: Indices, after: Indices, label: Indices) -> list[Change]:
        changes = []
        for i, old in enumerate(ACTIONS):
            for j, new in enumerate(ACTIONS):
                changed = np.flatnonzero((before == i) & (after == j)) if i != j else ()
                if len(changed):
                    values = label[changed]
                    counts = int((values == FRAUD).sum()), int((values == LEGITIMATE).sum())
                    examples = [self.ids[at] for at in changed[:EXAMPLES]]
                    changes.append(Change(old, new, len(changed), *counts, examples))
        return sorted(changes, key=lambda change: -change.count)


def _labels(log: DecisionLog) -> dict[str, Label]:
    """Return the label in effect of each decision that has one."""
    found: dict[str, list[Label]] = {}
    for logged, key in log.labels():
        found.setdefault(key, []).append(decode_label(logged.record))
    return {key: label for key, several in found.items() if (label := label_in_effect(several)) is not None}


def _value(label: Label | None) -> int:
    if label is None or label.is_fraud is None:
        return UNKNOWN
    return FRAUD if label.is_fraud else LEGITIMATE


def _costs(label: Indices, amount: Numbers, costs: dict[str, float]) -> Numbers | None:
    """Return what each of `ACTIONS` costs; NaN for a challenge, of which a policy has no cost."""
    if not costs:
        return None
    by_policy = decision_costs(label == FRAUD, amount, costs)
    return np.vstack([by_policy, np.full((len(ACTIONS) - len(by_policy), len(label)), np.nan)])


@contextmanager
def _without_collector() -> Iterator[None]:
    """Hold the garbage collector back: it looks for cycles, of which records have none, at a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parts(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    while some := list(islice(rows, size)):
        yield some
