"""What the service shows of itself: metrics over workers, logs, traces; and what it shows to nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, Histogram

from fraud.decisions.policy import Policy, RiskLevels
from fraud.decisions.verdict import verdict_of
from fraud.models.active import Swap
from fraud.models.scorer import ModelName
from fraud.pipeline.rows import Decision, Outcome
from fraud.serving.http import Answer
from fraud.serving.tracing import Tracing
from fraud.telemetry import logs
from fraud.telemetry import recorder as telemetry
from fraud.telemetry.metrics import METRICS, PROBABILITIES, SECONDS
from fraud.telemetry.recorder import Telemetry, resident_bytes

ROOT = Path(__file__).parent.parent


class Made:
    """A telemetry with a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.telemetry = Telemetry(self.registry)

    def value(self, metric: str, /, **labels: str) -> float | None:
        self.telemetry.flush()
        return self.registry.get_sample_value(metric, labels)


@pytest.fixture
def made() -> Made:
    return Made()


def call(path: str = "/predict", request_id: str = "r1", route: str | None = None, **headers: str) -> Any:
    return SimpleNamespace(
        scope={"path": path, "method": "POST", "type": "http"},
        route=SimpleNamespace(path=route or path),
        request_id=request_id,
        headers={k.encode(): v.encode() for k, v in headers.items()},
    )


def scorer(name: str = "m", version: str = "v") -> Any:
    return SimpleNamespace(
        name=SimpleNamespace(name=name, version=version, digest=f"sha256:{version}"),
    )


@settings(deadline=None)
@given(st.lists(st.floats(0, 20), max_size=60))
def test_counting_in_memory_equals_observing(values: list[float]) -> None:
    """The library's own histogram is the oracle."""
    made = Made()
    registry = CollectorRegistry()
    expected = Histogram("x", "x", buckets=SECONDS, registry=registry)
    for i, value in enumerate(values):
        made.telemetry.stage("score", value)
        expected.observe(value)
        if i % 7 == 0:
            made.telemetry.flush()
    if values:
        for bound in (*SECONDS, "+Inf"):
            le = str(float(bound)) if bound != "+Inf" else "+Inf"
            assert made.value("fraud_stage_seconds_bucket", stage="score", le=le) == registry.get_sample_value(
                "x_bucket", {"le": le}
            )
        assert made.value("fraud_stage_seconds_sum", stage="score") == pytest.approx(sum(values))


def test_requests_and_errors_are_counted(made: Made) -> None:
    made.telemetry.answered(call(), Answer(b"{}"), 0.002)
    made.telemetry.answered(call(), Answer(b"", 422, code="invalid_request"), 0.001)
    made.telemetry.answered(call("/a-path-of-the-caller's-own", route="other"), Answer(b"", 404), 0.001)
    assert made.value("fraud_requests_total", route="/predict", status="200") == 1
    assert made.value("fraud_requests_total", route="other", status="404") == 1
    assert made.value("fraud_errors_total", code="invalid_request") == 1
    assert made.value("fraud_errors_total", code="unknown") == 1
    assert made.value("fraud_request_seconds_count", route="/predict") == 2


def test_scores_are_counted_by_decision(made: Made) -> None:
    probabilities = np.random.default_rng(1).random(500).tolist()
    policy = Policy(0.3, 0.7, RiskLevels(0.2, 0.5, 0.8))
    model = ModelName("m", "v", "sha256:v")
    made.telemetry.decided([Decision("t", model, 0.0, p, verdict_of(policy, p)) for p in probabilities])
    decisions = {"approve": (0, 0.3), "review": (0.3, 0.7), "decline": (0.7, 1.1)}
    for decision, (low, high) in decisions.items():
        expected = sum(low <= p < high for p in probabilities)
        assert made.value("fraud_rows_total", name="m", version="v", decision=decision) == expected
    for bound in PROBABILITIES:
        expected = sum(p <= bound for p in probabilities)
        assert made.value("fraud_score_bucket", name="m", version="v", le=str(float(bound))) == expected


def test_swaps_and_the_versions_served(made: Made) -> None:
    made.telemetry.serving({"m": scorer(version="1")}, {}, {})
    made.telemetry.swapped(Swap("m", "champion", "m:1", "m:2", 0.3, ValueError("broken")))
    labels = {"name": "m", "role": "champion"}
    assert made.value("fraud_failed_swaps", **labels) == 1
    assert made.value("fraud_swaps_total", result="refused", **labels) == 1
    made.telemetry.swapped(Swap("m", "champion", "m:1", "m:2", 0.3))
    made.telemetry.serving({"m": scorer(version="2")}, {"m": scorer(version="3")}, {})
    assert made.value("fraud_failed_swaps", **labels) == 0
    assert made.value("fraud_swaps_total", result="ok", **labels) == 1
    served = {
        version: made.value("fraud_model_info", name="m", version=version, digest=f"sha256:{version}", role=role)
        for version, role in (("1", "champion"), ("2", "champion"), ("3", "challenger"))
    }
    assert served == {"1": 0, "2": 1, "3": 1}


def test_rules_are_counted_and_a_stopped_one_shows_until_its_set_is_replaced(made: Made) -> None:
    policy, model = Policy(0.3, 0.7, RiskLevels(0.2, 0.5, 0.8)), ModelName("m", "v", "sha256:v")
    verdict = verdict_of(policy, 0.1)._replace(decision="challenge")
    made.telemetry.decided([Decision("t", model, 0.0, 0.1, verdict, decided_by="night", rules_hit=["night", "dear"])])
    assert made.value("fraud_rows_total", name="m", version="v", decision="challenge") == 1
    assert made.value("fraud_rule_hits_total", name="m", rule="dear") == 1
    made.telemetry.rule_stopped("m", "night")
    made.telemetry.swapped(Swap("m", "rules", "sha256:1", "sha256:2", 0.1, ValueError("broken")))
    assert made.value("fraud_rules_stopped", name="m", rule="night") == 1
    made.telemetry.swapped(Swap("m", "rules", "sha256:1", "sha256:3", 0.1))
    assert made.value("fraud_rules_stopped", name="m", rule="night") == 0


def test_what_the_data_plane_counts_is_taken_over_once(made: Made) -> None:
    counts = {"rows": 5, "rows_recalled": 2, "degraded_history": 3, "labels_applied": 7}
    made.telemetry.watch(lambda: 17, lambda: counts)
    assert made.value("fraud_queue_rows") == 17
    counts |= {"rows_recalled": 4}
    assert made.value("fraud_rows_recalled_total") == 4
    assert made.value("fraud_degraded_rows_total", reason="history") == 3
    assert made.value("fraud_labels_total", outcome="applied") == 7
    assert made.value("fraud_memory_bytes") == pytest.approx(resident_bytes(), rel=0.2)


def test_every_metric_listed_can_be_scraped(made: Made) -> None:
    families = {family.name for family in made.registry.collect()}
    assert {metric.name.removesuffix("_total") for metric in METRICS} == families


def test_one_value_costs_microseconds(made: Made) -> None:
    """The bound is loose, for a busy machine; the point is that nothing is written to a file."""
    answer, request = Answer(b"{}"), call()
    best = min(_seconds(lambda: made.telemetry.answered(request, answer, 0.002), 2000) for _ in range(5))
    assert best < 20e-6


def _seconds(work: Any, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


WORKER = """
import sys, time
from fraud.telemetry.recorder import Telemetry
t = Telemetry()
t.stage("score", 0.5)
t.watch(lambda: 3, dict)
t.flush()
print("flushed", flush=True)
sys.stdin.read()
"""


def test_workers_add_up_and_the_dead_are_forgotten(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER], env=environment, cwd=ROOT, stdin=-1, stdout=-1) for _ in "ab"
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        assert scrape(environment)["fraud_stage_seconds_count"] == 2
        assert scrape(environment)["fraud_queue_rows"] == 6
        workers[0].kill()
        workers[0].wait()
        assert scrape(environment)["fraud_stage_seconds_count"] == 2  # what it counted was real
        assert scrape(environment)["fraud_queue_rows"] == 3
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def scrape(environment: dict[str, str]) -> dict[str, float]:
    script = (
        "from fraud.telemetry.recorder import forget_dead_workers; forget_dead_workers()\n"
        "from bentoml._internal.server.metrics.prometheus import PrometheusClient\n"
        "print(PrometheusClient().generate_latest().decode())"
    )
    text = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.partition("{")[0].split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.fixture
def log_lines(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What was logged to standard error; afterwards the loggers are as they were."""
    loggers = [logging.getLogger(name) for name in ("", "fraud", *logs.LOGGERS)]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate


def test_log_lines_are_json_with_the_request_id(log_lines: Any) -> None:
    for name in ("fraud", "fraud.serving.http", "bentoml", "bentoml.serve", "uvicorn", "uvicorn.error"):
        left_over = logging.getLogger(name)  # servers that ran in this process before have set their own
        left_over.disabled, left_over.propagate = False, True
        left_over.setLevel(logging.NOTSET)
    logs.configure_logging()
    token = logs.request_id.set("r-7")
    try:
        logging.getLogger("fraud.serving.http").warning("request %s failed", "r-7")
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("bentoml.serve").exception("lost")
    finally:
        logs.request_id.reset(token)
    logging.getLogger("uvicorn.error").error("outside")
    logging.getLogger("fraud").debug("not asked for")
    first, second, third = log_lines()
    assert (first["event"], first["level"], first["logger"]) == ("request r-7 failed", "warning", "fraud.serving.http")
    assert first["request_id"] == "r-7"
    assert first["timestamp"].endswith("Z")
    assert "ValueError: why" in second["exception"]
    assert "request_id" not in third


def test_request_log_tells_failed_ones_and_no_secret(log_lines: Any) -> None:
    secret = "fk_00000000_secretsecretsecret"
    request = call("/predict", "r-9", authorization=f"Bearer {secret}")
    request.scope["fraud.key_id"] = "00000000"
    for which in ("failed", "all"):
        log = logs.RequestLog(which)
        log(request, Answer(b"{}"), 0.001)
        log(request, Answer(b"{}", 422), 0.0015)
    lines = log_lines()
    assert [line["status"] for line in lines] == [422, 200, 422]
    assert lines[0]["request_id"] == "r-9"
    assert lines[0]["key"] == "00000000"
    assert lines[0]["milliseconds"] == 1.5
    assert secret not in json.dumps(lines)


def test_a_text_log_has_one_line_a_record_whatever_a_caller_sent(capfd: pytest.CaptureFixture[str]) -> None:
    forged = "x\r\n2026-11-26T00:00:00.000+00:00 forged level=info\x1b[2K\x85\u2028\ud800"
    before = logging.getLogger().handlers
    try:
        logs.configure_logging(style="text")
        logging.getLogger("fraud.x").warning("request %s failed: %s", "r-1", forged)
        try:
            raise ValueError(forged)
        except ValueError:
            logging.getLogger("fraud.x").exception("request failed", extra={"path": forged})
        request = call(forged, forged)
        request.scope["method"] = forged
        logs.RequestLog("all", "text")(request, Answer(b"", 404), 0.001)
    finally:
        logging.getLogger().handlers = before
    text = capfd.readouterr().err
    lines = text.splitlines()
    records = [line for line in lines if not line.startswith("    ")]
    assert len(records) == 3, text
    assert all(re.match(r"\d{4}-\d\d-\d\dT\S+ request", line) for line in records)
    assert "    ValueError: x" in lines
    assert "\x1b" not in text


def test_request_log_does_not_name_customers(log_lines: Any) -> None:
    log = logs.RequestLog("all")
    for path, route in ((f"{USERS}/profile", "/v1/users/{id}/profile"), (f"{USERS}/card", "other")):
        log(call(path, route=route), Answer(b"", 404), 0.001)
    assert [line["path"] for line in log_lines()] == ["/v1/users/{id}/profile", "other"]


USERS = "/v1/users/jane.doe@example.org/2"


def test_a_trace_does_not_name_customers() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://unused", processor=SimpleSpanProcessor(exporter))
    request = call(f"{USERS}/profile", route="/v1/users/{id}/profile")
    tracing.begin(request)
    tracing.end(request, Answer(b""), 0.1)
    assert "jane" not in exporter.get_finished_spans()[0].to_json()
    tracing.close()


def test_traces_carry_the_callers_context_and_the_stages() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://unused", processor=SimpleSpanProcessor(exporter))
    parent = "4bf92f3577b34da6a3ce929d0e0e4736"
    request = call("/predict", "r-1", traceparent=f"00-{parent}-00f067aa0ba902b7-01")

    async def run(requests: Any) -> list[list[Outcome]]:
        tracing.stage("score", 0.01)
        return [[] for _ in requests]

    async def batch_of_one() -> None:
        three_rows: Any = SimpleNamespace(request_id="r-1", n_rows=3)
        await tracing.traced(run)([three_rows])

    tracing.begin(request)
    asyncio.run(batch_of_one())
    tracing.end(request, Answer(b"", 503), 0.1)
    stage, batch, served = exporter.get_finished_spans()
    assert [span.name for span in (stage, batch, served)] == ["score", "batch", "POST /predict"]
    assert format(served.context.trace_id, "032x") == parent
    assert batch.links[0].context == served.context
    assert stage.parent is not None
    assert stage.parent.span_id == batch.context.span_id
    assert stage.start_time is not None
    assert stage.end_time is not None
    assert stage.end_time - stage.start_time == pytest.approx(1e7)
    assert served.attributes is not None
    assert served.attributes["http.response.status_code"] == 503
    assert served.attributes["fraud.request_id"] == "r-1"
    assert not served.status.is_ok
    tracing.close()


def test_tracing_costs_nothing_where_no_endpoint_is_set() -> None:
    script = "import sys, fraud.serving.worker; print('opentelemetry.exporter.otlp' in ' '.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-1] == "False"


def test_metrics_of_dead_workers_are_found_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gauge_livesum_999999999.db"
    alive = tmp_path / f"gauge_livesum_{os.getpid()}.db"
    counts = tmp_path / "counter_999999999.db"
    for path in (gone, alive, counts):
        path.write_bytes(bytes(64))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    telemetry.forget_dead_workers()
    assert (gone.exists(), alive.exists(), counts.exists()) == (False, True, True)
