"""The commands of a model's life: import, push, pull, promote, rollback, history, lineage, models."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fraud.errors import FraudError, RegistryError
from fraud.models.bundle import short
from fraud.models.names import checked_name
from fraud.models.registry_rows import Version
from fraud.settings import ModelSettings
from wandb_sync.models import Models, Sent
from wandb_sync.settings import WandbSettings

STILL_WAITING = 75

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True)
wide = Console(width=max(out.width, 160))  # a truncated table is useless

Why = Annotated[str, typer.Option("--why", help="The reason, kept in the history.")]
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A model, such as fraud-transaction.", callback=lambda name: checked_name(name)
    ),
]
NameReference = Annotated[
    str, typer.Argument(metavar="NAME:REF", help="REF is an alias (candidate), a version (v3) or a bundle digest.")
]
RunFolder = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="A run folder that `fraud train` wrote, runs/NAME-STAMP.")
]


@app.command("import")
def import_(run: RunFolder) -> None:
    """Put a finished run's model into the Bento store and the registry, and queue it for W&B.

    Checks every digest and scores the golden rows first. Importing again changes nothing.
    """
    show_version("imported", models().publish(run))


@app.command()
def push(
    run: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="A run folder to import first.")
    ] = None,
    pending: Annotated[bool, typer.Option("--pending", help="Send what waits, and nothing new.")] = False,
) -> None:
    """Send runs, models and moved aliases to W&B, oldest first, each once.

    What cannot be sent is queued; `fraud push --pending` sends it later. Exit code 75: something is still queued.
    """
    if (run is None) != pending:
        raise typer.BadParameter("give a run folder, or --pending")
    all_models = models()
    if run is not None:
        show_version("imported", all_models.publish(run))
    send_queue(all_models)


@app.command()
def pull(what: NameReference) -> None:
    """Bring a version from W&B into the Bento store: download, verify, import.

    A digest that the store already holds is not downloaded; without W&B the local registry is used.
    """
    out.print(models().pull(*split(what)))


@app.command()
def promote(
    what: NameReference,
    why: Why = "",
    force: Annotated[bool, typer.Option("--force", help="Promote although the gate refuses; needs --why.")] = False,
    metric: Annotated[str, typer.Option(help="The metric that the gate compares.")] = "average_precision",
    challenger: Annotated[
        bool, typer.Option("--challenger", help="Move challenger instead, without the gate.")
    ] = False,
    alias: Annotated[
        str | None, typer.Option(help="Move this one of FRAUD_MODEL_ALIASES instead of the one in force.")
    ] = None,
) -> None:
    """Move the alias in force to a version, keeping the one before as previous.

    The alias in force is the first of FRAUD_MODEL_ALIASES (production, if nothing else is set) that names a version.
    Refused when the version is worse than the one served by more than the interval, or incompatible with it.
    """
    if challenger and alias:
        raise typer.BadParameter("give --challenger or --alias, not both")
    all_models = models()
    name, reference = split(what)
    if challenger:
        show_version("challenger:", all_models.challenge(name, reference, why=why))
    else:
        moved = alias or all_models.registry.alias_in_force(name)
        promoted = all_models.promote(name, reference, why=why, force=force, metric=metric, alias=moved)
        show_moved(all_models, moved, promoted)
    send_queue(all_models, needed=False)


@app.command()
def rollback(name: Name, why: Why = "") -> None:
    """Move the alias in force back to the version before. A running service follows at once."""
    all_models = models()
    back = all_models.rollback(name, why=why)
    show_moved(all_models, all_models.registry.alias_in_force(name), back)
    send_queue(all_models, needed=False)


def history(name: str | None) -> None:
    """Show who moved an alias of one model or of all, when and why, newest first."""
    all_models = models()
    names = [name] if name else sorted({version.name for version in all_models.registry.versions()})
    table = Table("when", "model", "what", "alias", "from", "to", "who", "why", box=None)
    for model in names:
        for event in all_models.history(model):
            what = f"{event['kind']} (forced)" if event["forced"] else event["kind"]
            cells = (event.get(part) for part in ("alias", "before", "version", "who", "why"))
            table.add_row(event["at"], model, what, *("" if cell is None else str(cell) for cell in cells))
    wide.print(table)


@app.command()
def follow(
    name: Name,
    every_s: Annotated[float, typer.Option(min=5, help="Seconds between looks, a fifth more or less.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit.")] = False,
) -> None:
    """Poll W&B's alias in force (FRAUD_MODEL_ALIASES) and bring its version to this machine; run it beside a service.

    Each version is downloaded, verified and imported before the registry names it; the service follows the
    registry. A failure is shown, reported in the service's /readyz and metrics, and retried. Each round also sends what
    is queued for W&B, such as the record that a version serves here; with --once it only polls.
    """
    all_models, last = models(), {"look": "", "send": ""}
    while True:
        try:
            said = {"look": all_models.follow(name)}
        except FraudError as error:
            if once:
                raise
            said = {"look": f"what is served stays: {error.message}"}
        if not once:
            said["send"] = "\n".join(as_told(all_models.send_pending(within_s=every_s)))
        for what, line in said.items():
            if line and line != last[what]:
                out.print(line)
        if once:
            return
        last = said
        time.sleep(every_s * random.uniform(0.8, 1.2))


@app.command()
def lineage(name: Name) -> None:
    """Show on W&B, for each version, the run and data that made it and the runs that use it."""
    all_models = models()
    versions = all_models.lineage(name)
    if not versions:
        here = sorted({version.name for version in all_models.registry.versions()})
        project = all_models.settings.project
        raise RegistryError(
            f"W&B's project {project} has no version of a model {name!r}; "
            f"this machine's registry knows {', '.join(here) or 'none'}: `fraud push --pending` sends what waits"
        )
    for version in versions:
        out.print(f"{name}:{version['version']}  {' '.join(version['aliases'])}  bundle {version['bundle_digest']}")
        out.print(f"  made by run {version['logged_by']} from {', '.join(version['from']) or 'nothing recorded'}")
        out.print(f"  with {', '.join(version['beside'])}")
        for use in version["used_by"]:
            out.print(f"  used by run {use['run']} ({use['job_type']})")


@app.command(name="models")
def models_(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME[:REF]", help="One model, or one version of it; all when left out.")
    ] = None,
    production: Annotated[
        bool, typer.Option("--production", help="What is in production alone; exit code 1 where nothing is.")
    ] = False,
) -> None:
    """List the versions in this machine's registry with their aliases, metrics and W&B versions."""
    registry = models().registry
    listed = [registry.resolve(*split(name))] if name and ":" in name else registry.versions(name)
    if production:
        listed = [version for version in listed if registry.alias_in_force(version.name) in version.aliases]
        if not listed:
            raise RegistryError("no model is in production; fraud promote NAME:candidate puts one there")
    table = Table("model", "aliases", "Bento store", "average precision", "W&B", "registered", box=None)
    for version in listed:
        metric = version.metrics.get("average_precision")
        measured = f"{metric['value']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]" if metric else ""
        tag = f"{version.name}:{short(version.digest)}"
        table.add_row(
            str(version), " ".join(version.aliases), tag, measured, version.wandb_version or "waits", version.created
        )
    wide.print(table)


def models() -> Models:
    return Models(WandbSettings.read(), ModelSettings.read().alias_order)


def split(what: str) -> tuple[str, str]:
    name, _, reference = what.partition(":")
    if not reference:
        raise RegistryError(f"{what!r} names no version; give for example {what}:candidate or {what}:v3")
    return checked_name(name), reference


def show_version(what: str, version: Version, moved: str = "") -> None:
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    out.print(f"{what} {version}{aliases}, bundle {version.digest}{moved and f'; the alias {moved} moved'}")


def show_moved(all_models: Models, alias: str, version: Version) -> None:
    """Print which alias moved, and whether it decides what is served."""
    in_force = all_models.registry.alias_in_force(version.name)
    show_version("in production:" if alias == in_force else f"not in force (that is {in_force}):", version, alias)


def send_queue(all_models: Models, needed: bool = True) -> None:
    """Send what is queued, and print what was sent; if `needed`, exit with 75 when something is still queued."""
    sent = all_models.send_pending()
    for line in as_told(sent):
        out.print(line)
    if sent.waiting and needed:
        raise typer.Exit(STILL_WAITING)


def as_told(sent: Sent) -> list[str]:
    lines = [f"W&B has {item.name}: {item.payload.get('kind', 'run and artifacts')}" for item in sent.delivered]
    if sent.waiting:
        lines.append(f"{len(sent.waiting)} change(s) wait for W&B, kept for `fraud push --pending`: {sent.reason}")
    return lines
