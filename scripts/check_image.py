"""Prove an image: `python3 scripts/check_image.py fraud_bento:TAG [--engine docker]`.

1. With a read-only root, no network and one state folder it becomes ready and answers every golden request of its
   model with the training's exact probability.
2. Under load it gets SIGTERM: it ends with 0 in its grace time, and every decision that it acknowledged is in
   its decision log. Started again on the same state, it answers each of them with the same decision.
3. It runs under any other user id of the group 0, as OpenShift does: on an empty volume, and on one that another user
   id wrote before.

Needs podman or docker and nothing else of this project's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

USER = 1034
OTHER_USERS = (1_000_650_000, 4_242)
CALLERS = 4
START_LIMIT_S = 60.0
GRACE_S = 30.0
PACKED = "/home/bentoml/bento/models/*/*/golden.jsonl"


class Engine:
    def __init__(self, command: str, image: str) -> None:
        self.command, self.image = command, image

    def call(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run([self.command, *arguments], capture_output=True, text=True)
        if check and done.returncode:
            sys.exit(f"{self.command} {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
        return done.stdout.strip()

    def locked(self, state: Path | str) -> list[str]:
        """Options of a container that may write nothing but a state folder or volume, and has no capabilities."""
        options = ["--read-only", "--cap-drop", "ALL", "--volume", f"{state}:/state"]
        return [*options, "--read-only-tmpfs=false"] if self.command == "podman" else options

    @contextmanager
    def running(self, state: Path | str, *options: str) -> Iterator[tuple[str, float]]:
        """A container on a state folder or volume, once it is ready, and the seconds that it took."""
        started = time.perf_counter()
        name = self.call("run", "--detach", *self.locked(state), *options, self.image)
        try:
            while subprocess.run(
                [self.command, "exec", name, "/home/bentoml/bento/src/deploy/ready"], capture_output=True
            ).returncode:
                if time.perf_counter() - started > START_LIMIT_S:
                    sys.exit(f"not ready within {START_LIMIT_S:.0f} s:\n{self.logs(name)[-3000:]}")
                time.sleep(0.05)
            yield name, time.perf_counter() - started
        finally:
            self.call("rm", "--force", name, check=False)

    def logs(self, name: str) -> str:
        done = subprocess.run([self.command, "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout

    def memory_mib(self, name: str) -> float:
        """Proportional set size of all the container's processes."""
        said = self.call("exec", name, "sh", "-c", "cat /proc/[0-9]*/smaps_rollup 2>/dev/null", check=False)
        return sum(int(kib) for kib in re.findall(r"^Pss: +(\d+) kB", said, re.MULTILINE)) / 1024


def answers_without_network(engine: Engine, state: Path) -> None:
    with engine.running(state, "--network", "none") as (name, seconds):
        user, written = engine.call("exec", name, "id", "-u"), engine.call("exec", name, "sh", "-c", "touch /x || true")
        assert user == str(USER), f"runs as user {user}"
        assert not written
        print(engine.call("exec", name, "python3", "/home/bentoml/bento/src/deploy/rehearse.py", "--answers"))
        print(f"start to ready {seconds:.1f} s, memory {engine.memory_mib(name):.0f} MiB, root read-only, no network")


class Callers:
    """Threads that send one transaction after the other until the service is gone; `acknowledged` is what it said."""

    def __init__(self, port: int, golden: list[dict[str, object]]) -> None:
        self.port, self.golden = port, golden
        self.sent: dict[str, dict[str, object]] = {}
        self.acknowledged: dict[str, float] = {}
        self._threads = [threading.Thread(target=self._call, args=(i,)) for i in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _call(self, caller: int) -> None:
        for n in range(1_000_000):
            instance = dict(self.golden[n % len(self.golden)])
            instance |= {"transaction_id": f"stop-{caller}-{n}", "event_time": datetime.now(UTC).isoformat()}
            self.sent[str(instance["transaction_id"])] = instance
            try:
                said = predict(self.port, instance)
            except (OSError, http.client.HTTPException):
                return
            if said is None:
                return
            self.acknowledged[str(instance["transaction_id"])] = said


def predict(port: int, instance: dict[str, object]) -> float | None:
    """The probability; None when the service refuses because it stops."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/predict", json.dumps({"instances": [instance]}))
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status == 503:
        return None
    assert answer.status == 200, body
    probability: float = json.loads(body)["predictions"][0]["fraud_probability"]
    return probability


def open_port() -> tuple[int, tuple[str, ...]]:
    """A free port, and the options of a container that serves on it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return port, ("--network", "host", "--env", f"PORT={port}")


def stops_without_loss(engine: Engine, state: Path, *more: str, golden: str = PACKED) -> None:
    port, options = open_port()
    options = (*options, *more)
    with engine.running(state, *options) as (name, _):
        shown = engine.call("exec", name, "sh", "-c", f"cat {golden}")
        golden_instances = [json.loads(line)["instance"] for line in shown.splitlines()]
        callers = Callers(port, golden_instances)
        time.sleep(3)
        before = time.perf_counter()
        engine.call("stop", "--time", str(round(GRACE_S)), name)
        took = time.perf_counter() - before
        callers.join()
        status = engine.call("inspect", "--format", "{{.State.ExitCode}}", name)
    assert status == "0", f"ended with {status} after {took:.1f} s"
    assert len(callers.acknowledged) > 100, f"only {len(callers.acknowledged)} requests were answered before the stop"
    with engine.running(state, *options) as (name, seconds):
        lost = [key for key, said in callers.acknowledged.items() if predict(port, callers.sent[key]) != said]
        counted = engine.call("exec", name, "python3", "-c", COUNT)
    recorded = set(counted.split())
    assert not lost, f"{len(lost)} decisions are other ones after the restart, such as {lost[:3]}"
    missing = callers.acknowledged.keys() - recorded
    assert not missing, f"{len(missing)} acknowledged decisions are not in the log, such as {sorted(missing)[:3]}"
    print(
        f"SIGTERM under load: ended with 0 in {took:.1f} s; {len(callers.acknowledged)} decisions acknowledged, "
        f"0 lost, each the same after a restart that took {seconds:.1f} s"
    )


COUNT = """
import sqlite3
db = sqlite3.connect("file:/state/history.db?mode=ro", uri=True)
print(*(key.rpartition(chr(31))[2] for key, in db.execute("SELECT key FROM decisions")))
"""


@contextmanager
def empty_state() -> Iterator[Path]:
    """A folder that the container's user may write, and that may hold what he wrote."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        state.chmod(0o777)
        yield state


def runs_under_any_user(engine: Engine) -> None:
    volume = engine.call("volume", "create")
    try:
        for user in (*OTHER_USERS, USER):
            locked = ("--network", "none", "--user", f"{user}:0", "--security-opt", "no-new-privileges")
            with engine.running(volume, *locked) as (name, _):
                found = engine.call("exec", name, "sh", "-c", "id -u; id -g").split()
                assert found == [str(user), "0"], f"runs as {found}"
                answers = engine.call(
                    "exec", name, "python3", "/home/bentoml/bento/src/deploy/rehearse.py", "--answers"
                )
                engine.call("stop", "--time", str(round(GRACE_S)), name)
                status = engine.call("inspect", "--format", "{{.State.ExitCode}}", name)
            assert status == "0", f"as user {user} it ended with {status}"
            print(f"as user {user} of group 0, on the volume of the one before: {answers}")
    finally:
        engine.call("volume", "rm", "--force", volume, check=False)


def engine_of(description: str | None) -> Engine:
    """The engine and the image that the command line names; shows the image's size."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--engine", default="podman", choices=["podman", "docker"])
    given = parser.parse_args()
    engine = Engine(given.engine, given.image)
    size = int(engine.call("image", "inspect", "--format", "{{.Size}}", given.image)) / 1e6
    print(f"{given.image}: {size:.0f} MB", flush=True)
    return engine


def main() -> None:
    engine = engine_of(__doc__)
    for check in (answers_without_network, stops_without_loss):
        with empty_state() as state:
            check(engine, state)
    runs_under_any_user(engine)


if __name__ == "__main__":
    main()
