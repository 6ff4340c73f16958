"""The service against its peers: one model, one client, one core for the server and one for the client.

    python -m bench.service                       everything, twice round, medians
    python -m bench.service --rounds 1 --seconds 1 --connections 32 --rates 1000 --servers fraud_bento,bare_asgi

Each peer runs in a virtual environment of its own, made on first use from bench/peers/requirements.  Servers take
turns; every figure is read as a ratio within one run.  Writes bench/results/service.json and docs/performance.md,
or only the file that `--out` names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
from rich.table import Table

from bench.client import Load, ceiling
from bench.hardware import describe_hardware
from bench.model import instances, write_model
from bench.servers import BULK_ROWS, HERE, WORK, Endpoint, Running, console, running, servers


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


def loads(endpoint: str, connections: list[int], rates: list[float]) -> list[tuple[str, dict[str, Any]]]:
    if endpoint == "bulk":
        return [(ALONE, {"connections": 1})]
    closed = [(f"{n} connections", {"connections": n}) for n in connections]
    opened = [(f"{rate:g} a second", {"connections": 256, "rate": rate}) for rate in rates]
    return closed + opened


ALONE = "1 connections"


def booster_us_per_row(core: int) -> float:
    """LightGBM's own `predict` of the bulk request's rows as a ready matrix, one thread, on the server's core."""
    os.sched_setaffinity(0, {core})
    booster = lightgbm.Booster(model_file=WORK / "model" / "booster.txt")
    X = np.array([list(row.values()) for row in instances(BULK_ROWS)])
    seconds = []
    for _ in range(100):
        started = time.perf_counter()
        booster.predict(X, raw_score=True, num_threads=1)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) / BULK_ROWS * 1e6


LIBRARIES = ("bentoml", "lightgbm", "numpy", "numba", "uvicorn", "uvloop", "httptools", "msgspec")


def run(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the benchmark needs two cores: one for the server, one for the client")
    hardware = describe_hardware(LIBRARIES)
    write_model(WORK / "model")
    chosen = [server for server in servers() if not options.servers or server.name in options.servers]
    figures: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    starts: dict[str, list[dict[str, float]]] = {server.name: [] for server in chosen}
    for server in chosen:
        with running(server, cores[0]):
            pass  # what is compiled once, bytecode and kernels, is in its cache when the measuring begins
    for turn in range(options.rounds):
        for server in chosen:
            with running(server, cores[0]) as process:
                for endpoint_name, endpoint in server.endpoints.items():
                    for load_name, load in loads(endpoint_name, options.connections, options.rates):
                        measured = measure(process, endpoint, load, options.seconds, cores[-1])
                        figures.setdefault((server.name, endpoint_name, load_name), []).append(measured)
                        console.print(f"[dim]{turn + 1} {server.name} /{endpoint_name} {load_name}: {measured}[/dim]")
                starts[server.name].append({"start_to_ready_s": process.start_to_ready_s, **process.memory_mb()})
    spawned = get_context("spawn")  # this process has OpenMP's threads, which a fork would lose
    with ProcessPoolExecutor(1, spawned) as process_:
        booster_us = process_.submit(booster_us_per_row, cores[0]).result()
    results = [
        {"server": server, "endpoint": endpoint, "load": load, **medians(several)}
        for (server, endpoint, load), several in figures.items()
    ]
    return {
        "hardware": hardware,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "booster_us_per_row": round(booster_us, 2),
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
            for reference in REFERENCES.get(result["endpoint"], ())
            if rps.get((reference, result["endpoint"], result["load"]))
        }
    return results


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What this run says of each target; one whose loads or servers were left out is not listed."""
    at = {(r["endpoint"], r["server"], r["load"]): r for r in report["results"]}
    own = report["processes"].get("fraud_bento", {})
    found = []

    def target(name: str, measured: float | None, limit: float, at_least: bool = True) -> None:
        if measured is not None:
            met = measured >= limit if at_least else measured < limit
            bound = f"{'≥' if at_least else '<'} {limit:g}"
            found.append({"target": name, "measured": measured, "bound": bound, "met": met})

    def ratio(endpoint: str, reference: str) -> float | None:
        result = at.get((endpoint, "fraud_bento", "32 connections"))
        value: float | None = result and result["ratio_to"].get(reference)
        return value

    target("/predict, 32 connections, to idiomatic BentoML", ratio("predict", "bentoml_idiomatic"), 10)
    target("/predict, 32 connections, to bare ASGI", ratio("predict", "bare_asgi"), 1)
    target("/explain, 32 connections, to FastAPI with pred_contrib", ratio("explain", "fastapi_sklearn"), 30)
    bulk = at.get(("bulk", "fraud_bento", ALONE))
    if bulk:
        per_row = bulk["p50_ms"] * 1000 / BULK_ROWS / report["booster_us_per_row"]
        target("/predict of 1,000 rows, per row, to Booster.predict", round(per_row, 2), 3, at_least=False)
    reasons = at.get(("explain", "fraud_bento", "1000 a second"))
    target("p99 with reasons at 1,000 a second, ms", reasons and reasons["p99_ms"], 10, at_least=False)
    target("start to ready, s", own.get("start_to_ready_s"), 3, at_least=False)
    target("memory of a worker, MB", own.get("worker_rss_mb"), 400, at_least=False)
    return found


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
    for t in targets(report):
        console.print(f"{'met   ' if t['met'] else 'MISSED'} {t['target']}: {t['measured']:g} ({t['bound']})")
    console.print(f"the client alone can drive {report['client_ceiling_rps']:,.0f} a second")


def markdown(report: dict[str, Any]) -> str:
    """The report as docs/performance.md shows it: throughput and tail at each load, ratios, processes."""
    loads = list(dict.fromkeys(r["load"] for r in report["results"]))
    at = {(r["endpoint"], r["server"], r["load"]): r for r in report["results"]}
    h = report["hardware"]
    hardware = f"{h['processor']}, {h['cores']} cores, load average {h['load_average'][0]:g} at the start"
    lines = [
        f"Medians of {report['rounds']} rounds of {report['seconds']:g} s; {hardware}. The client alone drives "
        f"{report['client_ceiling_rps']:,.0f} a second.",
    ]
    for endpoint in dict.fromkeys(r["endpoint"] for r in report["results"] if r["endpoint"] != "bulk"):
        lines += ["", f"`/{endpoint}`, one row a call: requests a second, p99 in ms (p99.9)", ""]
        lines += ["| server | " + " | ".join(loads) + " |", "|---" * (len(loads) + 1) + "|"]
        for server in dict.fromkeys(s for e, s, _ in at if e == endpoint):
            cells = [at.get((endpoint, server, load)) for load in loads]
            shown = [f"{c['rps']:,.0f}, {c['p99_ms']:g} ({c['p999_ms']:g})" if c else "" for c in cells]
            lines.append(f"| {server} | " + " | ".join(shown) + " |")
    busiest = max((r for r in report["results"] if "connections" in r["load"]), key=lambda r: r["rps"])["load"]
    load = "32 connections" if "32 connections" in loads else busiest
    lines += ["", f"At {load}, as ratios, and what each server takes", ""]
    lines += ["| server | endpoint | rps as ratio to | CPU a request | start to ready | worker |", "|---" * 6 + "|"]
    for (endpoint, server, of), r in at.items():
        if of == load:
            ratios = ", ".join(f"{name} {ratio:g}" for name, ratio in r["ratio_to"].items())
            p = report["processes"][server]
            lines.append(
                f"| {server} | /{endpoint} | {ratios} | {r['cpu_us_per_request']:,.0f} µs "
                f"| {p['start_to_ready_s']:g} s | {p['worker_rss_mb']:,.0f} MB |"
            )
    lines += ["", "| target | measured | |", "|---|---|---|"]
    lines += [
        f"| {t['target']} {t['bound']} | {t['measured']:g} | {'met' if t['met'] else 'missed'} |"
        for t in targets(report)
    ]
    return "\n".join(lines)


def write_docs(report: dict[str, Any], page: Path) -> None:
    """Put the report between its two marks in a page."""
    before, _, rest = page.read_text().partition("<!-- service -->\n")
    _, _, after = rest.partition("<!-- /service -->")
    page.write_text(f"{before}<!-- service -->\n{markdown(report)}\n<!-- /service -->{after}")


def main() -> None:
    numbers = lambda text: [float(n) for n in text.split(",") if n]  # noqa: E731
    parser = argparse.ArgumentParser(prog="python -m bench.service", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load, after half a second of warm-up")
    parser.add_argument("--connections", type=lambda t: [int(n) for n in t.split(",") if n], default=[1, 8, 32, 128])
    parser.add_argument("--rates", type=numbers, default=[100.0, 500.0, 1000.0, 2000.0])
    parser.add_argument("--servers", type=lambda t: t.split(","), default=[])
    parser.add_argument("--out", type=Path, default=None, help="a file for the results, other than the committed one")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options)
    show(report)
    out = options.out or HERE / "results" / "service.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out is None:
        write_docs(report, HERE.parent / "docs" / "performance.md")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
