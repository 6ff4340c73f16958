"""Every block of the README, run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fraud.checks.servers import free_port
from tests.servers import needs_curl
from training.data import Mapping

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
START_S = 240


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("readme")
    names = {"BENTOML_HOME": "bento", "FRAUD_STATE_DIR": "state"}
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("FRAUD_", "WANDB_"))},
        **{variable: str(home / folder) for variable, folder in names.items()},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "BENTOML_DO_NOT_TRACK": "true",
    }


@pytest.fixture(scope="module")
def trained(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Run the shell blocks of the commands as they stand, in an empty folder that has only the examples."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples").symlink_to(ROOT / "examples")
    script = "set -eu\n" + "\n".join(block for block in blocks("sh") if block.startswith("fraud "))
    done = subprocess.run(["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / "scores.parquet").stat().st_size > 0
    return done.stdout


@contextmanager
def running(command: list[str], environment: dict[str, str], until: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a server in a process group of its own and wait for a line of its output."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while until not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no {until!r} in {START_S} s: {log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_example_mapping_is_the_one_that_is_shipped() -> None:
    (shown,) = blocks("yaml")
    assert Mapping.model_validate(yaml.safe_load(shown)) == Mapping.from_yaml(ROOT / "examples" / "sparkov.yaml")


@needs_curl
def test_make_serve_trains_serves_and_prints_a_curl_line_that_works(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert "make serve\n" in blocks("sh")
    port = free_port()
    fresh = environment | {"BENTOML_HOME": str(tmp_path / "bento"), "FRAUD_STATE_DIR": str(tmp_path / "state")}
    command = ["make", "-o", ".venv/wandb.done", "serve", f"PORT={port}", f"BIN={BIN}", f"WORK={tmp_path}"]
    with running(command, fresh, "ready; ", tmp_path / "log"):
        (line,) = re.findall(r"^curl .*$", (tmp_path / "log").read_text(), re.MULTILINE)
        answer = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
    (prediction,) = json.loads(answer.stdout)["predictions"]
    assert 0 < prediction["fraud_probability"] < 1


def test_make_test_is_there() -> None:
    assert "make test\n" in blocks("sh")
    asked = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m pytest" in asked.stdout


def test_the_request_gets_the_answer_that_is_shown(
    environment: dict[str, str], trained: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, shown = map(json.loads, blocks("json"))
    (python,) = blocks("python")
    port = free_port()
    command = [str(BIN / "bentoml"), "serve", "--port", str(port)]
    with running(command, environment, "startup hook: start", tmp_path / "log"):
        subprocess.run([BIN / "fraud", "try", "--url", f"http://localhost:{port}"], env=environment, check=True)
        answer = post(f"http://localhost:{port}/predict", request)
        exec(python.replace("localhost:3000", f"localhost:{port}"), {"instance": request["instances"][0]})
    assert len(capsys.readouterr().out.splitlines()) == 5
    for mine, theirs in zip(answer["predictions"], shown["predictions"], strict=True):
        assert len(mine["model"].pop("digest")) == len(theirs["model"].pop("digest"))
        assert len(mine["model"].pop("version")) == len(theirs["model"].pop("version"))
        assert mine.pop("fraud_probability") == pytest.approx(theirs.pop("fraud_probability"), rel=1e-6)
        assert mine == theirs
