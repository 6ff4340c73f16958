"""A rule set in force: decides on rows, and stops a rule that fires on too large a share of them.

A rule that fires on everything, by a slip in its condition, would decline or approve all traffic. Once stopped it
decides nothing in this worker until another set is in force, and the model decides in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from fraud.decisions.anomaly import Severity
from fraud.decisions.policy import Policy
from fraud.decisions.rules.lists import Lists
from fraud.decisions.rules.sets import Rules
from fraud.decisions.verdict import Ruling, Verdict, ruled
from fraud.schema import Row

logger = logging.getLogger("fraud.rules")

FEWEST = 200
"""Transactions before a rule's share is judged."""
WINDOW = 2000
"""Transactions after which counting begins anew."""


class RulesInForce:
    """The rules by which one worker decides on the transactions of one model version.

    Parameters
    ----------
    rules : Rules
    max_share : float
        Share of the transactions, 0 to 1, above which a rule is stopped, unless it has a `max_share` of its own.
    on_stop : callable, optional
        Is called with the id of a rule that is stopped.
    lists : Lists, optional
        As they are in this worker, at any time; empty ones by default.

    Attributes
    ----------
    stopped : set of str
        The ids of the rules that are stopped.
    """

    def __init__(
        self,
        rules: Rules,
        max_share: float = 1.0,
        on_stop: Callable[[str], None] | None = None,
        lists: Lists | None = None,
    ) -> None:
        self.rules = rules
        self._lists = Lists() if lists is None else lists
        self.stopped: set[str] = set()
        self._on_stop = on_stop
        self._shares = [max_share if rule.max_share is None else rule.max_share for rule in rules.rules]
        self._rows = 0
        self._fired = [0] * len(rules.rules)

    def verdict(
        self,
        policy: Policy,
        row: Row,
        x: list[float],
        score: float,
        outputs: Sequence[float],
        now_ms: int,
        severity: Severity | None = None,
    ) -> tuple[Verdict, Ruling]:
        """Return the verdict on a transaction and what the rules said.

        Parameters
        ----------
        x : list of float
            The row of `X`.
        score : float
            The decision score, which the policy's thresholds are on.
        outputs : sequence of float
            What the model says, as `fraud.decisions.rules.names.OUTPUTS` orders it.
        now_ms : int
            When the transaction arrived, ms since the epoch.
        severity : Severity, optional
            Of its anomaly, where one was measured.
        """
        rules = self.rules
        lists = self._lists
        columns = rules.columns(row, x, outputs, lists)
        fired = rules.valid(rules.fired(columns), now_ms)
        self._count(fired)
        snoozed = [rule.id for rule in (rules.rules[i] for i in fired) if lists.snoozed(rule.id, row)] if fired else ()
        return ruled(policy, score, rules, columns, fired, self.stopped, snoozed, lists.revision, severity)

    def _count(self, fired: Sequence[int]) -> None:
        self._rows += 1
        for i in fired:
            self._fired[i] += 1
        if self._rows >= FEWEST:
            for i in fired:
                if self._fired[i] > self._shares[i] * self._rows:
                    self._stop(i)
        if self._rows == WINDOW:
            self._rows, self._fired = 0, [0] * len(self._fired)

    def _stop(self, i: int) -> None:
        rule = self.rules.rules[i]
        if rule.shadow or rule.id in self.stopped:
            return
        self.stopped.add(rule.id)
        logger.error(
            "rule %s fired on %d of %d transactions, more than its share of %g, and is stopped: the model decides in "
            "its place until another rule set is in force",
            rule.id,
            self._fired[i],
            self._rows,
            self._shares[i],
        )
        if self._on_stop is not None:
            self._on_stop(rule.id)
