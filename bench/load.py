"""The load scenarios against the service with everything on: history, reasons, durable decision log, metrics.

    python -m bench.load [steady ramp spike soak swap] [--seconds 60] [further options of the load tests]

Serves what FRAUD_MODEL and BENTOML_HOME name (the model in production, as `make serve` does) on a fresh state
folder, offers each scenario, and keeps their results in bench/results/load.json. The service and the load generator
share the machine's cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.hardware import describe_hardware
from bench.servers import free_port
from fraud.models.served import Served
from fraud.settings import ModelSettings
from load_tests.scenarios import SCENARIOS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
RESULTS = ROOT / "bench" / "results" / "load.json"
DEFAULT = ("steady", "ramp", "spike")
START_LIMIT_S = 120.0
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine


@contextmanager
def serving(state: Path) -> Iterator[tuple[str, float]]:
    """The service on a port of its own; its URL and the seconds from start to ready."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"FRAUD_STATE_DIR": str(state / "state"), "BENTOML_DO_NOT_TRACK": "True"}
    with (state / "log").open("w") as log:
        started = time.perf_counter()
        command = [str(BIN / "bentoml"), "serve", "service:FraudBento", "--port", str(port)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not ready(url):
                if process.poll() is not None or time.perf_counter() - started > START_LIMIT_S:
                    raise SystemExit(f"the service did not start:\n{(state / 'log').read_text()[-2000:]}")
                time.sleep(0.02)
            yield url, time.perf_counter() - started
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def ready(url: str) -> bool:
    try:
        with DIRECT.open(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def offer(scenario: str, url: str, out: Path, options: list[str]) -> dict[str, Any]:
    """One run of a scenario; its result with the verdict."""
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless", "--only-summary"]
    subprocess.run([*command, "-H", url, "--scenario", scenario, "--out", str(out), *options], cwd=ROOT)
    (found,) = out.glob(f"{scenario}-*/result.json")
    result: dict[str, Any] = json.loads(found.read_text())
    return {key: value for key, value in result.items() if key not in ("host", "generator")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("scenarios", nargs="*", default=list(DEFAULT), help=", ".join(SCENARIOS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given, options = parser.parse_known_args()
    served = Served(ModelSettings.read())
    default = next(iter(served.champions().values()))
    options += ["--features", str(served.folders(default)[1] / "features.json")]
    kept = json.loads(given.out.read_text()) if given.out.is_file() else {"scenarios": {}}
    for scenario in given.scenarios:
        hardware = describe_hardware(("bentoml", "lightgbm", "locust", "numba"))
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (url, start_s):
            result = offer(scenario, url, Path(folder), options)
        kept["scenarios"][scenario] = {"hardware": hardware, "start_to_ready_s": round(start_s, 2), **result}
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
