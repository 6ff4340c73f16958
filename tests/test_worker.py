"""A worker: its parts are stopped in reverse, also when a later one cannot be started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import store_of_tiny_models

ROOT = Path(__file__).parent.parent
SCRIPT = """
import asyncio, gc, json, threading
from fraud.errors import FraudError, NotReady
from fraud.models.served import Packed
from fraud.serving.worker import Worker
from fraud.settings import Settings

def state(worker):
    try:
        return worker.engine.readiness()["status"]
    except NotReady:
        return "not ready"

async def main():
    worker = Worker(Settings.read(), Packed())
    seen = [state(worker)]
    try:
        await worker.start()
    except FraudError as error:
        seen.append(type(error).__name__)
    else:
        seen.append(state(worker))
        await worker.stop()
    seen.append(state(worker))
    await asyncio.get_running_loop().shutdown_default_executor()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print(json.dumps({"seen": seen, "threads": threads, "tasks": [task.get_coro().__qualname__ for task in others]}))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return store_of_tiny_models(tmp_path_factory.mktemp("bentoml"))


def life(environment: dict[str, str], **changes: str) -> Any:
    """Start and stop a worker in a process of its own; return what was seen of it and what it left running."""
    script = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env={**environment, **changes}, capture_output=True, text=True
    )
    assert script.returncode == 0, script.stderr
    return json.loads(script.stdout)


def test_a_worker_is_ready_between_start_and_stop_and_leaves_nothing_running(environment: dict[str, str]) -> None:
    seen = life(environment, FRAUD_SHADOW="true", FRAUD_OTLP_ENDPOINT="http://127.0.0.1:9")
    assert seen == {"seen": ["not ready", "ready", "not ready"], "threads": [], "tasks": []}


def test_what_was_started_is_stopped_when_the_store_cannot_be(environment: dict[str, str]) -> None:
    seen = life(environment, FRAUD_SHADOW="true", FRAUD_STORE="sqlite:/proc/nowhere/history.db")
    assert seen == {"seen": ["not ready", "StoreError", "not ready"], "threads": [], "tasks": []}


def test_the_process_that_starts_the_workers_loads_no_library_that_only_they_need() -> None:
    loaded = "import sys, service; print(sorted({'numba', 'llvmlite', 'lightgbm', 'sklearn'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
