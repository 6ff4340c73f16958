"""The lifecycle of model versions, synchronized with W&B.

Each action is done on this machine first (`fraud.models.lifecycle`) and sent to W&B afterwards; what cannot be sent now
waits in the outbox, in order.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fraud.models.bundle import short
from fraud.models.lifecycle import Lifecycle, who_am_i
from fraud.models.registry import PRODUCTION, Pending, Version
from fraud.models.run_folder import RunFolder, read_run
from wandb_sync.client import WandbClient, WandbError, WandbOffline, WandbUnreachable
from wandb_sync.pulling import Pulling
from wandb_sync.runs import Outbox
from wandb_sync.settings import WandbSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """The changes sent to W&B, and those still queued, with the reason."""

    delivered: list[Pending]
    waiting: list[Pending]
    reason: str


class Models(Lifecycle):
    """The models of one machine; with a key, their changes are sent to W&B."""

    def __init__(self, settings: WandbSettings, order: Sequence[str] = PRODUCTION) -> None:
        super().__init__(settings.bentoml_home, order)
        self.settings = settings
        self.client = WandbClient(settings)
        self.outbox = Outbox(settings, self.client)
        pulling = Pulling(settings, self, self.client)
        self.pull, self.follow = pulling.pull, pulling.follow

    # From training to the registry

    def log_run(self, run_folder: Path) -> None:
        """Queue a finished run for W&B, without making its model a version of this machine; asks no network."""
        run = read_run(run_folder)
        self.outbox.keep(run)
        self._queue(run, ())

    def publish(self, run_folder: Path, aliases: tuple[str, ...] = ("candidate",)) -> Version:
        """Import a finished run's bundle, register it and queue it for W&B; asks no network.

        An unchanged bundle makes no new version. May be repeated after an interruption at any point.
        """
        run = read_run(run_folder)
        self.import_run(run)
        self.outbox.keep(run)
        published = self.register_run(run, aliases)
        self._queue(run, aliases)
        return published

    def _queue(self, run: RunFolder, aliases: tuple[str, ...]) -> None:
        payload = {"key": run.run_id, "aliases": list(aliases), "digest": run.bundle.digest}
        self.registry.pend_run(run.bundle.manifest.name, payload)

    def record_use(self, name: str, reference: str, job_type: str, facts: dict[str, Any]) -> None:
        """Queue the record of a run that used a version of this machine, such as a backtest with its results."""
        self.registry.record_use(name, reference, job_type, facts, who=who_am_i())

    def send_pending(self, within_s: float = math.inf) -> Sent:
        """Send the queue to W&B, oldest first, each change once; what is not begun within the time limit stays queued.

        Changes of one model keep their order, with two exceptions: a run may pass a move that waits for it, and no
        change waits for the record of a use. If W&B does not answer, the rest stays queued.
        """
        until = time.monotonic() + within_s
        delivered: list[Pending] = []
        failed: dict[str, Pending] = {}
        reasons: list[str] = []
        with self._sending() as alone:
            if not alone:
                return Sent([], self.registry.pending(), "another process is sending")
            for item in self.registry.pending():
                if time.monotonic() > until:
                    reasons.append(f"{within_s:g} s have passed")
                    break
                earlier = failed.get(item.name)
                if earlier is not None and (earlier.kind == "run" or item.kind != "run"):
                    continue
                try:
                    self._send(item)
                except WandbError as error:
                    self.registry.failed(item.id, error.message)
                    reasons.append(error.message)
                    if item.kind != "use":
                        failed[item.name] = item
                    if isinstance(error, (WandbOffline, WandbUnreachable)):
                        break
                else:
                    self.registry.delivered(item.id)
                    if item.kind == "run":
                        self.outbox.drop(item.payload["key"])
                    delivered.append(item)
        return Sent(delivered, self.registry.pending(), "; ".join(reasons))

    def _send(self, item: Pending) -> None:
        if item.kind == "run":
            key, digest = item.payload["key"], item.payload["digest"]
            wandb_version = self.outbox.deliver(key, item.payload["aliases"])
            self.registry.set_wandb_version(item.name, digest, wandb_version)
            if self.store.holds(item.name, digest):
                self.store.label(f"{item.name}:{short(digest)}", {"wandb": f"{item.name}:{wandb_version}"})
        elif item.kind == "alias":
            record = {k: item.payload[k] for k in ("kind", "who", "why", "forced", "at", "aliases")}
            self.client.transfer(
                "move_aliases",
                name=item.name,
                targets=item.payload["aliases"],
                run_id=run_id_of(item.payload["key"]),
                record=record | {"model": item.name},
            )
        else:
            self.client.transfer(
                "log_use",
                run_id=item.payload["key"],
                job_type=item.payload["kind"],
                name=item.name,
                reference=item.payload["digest"],
                config=item.payload["facts"],
            )

    @contextmanager
    def _sending(self) -> Iterator[bool]:
        self.settings.home.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.settings.home / "send.lock", blocking=False)
        try:
            taken = lock.acquire()
        except Timeout:
            yield False
        else:
            with taken:
                yield True

    def history(self, name: str) -> list[dict[str, Any]]:
        """Who moved an alias, when and why, newest first: from W&B where it answers, and from here."""
        events = self.moves(name)
        seen = {(event["kind"], event["at"]) for event in events}
        try:
            moves = self.client.look_up("moves", name=name)
        except WandbError as error:
            log.info("history of this machine alone: %s", error.message)
        else:
            events += [move for move in moves if (move["kind"], move["at"]) not in seen]
        return sorted(events, key=lambda event: str(event["at"]), reverse=True)

    def lineage(self, name: str) -> list[dict[str, Any]]:
        """Each version on W&B with the run that made it, what that run used, and the runs that use it."""
        found: list[dict[str, Any]] = self.client.look_up("versions", name=name)
        return found


def run_id_of(key: str) -> str:
    """A W&B run id from an outbox key: letters, digits and - only."""
    return "".join(c if c.isalnum() else "-" for c in key)
