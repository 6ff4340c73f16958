"""What each contract costs beside `/predict`, and how late it answers at 500 a second.

    python -m bench.contracts                                    every contract, three rounds, medians
    python -m bench.contracts --rounds 1 --seconds 1 --contracts application-score

One server with one core answers all contracts as it does by default, recording every decision; the client has another
core. In each round `/predict` and the contract are sent the same rows in turn: 32 connections, then 500 requests a
second in an open loop. The contract that had its reasons from FastAPI and pickled models is compared with that peer in
the same rounds, both without a record. Contracts come from `fraud.checks.carriers`. Writes bench/results/contracts.json
and the table in docs/performance.md, or only the file that `--out` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from bench.hardware import describe_hardware
from bench.model import EXAMPLES, instances, write_model
from bench.servers import (
    DIRECT,
    HERE,
    WORK,
    Endpoint,
    Running,
    Server,
    console,
    fresh_transactions,
    own_environment,
    running,
    servers,
)
from bench.service import LIBRARIES, measure, medians
from fraud.checks.carriers import CARRIERS, OWN, Carrier, Row, without_id
from fraud.models.bento_store import BentoStore

MODELS = {"bench-features": "bundle", "bench-history": "history"}
FORM = "bench-form"
CLOSED: dict[str, Any] = {"connections": 32}
OPEN: dict[str, Any] = {"connections": 256, "rate": 500.0}
LEAST_RATIO, MOST_P99_MS, LEAST_TO_PEER = 0.85, 10.0, 30.0
WITH_REASONS, PEER = "application-score", "fastapi_sklearn"


def rows_of(model: str) -> list[dict[str, Any]]:
    """Return rows that a model of the benchmark takes."""
    if model == FORM:
        some = pd.read_parquet(WORK / FORM / "table.parquet").head(256)
        rows: list[dict[str, Any]] = json.loads(
            some[["amt", "hour", "day_of_week", "category"]].to_json(orient="records")
        )
        return rows
    return instances(256) if model == "bench-features" else fresh_transactions()


def endpoint(carrier: Carrier, model: str, version: str = "") -> Endpoint:
    rows: list[Row] = [row if carrier.has_id else without_id(row) for row in rows_of(model)]
    path = carrier.path.format(name=model, version=version)
    return Endpoint(path, [json.dumps(carrier.body([row], model)) for row in rows])


def form_model() -> str:
    """Return the tag of a model of the merchant's form, made as docs/contracts.md says."""
    table = WORK / FORM / "table.parquet"
    if not table.exists():
        command("simulate", "--merchant-form", "--out", table)
    return trained(FORM, table, EXAMPLES / "merchant_form.yaml")


def of_roles(name: str, roles: Sequence[str], *options: str) -> str:
    """Return the tag of a transactions model that asks for nothing but some roles."""
    mapping = WORK / f"{name}.yaml"
    roles = ["transaction_id", "event_time", "customer_id", "amount", *roles]
    label = "label: is_fraud\nlabel_time: label_time\nlabel_delay: 7d\n"
    mapping.write_text("kind: transaction\n" + "".join(f"{role}: {role}\n" for role in roles) + label)
    return trained(name, WORK / "model" / "simulated.parquet", mapping, *options)


def trained(name: str, table: Path, mapping: Path, *options: str) -> str:
    """Return the tag of a model in the benchmark's Bento store, trained once."""
    runs = WORK / name / "runs"
    if not [*runs.glob("*/bundle")]:
        files = ("--data", table, "--mapping", mapping, "--config", EXAMPLES / "quick.yaml")
        command("train", *files, "--name", name, "--runs", runs, *options)
    (bundle,) = runs.glob("*/bundle")
    return BentoStore(WORK / "bentoml").import_bundle(bundle, {})


def command(*arguments: str | Path) -> None:
    """Run a `fraud` command without W&B."""
    fraud = Path(sys.executable).parent / "fraud"
    subprocess.run([fraud, *arguments], check=True, cwd=WORK, env={**os.environ, "WANDB_MODE": "offline"})


def own_servers() -> tuple[Server, Server]:
    """Return the product as it is by default, with every model, and the same without a record."""
    environments = [own_environment(bundle) for bundle in MODELS.values()]
    bank = of_roles("bench-bank", ["category", "channel", "device_id"])
    anomaly = of_roles("bench-users", ["merchant_id"], "--detector", "isolation-forest")
    tags = ",".join([*(environment["FRAUD_MODEL"] for environment in environments), form_model(), bank, anomaly])
    recorded = dataclasses.replace(
        next(server for server in servers() if server.name == "fraud_bento_recorded"),
        name="contracts",
        endpoints={"predict": endpoint(OWN[0], "bench-features")},
        environment={**environments[0], "FRAUD_MODEL": tags},
    )
    unrecorded = dataclasses.replace(
        recorded,
        name="contracts_unrecorded",
        environment={**recorded.environment, "FRAUD_RECORD_UNNAMED": "false"},
    )
    return recorded, unrecorded


def models_of(server: Running) -> tuple[dict[str, str], dict[str, str]]:
    """Return the model of every contract, and the version of every model."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/readyz")
    with DIRECT.open(request, timeout=10) as answer:
        readiness = json.load(answer)
    versions = {model["name"]: model["version"] for model in readiness["models"]}
    models = {contract["name"]: contract["model"] for contract in readiness["contracts"]}
    return {name: next(iter(versions)) if model is None else model for name, model in models.items()}, versions


def run(options: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("the benchmark needs two cores: one for the server, one for the client")
    hardware = describe_hardware(LIBRARIES)
    write_model(WORK / "model")
    recorded, unrecorded = own_servers()
    figures: dict[str, list[dict[str, Any]]] = {}
    to_peer: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        with running(recorded, cores[0]) as server:
            models, versions = models_of(server)
            for contract in options.contracts or models:
                for carrier in CARRIERS[contract]:
                    model = models[contract]
                    turn = compare(server, carrier, model, versions[model], options.seconds, cores[-1])
                    figures.setdefault(f"{contract} {carrier.path}", []).append(turn)
                    console.print(f"[dim]{contract} {carrier.path}: {turn}[/dim]")
        if not options.contracts or WITH_REASONS in options.contracts:
            to_peer.append(compare_to_peer(unrecorded, options.seconds, cores))
            console.print(f"[dim]{WITH_REASONS} and {PEER}: {to_peer[-1]}[/dim]")
    return {
        "hardware": hardware,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "results": [{"contract": name, **medians(turns)} for name, turns in figures.items()],
        "to_peer": medians(to_peer) if to_peer else None,
    }


def compare_to_peer(unrecorded: Server, seconds: float, cores: list[int]) -> dict[str, float]:
    """Return one round of the contract that gives reasons and of the peer that does, neither with a record."""
    (peer,) = [server for server in servers() if server.name == PEER]
    with running(unrecorded, cores[0]) as server:
        way = endpoint(CARRIERS[WITH_REASONS][0], "bench-features")
        own_rps = measure(server, way, CLOSED, seconds, cores[-1])["rps"]
    with running(peer, cores[0]) as server:
        peer_rps = measure(server, peer.endpoints["explain"], CLOSED, seconds, cores[-1])["rps"]
    return {"rps": own_rps, "peer_rps": peer_rps, "ratio": own_rps / peer_rps}


def compare(server: Running, carrier: Carrier, model: str, version: str, seconds: float, core: int) -> dict[str, Any]:
    """Return one round of a contract and of `/predict` with the same rows, in turns of half the time each."""
    ways = {"predict": endpoint(OWN[0], model), "contract": endpoint(carrier, model, version)}
    late = measure(server, ways["contract"], OPEN, seconds, core)  # first: the disk is busy for a while after the rest
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(2):
        for name, way in ways.items():
            turns[name].append(measure(server, way, CLOSED, seconds / 2, core))
    rps = {name: statistics.mean(turn["rps"] for turn in some) for name, some in turns.items()}
    failed = late["errors"] + sum(turn["errors"] for some in turns.values() for turn in some)
    return {
        "rps": rps["contract"],
        "predict_rps": rps["predict"],
        "ratio": rps["contract"] / rps["predict"],
        "p99_ms": late["p99_ms"],
        "errors": failed,
    }


def targets(report: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Return what this run says of each target: its name, the figure, the bound, and whether it is met."""
    found = []
    for result in report["results"]:
        name, ratio, p99_ms = result["contract"], result["ratio"], result["p99_ms"]
        found.append((f"{name}, 32 connections, to /predict", ratio, f"≥ {LEAST_RATIO:g}", ratio >= LEAST_RATIO))
        found.append((f"{name}, p99 at 500 a second, ms", p99_ms, f"< {MOST_P99_MS:g}", p99_ms < MOST_P99_MS))
        found.append((f"{name}, errors", result["errors"], "0", result["errors"] == 0))
    if report["to_peer"]:
        ratio = report["to_peer"]["ratio"]
        what = f"{WITH_REASONS} with its reasons, 32 connections, to FastAPI with pickled models"
        found.append((what, ratio, f"≥ {LEAST_TO_PEER:g}", ratio >= LEAST_TO_PEER))
    return found


def show(report: dict[str, Any]) -> None:
    table = Table("contract", "a second", "/predict", "ratio", "p99 ms at 500 a second", "errors")
    for result in report["results"]:
        cells = [result[key] for key in ("rps", "predict_rps", "ratio", "p99_ms", "errors")]
        table.add_row(result["contract"], *[f"{cell:,g}" for cell in cells])
    console.print(table)
    for name, measured, bound, met in targets(report):
        console.print(f"{'met   ' if met else 'MISSED'} {name}: {measured:g} ({bound})")


def markdown(report: dict[str, Any]) -> str:
    """Return the report as docs/performance.md shows it."""
    h = report["hardware"]
    lines = [
        f"Medians of {report['rounds']} rounds; {h['processor']}, {h['cores']} cores, load average "
        f"{h['load_average'][0]:g} at the start.",
        "",
        "| contract | requests a second, 32 connections | as ratio to `/predict` | p99 at 500 a second |",
        "|---|---|---|---|",
        *[f"| {r['contract']} | {r['rps']:,.0f} | {r['ratio']:.2f} | {r['p99_ms']:g} ms |" for r in report["results"]],
    ]
    if report["to_peer"]:
        lines += [
            "",
            f"Without a record, `{WITH_REASONS}` answers {report['to_peer']['rps']:,.0f} a second with its reasons, "
            f"{report['to_peer']['ratio']:.1f} times as many as FastAPI with pickled models.",
        ]
    return "\n".join(lines)


def write_docs(report: dict[str, Any], page: Path) -> None:
    """Put the report between its two marks in a page."""
    before, _, rest = page.read_text().partition("<!-- contracts -->\n")
    _, _, after = rest.partition("<!-- /contracts -->")
    page.write_text(f"{before}<!-- contracts -->\n{markdown(report)}\n<!-- /contracts -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.contracts", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load, after half a second of warm-up")
    parser.add_argument("--contracts", type=lambda t: t.split(","), default=[])
    parser.add_argument("--out", type=Path, default=None, help="a file for the results, other than the committed one")
    options = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    report = run(options)
    show(report)
    out = options.out or HERE / "results" / "contracts.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    if options.out is None:
        write_docs(report, HERE.parent / "docs" / "performance.md")
    console.print(f"written to {out}")


if __name__ == "__main__":
    main()
