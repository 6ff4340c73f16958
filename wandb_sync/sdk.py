"""The child process that uses the SDK: ``python -m wandb_sync.sdk``.

It reads one request as JSON from standard input and answers with one line of JSON on standard output. The
environment (WandbSettings.environment) holds its limits, set before wandb is imported.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.errors import AuthenticationError, CommError, UsageError

from wandb_sync.run_log import log_folder
from wandb_sync.settings import SdkSettings

UNREACHABLE = re.compile(r"giving up after|dial tcp|connection refused|timed out|timeout|\b(429|50[0-4])\b")
DIGEST = re.compile(r"(sha256:)?[0-9a-f]{12,64}")
REFUSED = re.compile(r"\b(401|403)\b|not logged in|permission|api key")


class Missing(Exception):
    """The server answered that this does not exist."""


class Sdk:
    """Operations by name; arguments and results are JSON."""

    def __init__(self, max_file_bytes: int, api_timeout_s: int) -> None:
        self.max_file_bytes = max_file_bytes
        self.api_timeout_s = api_timeout_s
        self.settings = SdkSettings()
        self.project = self.settings.project
        self._api: wandb.Api | None = None

    @property
    def api(self) -> wandb.Api:
        if self._api is None:
            self._api = wandb.Api(timeout=self.api_timeout_s)
        return self._api

    @property
    def entity(self) -> str:
        return self.settings.entity or str(self.api.default_entity)

    # Runs

    def log_run(self, folder: str, run_id: str, training_pid: int | None = None) -> dict[str, Any]:
        """Write a run folder as an offline run; with `training_pid`, first watch that process until it is done.

        While it watches, the next line of standard input names the folder; its end means that training failed.
        """
        run = wandb.init(
            mode="offline",
            id=run_id,
            job_type="train",
            dir=str(self.settings.dir),
            settings=wandb.Settings(x_stats_pid=training_pid or os.getpid(), x_stats_sampling_interval=2.0),
        )
        if training_pid is not None:
            folder = sys.stdin.readline().strip()
            if not folder:
                run.finish(exit_code=1)
                return {"logged": False}
        log_folder(run, Path(folder))
        run.finish()
        return {"logged": True}

    def push_run(
        self, run_id: str, offline: str, media: list[str], artifacts: dict[str, Any], wait_s: float
    ) -> dict[str, Any]:
        """Upload an offline run and its artifacts, and return the model's version on the server.

        Success is decided by asking the server, before and after each step: a step that it has already is not
        repeated, since a second synchronisation would double the run's history.
        """
        state = self.run_state(run_id, 0.0)
        if not state["history_rows"]:
            self._sync(offline)
            state = self.run_state(run_id, wait_s)
            if not state["history_rows"]:
                raise CommError(f"run {run_id} is not on the server after its synchronisation")
        lost = sorted(set(media) - set(state["files"]))
        if lost:
            run = self.api.run(f"{self.entity}/{self.project}/{run_id}")
            for name in lost:
                run.upload_file(f"{offline}/files/{name}", root=f"{offline}/files")
        self._log_artifacts(run_id, **artifacts)
        found = self.find(artifacts["name"], artifacts["metadata"]["bundle_digest"])
        if found is None or not set(artifacts["aliases"]) <= set(found["aliases"]):
            raise CommError(f"{artifacts['name']} of run {run_id} is not on the server after its upload")
        return found

    def _sync(self, offline: str) -> None:
        """Send an offline run by W&B's own command, which exits 0 whatever happens; `push_run` asks the server."""
        for mark in [*Path(offline).glob("*.synced"), *Path(offline).glob("*.syncstate")]:
            mark.unlink()
        command = [sys.executable, "-m", "wandb", "sync", "--entity", self.entity, "--project", self.project, offline]
        subprocess.run(command, check=False)

    def run_state(self, run_id: str, wait_s: float) -> dict[str, Any]:
        """The server's state of a run; polled for up to `wait_s` while its history is missing."""
        until = time.monotonic() + wait_s
        while True:
            state = self._run_state(run_id)
            if state["history_rows"] or time.monotonic() >= until:
                return state
            time.sleep(1.0)

    def _run_state(self, run_id: str) -> dict[str, Any]:
        try:
            run = wandb.Api(timeout=self.api_timeout_s).run(f"{self.entity}/{self.project}/{run_id}")
        except CommError as error:
            if kind_of(error) != "missing":
                raise
            return {"exists": False, "history_rows": 0, "files": []}
        files = sorted(file.name for file in run.files())
        return {"exists": True, "history_rows": run.lastHistoryStep + 1, "files": files}

    # Artifacts

    def _log_artifacts(
        self,
        run_id: str,
        name: str,
        bundle: str,
        preprocessor_files: list[str],
        dataset: dict[str, Any],
        metadata: dict[str, Any],
        aliases: list[str],
    ) -> None:
        """Make dataset, preprocessor and model versions of a run, with their lineage.

        What the server has already, by content, makes no new version.
        """
        with wandb.init(id=run_id, resume="allow", job_type="train", settings=quiet()) as run:
            data = wandb.Artifact(f"{name}-dataset", "dataset", metadata=dataset)
            data.add_reference(dataset_uri(dataset), name=dataset["name"], checksum=False)
            run.use_artifact(data)

            preprocessor = wandb.Artifact(
                f"{name}-preprocessor", "preprocessor", metadata={"digest": metadata["preprocessor_digest"]}
            )
            model = wandb.Artifact(name, "model", metadata=metadata)
            for path in sorted(Path(bundle).iterdir()):
                part = preprocessor if path.name in preprocessor_files else model
                part.add_file(str(path), name=path.name, policy="mutable")
            timeout = self.settings.finish_timeout
            preprocessor = run.log_artifact(preprocessor).wait(timeout=timeout)
            model.metadata["preprocessor"] = f"{name}-preprocessor:{preprocessor.version}"
            run.log_artifact(model, aliases=aliases).wait(timeout=timeout)

    def find(self, name: str, reference: str) -> dict[str, Any] | None:
        """The model version that an alias, ``vN`` or a bundle digest, or its beginning, names, or None."""
        if DIGEST.fullmatch(reference):
            digest = f"sha256:{reference.removeprefix('sha256:')}"
            return next((v for v in self._versions(name) if str(v["bundle_digest"]).startswith(digest)), None)
        path = f"{self.entity}/{self.project}/{name}:{reference}"
        if not self.api.artifact_exists(path, type="model"):
            return None
        return describe(self.api.artifact(path, type="model"))

    def first_alias(self, name: str, aliases: list[str]) -> str | None:
        """The first of the aliases that names a version of a model, or None."""
        return next((alias for alias in aliases if self.find(name, alias) is not None), None)

    def versions(self, name: str) -> list[dict[str, Any]]:
        """All versions of a model with their lineage, newest first."""
        return [
            version | lineage(self.api.artifact(f"{self.entity}/{self.project}/{name}:{version['version']}"))
            for version in self._versions(name)
        ]

    def _versions(self, name: str) -> Iterator[dict[str, Any]]:
        if not self.api.artifact_collection_exists(f"{self.entity}/{self.project}/{name}", "model"):
            return
        for artifact in self.api.artifacts("model", f"{self.entity}/{self.project}/{name}"):
            yield describe(artifact)

    def move_aliases(
        self, name: str, targets: dict[str, str | None], run_id: str, record: dict[str, Any]
    ) -> dict[str, str]:
        """Let each alias name the version with its bundle digest (None: no version), and log who did it and why.

        The record is a run of its own that uses the model, so the lineage graph shows it. The aliases are read
        again afterwards, since a save whose answer was lost has an unknown outcome.
        """
        by_digest = {v["bundle_digest"]: v["version"] for v in self._versions(name)}
        missing = [digest for digest in targets.values() if digest is not None and digest not in by_digest]
        if missing:
            raise Missing(f"{name} has no version of bundle {missing[0]}")
        path = f"{self.entity}/{self.project}/{name}"
        for alias, digest in targets.items():
            if digest is None:
                for version in [v["version"] for v in self._versions(name) if alias in v["aliases"]]:
                    artifact = self.api.artifact(f"{path}:{version}", type="model")
                    artifact.aliases.remove(alias)
                    artifact.save()
            else:
                artifact = self.api.artifact(f"{path}:{by_digest[digest]}", type="model")
                if alias not in artifact.aliases:
                    artifact.aliases.append(alias)
                    artifact.save()
        after = {alias: v["bundle_digest"] for v in self._versions(name) for alias in v["aliases"]}
        wrong = [alias for alias, digest in targets.items() if after.get(alias) != digest]
        if wrong:
            raise CommError(f"alias {wrong[0]} of {name} did not move")
        used = next(digest for digest in targets.values() if digest is not None)
        self.log_use(run_id, record["kind"], name, used, record)
        return {alias: by_digest[digest] for alias, digest in targets.items() if digest is not None}

    def log_use(self, run_id: str, job_type: str, name: str, reference: str, config: dict[str, Any]) -> None:
        """Log a run that uses a model version: a promotion, a rollback, a backtest."""
        found = self.find(name, reference)
        if found is None:
            raise Missing(f"{name} has no version {reference}")
        label = f"{job_type} {name}"
        with wandb.init(
            id=run_id, name=label, resume="allow", job_type=job_type, config=config, settings=quiet()
        ) as run:
            run.use_artifact(f"{self.entity}/{self.project}/{name}:{found['version']}", type="model")

    def moves(self, name: str) -> list[dict[str, Any]]:
        """The records of promotions and rollbacks of a model, newest first."""
        kinds = ["promote", "rollback", "alias"]
        runs = self.api.runs(
            f"{self.entity}/{self.project}", filters={"jobType": {"$in": kinds}}, order="-created_at", lazy=False
        )
        return [dict(run.config) for run in runs if run.job_type in kinds and run.config.get("model") == name]

    def fetch(
        self, name: str, references: list[str], held: list[str], into: str, files: dict[str, list[str]]
    ) -> dict[str, dict[str, Any] | None]:
        """Look up model versions, and download those whose bundle is not `held` into ``<into>/<bundle digest>``.

        Parameters
        ----------
        references : list of str
            Aliases, ``vN`` or bundle digests.
        held : list of str
            First 16 hexadecimal digits of the bundles that need no download.
        files : dict
            File names that an artifact may hold, by its type: "model" and "preprocessor".
        """
        found = {reference: self.find(name, reference) for reference in references}
        for version in found.values():
            if version is None or version["bundle_digest"] is None:
                continue
            folder = Path(into) / version["bundle_digest"]
            if version["bundle_digest"].removeprefix("sha256:")[:16] not in held and not folder.exists():
                self._download(f"{name}:{version['version']}", "model", folder, files["model"])
                self._download(version["metadata"]["preprocessor"], "preprocessor", folder, files["preprocessor"])
        return found

    def _download(self, name: str, kind: str, into: Path, allowed: list[str]) -> None:
        """Download one artifact version; every name, size and MD5 is checked."""
        artifact = self.api.artifact(f"{self.entity}/{self.project}/{name}", type=kind)
        for path, entry in artifact.manifest.entries.items():
            if path not in allowed:
                raise ValueError(f"file {path!r} does not belong in {kind} {name}; allowed: {', '.join(allowed)}")
            if entry.ref is not None:
                raise ValueError(
                    f"file {path!r} of {name} is a reference to {entry.ref!r}; only stored files are taken"
                )
            if (entry.size or 0) > self.max_file_bytes:
                raise ValueError(f"file {path!r} of {name} has {entry.size} bytes; allowed are {self.max_file_bytes}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.max_file_bytes, self.max_file_bytes))
        own = into / kind
        artifact.download(root=str(own), skip_cache=True)
        artifact.verify(root=str(own))


def quiet() -> wandb.Settings:
    """Add no data about this machine to a run: it may have been trained on another one."""
    return wandb.Settings(x_disable_stats=True, x_disable_meta=True, x_save_requirements=False)


def dataset_uri(dataset: dict[str, Any]) -> str:
    return f"dataset://{dataset['digest'].replace(':', '/')}"


def describe(artifact: Any) -> dict[str, Any]:
    metadata = dict(artifact.metadata)
    return {
        "version": artifact.version,
        "aliases": [alias for alias in artifact.aliases if alias != artifact.version],
        "bundle_digest": metadata.get("bundle_digest"),
        "metadata": metadata,
        "created": artifact.created_at,
    }


def lineage(artifact: Any) -> dict[str, Any]:
    """The run that made an artifact, what that run used and made, and the runs that use the artifact."""
    made_by = artifact.logged_by()
    return {
        "logged_by": made_by.id if made_by else None,
        "from": [a.name for a in made_by.used_artifacts()] if made_by else [],
        "beside": [a.name for a in made_by.logged_artifacts() if a.type != "run_table"] if made_by else [],
        "used_by": [{"run": run.id, "job_type": run.job_type} for run in artifact.used_by()],
    }


def kind_of(error: Exception) -> str:
    """Classify an error of the SDK for the caller: "unreachable", "refused", "missing" or "failed".

    The SDK reports a server that does not answer as an AuthenticationError too, so its text decides.
    """
    text = str(error).lower()
    if UNREACHABLE.search(text):
        return "unreachable"
    if isinstance(error, (AuthenticationError, UsageError)) or REFUSED.search(text):
        return "refused"
    if isinstance(error, Missing) or "not found" in text or "could not find" in text:
        return "missing"
    return "unreachable" if isinstance(error, (wandb.Error, TimeoutError, ConnectionError)) else "failed"


def end_with_parent(lifeline: int) -> None:
    """End this process group when the parent's end of the pipe closes: nothing is sent after the parent was killed."""
    os.read(lifeline, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    threading.Thread(target=end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the SDK prints; standard output carries the answer alone
    request = json.loads(sys.stdin.readline())
    sdk = Sdk(request["max_file_bytes"], request["api_timeout_s"])
    operation: Callable[..., Any] = getattr(sdk, request["operation"])
    try:
        result = {"result": operation(**request["arguments"])}
    except Exception as error:
        result = {"error": {"kind": kind_of(error), "message": f"{type(error).__name__}: {error}"}}
    json.dump(result, answer)
    answer.flush()
    return 0


if __name__ == "__main__":
    # The SDK's background process may still be retrying what was given up: the parent ends the group.
    code = main()
    os._exit(code)
