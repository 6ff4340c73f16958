"""The past effect of a rule set, as `fraud rules test` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fraud.decisions.rules.effect import Outcome, RuleEffect

if TYPE_CHECKING:
    from fraud.checks.rule_effect import Effect

out = Console(soft_wrap=True, highlight=False, markup=False)
wide = Console(width=max(out.width, 170), highlight=False, markup=False)


def show_effect(effect: Effect) -> None:
    """Print what a rule set would have done: rule by rule, as a whole, and what would change."""
    out.print(
        f"{effect.transactions:,} decisions over {effect.days:.1f} days, {effect.labelled:,} with a label, "
        f"{effect.frauds:,} of them fraud"
    )
    for digest, reason in effect.left_out.items():
        out.print(f"left out, the decisions of {digest}: {reason}", style="yellow")
    wide.print(_rules(effect.rules))
    wide.print(_outcomes(effect.before, effect.after))
    for change in effect.changes:
        labels = f"{change.frauds} fraud, {change.legitimate} legitimate"
        out.print(
            f"{change.before} becomes {change.after}: {change.count:,} ({labels}): {', '.join(change.examples)} …"
        )
    for rule in effect.rules:
        if rule.earns_nothing:
            why = "it never fires" if rule.hits == 0 else f"it saves {rule.saving:,.2f}"
            out.print(f"rule {rule.id} has earned nothing: {why}", style="yellow")


def _rules(rules: list[RuleEffect]) -> Table:
    heads = ("rule", "outcome", "hits", "a day", "decides", "frauds", "legitimate", "precision", "fraud money")
    table = Table(*heads, "legitimate money", "frauds only it finds", "saves", box=None)
    for rule in rules:
        precision = "no labels"
        if rule.precision is not None:
            precision = f"{rule.precision:.1%} [{rule.precision_low:.1%}, {rule.precision_high:.1%}]"
        table.add_row(
            rule.id,
            f"{rule.outcome}{' (shadow)' if rule.shadow else ''}",
            *(f"{rule.hits:,}", f"{rule.hits_a_day:,.1f}", f"{rule.decided:,}"),
            *(f"{rule.frauds:,}", f"{rule.legitimate:,}", precision),
            *(f"{rule.fraud_amount:,.0f}", f"{rule.legitimate_amount:,.0f}", f"{rule.added_frauds:,}"),
            _money(rule.saving),
        )
    return table


def _outcomes(before: Outcome, after: Outcome) -> Table:
    table = Table("", "as decided", "under this set", box=None)
    for action in before.actions:
        table.add_row(action, f"{before.actions[action]:,}", f"{after.actions[action]:,}")
    table.add_row("reviews a day", f"{before.reviews_a_day:,.1f}", f"{after.reviews_a_day:,.1f}")
    for name, one, other in (
        ("frauds not approved", before.frauds_stopped, after.frauds_stopped),
        ("their money", before.fraud_amount_stopped, after.fraud_amount_stopped),
        ("legitimate declined", before.legitimate_declined, after.legitimate_declined),
        ("their money", before.legitimate_amount_declined, after.legitimate_amount_declined),
    ):
        table.add_row(name, f"{one:,.0f}", f"{other:,.0f}")
    table.add_row("cost by the policy", _money(before.cost), _money(after.cost))
    return table


def _money(amount: float | None) -> str:
    return "" if amount is None else f"{amount:,.2f}"
