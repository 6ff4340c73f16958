"""What ships: the Bento's contents, compose, alert rules and the dashboard, against the service they are for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from fraud.checks.servers import free_port
from fraud.models.bento_store import BentoStore
from fraud.models.lifecycle import who_am_i
from fraud.settings import variables
from fraud.telemetry.metrics import METRICS
from tests.tiny import write_tiny_bundle

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "fraud.json").read_text())
# nothing to show where nothing went wrong, or before a day has passed
MAY_BE_EMPTY = (
    "fraud_rule",  # no rule set is in force
    *("fraud_errors_total", "fraud_degraded_rows_total", "fraud:score_drift", "fraud_failed_swaps"),
    *("fraud_store_outages_total", "fraud_store_late_calls_total", "fraud_store_off"),
    *("fraud_labels_total", "fraud_shadow_"),
    "fraud_stream_",  # no stream process runs
    *("fraud_following_failed", "fraud_following_look_timestamp_seconds"),
)

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Prometheus; on Debian: apt-get install prometheus"
)


def queries() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def expressions() -> list[str]:
    return [rule["expr"] for group in RULES["groups"] for rule in group["rules"]] + [expr for _, expr in queries()]


def test_rules_and_dashboard_ask_only_for_what_the_service_tells() -> None:
    names = {m.name for m in METRICS}
    names |= {f"{m.name}_{part}" for m in METRICS if m.type == "histogram" for part in ("bucket", "sum", "count")}
    recorded = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
    for expression in expressions():
        asked = set(re.findall(r"\bfraud[_:][a-z0-9_:]+", expression))
        assert asked <= names | recorded, expression
    labels = {label for m in METRICS for label in m.labels} | {"le", "pid", "job"}
    for expression in expressions():
        for group in re.findall(r"(?:by|on) \(([a-z_, ]+)\)", expression):
            assert set(group.split(", ")) <= labels, expression


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    asked = " ".join(expr for _, expr in queries())
    for metric in METRICS:
        if metric.name not in ("fraud_extra_fields_total", "fraud_swap_seconds"):
            assert metric.name in asked, f"no panel shows {metric.name}"
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({(place["x"], place["y"]) for place in places}) == len(places)


def test_compose_pins_images_names_settings_and_mounts_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    settings = set(variables())
    for name, service in compose["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert tag != "latest", name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
    fraud = compose["services"]["fraud"]
    assert fraud["environment"].keys() <= settings | {"PGPASSWORD"}  # which libpq reads
    assert not [url for url in fraud["environment"].values() if "PASSWORD" in url.partition("@")[0] and "@" in url]
    assert fraud["read_only"]
    limit = next(
        r["expr"] for g in RULES["groups"] for r in g["rules"] if r.get("record") == "fraud:memory_limit_bytes"
    )
    assert fraud["mem_limit"] == "1g"
    assert limit == f"vector({2**30})"


def test_compose_follows_its_specification(tmp_path: Path) -> None:
    check: list[Any] = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DEPLOY / "compose.yaml").read_text().replace("mem_limit", "memory"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


@needs_prometheus
def test_rules_hold_their_own_tests() -> None:
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_documented_and_raised_in_the_rules_tests() -> None:
    alerts = {rule["alert"] for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
    documented = set(re.findall(r"^\| (Fraud\w+) \|", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE))
    assert documented == alerts
    tests = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yaml").read_text())["tests"]
    raised = {a["alertname"] for test in tests for a in test.get("alert_rule_test", []) if "exp_alerts" in a}
    asked = {e["expr"] for test in tests for e in test.get("promql_expr_test", []) if "exp_samples" in e}
    raised |= set(re.findall(r'alertname="(\w+)"', " ".join(asked)))
    assert raised == alerts


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("deploy")
    tag = BentoStore(home).import_bundle(write_tiny_bundle(home / "bundle", "transaction", name="tiny"), {})
    return {
        **os.environ,
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "FRAUD_MODEL": str(tag),
        "FRAUD_STATE_DIR": str(home / "state"),
    }


def test_the_bento_holds_the_service_its_command_and_models_and_nothing_else(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [BIN / "bentoml", "build", "-o", "tag"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tag = done.stdout.strip().rpartition("__tag__:")[2]
    bento = Path(environment["BENTOML_HOME"], "bentos", *tag.split(":"))
    rooms = {path.relative_to(bento / "src").parts[0] for path in (bento / "src").rglob("*") if path.is_file()}
    assert rooms == {
        *("service.py", "bentofile.yaml", "fraud", "wandb_sync"),
        *("requirements", "deploy"),
    }
    info = yaml.safe_load((bento / "bento.yaml").read_text())
    models = [model["tag"] for service in info["services"] for model in service["models"]]
    assert [model.partition(":")[0] for model in models] == ["tiny", "tiny-preprocessor"]
    assert models[0] == environment["FRAUD_MODEL"]
    dockerfile = (bento / "env" / "docker" / "Dockerfile").read_text()
    assert "USER bentoml" in dockerfile
    assert "--require-hashes" in dockerfile
    assert "HEALTHCHECK" in dockerfile
    for needed in re.findall(r"src/(deploy/\w+(?:\.py)?)", dockerfile):
        assert (bento / "src" / needed).is_file(), needed
    for packages in ("serve", "follow"):
        assert (bento / "src" / "requirements" / f"{packages}.txt").is_file()


@contextmanager
def process(command: list[Any], answers: Callable[[], bool], log: Path, **options: Any) -> Iterator[None]:
    with log.open("w") as output:
        started = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options)
    try:
        deadline = time.monotonic() + 90
        while not answers():
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        started.wait(30)


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def reached(url: str) -> bool:
    try:
        fetch(url)
    except OSError:
        return False
    return True


@needs_prometheus
def test_every_panel_shows_a_service_under_load(environment: dict[str, str], tmp_path: Path) -> None:
    """A real Prometheus scrapes the real service; every query of the dashboard answers."""
    port, watching = free_port(), free_port()
    rules = (DEPLOY / "prometheus" / "rules.yaml").read_text().replace("interval: 15s", "interval: 1s")
    (tmp_path / "rules.yaml").write_text(rules)
    config = (DEPLOY / "prometheus" / "prometheus.yaml").read_text().replace("fraud:3000", f"127.0.0.1:{port}")
    (tmp_path / "prometheus.yaml").write_text(config.replace("interval: 5s", "interval: 1s"))
    service = [BIN / "bentoml", "serve", "service:FraudBento", "--port", str(port)]
    prometheus = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yaml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{watching}",
    ]

    def ask(expression: str) -> list[Any]:
        query = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", "30s")})
        found: list[Any] = json.loads(fetch(f"http://127.0.0.1:{watching}/api/v1/query?{query}"))["data"]["result"]
        return found

    with (
        process(service, lambda: reached(f"http://127.0.0.1:{port}/readyz"), tmp_path / "a", cwd=ROOT, env=environment),
        process(prometheus, lambda: reached(f"http://127.0.0.1:{watching}/-/ready"), tmp_path / "b"),
    ):
        command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless", "--only-summary"]
        load = [*command, "-H", f"http://127.0.0.1:{port}", "--seconds", "8", "--rate", "30", "--out", str(tmp_path)]
        load += ["--features", str(Path(environment["BENTOML_HOME"], "bundle", "features.json"))]
        done = subprocess.run(load, cwd=ROOT, capture_output=True, text=True)
        (result,) = tmp_path.glob("*/result.json")
        assert json.loads(result.read_text())["measured"]["error_share"] == 0, done.stdout
        empty = [title for title, expr in queries() if not ask(expr) and not expr_may_be_empty(expr)]
        assert not empty
        (memory,) = ask("sum(fraud_memory_bytes)")
        assert 5e7 < float(memory["value"][1]) < 1e9
        assert {alert["metric"]["alertname"] for alert in ask('ALERTS{alertstate="firing"}')} == set()


def expr_may_be_empty(expression: str) -> bool:
    return any(name in expression for name in MAY_BE_EMPTY)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_the_start_runs_under_any_user_id_of_the_group_0(tmp_path: Path) -> None:
    """The start script with a program in the service's place, under two ids without a name, one after the other."""
    state, kernels, programs = tmp_path / "state", tmp_path / "kernels", tmp_path / "bin"
    for folder in (state, kernels, programs):
        folder.mkdir()
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:  # pytest's own folders, one more of them in each of several processes
            folder.chmod(0o755)
    os.chown(state, 1034, 0)
    state.chmod(0o2775)
    (kernels / "digest").write_text("1")
    program = programs / "bentoml"
    program.write_text('#!/bin/sh\nmkdir -p "$BENTOML_HOME/made" && echo "$1" >> "$BENTOML_HOME/made/asked" && id -u\n')
    program.chmod(0o755)
    start = tmp_path / "start"
    start.write_text((DEPLOY / "start").read_text().replace("/app/kernels", str(kernels)))
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(state),
        "BENTO_PATH": str(tmp_path),
        "BENTOML_HOME": str(state / "bentoml"),
        "TMPDIR": str(state / "tmp"),
        "NUMBA_CACHE_DIR": str(state / "kernels"),
    }
    for user in ("12345", "54321"):
        (kernels / "digest").write_text(user)  # another image's kernels
        done = subprocess.run(
            ["setpriv", "--reuid", user, "--regid", "0", "--clear-groups", "sh", str(start)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, f"{user}\n"), done.stderr
    assert (state / "bentoml" / "made" / "asked").read_text() == "serve\nserve\n"


def test_whoever_has_no_name_moves_aliases_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987_654)
    assert who_am_i().startswith("987654@")
