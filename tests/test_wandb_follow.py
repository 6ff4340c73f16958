"""A running service and W&B: it follows at an admin's word, says what it serves, and serves on whatever W&B does."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fraud.models.bundle import short
from fraud.serving.security import new_key
from tests.servers import bentoml_serve, wait_until
from tests.wandb_machine import PROJECT, Machine, collection
from tests.wandb_runs import NAME, digest_of, golden, make_run
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import ENTITY

BOUND_S = 60.0


@contextmanager
def service(machine: Machine, **environment: str) -> Iterator[httpx.Client]:
    """`bentoml serve` on a machine's Bento store, following its registry."""
    environment = {"FRAUD_MODEL": NAME, "FRAUD_STATE_DIR": str(machine.home / "state"), **environment}
    with (
        bentoml_serve(machine.environment | environment, machine.home / "log") as url,
        httpx.Client(base_url=url, timeout=BOUND_S) as client,
    ):
        yield client


@dataclass
class Served:
    """A service of two workers on a machine of its own, with a key for its administration."""

    machine: Machine
    client: httpx.Client
    secret: str
    scoring: str
    runs: list[Path]

    def refresh(self, **headers: str) -> httpx.Response:
        return self.client.post("/admin/models/refresh", headers=headers)

    def refreshed(self) -> dict[str, Any]:
        answer = self.refresh(authorization=f"Bearer {self.secret}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def version(self) -> str:
        row = golden(self.runs[0] / "bundle")[0]["instance"]
        answer = self.client.post("/predict", json={"instances": [row]}).json()
        version: str = answer["predictions"][0]["model"]["version"]
        return version

    def metric(self, name: str) -> float:
        lines = [line for line in self.client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
        (line,) = lines
        return float(line.rpartition(" ")[2])


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def served(server: WandbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two versions on W&B, the first in production there and, pulled, on the machine that serves."""
    trainer_home, home = tmp_path_factory.mktemp("trainer"), tmp_path_factory.mktemp("server")
    trainer, machine = Machine(trainer_home, server), Machine(home, server)
    runs = [make_run(trainer_home / "runs", seed) for seed in (1, 2)]
    for run in runs:
        trainer.models.publish(run)
    trainer.models.promote(NAME, "v0", why="the first")
    assert trainer.models.send_pending().waiting == []
    machine.models.follow(NAME)
    secret, key = new_key(["admin"])
    scoring, other = new_key(["score"])
    keys = f"{key.line()},{other.line()}"
    with service(machine):
        wait_until(lambda: len(machine.models.registry.pending()) > 0)
    with service(machine, FRAUD_API_KEYS=keys, FRAUD_WORKERS="2", FRAUD_WANDB_TRANSFER_TIMEOUT_S="10") as client:
        yield Served(machine, client, secret, scoring, runs)


def test_what_serves_is_a_run_behind_the_version_once_for_all_workers_and_restarts(
    server: WandbServer, served: Served
) -> None:
    registry = served.machine.models.registry
    assert [item.kind for item in registry.pending()] == ["use"]
    done = served.machine.run("push", "--pending")
    assert done.returncode == 0, done.stdout
    assert f"W&B has {NAME}: production" in done.stdout
    (run,) = served.machine.ask(f"""
runs = [api.run("{ENTITY}/{PROJECT}/" + r.id) for r in api.artifact("{ENTITY}/{PROJECT}/{NAME}:v0").used_by()]
answer = [dict(run.config, state=run.state) for run in runs if run.job_type == "production"]""")
    assert run["host"] == socket.gethostname()
    assert run["since"].endswith("+00:00")
    assert run["state"] == "finished"


def test_an_admin_lets_it_follow_an_alias_that_was_moved_on_wandb(server: WandbServer, served: Served) -> None:
    first, second = (short(digest_of(run)) for run in served.runs)
    assert served.version() == first
    server.state.set_aliases(collection(server, NAME).versions[1], ["production"])
    assert served.refresh().status_code == 401
    assert served.refresh(authorization="Bearer fk_00000000_" + "x" * 43).status_code == 401
    assert served.refresh(authorization=f"Bearer {served.scoring}").status_code == 403
    assert served.version() == first
    answer = served.refreshed()
    assert answer["wandb_look"] == "asked"
    assert answer["models"][0]["version"] == second
    assert answer["wandb"][NAME]["failed"] is False
    wait_until(lambda: {served.version() for _ in range(10)} == {second})  # the other worker, by itself
    wait_until(lambda: served.metric("fraud_following_failed") == 0)
    looked = served.metric("fraud_following_look_timestamp_seconds")
    assert 0 <= time.time() - looked < 300


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("graphql", "status", status=500), "500"),
        (Fault("graphql", "cut"), "W&B at"),
        (Fault("graphql", "slow", delay_s=30.0), "took more than 10 s"),
    ],
    ids=["500", "cut", "silent"],
)
def test_where_wandb_fails_it_says_so_in_time_and_serves_on(
    server: WandbServer, served: Served, fault: Fault, reason: str
) -> None:
    before = served.version()
    server.state.set_aliases(collection(server, NAME).versions[0], ["production"])
    server.faults.set(fault)
    started = time.monotonic()
    answer = served.refreshed()
    assert time.monotonic() - started < BOUND_S
    assert answer["wandb_look"].startswith(f"failed: {NAME}: ")
    assert reason in answer["wandb_look"]
    assert answer["wandb"][NAME]["failed"] is True
    assert served.version() == before
    wait_until(lambda: served.client.get("/readyz").json()["wandb"][NAME]["failed"])
    wait_until(lambda: served.metric("fraud_following_failed") == 1)
    server.faults.clear()
    server.state.set_aliases(collection(server, NAME).versions[1], ["production"])
    assert served.refreshed()["wandb_look"] == "asked"
    wait_until(lambda: served.metric("fraud_following_failed") == 0)


def test_without_a_key_only_the_registry_is_asked(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.machine.fraud.parent, tmp_path / "bentoml")
    machine = Machine(tmp_path, None)
    registry = machine.models.registry
    registry.move(NAME, digest_of(served.runs[0]), "production", who="a test", why="")
    secret, key = new_key(["admin"])
    with service(machine, FRAUD_API_KEYS=key.line()) as client:
        registry.move(NAME, digest_of(served.runs[1]), "production", who="a test", why="")
        answer = client.post("/admin/models/refresh", headers={"authorization": f"Bearer {secret}"}).json()
    assert answer["wandb_look"].startswith("not asked: W&B is off here (no WANDB_API_KEY")
    assert answer["models"][0]["version"] == short(digest_of(served.runs[1]))
