"""The servers of the benchmark: how each is installed, started on one core, watched and ended."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from bench.client import COUNTER
from bench.model import NAMES, instances
from fraud.models.bento_store import BentoStore

HERE = Path(__file__).parent
PEERS = HERE / "peers"
WORK = HERE / ".work"
BULK_ROWS = 1000
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine
console = Console(width=150)


@dataclass(frozen=True)
class Endpoint:
    path: str
    bodies: list[str]


@dataclass(frozen=True)
class Server:
    """How to start one server on a port, and what it answers."""

    name: str
    requirements: str | None
    """File in bench/peers/requirements, without its suffix; None for this project's own environment."""
    command: Callable[[str, int], list[str]]
    """Of the environment's bin folder and the port."""
    endpoints: dict[str, Endpoint]
    cwd: Path = PEERS
    environment: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def as_instances(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps({"instances": [row]}) for row in rows]


def as_v2(rows: list[dict[str, float]]) -> list[str]:
    inputs = [
        {"name": "x", "shape": [1, len(NAMES)], "datatype": "FP64", "data": [row[n] for n in NAMES]} for row in rows
    ]
    return [json.dumps({"inputs": [x], "outputs": [{"name": "predict_proba"}]}) for x in inputs]


def servers() -> list[Server]:
    rows = instances(256)
    plain = as_instances(rows)
    both = {"predict": Endpoint("/predict", plain), "explain": Endpoint("/explain", plain)}
    predict = {"predict": both["predict"]}
    mlserver = WORK / "mlserver"
    own = Server(
        "fraud_bento",
        None,
        lambda bin_, port: [f"{bin_}/bentoml", "serve", "service:FraudBento", "--port", str(port)],
        {**both, "bulk": Endpoint("/predict", [json.dumps({"instances": instances(BULK_ROWS)})])},
        cwd=HERE.parent,
        environment=own_environment("bundle") | {"FRAUD_RECORD_UNNAMED": "false"},  # the peers record nothing
    )
    fresh = as_instances(fresh_transactions())
    return [
        own,
        dataclasses.replace(own, name="fraud_bento_recorded", endpoints=both, environment=own_environment("bundle")),
        dataclasses.replace(
            own,
            name="fraud_bento_history",
            endpoints={"predict": Endpoint("/predict", fresh), "explain": Endpoint("/explain", fresh)},
            environment=own_environment("history"),
        ),
        Server(
            "bare_asgi",
            "fastapi",
            lambda bin_, port: [f"{bin_}/uvicorn", "bare_asgi:app", "--port", str(port), *QUIET],
            predict,
        ),
        Server(
            "bentoml_idiomatic",
            "bentoml",
            lambda bin_, port: [f"{bin_}/bentoml", "serve", "bentoml_idiomatic:Idiomatic", "--port", str(port)],
            predict,
        ),
        Server(
            "fastapi_sklearn",
            "fastapi",
            lambda bin_, port: [f"{bin_}/uvicorn", "fastapi_sklearn:app", "--port", str(port), *QUIET],
            both,
        ),
        Server(
            "litserve",
            "litserve",
            lambda bin_, port: [f"{bin_}/python", "litserve_api.py", str(port)],
            predict,
        ),
        Server(
            "mlserver",
            "mlserver",
            lambda bin_, port: [f"{bin_}/mlserver", "start", str(mlserver)],
            {"predict": Endpoint("/v2/models/fraud/infer", as_v2(rows))},
        ),
    ]


QUIET = ["--log-level", "warning", "--no-access-log"]


def fresh_transactions() -> list[dict[str, Any]]:
    """Transactions of now; each time one is sent it has an id of its own, so that all are scored and recorded."""
    event_time = datetime.now(UTC).isoformat(timespec="milliseconds")
    known = json.loads((WORK / "model" / "transactions.json").read_text())
    return [{**t, "transaction_id": COUNTER.decode(), "event_time": event_time} for t in known]


def own_environment(bundle: str) -> dict[str, str]:
    """A Bento store of the benchmark's own, with the model in it."""
    home = WORK / "bentoml"
    tag = BentoStore(home).import_bundle(WORK / "model" / bundle, {})
    return {"BENTOML_HOME": str(home), "FRAUD_MODEL": tag, "FRAUD_STATE_DIR": str(WORK / "state")}


def environment_of(server: Server) -> Path:
    """The server's bin folder; its environment is made first, where it is not there."""
    return Path(sys.executable).parent if server.requirements is None else made_environment(server.requirements)


def made_environment(name: str) -> Path:
    """Return the bin folder of an environment with the packages of bench/peers/requirements/NAME.txt."""
    requirements = PEERS / "requirements" / f"{name}.txt"
    folder = WORK / "environments" / name
    if not (folder / "done").exists():
        console.print(f"making the environment {name} …")
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if uv:
            subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
            install: list[str | Path] = [uv, "pip", "install", "-q", "--python", folder / "bin" / "python"]
        else:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            install = [folder / "bin" / "python", "-m", "pip", "install", "-q"]
        subprocess.run([*install, "-r", requirements], check=True)
        (folder / "done").touch()
    return folder / "bin"


@dataclass
class Running:
    process: psutil.Process
    port: int
    start_to_ready_s: float

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu_s(self) -> float:
        return sum(sum(p.cpu_times()[:2]) for p in self.tree())

    def memory_mb(self) -> dict[str, float]:
        """Resident memory of the largest process, and what all of them take together (shared pages once)."""
        resident = max(p.memory_info().rss for p in self.tree())
        together = sum(p.memory_full_info().pss for p in self.tree())
        return {"worker_rss_mb": round(resident / 2**20, 1), "all_pss_mb": round(together / 2**20, 1)}


@contextmanager
def running(server: Server, core: int) -> Iterator[Running]:
    """Start a server on one core, until it has answered a score; end it with all its processes."""
    bin_ = environment_of(server)
    port = free_port()
    shutil.rmtree(WORK / "state", ignore_errors=True)
    if server.name == "mlserver":
        prepare_mlserver(port)
    log = (WORK / f"{server.name}.log").open("w")
    environment = {
        **os.environ,
        **server.environment,
        "BENCH_MODEL": str(WORK / "model"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        server.command(str(bin_), port),
        cwd=server.cwd,
        env=environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        endpoint = server.endpoints["predict"]
        while not answers(port, endpoint, server.headers):
            if process.poll() is not None or time.perf_counter() - started > 120:
                raise RuntimeError(f"{server.name} did not start; see {log.name}")
            time.sleep(0.01)
        yield Running(psutil.Process(process.pid), port, round(time.perf_counter() - started, 2))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def answers(port: int, endpoint: Endpoint, headers: dict[str, str]) -> bool:
    body = endpoint.bodies[0].encode().replace(COUNTER, b"0" * len(COUNTER))
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{endpoint.path}", body, {"Content-Type": "application/json", **headers}
    )
    try:
        with DIRECT.open(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def prepare_mlserver(port: int) -> None:
    folder = WORK / "mlserver"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(PEERS / "mlserver", folder)
    shutil.copy(WORK / "model" / "classifier.joblib", folder)
    settings = json.loads((folder / "settings.json").read_text())
    settings |= {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    (folder / "settings.json").write_text(json.dumps(settings))
