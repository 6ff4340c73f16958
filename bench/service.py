"""The service against its peers: one model, one client, one core for the server and one for the client.

    python -m bench.service                       everything, twice round, medians
    python -m bench.service --rounds 1 --seconds 1 --connections 32 --rates 1000 --servers fraud_bento,bare_asgi

Each peer runs in a virtual environment of its own, made on first use from bench/peers/requirements.  Servers take
turns; every figure is read as a ratio within one run.  Writes bench/results/service.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.client import COUNTER, Load, ceiling
from bench.model import NAMES, instances, write_model
from wandb_sync.store import BentoStore

HERE = Path(__file__).parent
PEERS = HERE / "peers"
WORK = HERE / ".work"
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
        both,
        cwd=HERE.parent,
        environment=own_environment("bundle"),
    )
    fresh = as_instances(fresh_transactions())
    return [
        own,
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
    if server.requirements is None:
        return Path(sys.executable).parent
    requirements = PEERS / "requirements" / f"{server.requirements}.txt"
    folder = WORK / "environments" / server.requirements
    if not (folder / "done").exists():
        console.print(f"making the environment of {server.name} …")
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
        while not answers(port, endpoint):
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


def answers(port: int, endpoint: Endpoint) -> bool:
    body = endpoint.bodies[0].encode().replace(COUNTER, b"0" * len(COUNTER))
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{endpoint.path}", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
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


def measure(server: Running, endpoint: Endpoint, load: dict[str, Any], seconds: float, core: int) -> dict[str, Any]:
    """Drive one load from a process of its own; adds the server's CPU time per request."""
    load_ = Load(server.port, endpoint.path, endpoint.bodies, seconds=seconds, core=core, **load)
    before = server.cpu_s()
    client = subprocess.run(
        [sys.executable, "-m", "bench.client", "-"],
        input=json.dumps(asdict(load_)),
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if client.returncode:
        raise RuntimeError(f"the client failed: {client.stderr.strip().splitlines()[-1]}")
    measured: dict[str, Any] = json.loads(client.stdout)
    measured["cpu_us_per_request"] = round((server.cpu_s() - before) / measured.pop("sent") * 1e6, 1)
    return measured


def loads(connections: list[int], rates: list[float]) -> list[tuple[str, dict[str, Any]]]:
    closed = [(f"{n} connections", {"connections": n}) for n in connections]
    opened = [(f"{rate:g} a second", {"connections": 256, "rate": rate}) for rate in rates]
    return closed + opened


def run(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the benchmark needs two cores: one for the server, one for the client")
    write_model(WORK / "model")
    chosen = [server for server in servers() if not options.servers or server.name in options.servers]
    figures: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    starts: dict[str, list[dict[str, float]]] = {server.name: [] for server in chosen}
    for turn in range(options.rounds):
        for server in chosen:
            with running(server, cores[0]) as process:
                for endpoint_name, endpoint in server.endpoints.items():
                    for load_name, load in loads(options.connections, options.rates):
                        measured = measure(process, endpoint, load, options.seconds, cores[-1])
                        figures.setdefault((server.name, endpoint_name, load_name), []).append(measured)
                        console.print(f"[dim]{turn + 1} {server.name} /{endpoint_name} {load_name}: {measured}[/dim]")
                starts[server.name].append({"start_to_ready_s": process.start_to_ready_s, **process.memory_mb()})
    results = [
        {"server": server, "endpoint": endpoint, "load": load, **medians(several)}
        for (server, endpoint, load), several in figures.items()
    ]
    return {
        "hardware": {"cpus": os.cpu_count(), "machine": platform.processor() or platform.machine()},
        "rounds": options.rounds,
        "seconds": options.seconds,
        "client_ceiling_rps": ceiling(cores[0], cores[-1]).rps,
        "results": with_ratios(results),
        "processes": {name: medians(several) for name, several in starts.items()},
    }


def medians(several: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: round(statistics.median(one[key] for one in several), 3) for key in several[0]}


REFERENCES = {"predict": ("bentoml_idiomatic", "bare_asgi"), "explain": ("fastapi_sklearn",)}


def with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add each server's throughput as a ratio to the references' under the same load."""
    rps = {(r["server"], r["endpoint"], r["load"]): r["rps"] for r in results}
    for result in results:
        result["ratio_to"] = {
            reference: round(result["rps"] / rps[reference, result["endpoint"], result["load"]], 2)
            for reference in REFERENCES[result["endpoint"]]
            if rps.get((reference, result["endpoint"], result["load"]))
        }
    return results


def show(report: dict[str, Any]) -> None:
    table = Table(
        "endpoint",
        "load",
        "server",
        "rps",
        "p50 ms",
        "p99 ms",
        "p99.9 ms",
        "cpu µs",
        "errors",
        "late",
        "rps as ratio to",
    )
    by_load: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in report["results"]:
        by_load.setdefault((result["endpoint"], result["load"]), []).append(result)
    for (endpoint, load), results in by_load.items():
        for r in sorted(results, key=lambda r: -r["rps"]):
            ratios = ", ".join(f"{name} {ratio}" for name, ratio in r["ratio_to"].items())
            figures = [r[key] for key in ("rps", "p50_ms", "p99_ms", "p999_ms", "cpu_us_per_request", "errors", "late")]
            table.add_row(f"/{endpoint}", load, r["server"], *[f"{figure:,g}" for figure in figures], ratios)
        table.add_section()
    console.print(table)
    processes = Table("server", "start to ready s", "worker MB", "all processes MB")
    for name, p in report["processes"].items():
        processes.add_row(name, *[f"{p[key]:g}" for key in ("start_to_ready_s", "worker_rss_mb", "all_pss_mb")])
    console.print(processes)
    console.print(f"the client alone can drive {report['client_ceiling_rps']:,.0f} a second")


def main() -> None:
    numbers = lambda text: [float(n) for n in text.split(",") if n]  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load, after half a second of warm-up")
    parser.add_argument("--connections", type=lambda t: [int(n) for n in t.split(",") if n], default=[1, 8, 32, 128])
    parser.add_argument("--rates", type=numbers, default=[100.0, 500.0, 1000.0, 2000.0])
    parser.add_argument("--servers", type=lambda t: t.split(","), default=[])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "service.json")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options)
    show(report)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
