"""The outbox of run folders: training runs wait here until W&B has everything.

An entry of the outbox is a folder: ``run/`` is a copy of the run folder, ``sdk/`` the SDK's offline run. It is deleted
once the server confirms the run and its artifacts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fraud.models.bundle import PREPROCESSOR_FILES
from fraud.models.run_folder import RunFolder, read_run
from wandb_sync.client import WandbClient, sdk_process
from wandb_sync.scratch import held, scratch, was_abandoned
from wandb_sync.settings import WandbSettings

ARRIVAL_WAIT_S = 10.0


class Outbox:
    """The files not yet sent to W&B, in the registry's order.

    Parameters
    ----------
    settings : WandbSettings
    client : WandbClient
    """

    def __init__(self, settings: WandbSettings, client: WandbClient) -> None:
        self.folder = settings.home / "outbox"
        self.settings = settings
        self.client = client

    def keep(self, run: RunFolder) -> None:
        """Copy a run folder; an interrupted copy is never taken for a complete one."""
        target = self.folder / run.run_id / "run"
        if target.is_dir():
            return
        with scratch(self.settings.home) as staging:
            shutil.copytree(run.path, staging / "run")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staging / "run", target)

    def drop(self, run_id: str) -> None:
        shutil.rmtree(self.folder / run_id, ignore_errors=True)

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Let the SDK measure this process and machine during a training; its failures do not affect the training.

        Without the SDK nothing is measured.

        Example
        -------
        ::

            with outbox.watch() as watch:
                folder = train(...)
                watch.finish(folder)
        """
        if importlib.util.find_spec("wandb") is None:
            yield Watch(self, None, "")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if was_abandoned(entry):  # by a training that was killed
                shutil.rmtree(entry)
        run_id = secrets.token_hex(6)
        entry = self.folder / run_id
        (entry / "sdk").mkdir(parents=True)
        environment = self.settings.environment(entry / "sdk") | {"WANDB_MODE": "offline"}
        arguments = {"folder": "", "run_id": run_id, "training_pid": os.getpid()}
        with held(entry), sdk_process(environment) as process:
            watch = Watch(self, process, run_id)
            watch.send(json.dumps(self.client.request("log_run", arguments)))
            try:
                yield watch
            finally:
                if not watch.finished:
                    self.drop(run_id)

    def deliver(self, run_id: str, aliases: list[str]) -> str:
        """Upload a kept run with its artifacts, and return the model's version on the server.

        Every step asks the server first, so it may be repeated after an interruption at any point.
        """
        run = read_run(self.folder / run_id / "run")
        sdk = self._logged(run)
        # synchronising deletes what it staged, even where its upload failed: it works on a second copy
        shutil.rmtree(sdk / "data", ignore_errors=True)
        shutil.copytree(sdk / "staged", sdk / "data")
        offline = next((sdk / "wandb").rglob("offline-run-*"))
        files = offline / "files"
        manifest = run.bundle.manifest
        found = self.client.transfer(
            "push_run",
            run_id=run_id,
            offline=str(offline),
            media=[p.relative_to(files).as_posix() for p in (files / "media").rglob("*") if p.is_file()],
            artifacts={
                "name": manifest.name,
                "bundle": str(run.bundle_path),
                "preprocessor_files": PREPROCESSOR_FILES,
                "dataset": run.facts["dataset"],
                "aliases": aliases,
                "metadata": {
                    "bundle_digest": run.bundle.digest,
                    "preprocessor_digest": manifest.preprocessor_digest,
                    "features_digest": manifest.features_digest,
                    "libraries": manifest.libraries,
                    "kind": manifest.kind,
                    "seed": manifest.seed,
                    "git_commit": manifest.git_commit,
                    "metrics": run.facts["metrics"],
                    "run": run_id,
                },
            },
            wait_s=ARRIVAL_WAIT_S,
        )
        return str(found["version"])

    def _logged(self, run: RunFolder) -> Path:
        """The SDK's offline run, written now unless a watch completed it."""
        sdk = self.folder / run.run_id / "sdk"
        if not (sdk / "staged").is_dir():
            shutil.rmtree(sdk, ignore_errors=True)
            sdk.mkdir(parents=True)
            self.client.offline("log_run", sdk, folder=str(run.path), run_id=run.run_id)
            seal(sdk)
        return sdk


class Watch:
    """A training watched by the SDK."""

    def __init__(self, outbox: Outbox, process: subprocess.Popen[str] | None, run_id: str) -> None:
        self.outbox = outbox
        self.process = process
        self.run_id = run_id
        self.finished = False

    def send(self, line: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it could not start: the run is logged without it when it is pushed
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def finish(self, folder: Path) -> None:
        """Log the finished run folder, and note its run id in it."""
        if self.process is None:
            return
        try:
            output, _ = self.process.communicate(f"{folder}\n", timeout=self.outbox.settings.transfer_timeout_s)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return  # the run is logged without system metrics when it is pushed
        if '"logged": true' in output:
            seal(self.outbox.folder / self.run_id / "sdk")
            (folder / "wandb-run-id").write_text(self.run_id + "\n")
            self.finished = True


def seal(sdk: Path) -> None:
    """Mark an offline run as complete, by copying the file that its synchronization would delete."""
    (sdk / "data").mkdir(exist_ok=True)
    shutil.rmtree(sdk / "staging", ignore_errors=True)
    shutil.copytree(sdk / "data", sdk / "staging")
    os.rename(sdk / "staging", sdk / "staged")
