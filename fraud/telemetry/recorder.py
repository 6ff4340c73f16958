"""Prometheus metrics of the service, summed over workers, at less than a microsecond a value.

Every worker writes its values to its own files, which BentoML's `/metrics` sums. Writing to a file on each request is
too slow, so a worker counts in memory and flushes to the files twice a second; scraped values are at most that old.
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, multiprocess

from fraud.decisions.verdict import ACTIONS
from fraud.models.active import Swap
from fraud.telemetry.metrics import METRICS
from fraud.telemetry_settings import TelemetrySettings

if TYPE_CHECKING:
    from fraud.models.registry import FollowStatus
    from fraud.pipeline.requests import DecideRequests, ScoreRequest
    from fraud.pipeline.rows import Decision, Outcome
    from fraud.stores.protocol import StoreStats

FLUSH_S = 0.5


class _Histogram(Histogram):
    """A histogram that takes counts instead of values."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """Add `counts[i]` values of bucket i, which add up to `total`."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(total)


class _Tally:
    """The increments of one histogram or counter since the last flush."""

    __slots__ = ("_child", "_counts", "_edges", "_total")

    def __init__(self, child: Any, edges: tuple[float, ...] | None) -> None:
        self._child = child
        self._edges = edges
        self._counts = [0] * (len(edges) + 1 if edges else 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        assert self._edges is not None
        self._counts[bisect_left(self._edges, value)] += 1
        self._total += value

    def increase(self, by: float = 1.0) -> None:
        self._total += by

    def flush(self) -> None:
        if self._edges is None:
            if self._total:
                self._child.inc(self._total)
        elif any(self._counts):
            self._child.add(self._counts, self._total)
            self._counts = [0] * len(self._counts)
        self._total = 0.0


class _Declared(Protocol):
    @property
    def path(self) -> str: ...


class _Called(Protocol):
    @property
    def route(self) -> _Declared: ...


class _Answered(Protocol):
    @property
    def status(self) -> int: ...

    @property
    def code(self) -> str: ...


class Telemetry:
    """The metrics of one worker.

    Parameters
    ----------
    registry : CollectorRegistry
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        forget_dead_workers()
        self._metrics: dict[str, Any] = {}
        for metric in METRICS:
            name = metric.name.removesuffix("_total")
            if metric.type == "counter":
                made: Any = Counter(name, metric.meaning, metric.labels, registry=registry)
            elif metric.type == "gauge":
                made = Gauge(name, metric.meaning, metric.labels, registry=registry, multiprocess_mode=metric.mode)
            else:
                made = _Histogram(name, metric.meaning, metric.labels, registry=registry, buckets=metric.buckets)
            self._metrics[metric.name] = made
        self._edges = {
            metric.name: tuple(map(float, metric.buckets)) for metric in METRICS if metric.type == "histogram"
        }
        self._tallies: dict[tuple[str, ...], _Tally] = {}
        self._lock = Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._sources: list[Callable[[], None]] = []
        self._counts_seen: dict[tuple[str, ...], int] = {}
        self._rules_stopped: set[tuple[str, str]] = set()
        self._served: dict[tuple[str, str], tuple[str, str, str, str]] = {}

    # what the parts of the service report

    def answered(self, call: _Called, answer: _Answered, seconds: float) -> None:
        """Count one request; an observer of the front door."""
        route = call.route.path
        with self._lock:
            self._tally("fraud_request_seconds", route).observe(seconds)
            self._tally("fraud_requests_total", route, str(answer.status)).increase()
            if answer.status >= 400:
                self._tally("fraud_errors_total", answer.code or "unknown").increase()

    def stage(self, name: str, seconds: float) -> None:
        """Record the time that a batch spent in a stage, or a request in the queue."""
        with self._lock:
            self._tally("fraud_stage_seconds", name).observe(seconds)

    def timed(self, run: DecideRequests) -> DecideRequests:
        """Wrap the batch function: record its rows and the queue time of each request."""

        async def run_timed(requests: Sequence[ScoreRequest]) -> list[list[Outcome]]:
            now = time.perf_counter()
            with self._lock:
                queue = self._tally("fraud_stage_seconds", "queue")
                for request in requests:
                    queue.observe(now - request.queued_at)
                self._tally("fraud_batch_rows").observe(sum([request.n_rows for request in requests]))
            return await run(requests)

        return run_timed

    def decided(self, decisions: Sequence[Decision]) -> None:
        """Count the new decisions of a batch; repeated ones are not counted."""
        with self._lock:
            for model, group in groupby(decisions, key=attrgetter("model")):
                scores = self._tally("fraud_score", model.name, model.version)
                made = dict.fromkeys(ACTIONS, 0)
                for decision in group:
                    scores.observe(decision.decision_score)
                    made[decision.verdict.decision] += 1
                    for rule in decision.rules_hit:
                        self._tally("fraud_rule_hits_total", model.name, rule).increase()
                for action, count in made.items():
                    if count:
                        self._tally("fraud_rows_total", model.name, model.version, action).increase(count)

    def rule_stopped(self, name: str, rule: str) -> None:
        """Show that a rule of a model is stopped, until rules or model are replaced."""
        self._rules_stopped.add((name, rule))
        self._metrics["fraud_rules_stopped"].labels(name, rule).set(1)

    def swapped(self, swap: Swap) -> None:
        """Count a swap, and show which version is served."""
        failed = self._metrics["fraud_failed_swaps"].labels(swap.name, swap.role)
        with self._lock:
            result = "refused" if swap.error else "ok"
            self._tally("fraud_swaps_total", swap.name, swap.role, result).increase()
            self._tally("fraud_swap_seconds").observe(swap.seconds)
        failed.set(1 if swap.error else 0)
        for stopped in [] if swap.error else [known for known in self._rules_stopped if known[0] == swap.name]:
            self._rules_stopped.discard(stopped)
            self._metrics["fraud_rules_stopped"].labels(*stopped).set(0)

    def serving(self, champions: dict[str, Any], challengers: dict[str, Any], anomaly: dict[str, Any]) -> None:
        """Show which versions this worker serves now."""
        now = {
            (name, role): (name, scorer.name.version, scorer.name.digest, role)
            for role, scorers in (("champion", champions), ("challenger", challengers), ("anomaly", anomaly))
            for name, scorer in scorers.items()
        }
        info = self._metrics["fraud_model_info"]
        for labels in set(self._served.values()) - set(now.values()):
            info.labels(*labels).set(0)
        for labels in now.values():
            info.labels(*labels).set(1)
        for key in self._served.keys() - now.keys():
            self._metrics["fraud_failed_swaps"].labels(*key).set(0)
        self._served = now

    def shadowed(self, name: str, agreed: int, differed: int) -> None:
        """Count the rows that a shadow scored."""
        with self._lock:
            for label, count in (("true", agreed), ("false", differed)):
                if count:
                    self._tally("fraud_shadow_rows_total", name, label).increase(count)

    def shadow_dropped(self, rows: int) -> None:
        with self._lock:
            self._tally("fraud_shadow_dropped_total").increase(rows)

    # what any part reports, by the metric's name

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Increase a counter."""
        with self._lock:
            self._tally(name, *labels).increase(by)

    def observe(self, name: str, values: Iterable[float], *labels: str) -> None:
        """Add values to a histogram."""
        with self._lock:
            tally = self._tally(name, *labels)
            for value in values:
                tally.observe(value)

    def show(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        metric = self._metrics[name]
        (metric.labels(*labels) if labels else metric).set(value)

    # what is asked of the parts of the service, at each flush

    def watch(
        self,
        queued_rows: Callable[[], int],
        counts: Callable[[], dict[str, int]],
        store: Callable[[], StoreStats] | None = None,
        looks: Callable[[], Mapping[str, FollowStatus]] | None = None,
    ) -> None:
        """Start to read the queue's length, the pipeline's counts and the state of the store and of W&B polling."""
        self._sources = [
            lambda: self._metrics["fraud_queue_rows"].set(queued_rows()),
            lambda: self._take_counts(counts()),
        ]
        if store is not None:
            self._sources.append(lambda: self._take_store(store()))
        if looks is not None:
            self._sources.append(lambda: self._take_looks(looks()))

    def start(self) -> None:
        """Flush regularly from now on, on the running event loop."""
        self.flush()
        self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.start)

    def stop(self) -> None:
        """Flush a last time."""
        if self._timer is not None:
            self._timer.cancel()
        self.flush()

    def flush(self) -> None:
        """Write the counts to the files that are scraped."""
        for read in self._sources:
            read()
        self._metrics["fraud_memory_bytes"].set(resident_bytes())
        with self._lock:
            for tally in self._tallies.values():
                tally.flush()

    def _take_counts(self, counts: dict[str, int]) -> None:
        for name, count in counts.items():
            key: tuple[str, ...] = (f"fraud_{name}_total",)
            if name.startswith("degraded_"):
                key = ("fraud_degraded_rows_total", name.removeprefix("degraded_"))
            elif name.startswith("labels_"):
                key = ("fraud_labels_total", name.removeprefix("labels_"))
            if key[0] in self._metrics and name != "rows":  # rows are counted by decision
                self._take(count, *key)

    def _take_store(self, figures: StoreStats) -> None:
        self._metrics["fraud_store_waiting"].set(figures.waiting)
        for name, is_off in figures.off.items():
            self._metrics["fraud_store_off"].labels(name).set(is_off)
        for name, count in figures.outages.items():
            self._take(count, "fraud_store_outages_total", name)
        for name, count in figures.late_calls.items():
            self._take(count, "fraud_store_late_calls_total", name)

    def _take_looks(self, looks: Mapping[str, FollowStatus]) -> None:
        for name, look in looks.items():
            self._metrics["fraud_following_failed"].labels(name).set(1 if look.error else 0)
            looked = datetime.fromisoformat(look.checked).timestamp()
            self._metrics["fraud_following_look_timestamp_seconds"].labels(name).set(looked)

    def _take(self, count: int, *key: str) -> None:
        """Add the increment of a count since the last flush."""
        gained = count - self._counts_seen.get(key, 0)
        self._counts_seen[key] = count
        if gained:
            with self._lock:
                self._tally(*key).increase(gained)

    def _tally(self, *key: str) -> _Tally:
        tally = self._tallies.get(key)
        if tally is None:
            name, *labels = key
            metric = self._metrics[name]
            tally = self._tallies[key] = _Tally(metric.labels(*labels) if labels else metric, self._edges.get(name))
        return tally


def resident_bytes() -> int:
    """Return the resident memory of this process without mapped files, bytes.

    The kernel can drop pages of mapped files, such as SQLite's, at any time.
    """
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(of_files)) * os.sysconf("SC_PAGE_SIZE")


def forget_dead_workers() -> None:
    """Remove the gauges of dead workers from the sums."""
    folder = TelemetrySettings.read().metrics_dir
    for path in folder.glob("gauge_live*_*.db") if folder is not None else ():
        pid = int(path.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
