"""Three times as many requests as the service can answer: what becomes of those it takes, and of the rest.

    python -m bench.overload              writes bench/results/overload.json
    python -m bench.overload --times 2 --seconds 5

The service with everything on, history included, has one core, the client another. Its capacity is what it answers to
128 connections; then requests come in an open loop at a multiple of it, and then, at once, at half of it. Latency
counts from the moment a request was due.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.hardware import describe_hardware
from bench.model import write_model
from bench.servers import HERE, WORK, console, running, servers
from bench.service import LIBRARIES, measure

CONNECTIONS = 2048
ACCEPTED_P99_MS = 250.0
RECOVERY_S = 1.0
GROWTH = 0.02


def run(times: float, seconds: float) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    hardware = describe_hardware(LIBRARIES)
    write_model(WORK / "model")
    server = next(server for server in servers() if server.name == "fraud_bento_history")
    endpoint = server.endpoints["predict"]
    with running(server, cores[0]) as process:

        def offer(load: dict[str, Any], for_s: float) -> dict[str, Any]:
            measured = measure(process, endpoint, load, for_s, cores[-1])
            own = max(p.memory_info().rss - p.memory_info().shared for p in process.tree())  # without mapped files
            return {**measured, "worker_mb": round(own / 2**20, 1)}

        capacity = offer({"connections": 128}, 5.0)
        over = {"connections": CONNECTIONS, "rate": times * capacity["rps"]}
        phases = {
            "capacity": capacity,
            "first overload": offer(over, seconds),
            "second overload": offer(over, seconds),
            # begins a moment after the overload's last answer, and is judged from its first request on
            "after": offer({"connections": 128, "rate": capacity["rps"] / 2, "warmup_s": 0.0}, RECOVERY_S),
        }
    return {"hardware": hardware, "times": times, "seconds": seconds, "phases": phases}


def targets(report: dict[str, Any]) -> list[tuple[str, bool]]:
    first, over, after = (report["phases"][name] for name in ("first overload", "second overload", "after"))
    grown = over["worker_mb"] / first["worker_mb"] - 1
    broken = over["errors"] - over["refused"]
    return [
        (f"p99 of those accepted {over['p99_ms']:.0f} ms (< {ACCEPTED_P99_MS:.0f})", over["p99_ms"] < ACCEPTED_P99_MS),
        (f"{broken} failed otherwise, {over['late']} unanswered", not broken and not over["late"]),
        (f"memory grew by {grown:.1%} from one overload to the next", grown < GROWTH),
        (
            f"at half the capacity again in the first second: {after['errors']} refused, p99 {after['p99_ms']:.0f} ms",
            not after["errors"] and after["p99_ms"] < ACCEPTED_P99_MS,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--times", type=float, default=3.0, help="the capacity")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of two overloads")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overload.json")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options.times, options.seconds)
    table = Table("", "answered a second", "p50 ms", "p99 ms", "refused", "their p99 ms", "unanswered", "worker MB")
    for name, phase in report["phases"].items():
        keys = ("rps", "p50_ms", "p99_ms", "refused", "refused_p99_ms", "late", "worker_mb")
        table.add_row(name, *[f"{phase[key]:,.0f}" for key in keys])
    console.print(table)
    for text, met in targets(report):
        console.print(f"{'met   ' if met else 'MISSED'} {text}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {options.out}")


if __name__ == "__main__":
    main()
