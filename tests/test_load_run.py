"""Locust runs the load tests against a real server on loopback: what is judged, and by which exit status."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PATIENT = """
# the machine that runs the tests may be busy
[smoke]
p99_ms = { max = 5000 }
error_share = { max = 0 }
shed_share = { max = 0 }
[ramp]
stage_p99_ms = { max = 2000 }
knee_rps = { min = 400 }
[swap]
error_share = { max = 0 }
versions = { min = 2 }
"""


@pytest.fixture
def patient(tmp_path: Path) -> list[str]:
    """Levels that hold on a busy machine too."""
    levels = tmp_path / "levels.toml"
    levels.write_text(PATIENT)
    return ["--levels", str(levels)]


@contextmanager
def serving(*options: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "tests.load_server", str(port), *options], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def locust(out: Path, host: str, *options: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, result.json and output of a run."""
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless", "--only-summary"]
    done = subprocess.run(
        [*command, "--host", host, "--out", str(out), *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    (result,) = out.glob("*/result.json")
    assert (result.parent / "report.html").read_text().count("data:image/png") >= 2
    return done.returncode, json.loads(result.read_text()), done.stdout + done.stderr


def test_smoke_passes_and_checks_every_answer(tmp_path: Path, patient: list[str]) -> None:
    with serving() as host:
        mix = (*patient, "--bad-share", "0.2", "--retry-share", "0.2", "--fraud-share", "0.3")
        status, result, said = locust(tmp_path, host, "--scenario", "smoke", "--seconds", "3", "--rate", "100", *mix)
    assert status == 0, said
    assert result["passed"]
    assert result["measured"]["requests"] > 200
    assert result["measured"]["error_share"] == 0
    assert result["kinds"]["retry"] > 10
    assert sum(n for kind, n in result["kinds"].items() if kind.startswith("bad")) > 20
    assert "held   p99_ms" in said


def test_a_slow_server_misses_the_level(tmp_path: Path) -> None:
    with serving("--delay-ms", "60") as host:
        status, result, said = locust(tmp_path, host, FRAUD_LOAD_SCENARIO="smoke", FRAUD_LOAD_SECONDS="2")
    assert status == 1
    assert not result["passed"]
    assert result["measured"]["p50_ms"] > 60
    assert result["measured"]["error_share"] == 0
    assert "MISSED p50_ms" in said


def test_a_server_that_decides_a_retry_anew_is_wrong(tmp_path: Path) -> None:
    with serving("--forget") as host:
        status, result, said = locust(
            tmp_path, host, "--seconds", "2", "--rate", "100", "--retry-share", "0.2", "--bad-share", "0"
        )
    assert status == 1
    assert result["measured"]["error_share"] > 0.05
    assert "retry: first" in said


def test_waiting_counts_from_the_intended_time(tmp_path: Path) -> None:
    """One connection, 50 ms an answer, 40 requests at once: the last ones wait for the first ones."""
    with serving("--delay-ms", "50") as host:
        _, result, _ = locust(
            tmp_path, host, "--requests", "40", "--delay", "0.001", "--connections", "1", "--bad-share", "0"
        )
    assert result["measured"]["requests"] == 40
    assert 1900 < result["measured"]["max_ms"] < 8000
    assert 900 < result["measured"]["p50_ms"] < 4000


def test_two_workers_find_the_knee(tmp_path: Path, patient: list[str]) -> None:
    ramp = ("--scenario", "ramp", "--rate", "60", "--seconds", "48", "--processes", "2")
    with serving("--most-rps", "150", "--delay-ms", "50") as host:
        status, result, said = locust(tmp_path, host, *ramp, *patient)
    assert result["options"]["expect_workers"] == 2
    assert 90 < result["knee"]["rps"] < 160, said
    assert result["knee"]["limited_by"].startswith("load shed")
    assert len(result["stages"]) < 24
    assert result["measured"]["error_share"] == 0  # what was under way at the end is waited for
    assert status == 1  # fewer than the level asks for


@pytest.mark.parametrize("fails", [False, True])
def test_a_swap_in_the_middle(tmp_path: Path, patient: list[str], fails: bool) -> None:
    version = tmp_path / "version"
    version.write_text("1")
    script = "raise SystemExit('refused')" if fails else f"open({str(version)!r}, 'w').write('2')"
    command = f'{sys.executable} -c "{script}"'
    swap = ("--scenario", "swap", "--seconds", "4", "--rate", "60", "--swap-command", command)
    with serving("--version", str(version)) as host:
        status, result, said = locust(tmp_path, host, *swap, *patient)
    assert status == int(fails), said
    assert len(result["versions"]) == (1 if fails else 2)
    assert ("the swap command failed with 1: refused" in said) == fails


def test_what_cannot_run_is_said_before_the_run(tmp_path: Path) -> None:
    locust = [sys.executable, "-m", "load_tests", "--seconds", "1", "--out", str(tmp_path / "out")]
    with serving() as host:
        for options, said in (
            (["--host", host, "--levels", str(tmp_path / "none.toml")], "none.toml"),
            (["--host", host, "--features", str(tmp_path / "none.json")], "none.json"),
            (["--host", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9"),
            ([], "no base URL"),
        ):
            done = subprocess.run([*locust, *options], cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == 1
            assert said in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_help_names_the_options_and_their_variables() -> None:
    done = subprocess.run([sys.executable, "-m", "load_tests", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    documented = (ROOT / "docs" / "load.md").read_text()
    options = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE))
    assert len(options) > 15
    assert not [option for option in options if f"`{option}`" not in documented]
    assert "FRAUD_LOAD_SCENARIO" in done.stdout
