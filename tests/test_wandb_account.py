"""The same round trip on a real W&B account: collected only where WANDB_API_KEY is set."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from fraud.models.bundle import short
from tests.wandb_machine import Machine
from tests.wandb_runs import digest_of, make_run

if "WANDB_API_KEY" in os.environ:

    def test_a_round_trip_on_the_real_service(tmp_path: Path) -> None:
        account = {name: os.environ[name] for name in os.environ if name in ("WANDB_API_KEY", "WANDB_BASE_URL")}
        account["WANDB_PROJECT"] = os.environ.get("WANDB_PROJECT", "fraud-bento-check")
        account["FRAUD_WANDB_RETRIES"] = "5"
        trainer = Machine(tmp_path / "trainer", None, **account)
        other = Machine(tmp_path / "other", None, **account)
        for machine in (trainer, other):
            machine.environment.pop("WANDB_ENTITY")
            if "WANDB_ENTITY" in os.environ:
                machine.environment["WANDB_ENTITY"] = os.environ["WANDB_ENTITY"]
        name = f"check-{uuid.uuid4().hex[:8]}"
        runs = [make_run(tmp_path / "runs", seed, name=name) for seed in (1, 2)]
        models = trainer.models
        for run in runs:
            models.publish(run)
        models.promote(name, "v0", why="the first")
        models.promote(name, "v1", why="better")
        assert models.send_pending().waiting == []
        versions = {version["version"]: version for version in models.lineage(name)}
        assert set(versions["v1"]["aliases"]) >= {"candidate", "production"}
        assert versions["v1"]["from"] == [f"{name}-dataset:v0"]
        assert [use["job_type"] for use in versions["v1"]["used_by"]] == ["promote"]
        assert other.models.pull(name, "production") == f"{name}:{short(digest_of(runs[1]))}"
        models.rollback(name, why="a check")
        assert models.send_pending().waiting == []
        assert other.models.follow(name) == f"{name}:{short(digest_of(runs[0]))}"
