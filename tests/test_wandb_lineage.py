"""What a version was used for, in W&B's lineage of it: backtests and production."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.conftest import EXAMPLES
from tests.servers import wait_until
from tests.wandb_machine import PROJECT, Machine
from tests.wandb_server import WandbServer
from tests.wandb_server.state import ENTITY
from training.data import dataset_digest
from training.train import Run

NAME = "fraud-features"
MAPPING = ("--mapping", EXAMPLES / "features.yaml")


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(scope="module")
def trained(server: WandbServer, features_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine whose version, really trained, is on W&B."""
    root = tmp_path_factory.mktemp("trained")
    run = shutil.copytree(features_run.folder, root / "runs" / features_run.folder.name)
    machine = Machine(root, server)
    machine.models.publish(run)
    assert machine.models.send_pending().waiting == []
    return machine


def backtests(machine: Machine) -> list[dict[str, Any]]:
    """Configurations of the backtest runs that the dashboard shows behind the version."""
    answer: list[dict[str, Any]] = machine.ask(f"""
runs = [api.run("{ENTITY}/{PROJECT}/" + r.id) for r in api.artifact("{ENTITY}/{PROJECT}/{NAME}:v0").used_by()]
answer = [run.config for run in runs if run.job_type == "backtest"]""")
    return answer


def test_scores_of_labelled_rows_are_measured_and_are_a_backtest_of_the_version(
    trained: Machine, simulated_features: Path, features_run: Run, tmp_path: Path
) -> None:
    given = ("score", "--data", simulated_features, *MAPPING, "--out", tmp_path / "scores.parquet", "--model")
    done = trained.run(*given, f"{NAME}:candidate")
    assert done.returncode == 0, done.stdout
    assert "4,000 labelled rows, with 95% intervals" in done.stdout
    assert "The model was trained on this file" in done.stdout
    assert f"W&B has {NAME}: backtest" in done.stdout
    (facts,) = backtests(trained)
    assert facts["data"]["name"] == simulated_features.name
    assert facts["data"]["digest"] == dataset_digest(simulated_features)
    assert facts["data"]["rows"] == facts["labelled_rows"] == 4000
    assert facts["data"]["from"] < facts["data"]["to"]
    assert facts["trained_on_it"] is True
    assert facts["metrics"].keys() == features_run.metrics.keys()
    measured = facts["metrics"]["average_precision"]
    assert 0 < measured["low"] <= measured["value"] <= measured["high"] <= 1
    assert f"{measured['value']:.4f}" in done.stdout
    assert "(backtest)" in trained.run("lineage", NAME).stdout

    # a bundle in a folder is measured, and is no version to record a use of
    done = trained.run(*given, features_run.folder / "bundle")
    assert done.returncode == 0, done.stdout
    assert "4,000 labelled rows" in done.stdout
    # rows without labels cannot be measured
    bare = tmp_path / "bare.parquet"
    pd.read_parquet(simulated_features).drop(columns=["is_fraud", "label_time"]).to_parquet(bare)
    done = trained.run("score", "--data", bare, *MAPPING, "--out", tmp_path / "b.csv", "--model", f"{NAME}:v0")
    assert done.returncode == 0, done.stdout
    assert "labelled rows" not in done.stdout
    assert trained.models.registry.pending() == []
    assert len(backtests(trained)) == 1


def test_scores_of_transactions_are_measured_by_customer_as_in_training(
    simulated: Path, transaction_run: Run, tmp_path: Path
) -> None:
    given = ("--data", simulated, "--mapping", EXAMPLES / "simulated.yaml", "--out", tmp_path / "scores.csv")
    done = Machine(tmp_path, None).run("score", *given, "--model", transaction_run.folder)
    assert done.returncode == 0, done.stdout
    assert "card_precision_at_100" in transaction_run.metrics
    assert all(measure in done.stdout for measure in transaction_run.metrics)


def test_a_use_that_cannot_be_sent_waits_and_holds_up_nothing(trained: Machine) -> None:
    models = trained.models
    models.registry.register(NAME, "sha256:" + "e" * 64, "sha256:" + "f" * 64, who="a test", aliases=())
    models.record_use(NAME, "v1", "backtest", {})
    models.challenge(NAME, "v0", why="compare")
    late = models.send_pending(within_s=0.0)
    assert (late.delivered, len(late.waiting), late.reason) == ([], 2, "0 s have passed")
    sent = models.send_pending()
    assert [item.kind for item in sent.delivered] == ["alias"]
    assert [item.kind for item in sent.waiting] == ["use"]
    assert "has no version sha256:eeee" in sent.reason


def test_a_follower_sends_what_waits_each_time_round(trained: Machine) -> None:
    models = trained.models
    if models.registry.digest_of(NAME, "production") is None:
        models.promote(NAME, "v0", why="the first")
    models.record_use(NAME, "v0", "production", {"host": "here"})
    follower = trained.start("follow", NAME, "--every-s", "5")
    try:
        wait_until(lambda: not any(item.payload["kind"] == "production" for item in models.registry.pending()), 60)
    finally:
        follower.terminate()
        follower.wait(30)
    assert "production" in [use["job_type"] for use in models.lineage(NAME)[0]["used_by"]]
