"""kill -9 at points of push, promote and pull: a rerun ends right, and nothing half-made is ever seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fraud.bundle import short
from tests.wandb_machine import PROJECT, Machine, assert_server_whole, collection
from tests.wandb_runs import digest_of, make_run
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import ENTITY

KILLED = -9


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


PUSH_POINTS = {
    "before the preprocessor is in the store": ("os.rename", "/models/", 1),
    "before the model is in the store": ("os.rename", "/models/", 3),
    "before the outbox has its copy": ("os.rename", "/outbox/", 1),
    "before the version is registered": ("sqlite3.connect", "registry.db", 1),
    "before the push is queued": ("sqlite3.connect", "registry.db", 2),
    "before the run exists": Fault("upsertBucket", "kill_before"),
    "after the history arrived": Fault("file_stream", "kill_after"),
    "before a plot is uploaded": Fault("PUT /storage/run", "kill_before"),
    "before the second artifact is created": Fault("createArtifact", "kill_before", skip=2),
    "before the model's files are uploaded": Fault("PUT /storage/md5", "kill_before", skip=4),
    "before the model is committed": Fault("commitArtifact", "kill_before", skip=3),
    "after the model was committed": Fault("commitArtifact", "kill_after", skip=3),
}


@pytest.mark.parametrize("point", PUSH_POINTS)
def test_a_killed_push_is_finished_by_the_next(server: WandbServer, tmp_path: Path, point: str) -> None:
    name = f"push-{list(PUSH_POINTS).index(point)}"
    machine, run = Machine(tmp_path, server), make_run(tmp_path / "runs", 1, name=name)
    at = PUSH_POINTS[point]
    if isinstance(at, Fault):
        server.faults.set(at)
        killed = machine.run("push", run, fault=at)
        server.faults.clear()
        assert at.hits > 0
    else:
        killed = machine.run("push", run, kill_at=at)
    assert killed.returncode == KILLED, killed.stdout
    machine.assert_store_whole()
    assert_server_whole(server)

    again = machine.run("push", run)
    assert again.returncode == 0, again.stdout
    assert f"{name}:{short(digest_of(run))}" in machine.assert_store_whole()
    assert_server_whole(server)
    versions = collection(server, name).committed()
    assert [version.version for version in versions] == [0]
    assert collection(server, name).aliases["candidate"] is versions[0]
    assert versions[0].run is not None
    assert len(versions[0].run.history()) == 1
    assert versions[0].run.summary["metrics/average_precision"] == 0.8
    assert {path.split("/")[1] for path in versions[0].run.files if path.startswith("media/")} == {
        "html",
        "images",
        "table",
    }
    assert machine.models.registry.pending() == []
    assert machine.models.registry.versions(name)[0].wandb_version == "v0"
    assert list((machine.fraud / "outbox").iterdir()) == []


@pytest.fixture(scope="module")
def published(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, str, list[Path]]:
    """A model with two versions on the server, the first in production."""
    root, name = tmp_path_factory.mktemp("published"), "pulled"
    machine = Machine(root, server)
    runs = [make_run(root / "runs", seed, name=name) for seed in (1, 2)]
    models = machine.models
    for run in runs:
        models.publish(run)
    models.promote(name, "v0", why="the first")
    assert models.send_pending().waiting == []
    return machine, name, runs


MOVE_POINTS = {
    "before the registry moved it": ("sqlite3.connect", "registry.db", 4),
    "before W&B moved production": Fault("addAliases", "kill_before"),
    "after W&B moved production": Fault("addAliases", "kill_after"),
    "before the move is on record": Fault("upsertBucket", "kill_before"),
    "before the record uses the model": Fault("useArtifact", "kill_before"),
}


@pytest.mark.parametrize("point", MOVE_POINTS)
def test_a_killed_promotion_is_finished_by_the_next(
    server: WandbServer, published: tuple[Machine, str, list[Path]], point: str
) -> None:
    machine, name, runs = published
    models = machine.models
    production = models.registry.digest_of(name, "production")
    other = next(digest_of(run) for run in runs if digest_of(run) != production)
    at = MOVE_POINTS[point]
    arguments = ("promote", f"{name}:{other}", "--why", point)
    if isinstance(at, Fault):
        server.faults.set(at)
        killed = machine.run(*arguments, fault=at)
        server.faults.clear()
        assert at.hits > 0
    else:
        killed = machine.run(*arguments, kill_at=at)
    assert killed.returncode == KILLED, killed.stdout
    assert_server_whole(server)

    again = machine.run(*arguments)
    assert again.returncode == 0, again.stdout
    assert machine.models.registry.digest_of(name, "production") == other
    assert models.registry.pending() == []
    aliases = collection(server, name).aliases
    assert other in (aliases["production"].metadata or "")
    assert (production or "") in (aliases["previous"].metadata or "")
    project = server.state.project(PROJECT, ENTITY)
    assert project is not None
    records = [run for run in project.runs.values() if run.job_type == "promote" and point in run.config]
    assert len(records) == 1
    assert records[0].used == [aliases["production"]]


PULL_POINTS = {
    "before the manifest is downloaded": Fault("GET /storage/manifest", "kill_before"),
    "during the download": Fault("GET /storage/md5", "kill_before", skip=3),
    "after the last file was downloaded": Fault("GET /storage/md5", "kill_after", skip=9),
    "before the preprocessor is in the store": ("os.rename", "/models/", 1),
    "before the model is in the store": ("os.rename", "/models/", 3),
    "before the store names its latest": ("os.rename", "/latest", 2),
    "before the version is registered": ("sqlite3.connect", "registry.db", 1),
}


@pytest.mark.parametrize("point", PULL_POINTS)
def test_a_killed_pull_is_finished_by_the_next(
    server: WandbServer, published: tuple[Machine, str, list[Path]], tmp_path: Path, point: str
) -> None:
    _, name, runs = published
    machine, at = Machine(tmp_path, server), PULL_POINTS[point]
    if isinstance(at, Fault):
        server.faults.set(at)
        killed = machine.run("pull", f"{name}:v1", fault=at)
        server.faults.clear()
        assert at.hits > 0
    else:
        killed = machine.run("pull", f"{name}:v1", kill_at=at)
    assert killed.returncode == KILLED, killed.stdout
    machine.assert_store_whole()

    again = machine.run("pull", f"{name}:v1")
    assert again.returncode == 0, again.stdout
    assert f"{name}:{short(digest_of(runs[1]))}" in machine.assert_store_whole()
    assert machine.models.registry.resolve(name, digest_of(runs[1])).wandb_version == "v1"
    assert list((machine.fraud / "staging").iterdir()) == []
    assert not list(machine.fraud.glob("download-*"))
