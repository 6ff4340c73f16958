"""A machine with a home of its own, from which the SDK and the commands run as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fraud.models.bento_store import BentoStore
from fraud.models.bundle import read_bundle
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import ENTITY, Collection
from wandb_sync.models import Models
from wandb_sync.settings import WandbSettings

PROJECT = "fraud-bento"
COMMAND = "from fraud.cli.main import main; main()"
# Ends its own process group at the n-th audit event whose arguments contain a text, before the event happens.
KILLED_COMMAND = """
import os, signal, sys
event, text, n = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
def hook(name, arguments):
    global n
    if name == event and any(text in str(argument) for argument in arguments):
        n -= 1
        if n == 0:
            os.killpg(0, signal.SIGKILL)
sys.addaudithook(hook)
from fraud.cli.main import main
main()
"""


class Machine:
    """A home folder with the environment of its processes; `server` is None where there is no network."""

    def __init__(self, home: Path, server: WandbServer | None, **environment: str) -> None:
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "BENTOML_HOME": str(home / "bentoml"),
            "BENTOML_DO_NOT_TRACK": "True",
            "WANDB_ENTITY": ENTITY,
            "WANDB_PROJECT": PROJECT,
            "WANDB_X_DISABLE_STATS": "true",
            "WANDB_X_DISABLE_META": "true",
            "WANDB_X_DISABLE_MACHINE_INFO": "true",
            "FRAUD_WANDB_RETRIES": "1",
            "FRAUD_WANDB_RETRY_WAIT_S": "1",
            **environment,
        }
        if server is not None:
            self.environment |= {"WANDB_BASE_URL": server.base_url, "WANDB_API_KEY": server.API_KEY}
        (home / "bentoml" / "models").mkdir(parents=True, exist_ok=True)

    @property
    def models(self) -> Models:
        order = self.environment.get("FRAUD_MODEL_ALIASES", "production").split(",")
        return Models(WandbSettings.of(self.environment), order)

    @property
    def fraud(self) -> Path:
        return self.home / "bentoml" / "fraud"

    def run(
        self, *arguments: str | Path, kill_at: tuple[str, str, int] | None = None, fault: Fault | None = None
    ) -> Any:
        """Run a command to its end; `kill_at` is an audit event, `fault` one that kills this command."""
        script = [KILLED_COMMAND, *(str(part) for part in kill_at)] if kill_at else [COMMAND]
        with subprocess.Popen(
            [sys.executable, "-c", *script, *(str(argument) for argument in arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            if fault is not None:
                fault.pid = process.pid
            output, _ = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, output, "")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command and leave it to itself."""
        return subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], env=self.environment, text=True)

    def processes(self) -> list[int]:
        """Ids of the processes that run with this machine's environment."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile, or is another user's
                if str(self.home).encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    def ask(self, script: str) -> Any:
        """Run a script that uses `api`, a wandb.Api(), and assigns `answer`, in a process of its own."""
        code = f"import json, wandb\napi = wandb.Api(timeout=10)\n{script}\nprint(json.dumps(answer))"
        environment = {**self.environment, "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(self.home / "api-cache")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        return json.loads(done.stdout.splitlines()[-1])

    def assert_store_whole(self) -> list[str]:
        """Whatever `bentoml models list` would show is whole; returns the tags."""
        from bentoml._internal.models import ModelStore

        models = ModelStore(self.home / "bentoml" / "models").list()
        tags = [str(model.tag) for model in models]
        store = BentoStore(self.home / "bentoml")
        for tag in tags:
            if "-preprocessor:" not in tag:
                read_bundle(*store.bundle_paths(tag))
        return tags


def collection(server: WandbServer, name: str) -> Collection:
    project = server.state.project(PROJECT, ENTITY)
    assert project is not None
    return project.collections[name]


def assert_server_whole(server: WandbServer) -> None:
    """No alias points at nothing, and every version has all of its files."""
    for project in server.state.projects.values():
        for found in project.collections.values():
            for artifact in [*found.aliases.values(), *found.committed()]:
                assert artifact.state == "COMMITTED"
                assert artifact.manifest_key in server.state.blobs
                for entry in artifact.entries.values():
                    assert "ref" in entry or f"md5/{entry['digest']}" in server.state.blobs
