"""The load test as Locust runs it: `locust -f load_tests/locustfile.py --headless --scenario steady -H URL`.

Each Locust worker runs one user, and the user is one stream of the open loop; the streams of all workers, on one
machine (`--processes 2`) or several (`--master`, `--worker`), add up to the scenario's rate. The process without
workers, or the master, gathers the counts, judges them and writes the report.
"""

from __future__ import annotations

import gc
import itertools
import logging
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gevent
import msgspec
from gevent import subprocess
from locust import LoadTestShape, User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from fraud.schema import FeatureSpec
from load_tests.measure import Recorder, knee, stage_measures
from load_tests.report import Run, write_report
from load_tests.scenarios import SCENARIOS, Scenario, arrivals, evenly
from load_tests.sender import Sender, read_memory, unreachable
from load_tests.traffic import Mix, Traffic
from load_tests.verdict import LevelsError, read_levels, stage_limit_ms

logger = logging.getLogger("load_tests")

HERE = Path(__file__).parent
MEMORY_METRICS = ("fraud_memory_bytes", "process_resident_memory_bytes")
SCRAPE_EVERY_S = 5.0
REPORT_DELAY_S = 4.0  # a worker reports every 3 s
START_DELAY_S = 2.0  # a stream begins a moment after the test
MIX = Mix()

recorder = Recorder()


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    """Every option is also an environment variable; the base URL is `--host` or `LOCUST_HOST`."""

    def option(name: str, default: Any, meaning: str, **more: Any) -> None:
        variable = "FRAUD_LOAD_" + name.upper().replace("-", "_")
        more.setdefault("type", type(default))
        meaning += f" (default {default})" if default not in (None, "") else ""
        parser.add_argument(f"--{name}", default=default, env_var=variable, help=meaning, **more)

    option("scenario", "smoke", "what load is offered: " + ", ".join(SCENARIOS), choices=list(SCENARIOS))
    option("rate", None, "requests a second of the scenario's first stage", type=float)
    option("seconds", None, "length of the whole scenario, s", type=float)
    option("requests", None, "stop after this many requests", type=int)
    option("delay", None, "send evenly, this many seconds apart, instead of at random times", type=float)
    option("request-timeout", 10.0, "seconds after which a request has failed")
    option("connections", 256, "the most requests under way of one worker")
    option("seed", 1, "of customers, arrivals, fraud and mistakes")
    option("customers", MIX.customers, "customers that the traffic is spread over, unevenly")
    option("rows", MIX.rows, "transactions a request")
    option("explain-share", MIX.explain_share, "share of requests that ask for reasons")
    option("fraud-share", MIX.fraud_share, "share of transactions that are part of a fraud")
    option("retry-share", MIX.retry_share, "share of requests that come again with the same ids")
    option("bad-share", MIX.bad_share, "share of requests that break the contract and must be refused")
    option("features", "", "the model's features.json, when it asks for columns of its own")
    option("levels", str(HERE / "service_levels.toml"), "the service levels to judge by")
    option("swap-command", "", "run at the scenario's moment of the swap, such as 'fraud rollback NAME --why test'")
    option("out", "load-results", "folder for the reports")
    option("api-key", "", "sent as the bearer token", is_secret=True)


def options_of(environment: Environment) -> Any:
    return environment.parsed_options


@events.init.add_listener
def check(environment: Environment, **_: Any) -> None:
    """Check before the run whatever would otherwise fail during it or at its end."""
    options = options_of(environment)
    try:
        if options.features:
            spec_of(options)
        if isinstance(environment.runner, WorkerRunner):
            return
        read_levels(Path(options.levels), options.scenario)
    except (LevelsError, OSError, msgspec.DecodeError) as error:
        raise SystemExit(f"the load test cannot begin: {error}") from None
    if not environment.host:
        raise SystemExit("no base URL: give --host or LOCUST_HOST")
    if problem := unreachable(environment.host):
        raise SystemExit(f"the load test cannot begin: nothing answers at {environment.host}: {problem}")
    if SCENARIOS[options.scenario].swap_at is not None and not options.swap_command:
        logger.warning("no --swap-command: another model has to take over by itself in the middle of the run")


def spec_of(options: Any) -> FeatureSpec | None:
    """The model's features, if the traffic must carry the model's own columns."""
    return msgspec.json.decode(Path(options.features).read_bytes(), type=FeatureSpec) if options.features else None


def scenario_of(options: Any) -> Scenario:
    """The scenario with the rate and the length that were asked for."""
    scenario = SCENARIOS[options.scenario]
    rate = 1 / options.delay if options.delay else options.rate
    seconds = options.seconds
    if options.requests and seconds is None:
        seconds = options.requests / (rate or scenario.stages[0].rps)
    return scenario.scaled(rate, seconds)


class PaymentsBackend(User):
    """One stream of the open loop, and the only user of its process."""

    stream: Sender | None = None

    @task
    def send(self) -> None:
        options = options_of(self.environment)
        streams = options.expect_workers
        index = self.environment.runner.worker_index if streams > 1 else 0
        mix = Mix(
            customers=options.customers,
            rows=options.rows,
            explain_share=options.explain_share,
            fraud_share=options.fraud_share,
            retry_share=options.retry_share,
            bad_share=options.bad_share,
        )
        run = f"{time.time_ns() // 1_000_000:x}"
        traffic = Traffic(mix, options.seed, index, spec_of(options), run)
        self.stream = Sender(
            self.environment.host,
            traffic,
            recorder,
            self._report,
            api_key=options.api_key,
            connections=options.connections,
            timeout_s=options.request_timeout,
        )
        scenario = scenario_of(options)
        if options.delay:
            due = evenly(options.delay, index, streams)
            due = itertools.takewhile(lambda at: options.requests or at < scenario.seconds, due)
        else:
            due = arrivals(scenario, index, streams, options.seed, endless=bool(options.requests))
        if options.requests:
            due = itertools.islice(due, options.requests // streams + (index < options.requests % streams))
        gc.collect()
        gc.freeze()
        self.stream.run(due, time.perf_counter() + 0.1)
        raise StopUser

    def on_stop(self) -> None:
        if self.stream:
            self.stream.stop()

    def _report(self, path: str, latency_ms: float, size: int, error: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="POST",
            name=path,
            response_time=latency_ms,
            response_length=size,
            exception=error,
            context={},
        )


class Schedule(LoadTestShape):
    """One user a worker until the last answer; a ramp ends when two stages have not held."""

    def tick(self) -> tuple[int, float] | None:
        assert self.runner is not None
        options = options_of(self.runner.environment)
        delay = REPORT_DELAY_S if isinstance(self.runner, MasterRunner) else 0.0
        elapsed: float = self.get_run_time()  # type: ignore[no-untyped-call]
        scenario = scenario_of(options)
        longest = scenario.seconds * (2 if options.requests else 1) + options.request_timeout + delay
        if options.requests:
            all_sent = recorder.kinds.total() >= options.requests
        else:
            all_sent = elapsed > scenario.seconds + START_DELAY_S + delay
        if (all_sent and not recorder.under_way()) or elapsed > longest:
            return None
        if scenario.finds_knee and self._gave_way(scenario, elapsed - delay, Path(options.levels)):
            return None
        return options.expect_workers, options.expect_workers

    def _gave_way(self, scenario: Scenario, until: float, levels: Path) -> bool:
        offered = stage_measures(recorder, scenario, until)
        best, _ = knee(offered, stage_limit_ms(read_levels(levels, scenario.name)))
        return len(offered) >= 2 and offered[-2]["offered_rps"] > best


class Gathering:
    """What the judging process collects of a run besides the recorder."""

    def __init__(self, environment: Environment) -> None:
        options = options_of(environment)
        assert environment.host
        self.host, self.api_key = environment.host, options.api_key
        self.scenario = scenario_of(options)
        self.swap_command: str = options.swap_command
        self.started = time.perf_counter()
        self.started_at = datetime.now(UTC)
        self.memory: list[tuple[float, float]] = []
        self.swaps: list[tuple[float, int]] = []
        self._greenlets = [gevent.spawn(self._watch_memory)]
        if self.swap_command and self.scenario.swap_at is not None:
            self._greenlets.append(gevent.spawn_later(self.scenario.swap_at * self.scenario.seconds, self._swap))

    def stop(self) -> None:
        gevent.killall(self._greenlets)

    def _watch_memory(self) -> None:
        warned = False
        while True:
            size = read_memory(self.host, self.api_key, MEMORY_METRICS)
            if size is not None:
                self.memory.append((time.perf_counter() - self.started, size))
            elif not warned:
                logger.warning("the service's /metrics do not say how much memory it holds")
                warned = True
            gevent.sleep(SCRAPE_EVERY_S)

    def _swap(self) -> None:
        at = time.perf_counter() - self.started
        done = subprocess.run(shlex.split(self.swap_command), capture_output=True, text=True)
        self.swaps.append((at, done.returncode))
        if done.returncode:
            logger.error("the swap command failed with %d: %s", done.returncode, done.stderr.strip()[-500:])


gathering: Gathering | None = None


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    global gathering
    recorder.take()
    if not isinstance(environment.runner, WorkerRunner):
        gathering = Gathering(environment)


@events.report_to_master.add_listener
def report_to_master(client_id: str, data: dict[str, Any]) -> None:
    data["load_test"] = recorder.take()


@events.worker_report.add_listener
def worker_report(client_id: str, data: dict[str, Any]) -> None:
    recorder.add(data["load_test"])


@events.quitting.add_listener
def judge_and_report(environment: Environment, **_: Any) -> None:
    if gathering is None:
        return
    gathering.stop()
    options = options_of(environment)
    scenario = gathering.scenario
    run = Run(
        scenario=scenario,
        host=gathering.host,
        started_at=gathering.started_at,
        options={name: value for name, value in vars(options).items() if name in REPORTED and value not in (None, "")},
        recorder=recorder,
        memory=gathering.memory,
        swaps=gathering.swaps,
        levels=read_levels(Path(options.levels), scenario.name),
    )
    folder = write_report(run, Path(options.out))
    for finding in run.findings:
        print(finding)
    for example in recorder.examples:
        print("  ", example)
    print(f"{'PASSED' if run.passed else 'FAILED'}: {scenario.name} against {gathering.host}; {folder / 'report.html'}")
    environment.process_exit_code = 0 if run.passed else 1


REPORTED = {
    "rate", "seconds", "requests", "delay", "seed", "customers", "rows", "explain_share", "fraud_share",
    "retry_share", "bad_share", "connections", "expect_workers", "swap_command",
}  # fmt: skip
