"""Rule sets: the file that a team writes, and the set checked against one model's specification, ready to decide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

from fraud.decisions.policy import Action
from fraud.decisions.rules.checker import check
from fraud.decisions.rules.lists import ListName, Lists
from fraud.decisions.rules.names import Facts, Names
from fraud.decisions.rules.rowwise import row_function
from fraud.decisions.rules.tree import Condition, Definite, definitely
from fraud.errors import RuleError
from fraud.refusals import split_path
from fraud.schema import FeatureSpec, Row

MAX_RULES = 1000
MAX_SET_BYTES = 1_048_576
SHOWN_FAULTS = 20
MODEL = "model"
"""In `decided_by`: no rule decided."""
PRECEDENCE: tuple[Action | None, ...] = ("approve", "decline", "review", "challenge", None)
"""Which of several rules that fire decides: the first outcome in this order; None stands for rules that adjust odds."""

RuleId = Annotated[str, Meta(pattern="^[a-z][a-z0-9_]{0,63}$", description="lower-case letters, digits and _")]
Moment = Annotated[datetime, Meta(tz=True)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One rule: a condition, and either an outcome or a factor for the odds of fraud.

    Attributes
    ----------
    id : str
        Names the rule in answers, records and metrics.
    when : str
        An expression; see `fraud.decisions.rules.syntax`. The rule fires only when it is definitely true.
    outcome : optional
        ``approve``, ``challenge``, ``review`` or ``decline``.
    odds : float, optional
        Instead of an outcome: the odds of fraud are multiplied by it before the model's thresholds are applied; from
        1e-6 to 1e6.
    priority : int
        Of rules with the same outcome, the one with the greatest priority is named as the one that decided.
    enabled, shadow : bool
        A shadow rule is evaluated and recorded, and decides nothing.
    valid_from, valid_until : datetime, optional
        The rule fires at transactions that arrive in between, from the first and before the second.
    max_share : float, optional
        Share of the transactions above which the rule is stopped, in place of the setting.
    """

    id: RuleId
    when: str
    description: Annotated[str, Meta(max_length=2000)] = ""
    outcome: Action | None = None
    odds: Annotated[float, Meta(ge=1e-6, le=1e6)] | None = None
    priority: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0
    enabled: bool = True
    shadow: bool = False
    valid_from: Moment | None = None
    valid_until: Moment | None = None
    max_share: Annotated[float, Meta(gt=0, le=1)] | None = None
    owner: Annotated[str, Meta(max_length=128)] = ""


class RuleSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The rules of one model.

    Attributes
    ----------
    model : str
        The name of the model whose transactions the rules decide.
    lists : tuple of str
        The lists that the rules look into; what is on them changes at any time.
    """

    model: Annotated[str, Meta(min_length=1, max_length=64)]
    description: Annotated[str, Meta(max_length=2000)] = ""
    lists: Annotated[tuple[ListName, ...], Meta(max_length=100)] = ()
    rules: Annotated[tuple[Rule, ...], Meta(max_length=MAX_RULES)] = ()

    def encode(self) -> bytes:
        """Return the set as JSON; equal sets have equal bytes."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        """``sha256:`` and the digest of `encode`."""
        return f"sha256:{sha256(self.encode()).hexdigest()}"


def read_rule_set(text: str) -> RuleSet:
    """Return the rule set that a file of YAML or JSON holds; its expressions are checked by `Rules`.

    Raises
    ------
    RuleError
        Says what is wrong, and where.
    """
    if len(text) > MAX_SET_BYTES:
        raise RuleError(f"a rule set of {len(text)} characters; at most {MAX_SET_BYTES} are allowed")
    try:
        if text.lstrip().startswith("{"):
            rule_set = msgspec.json.decode(text, type=RuleSet)
        else:  # a safe loader, which also refuses aliases and repeated keys
            rule_set = msgspec.convert(yaml.load(text, Loader=_Loader), RuleSet)
    except msgspec.ValidationError as error:
        message, path = split_path(str(error))
        raise RuleError(message, path) from None
    except (msgspec.DecodeError, yaml.YAMLError) as error:
        raise RuleError(f"no rule set: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RuleError("no rule set: it is nested too deeply") from None
    expect_whole(rule_set)
    return rule_set


def expect_whole(rule_set: RuleSet) -> None:
    """Raise `RuleError` where a set contradicts itself; its expressions are checked by `Rules`."""
    seen: set[str] = set()
    for i, rule in enumerate(rule_set.rules):
        path = f"$.rules[{i}]"
        if (rule.outcome is None) == (rule.odds is None):
            raise RuleError(f"rule {rule.id} needs an outcome or odds, and not both", path)
        if rule.id in seen or rule.id == MODEL:
            taken = "is kept for decisions of the model" if rule.id == MODEL else "is given twice"
            raise RuleError(f"the id {rule.id} {taken}", f"{path}.id")
        if rule.valid_from and rule.valid_until and rule.valid_from >= rule.valid_until:
            raise RuleError(f"rule {rule.id} ends before it begins", f"{path}.valid_until")
        seen.add(rule.id)


class Rules:
    """A rule set checked against one model's specification.

    Parameters
    ----------
    rule_set : RuleSet
    spec : FeatureSpec

    Attributes
    ----------
    rules : tuple of Rule
        The enabled ones, in the order in which they decide.
    conditions : tuple of Condition
        Theirs.
    asked : dict of Fact to int
        What the set asks of a request, each with its column; `facts` reads their values from a row.
    literals : dict of str to dict of str to float
        The code of each literal that a text is compared with, by the name of the text.
    width : int
        How many columns come from the model; the set's own facts follow.
    bounds : list of (float, float), width
        The least and the greatest value of each of those columns, as the model's specification states them.

    Raises
    ------
    RuleError
        Names every rule that this model cannot decide, with the place in its expression.
    """

    def __init__(self, rule_set: RuleSet, spec: FeatureSpec) -> None:
        self.rule_set = rule_set
        self.digest = rule_set.digest
        facts = Facts(Names(spec, rule_set.lists))
        checked: list[tuple[Rule, Condition]] = []
        faults: list[RuleError] = []
        for i, rule in enumerate(rule_set.rules):
            try:
                checked.append((rule, check(rule.when, facts)))
            except RuleError as error:
                faults.append(RuleError(f"rule {rule.id}: {error.message}", f"$.rules[{i}].when"))
        if faults:
            raise _joined(faults)
        enabled = sorted(
            (pair for pair in checked if pair[0].enabled),
            key=lambda p: (PRECEDENCE.index(p[0].outcome), -p[0].priority),
        )
        self.rules = tuple(rule for rule, _ in enabled)
        self.conditions = tuple(condition for _, condition in enabled)
        self.definite: tuple[Definite, ...] = tuple(map(definitely, self.conditions))
        self.width = facts.names.width
        self.asked, self.literals = facts.asked, facts.literals
        self.n_facts = len(facts.asked)
        self.fired = row_function(self.definite)
        self.bounds = facts.names.bounds
        self.facts = facts.reader()
        self._has_validity = any(rule.valid_from or rule.valid_until for rule in self.rules)

    def columns(self, row: Row, x: list[float], outputs: Sequence[float], lists: Lists) -> list[float]:
        """Return what the rules read of a row: its `x` of `X`, the model's outputs, and the set's facts."""
        return [*x, *outputs, *self.facts(row, x, lists)]

    def valid(self, fired: list[int], now_ms: int) -> list[int]:
        """Return those of the rules that fired which are valid at a time, ms since the epoch."""
        if not self._has_validity:
            return fired
        return [i for i in fired if _is_valid(self.rules[i], now_ms)]


def _is_valid(rule: Rule, now_ms: int) -> bool:
    return (rule.valid_from is None or rule.valid_from.timestamp() * 1000 <= now_ms) and (
        rule.valid_until is None or now_ms < rule.valid_until.timestamp() * 1000
    )


def _joined(faults: list[RuleError]) -> RuleError:
    if len(faults) == 1:
        return faults[0]
    more = len(faults) - SHOWN_FAULTS
    shown = "; ".join(fault.message for fault in faults[:SHOWN_FAULTS])
    return RuleError(shown + (f"; and {more} more" if more > 0 else ""), faults[0].path)


class _Loader(yaml.SafeLoader):
    """Reads plain YAML: without aliases, which can make a small text huge, and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise yaml.YAMLError(f"line {line}: an alias (*) is not taken here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {str(key)[:60]!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # YAML 1.1 takes 1e-3, without a point, for a text
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
