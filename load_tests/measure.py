"""The measurements of a run: latencies from the intended send time, per second, small enough to send to a master."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from load_tests.scenarios import Scenario

RESOLUTION = math.log(1.01)
ANSWERED = ("ok", "refused")
OUTCOMES = (*ANSWERED, "shed", "wrong", "failed")
LAG = "lag"
EXAMPLES = 10

Histogram = Counter[int]


def bucket(seconds: float) -> int:
    """The bucket of a duration: whole powers of 1.01, in µs."""
    return max(0, math.ceil(math.log(max(seconds * 1e6, 1.0)) / RESOLUTION))


def percentile(histogram: Histogram, share: float) -> float:
    """The upper edge, ms, of the bucket that holds a share of the durations: at most 1% too high; nan of none."""
    wanted = math.ceil(share * histogram.total())
    if not wanted:
        return math.nan
    seen = 0
    for edge in sorted(histogram):
        seen += histogram[edge]
        if seen >= wanted:
            break
    return math.exp(edge * RESOLUTION) / 1e3


class Recorder:
    """Counts of one process, exported as plain data and merged elsewhere.

    `seconds[s][what]` is the histogram of the requests meant for second `s`: of the time until their answer, by
    outcome, and under ``lag`` of how late this program sent them.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, dict[str, Histogram]] = defaultdict(lambda: defaultdict(Counter))
        self.kinds: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.degraded = 0
        self.examples: list[str] = []

    def sent(self, due: float, lag: float, kind: str) -> None:
        """Count a sent request, `lag` s after its intended time `due` (s since the start)."""
        self.seconds[int(due)][LAG][bucket(lag)] += 1
        self.kinds[kind] += 1

    def answered(self, due: float, latency: float, outcome: str, example: str = "") -> None:
        """Count an answer, `latency` s after the intended time of its request."""
        self.seconds[int(due)][outcome][bucket(latency)] += 1
        if example and len(self.examples) < EXAMPLES:
            self.examples.append(f"{due:.3f} s, {outcome}: {example}")

    def take(self) -> dict[str, Any]:
        """Return all counts as plain data and empty the recorder."""
        taken = {
            "seconds": {s: {what: dict(h) for what, h in of.items()} for s, of in self.seconds.items()},
            "kinds": dict(self.kinds),
            "versions": dict(self.versions),
            "degraded": self.degraded,
            "examples": self.examples,
        }
        self.__init__()  # type: ignore[misc]
        return taken

    def add(self, taken: Mapping[str, Any]) -> None:
        """Add the counts taken from another recorder."""
        for second, of in taken["seconds"].items():
            for what, histogram in of.items():
                self.seconds[int(second)][what].update({int(edge): n for edge, n in histogram.items()})
        self.kinds.update(taken["kinds"])
        self.versions.update(taken["versions"])
        self.degraded += taken["degraded"]
        self.examples = (self.examples + taken["examples"])[:EXAMPLES]

    def histogram(self, whats: Iterable[str], begin: float = 0.0, end: float = math.inf) -> Histogram:
        """The sum over kinds of outcome and the seconds from `begin` up to `end`."""
        total: Histogram = Counter()
        for second, of in self.seconds.items():
            if begin <= second < end:
                for what in whats:
                    total.update(of.get(what, {}))
        return total

    def under_way(self) -> int:
        """Requests sent and not answered yet."""
        return self.histogram([LAG]).total() - self.histogram(OUTCOMES).total()


def measures(recorder: Recorder, begin: float, end: float) -> dict[str, float]:
    """The figures of the seconds from `begin` up to `end`, whole ones; a request without any answer is an error."""
    begin = math.ceil(begin)
    sent = recorder.histogram([LAG], begin, end)
    answered = recorder.histogram(ANSWERED, begin, end)
    shed = recorder.histogram(["shed"], begin, end)
    n = sent.total()
    share = 1 / n if n else math.nan
    return {
        "requests": n,
        "answered_rps": answered.total() / (end - begin),
        "p50_ms": percentile(answered, 0.5),
        "p90_ms": percentile(answered, 0.9),
        "p99_ms": percentile(answered, 0.99),
        "p999_ms": percentile(answered, 0.999),
        "max_ms": percentile(answered, 1.0),
        "error_share": (n - answered.total() - shed.total()) * share,
        "shed_share": shed.total() * share,
        "shed_p99_ms": percentile(shed, 0.99),
        "lag_p99_ms": percentile(sent, 0.99),
    }


def stage_measures(recorder: Recorder, scenario: Scenario, until: float = math.inf) -> list[dict[str, float]]:
    """The figures of every stage that was offered in whole seconds before `until`."""
    rows, begin = [], 0.0
    for stage in scenario.stages:
        end = begin + stage.seconds
        if end > until or not recorder.histogram([LAG], math.ceil(begin), end):
            break
        # the first second of a stage still answers for the one before
        rows.append({"offered_rps": stage.rps, **measures(recorder, begin + min(1.0, stage.seconds / 2), end)})
        begin = end
    return rows


def knee(stages: list[dict[str, float]], p99_ms: float) -> tuple[float, str]:
    """The highest rate (requests a second) up to which every stage held, and the limit exceeded after it.

    A stage holds when its p99 is within the limit and no more than 1% is shed or in error.
    """
    best = 0.0
    for stage in stages:
        if stage["lag_p99_ms"] > p99_ms:
            return best, "this load generator (give it more workers)"
        if stage["error_share"] > 0.01:
            return best, f"errors: {stage['error_share']:.1%} at {stage['offered_rps']:.0f} rps"
        if stage["shed_share"] > 0.01:
            return best, f"load shed: {stage['shed_share']:.1%} at {stage['offered_rps']:.0f} rps"
        if not stage["p99_ms"] <= p99_ms:
            return best, f"p99: {stage['p99_ms']:.0f} ms at {stage['offered_rps']:.0f} rps"
        best = stage["offered_rps"]
    return best, "nothing: the service held every stage"
