"""`fraud rules`: check a rule set, save it, put it in force, take it back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
import yaml
from rich.console import Console
from rich.table import Table

from fraud.cli.audit import log_of
from fraud.cli.effects import show_effect
from fraud.decisions.rules.lint import warnings_of
from fraud.decisions.rules.lists import Lists
from fraud.decisions.rules.sets import Rules, RuleSet, read_rule_set
from fraud.errors import RegistryError, RuleError
from fraud.models.bundle import read_bundle, short
from fraud.models.lifecycle import who_am_i
from fraud.models.names import RULES, checked_name
from fraud.models.rule_sets import RuleSets
from fraud.settings import ModelSettings, Settings
from fraud.stores.lists import open_lists
from fraud.stores.opening import StoreOptions
from fraud.stores.personal import hash_of

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False, markup=False)

File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A rule set, YAML or JSON; docs/rules.md.")]
Name = Annotated[str, typer.Argument(metavar="MODEL", help="The model whose transactions the rules decide.")]
Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.")]
Reference = Annotated[
    str, typer.Argument(metavar="MODEL:REF", help="REF is an alias (candidate), a version (v3) or a digest.")
]


@app.command()
def check(
    file: File,
    bundle: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Check it against the model in this bundle folder."),
    ] = None,
) -> None:
    """Check a rule set against its model: names, types, categories, places of faults; exit 1 when it cannot serve.

    The model is the version in production, or else the latest one; --bundle names another.
    """
    with _named(file):
        rule_set = _read(file)
        rules = _sets().check(rule_set) if bundle is None else Rules(rule_set, read_bundle(bundle).spec)
    table = Table("order", "rule", "outcome", "", "condition", box=None)
    for i, rule in enumerate(rules.rules, 1):
        outcome = rule.outcome or f"odds x {rule.odds:g}"
        table.add_row(str(i), rule.id, outcome, "shadow" if rule.shadow else "", " ".join(rule.when.split()))
    Console(width=max(out.width, 140), highlight=False, markup=False).print(table)
    for warning in warnings_of(rules):
        out.print(f"warning: {warning}", style="yellow")
    off = len(rule_set.rules) - len(rules.rules)
    out.print(f"{len(rules.rules)} rules can serve{f', {off} are not enabled' if off else ''}; digest {rules.digest}")


@app.command()
def save(file: File) -> None:
    """Check a rule set and register it as candidate; saving it again changes nothing."""
    with _named(file):
        version = _sets().save(_read(file), who=who_am_i())
    out.print(
        f"saved {version}, {version.digest}: fraud rules promote {version.name.removesuffix(RULES)}:v{version.version}"
    )


@app.command()
def promote(what: Reference, why: Why = "") -> None:
    """Put a saved rule set in force. Running services follow within seconds, without a failed request."""
    name, _, reference = what.partition(":")
    if not reference:
        raise RegistryError(f"{what!r} names no version; give for example {what}:candidate or {what}:v3")
    version = _sets().promote(checked_name(name), reference, who=who_am_i(), why=why)
    out.print(f"in force: {version}, {version.digest}")


@app.command()
def rollback(model: Name, why: Why = "") -> None:
    """Put the rule set before back in force."""
    version = _sets().rollback(checked_name(model), who=who_am_i(), why=why)
    out.print(f"in force: {version}, {version.digest}")


@app.command("test")
def past_effect(
    file: File,
    since: Annotated[
        str, typer.Option(help="Decisions of the last 90d, 12h or 30m, or made since a date such as 2026-11-01, UTC.")
    ] = "90d",
    out_file: Annotated[Path | None, typer.Option("--out", help="Write everything here as JSON.")] = None,
) -> None:
    """Decide recorded transactions again under a rule set: what each rule, and the set, would have done.

    Reads the decision log and the labels of the service's store beside the running service; nothing is changed.
    Every rule counts as valid; a shadow rule is judged as if it were applied.
    """
    from fraud.checks.rule_effect import rule_effect  # takes a second to import

    settings = Settings.read()
    sets = _sets()
    with _named(file):
        rule_set = _read(file)
        sets.check(rule_set)
    effect = rule_effect(
        log_of(settings),
        rule_set,
        lambda name, digest: sets.store.read(f"{name}:{short(digest)}", digest),
        sets.read,
        _lists_now(settings),
        _since_ms(since),
    )
    if out_file is not None:
        out_file.write_bytes(msgspec.json.format(msgspec.json.encode(effect)))
    show_effect(effect)


@app.command("list")
def list_(model: Name) -> None:
    """List the saved rule sets of a model and who moved them, newest first."""
    sets = _sets()
    table = Table("rule set", "aliases", "digest", "saved", box=None)
    for version in sets.registry.versions(checked_name(model) + RULES):
        table.add_row(str(version), " ".join(version.aliases), version.digest, version.created)
    wide = Console(width=max(out.width, 160), highlight=False, markup=False)
    wide.print(table)
    for event in sets.registry.events(model + RULES):
        if event.alias:
            before = "" if event.before is None else f" from v{event.before}"
            wide.print(f"{event.at} {event.kind}{before} to v{event.version} by {event.who} {event.why}")


@app.command()
def show(what: Reference) -> None:
    """Print a saved rule set as YAML."""
    name, _, reference = what.partition(":")
    sets = _sets()
    version = sets.registry.resolve(checked_name(name) + RULES, reference or "production")
    written = msgspec.to_builtins(sets.read(version.digest), builtin_types=(datetime,))
    typer.echo(yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=110), nl=False)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file, and the place in it, in the error of a rule."""
    try:
        yield
    except RuleError as error:
        raise RuleError(f"{file}: {error.path or '$'}: {error.message}") from None


def _read(file: Path) -> RuleSet:
    return read_rule_set(file.read_text(encoding="utf-8", errors="replace"))


def _sets() -> RuleSets:
    settings = ModelSettings.read()
    return RuleSets(settings.bentoml_home, settings.alias_order)


def _since_ms(since: str) -> int:
    """Return the time, ms since the epoch, that ``90d`` or a date stands for."""
    count, unit = since[:-1], since[-1:]
    if unit in _UNITS_S and count.isdigit():
        return time.time_ns() // 1_000_000 - int(count) * _UNITS_S[unit] * 1000
    try:
        return int(datetime.fromisoformat(since).replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError:
        raise typer.BadParameter(f"--since {since!r}; allowed: 90d, 12h, 30m, or a date such as 2026-11-01") from None


_UNITS_S = {"d": 86_400, "h": 3600, "m": 60}


def _lists_now(settings: Settings) -> Lists:
    """Return the lists as they are now."""
    options = StoreOptions.of(settings)
    lists = Lists(hash_of(options.personal_fields, options.personal_key))
    store = open_lists(settings.store.url, options)
    while changes := store.since(lists.revision):
        lists.apply(changes)
    lists.expire(time.time_ns() // 1_000_000)
    store.close()
    return lists
