"""Push, promote, pull, roll back and follow, with the unmodified SDK in processes of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import short
from fraud.models.scorer import Scorer
from tests.wandb_machine import PROJECT, Machine, assert_server_whole, collection
from tests.wandb_runs import NAME, digest_of, golden, make_run
from tests.wandb_server import WandbServer
from tests.wandb_server.state import ENTITY


@pytest.fixture(
    scope="module",
    params=[(LIGHTGBM, ISOLATION_FOREST), (ISOLATION_FOREST, ISOLATION_FOREST)],
    ids=["both algorithms", "isolation forests alone"],
)
def algorithms(request: pytest.FixtureRequest) -> tuple[Algorithm, Algorithm]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def server(algorithms: tuple[Algorithm, Algorithm]) -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="module")
def pushed(
    server: WandbServer, algorithms: tuple[Algorithm, Algorithm], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Machine, list[Path]]:
    """Two runs pushed by the command, v0 then v1; v0 and then v1 promoted."""
    root = tmp_path_factory.mktemp("trainer")
    trainer = Machine(root, server)
    first, second = algorithms
    runs = [make_run(root / "runs", 1, 0.80, algorithm=first), make_run(root / "runs", 2, 0.84, algorithm=second)]
    for run in runs:
        done = trainer.run("push", run)
        assert done.returncode == 0, done.stdout
    assert trainer.run("promote", f"{NAME}:v0", "--why", "the first").returncode == 0
    assert trainer.run("promote", f"{NAME}:candidate", "--why", "better").returncode == 0
    return trainer, runs


def test_two_trainings_are_two_versions_that_the_dashboards_api_reads(
    server: WandbServer, pushed: tuple[Machine, list[Path]]
) -> None:
    trainer, runs = pushed
    assert_server_whole(server)
    answer = trainer.ask(f"""
path = "{ENTITY}/{PROJECT}/{NAME}"
versions = {{a.version: a for a in api.artifacts("model", path)}}
made_by = {{v: api.run("{ENTITY}/{PROJECT}/" + a.logged_by().id) for v, a in versions.items()}}
run = made_by["v1"]
answer = {{
    "aliases": {{v: sorted(a.aliases) for v, a in versions.items()}},
    "digests": {{v: a.metadata["bundle_digest"] for v, a in versions.items()}},
    "interval": versions["v1"].metadata["metrics"]["average_precision"],
    "used": [a.name for a in run.used_artifacts()],
    "made": sorted(a.name for a in run.logged_artifacts() if a.type != "run_table"),
    "used_by": [api.run("{ENTITY}/{PROJECT}/" + r.id).job_type for r in versions["v1"].used_by()],
    "config": run.config["num_leaves"], "state": run.state, "name": run.name,
    "summary": {{k: run.summary[k] for k in ("metrics/average_precision", "baseline/average_precision")}},
    "history": len(list(run.scan_history())),
    "files": sorted(f.name.split("_")[0] for f in run.files() if f.name.startswith("media/")),
    "reference": [e.ref for e in api.artifact(path + "-dataset:v0").manifest.entries.values()],
}}""")
    assert answer["aliases"] == {"v0": ["previous"], "v1": ["candidate", "latest", "production"]}
    assert answer["digests"] == {"v0": digest_of(runs[0]), "v1": digest_of(runs[1])}
    assert answer["interval"]["value"] == 0.84
    assert answer["interval"]["low"] < 0.84 < answer["interval"]["high"]
    assert answer["used"] == [f"{NAME}-dataset:v0"]
    assert answer["made"] == [f"{NAME}:v1"]
    assert answer["used_by"] == ["promote"]
    assert (answer["config"], answer["state"], answer["name"]) == (7, "finished", f"{NAME} 2026-01-02T00:00:00")
    assert answer["summary"] == {"metrics/average_precision": 0.84, "baseline/average_precision": 0.5}
    assert answer["history"] == 1
    assert answer["files"] == ["media/html/report", "media/images/plots/roc", "media/table/tables/thresholds"]
    assert answer["reference"] == ["dataset://sha256/" + "d" * 64]


def test_an_unchanged_bundle_makes_no_new_version(server: WandbServer, pushed: tuple[Machine, list[Path]]) -> None:
    trainer, runs = pushed
    done = trainer.run("push", runs[1])
    assert done.returncode == 0, done.stdout
    assert len(collection(server, NAME).committed()) == 2
    assert len(trainer.models.registry.versions(NAME)) == 2


def test_lineage_and_history_say_what_came_from_what_and_who_moved_it(pushed: tuple[Machine, list[Path]]) -> None:
    trainer, _ = pushed
    lineage = trainer.run("lineage", NAME).stdout
    assert f"from {NAME}-dataset:v0" in lineage
    assert f"{NAME}-preprocessor:v0" in lineage
    assert "(promote)" in lineage
    history = trainer.run("history", "--model", NAME).stdout
    assert "the first" in history
    assert "better" in history
    assert "@" in history


def test_another_machine_pulls_by_alias_and_scores_the_golden_rows_bit_for_bit(
    server: WandbServer, pushed: tuple[Machine, list[Path]], tmp_path: Path
) -> None:
    _, runs = pushed
    other = Machine(tmp_path, server)
    done = other.run("pull", f"{NAME}:production")
    assert done.returncode == 0, done.stdout
    tag = f"{NAME}:{short(digest_of(runs[1]))}"
    assert tag in done.stdout
    listed = subprocess.run(
        [sys.executable, "-m", "bentoml", "models", "list", "-o", "json"],
        env=other.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert tag in listed
    assert f"{NAME}-preprocessor:" in listed

    scorer = Scorer.load(*BentoStore(tmp_path / "bentoml").bundle_paths(tag))
    rows = golden(runs[1] / "bundle")
    X = np.array([row["features"] for row in rows])
    scores = list(scorer.score(X).rows())
    assert [score.raw_margin for score in scores] == [row["raw_margin"] for row in rows]
    assert [score.fraud_probability for score in scores] == [row["fraud_probability"] for row in rows]

    # an older one by its Bento store tag
    assert other.models.pull(NAME, short(digest_of(runs[0]))) == f"{NAME}:{short(digest_of(runs[0]))}"

    # again: what the store has is not downloaded; a digest that it has is not even asked for
    before = len(server.requests)
    other.models.pull(NAME, "production")
    assert not [request for request in server.requests[before:] if request.startswith("GET")]
    before = len(server.requests)
    started = time.perf_counter()
    assert other.models.pull(NAME, digest_of(runs[1])) == tag
    assert time.perf_counter() - started < 1.0
    assert len(server.requests) == before


def test_a_follower_takes_the_alias_and_rolls_back_with_it(
    server: WandbServer, pushed: tuple[Machine, list[Path]], tmp_path: Path
) -> None:
    trainer, runs = pushed
    follower = Machine(tmp_path, server).models
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[1]))}"
    assert follower.registry.resolve(NAME, "previous").digest == digest_of(runs[0])

    done = trainer.run("rollback", NAME, "--why", "alerts doubled")
    assert done.returncode == 0, done.stdout
    assert collection(server, NAME).aliases["production"].version == 0
    assert "previous" not in collection(server, NAME).aliases
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[0]))}"
    assert any(record["why"] == "alerts doubled" for record in follower.history(NAME))

    # moved by hand in the dashboard
    server.state.set_aliases(collection(server, NAME).versions[1], ["production"])
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[1]))}"
    assert follower.registry.events(NAME)[0].who == "W&B"
    following = follower.registry.following(NAME)
    assert following is not None
    assert following.error == ""


def test_a_follower_takes_the_first_alias_that_wandb_has(
    server: WandbServer, pushed: tuple[Machine, list[Path]], tmp_path: Path
) -> None:
    _, runs = pushed
    versions, on_wandb = collection(server, NAME).versions, collection(server, NAME).aliases
    server.state.set_aliases(versions[1], ["production"])
    follower = Machine(tmp_path, server, FRAUD_MODEL_ALIASES="champion,production,staging").models
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[1]))}"
    assert follower.registry.alias_in_force(NAME) == "production"
    assert follower.store.versions(NAME) == [short(digest_of(runs[1]))], "only what is served, and what was before"

    server.state.set_aliases(versions[0], ["champion"])
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[0]))}"
    assert follower.registry.alias_in_force(NAME) == "champion"

    moved = follower.promote(NAME, "v0", why="better after all")
    assert follower.registry.resolve(NAME, "champion") == moved
    assert follower.send_pending().waiting == []
    assert on_wandb["champion"] is versions[1], "what was promoted here, W&B has"

    del on_wandb["champion"]  # taken away in the dashboard
    assert follower.follow(NAME) == f"{NAME}:{short(digest_of(runs[1]))}"
    assert follower.registry.alias_in_force(NAME) == "production"


def test_a_backtest_and_a_challenger_are_in_the_lineage(
    server: WandbServer, pushed: tuple[Machine, list[Path]]
) -> None:
    trainer, _ = pushed
    models = trainer.models
    models.record_use(NAME, "v0", "backtest", {"average_precision": 0.71})
    models.challenge(NAME, "v0", why="compare again")
    assert models.send_pending().waiting == []
    assert collection(server, NAME).aliases["challenger"].version == 0
    used_by = {version["version"]: version["used_by"] for version in models.lineage(NAME)}
    assert {"backtest", "alias"} <= {use["job_type"] for use in used_by["v0"]}


def test_a_watched_training_has_system_metrics(server: WandbServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, server, WANDB_X_DISABLE_STATS="false", WANDB_X_DISABLE_MACHINE_INFO="false")
    models = machine.models
    with models.outbox.watch() as watch:
        run = make_run(tmp_path / "runs", 3, name="watched")
        watch.finish(run)
    assert (run / "wandb-run-id").read_text().strip() == watch.run_id
    models.publish(run)
    assert models.send_pending().waiting == []
    project = server.state.project(PROJECT, ENTITY)
    assert project is not None
    stored = project.runs[watch.run_id]
    assert any("system.proc.memory.rssMB" in line for line in stored.lines("wandb-events.jsonl"))
    assert len(stored.history()) == 1


def test_a_killed_training_leaves_its_outbox_to_be_swept_by_the_next(server: WandbServer, tmp_path: Path) -> None:
    machine = Machine(tmp_path, server)
    script = """
import os, signal
from wandb_sync.models import Models
from wandb_sync.settings import WandbSettings
with Models(WandbSettings.read()).outbox.watch():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], env=machine.environment, check=False)
    assert killed.returncode == -9
    outbox = machine.models.outbox
    assert len(list(outbox.folder.iterdir())) == 1
    with outbox.watch() as watch:
        assert [entry.name for entry in outbox.folder.iterdir()] == [watch.run_id]


def test_a_training_that_fails_leaves_no_watched_run(server: WandbServer, tmp_path: Path) -> None:
    models = Machine(tmp_path, server).models
    with pytest.raises(ZeroDivisionError), models.outbox.watch():
        1 / 0  # noqa: B018
    assert list(models.outbox.folder.iterdir()) == []
    assert models.registry.pending() == []
