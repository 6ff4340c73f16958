"""Trained here, pulled there, served there: the trainer's golden rows bit for bit, and a rollback in two seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest

from fraud.detectors.protocol import Algorithm
from fraud.detectors.registered import ALGORITHMS
from fraud.models.bundle import short
from fraud.models.scorer import Scorer
from tests.servers import bentoml_serve
from tests.wandb_machine import Machine
from tests.wandb_runs import NAME, digest_of, golden, make_run
from tests.wandb_server import WandbServer

ROOT = Path(__file__).parent.parent
ROLLBACK_LIMIT_S = 2.0


@contextmanager
def service(machine: Machine) -> Iterator[bentoml.SyncHTTPClient]:
    """`bentoml serve` on a machine's Bento store, following its registry."""
    environment = {**machine.environment, "FRAUD_MODEL": NAME, "FRAUD_STATE_DIR": str(machine.home / "state")}
    with bentoml_serve(environment, machine.home / "log") as url, bentoml.SyncHTTPClient(url) as client:
        yield client


def predict(client: bentoml.SyncHTTPClient, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answer: dict[str, Any] = client.predict(instances=[row["instance"] for row in rows])
    predictions: list[dict[str, Any]] = answer["predictions"]
    return predictions


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_pulled_elsewhere_it_predicts_the_golden_rows_and_rolls_back(algorithm: Algorithm, tmp_path: Path) -> None:
    trainer_home, other_home = tmp_path / "trainer", tmp_path / "other"
    with WandbServer() as server:
        trainer, other = Machine(trainer_home, server), Machine(other_home, server)
        runs = [make_run(trainer_home / "runs", seed, algorithm=algorithm) for seed in (1, 2)]
        models = trainer.models
        for run in runs:
            models.publish(run)
            models.promote(NAME, digest_of(run), why="a test")
        assert models.send_pending().waiting == []
        followed = other.run("follow", NAME, "--once")
        assert followed.returncode == 0, followed.stdout
    # W&B is gone now: neither serving nor rolling back needs it
    other.environment["WANDB_MODE"] = "offline"
    followed = other.run("follow", NAME, "--once")
    assert followed.returncode == 0
    assert "following the local registry" in followed.stdout
    look = other.models.registry.following(NAME)
    assert look is not None
    assert "WANDB_MODE=offline" in look.error
    rows = golden(runs[1] / "bundle")
    with service(other) as client:
        predictions = predict(client, rows)
        assert [p["fraud_probability"] for p in predictions] == [row["fraud_probability"] for row in rows]
        pulled = Scorer.load(runs[1] / "bundle")
        anomaly = pulled.detector.anomaly_score(np.array([row["raw_margin"] for row in rows]))
        assert [p["anomaly"]["score"] for p in predictions if "anomaly" in p] == ([] if anomaly is None else [*anomaly])
        assert {p["model"]["digest"] for p in predictions} == {digest_of(runs[1])}

        started = time.perf_counter()
        assert other.run("models", NAME).returncode == 0
        any_command_s = time.perf_counter() - started
        started = time.perf_counter()
        rollback = other.start("rollback", NAME, "--why", "alerts doubled")
        while predict(client, rows[:1])[0]["model"]["version"] != short(digest_of(runs[0])):
            assert time.perf_counter() - started < 30
        took_s = time.perf_counter() - started
        assert rollback.wait(timeout=30) == 0
    # where the machine is busy with other things, a command that does nothing takes long as well
    limit_s = max(ROLLBACK_LIMIT_S, 4 * any_command_s)
    assert took_s < limit_s, f"the old model answered after {took_s:.2f} s, a mere listing took {any_command_s:.2f} s"
