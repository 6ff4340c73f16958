"""kill -9 at points of push, promote and pull: a rerun ends right, and nothing half-made is ever seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fraud.models.bundle import read_manifest, short
from tests.wandb_machine import PROJECT, Machine, assert_server_whole, collection
from tests.wandb_runs import digest_of, make_run
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import ENTITY

KILLED = -9
PUSHED, PULLED = "pushed", "pulled"


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


Point = Fault | tuple[str, str, int]

PUSH_POINTS: dict[str, Point] = {
    "before the preprocessor is in the store": ("os.rename", "/models/", 1),
    "before the model is in the store": ("os.rename", f"/models/{PUSHED}/", 1),
    "before the version is registered": ("sqlite3.connect", "registry.db", 1),
    "before the push is queued": ("sqlite3.connect", "registry.db", 2),
    "before the run exists on W&B": Fault("upsertBucket", "kill_before"),
    "after its history arrived": Fault("file_stream", "kill_after"),
    "before a plot is uploaded": Fault("PUT /storage/run", "kill_before"),
    "before the model's files are uploaded": Fault("PUT /storage/md5", "kill_before", skip=2),
    "before the model is committed": Fault("commitArtifact", "kill_before"),
    "after the model was committed": Fault("commitArtifact", "kill_after"),
}


def kill(machine: Machine, server: WandbServer, point: str, at: Point, *arguments: str | Path) -> None:
    """Run a command that is killed at a point, and look at what everybody else sees then."""
    if isinstance(at, Fault):
        server.faults.set(at)
        killed = machine.run(*arguments, fault=at)
    else:
        killed = machine.run(*arguments, kill_at=at)
    assert killed.returncode == KILLED, f"{point}: {killed.stdout}"
    wait_until(lambda: not machine.processes(), f"{point}: a process works on behind the killed command")
    server.faults.clear()
    machine.assert_store_whole()
    assert_server_whole(server)


def wait_until(done: Callable[[], bool], otherwise: str) -> None:
    until = time.monotonic() + 10
    while not done():
        assert time.monotonic() < until, otherwise
        time.sleep(0.02)


def test_a_push_killed_again_and_again_ends_right(server: WandbServer, tmp_path: Path) -> None:
    machine, run = Machine(tmp_path, server), make_run(tmp_path / "runs", 1, name=PUSHED)
    for point, at in PUSH_POINTS.items():
        kill(machine, server, point, at, "push", run)
    again = machine.run("push", run)
    assert again.returncode == 0, again.stdout
    assert machine.assert_store_whole() == [
        f"{PUSHED}:{short(digest_of(run))}",
        f"{PUSHED}-preprocessor:{short(read_manifest(run / 'bundle')[1].preprocessor_digest)}",
    ]
    versions = collection(server, PUSHED).committed()
    assert [version.version for version in versions] == [0]
    assert collection(server, PUSHED).aliases["candidate"] is versions[0]
    made_by = versions[0].run
    assert made_by is not None
    assert len(made_by.history()) == 1
    assert made_by.summary["metrics/average_precision"] == 0.8
    media = {path.split("/")[1] for path in made_by.files if path.startswith("media/")}
    assert media == {"html", "images", "table"}
    assert all(key in server.state.blobs for path, key in made_by.files.items() if path.startswith("media/"))
    registry = machine.models.registry
    assert [version.wandb_version for version in registry.versions(PUSHED)] == ["v0"]
    assert registry.pending() == []
    assert list((machine.fraud / "outbox").iterdir()) == []
    assert [path for path in (machine.fraud / "scratch").iterdir() if path.is_dir()] == []


@pytest.fixture(scope="module")
def published(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, list[Path]]:
    """A model with two versions on the server, the first in production."""
    root = tmp_path_factory.mktemp("published")
    machine = Machine(root, server)
    runs = [make_run(root / "runs", seed, name=PULLED) for seed in (1, 2)]
    models = machine.models
    for run in runs:
        models.publish(run)
    models.promote(PULLED, "v0", why="the first")
    assert models.send_pending().waiting == []
    return machine, runs


MOVE_POINTS: dict[str, Point] = {
    "before the registry moved it": ("sqlite3.connect", "registry.db", 4),
    "before W&B moved production": Fault("addAliases", "kill_before"),
    "after W&B moved production": Fault("addAliases", "kill_after"),
    "before the record uses the model": Fault("useArtifact", "kill_before"),
}


def test_a_promotion_killed_again_and_again_ends_right(
    server: WandbServer, published: tuple[Machine, list[Path]]
) -> None:
    machine, runs = published
    arguments = ("promote", f"{PULLED}:v1", "--why", "better")
    for point, at in MOVE_POINTS.items():
        kill(machine, server, point, at, *arguments)
        assert collection(server, PULLED).aliases["production"].version in (0, 1)
    again = machine.run(*arguments)
    assert again.returncode == 0, again.stdout
    registry = machine.models.registry
    assert registry.digest_of(PULLED, "production") == digest_of(runs[1])
    assert registry.digest_of(PULLED, "previous") == digest_of(runs[0])
    assert registry.pending() == []
    aliases = {alias: artifact.version for alias, artifact in collection(server, PULLED).aliases.items()}
    assert aliases == {"latest": 1, "candidate": 1, "production": 1, "previous": 0}
    project = server.state.project(PROJECT, ENTITY)
    assert project is not None
    records = [run for run in project.runs.values() if run.job_type == "promote" and '"better"' in run.config]
    assert len(records) == 1
    assert records[0].used == [collection(server, PULLED).aliases["production"]]


PULL_POINTS: dict[str, Point] = {
    "during the download": Fault("GET /storage/md5", "kill_before", skip=3),
    "after the last file was downloaded": Fault("GET /storage/md5", "kill_after", skip=9),
    "before the preprocessor is in the store": ("os.rename", "/models/", 1),
    "before the model is in the store": ("os.rename", f"/models/{PULLED}/", 1),
    "before the version is registered": ("sqlite3.connect", "registry.db", 1),
}


def test_a_pull_killed_again_and_again_ends_right(
    server: WandbServer, published: tuple[Machine, list[Path]], tmp_path: Path
) -> None:
    machine, (_, run) = Machine(tmp_path, server), published[1]
    for point, at in PULL_POINTS.items():
        kill(machine, server, point, at, "pull", f"{PULLED}:v1")
    again = machine.run("pull", f"{PULLED}:v1")
    assert again.returncode == 0, again.stdout
    assert f"{PULLED}:{short(digest_of(run))}" in machine.assert_store_whole()
    assert machine.models.registry.resolve(PULLED, digest_of(run)).wandb_version == "v1"
    assert list((machine.fraud / "staging").iterdir()) == []
    assert [path for path in (machine.fraud / "scratch").iterdir() if path.is_dir()] == []
