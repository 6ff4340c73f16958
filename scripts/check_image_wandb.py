"""Prove that an image takes its models from W&B: `python -m scripts.check_image_wandb fraud_bento:TAG-wandb`.

`make image WANDB=1` makes such an image. W&B is the small server of tests/wandb_server here, the SDK in the image is
the unmodified one, and the root stays read-only.

1. On an empty volume it pulls what W&B has in production, and answers its golden requests as in training; when the
   alias moves on W&B, it swaps; when the process that follows W&B is killed, it goes on, says so, and looks again.
2. SIGTERM under load loses nothing, and ends all its processes.
3. With W&B silent, or gone, it serves what the volume has, and says that W&B does not answer; a version named by its
   digest needs no W&B; on an empty volume it ends with a message. SIGTERM ends it also while it waits for W&B.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fraud.checks.servers import free_port
from fraud.models.bundle import short
from scripts.check_image import Engine, empty_state, engine_of, open_port, stops_without_loss
from tests.wandb_machine import Machine, collection
from tests.wandb_runs import NAME, digest_of, golden, make_run
from tests.wandb_server import Fault, WandbServer
from tests.wandb_server.state import ENTITY

LOOK_S = 5
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
KILL_FOLLOWER = "kill -KILL $(grep -la 'cli[.]main import' /proc/[0-9]*/cmdline | cut -d/ -f3)"


def from_wandb(base_url: str, *more: str) -> list[str]:
    variables = {
        "MODELS_FROM": "wandb",
        "FRAUD_MODEL": NAME,
        "FOLLOW_EVERY_S": str(LOOK_S),
        "WANDB_BASE_URL": base_url,
        "WANDB_API_KEY": WandbServer.API_KEY,
        "WANDB_ENTITY": ENTITY,
        "FRAUD_WANDB_RETRIES": "1",
        "FRAUD_WANDB_RETRY_WAIT_S": "1",
    }
    variables |= dict(text.split("=", 1) for text in more)
    return [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]


def predictions(port: int, run: Path) -> list[dict[str, Any]]:
    """What the service answers to the golden requests of a run."""
    body = json.dumps({"instances": [row["instance"] for row in golden(run / "bundle")]}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"})
    with DIRECT.open(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["predictions"]
    return found


def serves(port: int, run: Path) -> bool:
    """Whether the golden requests of a run are answered by its model; a probability that differs is an error."""
    answers = predictions(port, run)
    if {answer["model"]["digest"] for answer in answers} != {digest_of(run)}:
        return False
    expected = [row["fraud_probability"] for row in golden(run / "bundle")]
    assert [answer["fraud_probability"] for answer in answers] == expected
    return True


def looked(port: int) -> dict[str, Any]:
    """What /readyz says of W&B."""
    with DIRECT.open(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)["wandb"][NAME]
    return found


def within(limit_s: float, condition: Callable[[], bool], what: str) -> float:
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < limit_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.2)
    return time.perf_counter() - started


def follows(engine: Engine, state: Path, server: WandbServer, runs: list[Path]) -> None:
    port, options = open_port()
    with engine.running(state, *options, *from_wandb(server.base_url)) as (name, seconds):
        assert serves(port, runs[1])
        assert looked(port)["failed"] is False
        print(f"an empty volume: pulled and ready after {seconds:.1f} s, memory {engine.memory_mib(name):.0f} MiB")
        versions = collection(server, NAME).versions
        server.state.set_aliases(versions[0], ["production"])
        took = within(30, lambda: serves(port, runs[0]), "the version that production names now is served")
        print(
            f"production moved on W&B: served after {took:.1f} s, of which up to {1.2 * LOOK_S:.0f} s between looks; "
            f"memory with the follower {engine.memory_mib(name):.0f} MiB"
        )

        engine.call("exec", name, "sh", "-c", KILL_FOLLOWER)
        within(10, lambda: "ended with 137" in engine.logs(name), "the log says that the follower was killed")
        assert serves(port, runs[0])
        server.state.set_aliases(versions[1], ["production"])
        took = within(30, lambda: serves(port, runs[1]), "followed again after the follower was killed")
        print(f"the follower killed: the service went on, and followed again after {took:.1f} s")


def pins_a_version(engine: Engine, state: Path, server: WandbServer, run: Path) -> None:
    port, options = open_port()
    pinned = f"FRAUD_MODEL={NAME}:{short(digest_of(run))}"
    with engine.running(state, *options, *from_wandb(server.base_url, pinned)) as (_, seconds):
        assert serves(port, run)
        print(f"an empty volume, a version by its digest: pulled and ready after {seconds:.1f} s")


def waits_for_no_one(engine: Engine, state: Path, empty: Path, server: WandbServer, runs: list[Path]) -> None:
    server.faults.set(Fault("/graphql", "slow", delay_s=60))
    port, options = open_port()
    silent = from_wandb(server.base_url, "FRAUD_WANDB_TRANSFER_TIMEOUT_S=5")
    with engine.running(state, *options, *silent) as (name, seconds):
        assert serves(port, runs[1])
        assert looked(port)["failed"] is True
        print(f"W&B silent: what the volume has is served after {seconds:.1f} s, of which 5 s were given to W&B")
    asked = len(server.requests)
    name = engine.call("run", "--detach", *engine.locked(empty), "--network", "host", *silent, engine.image)
    try:
        within(30, lambda: len(server.requests) > asked, "W&B is asked")
        started = time.perf_counter()
        engine.call("stop", "--time", "30", name)
        print(f"SIGTERM while it waits for W&B: ended after {time.perf_counter() - started:.1f} s")
        assert engine.call("inspect", "--format", "{{.State.ExitCode}}", name) == "143"
    finally:
        engine.call("rm", "--force", name, check=False)
    server.faults.clear()


def goes_on_without_wandb(engine: Engine, state: Path, gone: str, runs: list[Path]) -> None:
    port, options = open_port()
    with engine.running(state, *options, *from_wandb(gone)) as (name, seconds):
        assert serves(port, runs[1])
        assert looked(port)["failed"] is True
        assert "following the local registry: W&B at" in engine.logs(name)
        print(f"W&B gone: what the volume has is served after {seconds:.1f} s, and /readyz and the log say so")
    pinned = f"FRAUD_MODEL={NAME}:{short(digest_of(runs[0]))}"
    with engine.running(state, *options, *from_wandb(gone, pinned)) as (_, seconds):
        assert serves(port, runs[0])
        print(f"W&B gone, a version by its digest: served after {seconds:.1f} s")


def ends_with_nothing_to_serve(engine: Engine, state: Path, gone: str) -> None:
    started = time.perf_counter()
    command = [engine.command, "run", "--rm", *engine.locked(state), "--network", "host", *from_wandb(gone)]
    done = subprocess.run([*command, engine.image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1, f"ended with {done.returncode}: {done.stdout[-2000:]}"
    assert f"nothing to serve: W&B gave no {NAME} in production, and the volume has none" in done.stdout, done.stdout
    print(f"W&B gone, an empty volume: ended with 1 after {time.perf_counter() - started:.1f} s, and said why")


def main() -> None:
    engine = engine_of(__doc__)
    with (
        tempfile.TemporaryDirectory() as home,
        empty_state() as state,
        empty_state() as pinned,
        empty_state() as empty,
    ):
        with WandbServer() as server:
            trainer = Machine(Path(home), server)
            runs = [make_run(Path(home, "runs"), 1), make_run(Path(home, "runs"), 2)]
            for run in runs:
                trainer.models.publish(run)
                trainer.models.promote(NAME, digest_of(run), why="a check")
            assert not trainer.models.send_pending().waiting
            follows(engine, state, server, runs)
            stored = f"/state/bentoml/models/{NAME}/{short(digest_of(runs[1]))}/golden.jsonl"
            stops_without_loss(engine, state, *from_wandb(server.base_url), golden=stored)
            pins_a_version(engine, pinned, server, runs[0])
            waits_for_no_one(engine, state, empty, server, runs)
            assert not server.errors, server.errors
        gone = f"http://127.0.0.1:{free_port()}"
        goes_on_without_wandb(engine, state, gone, runs)
        ends_with_nothing_to_serve(engine, empty, gone)


if __name__ == "__main__":
    main()
