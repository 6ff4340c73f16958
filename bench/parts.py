"""What each part of the service costs: the service as it comes against itself with one part on or off.

    python -m bench.parts                 writes bench/results/parts.json
    python -m bench.parts --rounds 1 --seconds 1

One row a call with history, reasons and record, at 32 connections; each variant takes its turn in every round, and its
cost is the CPU time of a request as a ratio to the service as it comes in the same round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.anomaly import write_anomaly_bundle
from bench.hardware import describe_hardware
from bench.model import write_model
from bench.servers import HERE, WORK, Server, console, running, servers
from bench.service import LIBRARIES, measure
from fraud.models.bento_store import BentoStore
from fraud.serving.security import new_key

AS_IT_COMES = "as it comes"


def variants() -> dict[str, Server]:
    """The service with history, as it comes and with one thing changed."""
    own = next(server for server in servers() if server.name == "fraud_bento_history")
    secret, key = new_key(["score"])
    keys = {"FRAUD_REQUIRE_KEYS": "true", "FRAUD_API_KEYS": key.line()}

    def changed(environment: dict[str, str], headers: dict[str, str] | None = None) -> Server:
        return dataclasses.replace(own, environment=own.environment | environment, headers=headers or {})

    return {
        AS_IT_COMES: own,
        "an anomaly model beside": changed({"FRAUD_ANOMALY_MODEL": anomaly_model()}),
        "API keys required": changed(keys, {"X-API-Key": secret}),
        "a rate for each caller": changed({"FRAUD_RATE_LIMIT_PER_S": "1000000"}),
        "a log line for every request": changed({"FRAUD_LOG_REQUESTS": "all"}),
        "no reasons on record": changed({"FRAUD_RECORD_REASONS": "false"}),
        "personal ids stored as keyed hashes": changed(
            {"FRAUD_PERSONAL_FIELDS": "customer_id,merchant_id", "FRAUD_PERSONAL_KEY": "k" * 32}
        ),
        "decisions not durable when answered": changed({"FRAUD_DURABLE": "false"}),
        "no metrics": dataclasses.replace(
            own,
            command=lambda bin_, port: [
                f"{bin_}/bentoml",
                "serve",
                "bench.without_metrics:FraudBento",
                "--port",
                str(port),
            ],
        ),
    }


def anomaly_model() -> str:
    """Return the tag of the anomaly model, which is then in the benchmark's Bento store."""
    folder = write_anomaly_bundle(WORK / "anomaly", WORK / "model" / "history", WORK / "model" / "simulated.parquet")
    return BentoStore(WORK / "bentoml").import_bundle(folder, {})


def run(rounds: int, seconds: float) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    hardware = describe_hardware(LIBRARIES)
    write_model(WORK / "model")
    ratios: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        figures: dict[str, dict[str, Any]] = {}
        for name, server in variants().items():
            with running(server, cores[0]) as process:
                load = {"connections": 32, "headers": server.headers}
                figures[name] = measure(process, server.endpoints["predict"], load, seconds, cores[-1])
            console.print(f"[dim]{name}: {figures[name]}[/dim]")
            base = figures[AS_IT_COMES]
            one = {key: figures[name][key] / base[key] for key in ("cpu_us_per_request", "rps", "p99_ms")}
            ratios.setdefault(name, []).append(one)
    parts = [
        {"part": name, **{key: round(statistics.median(one[key] for one in several), 3) for key in several[0]}}
        for name, several in ratios.items()
    ]
    return {"hardware": hardware, "rounds": rounds, "seconds": seconds, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description="What each part of the service costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "parts.json")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options.rounds, options.seconds)
    table = Table("part", "CPU a request", "throughput", "p99", title="ratios to the service as it comes")
    for part in report["parts"]:
        table.add_row(part["part"], *[f"{part[key]:.2f}" for key in ("cpu_us_per_request", "rps", "p99_ms")])
    console.print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
