"""A finished run: its figures, the verdict, and the page that shows them."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from load_tests.measure import ANSWERED, LAG, OUTCOMES, Recorder, knee, measures, percentile, stage_measures
from load_tests.scenarios import Scenario
from load_tests.verdict import MEASURES, Finding, Level, judge, shown, stage_limit_ms

COLOURS = {"ok": "#2a7f62", "refused": "#8a8a8a", "shed": "#e0a030", "wrong": "#8e44ad", "failed": "#c0392b"}


@dataclass
class Run:
    """The results of a run."""

    scenario: Scenario
    host: str
    started_at: datetime
    options: dict[str, Any]
    recorder: Recorder
    memory: list[tuple[float, float]]
    """(s since the start, bytes)"""
    swaps: list[tuple[float, int]]
    """(s since the start, exit status)"""
    levels: list[Level] = field(default_factory=list)

    @cached_property
    def stages(self) -> list[dict[str, float]]:
        return stage_measures(self.recorder, self.scenario)

    @cached_property
    def knee(self) -> tuple[float, str]:
        return knee(self.stages, stage_limit_ms(self.levels))

    @cached_property
    def measured(self) -> dict[str, float]:
        """Every measure of `verdict.MEASURES`; nan where this run has none."""
        recorder = self.recorder
        last = max(recorder.seconds, default=0)
        found = measures(recorder, self.scenario.warmup_s, last + 1)
        found["degraded_share"] = recorder.degraded / max(recorder.versions.total(), 1)
        found["versions"] = len(recorder.versions)
        found["knee_rps"] = self.knee[0] if self.scenario.finds_knee else math.nan
        found["last_stage_p99_ms"] = self.stages[-1]["p99_ms"] if self.stages else math.nan
        found["memory_growth_share"] = self._memory_growth()
        return found

    @cached_property
    def findings(self) -> list[Finding]:
        return judge(self.levels, self.measured)

    @property
    def passed(self) -> bool:
        swapped = all(status == 0 for _, status in self.swaps)
        return bool(self.measured["requests"]) and swapped and all(finding.held for finding in self.findings)

    def _memory_growth(self) -> float:
        """The last tenth's median over the first tenth's, less one, after the warm-up."""
        sizes = [size for at, size in self.memory if at >= self.scenario.warmup_s]
        tenth = max(1, len(sizes) // 10)
        if len(sizes) < 2:
            return math.nan
        return statistics.median(sizes[-tenth:]) / statistics.median(sizes[:tenth]) - 1


def write_report(run: Run, out: Path) -> Path:
    """Write `report.html` and `result.json` into a new folder below `out`; return the folder."""
    folder = out / f"{run.scenario.name}-{run.started_at:%Y%m%dT%H%M%SZ}"
    folder.mkdir(parents=True, exist_ok=True)
    some = run.memory[:: max(1, len(run.memory) // 60)]
    result = {
        "scenario": run.scenario.name,
        "started_at": run.started_at.isoformat(timespec="seconds"),
        "host": run.host,
        "passed": run.passed,
        "measured": _plain(run.measured),
        "levels": [str(finding) for finding in run.findings],
        "stages": [_plain(stage) for stage in run.stages],
        "knee": {"rps": run.knee[0], "limited_by": run.knee[1]} if run.scenario.finds_knee else None,
        "versions": dict(run.recorder.versions),
        "kinds": dict(run.recorder.kinds),
        "examples": run.recorder.examples,
        "memory_mib": [[round(at), round(size / 2**20, 1)] for at, size in some],
        "options": run.options,
        "generator": {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "report.html").write_text(_page(run))
    return folder


def _plain(figures: dict[str, float]) -> dict[str, float | None]:
    """Figures for JSON, to four digits; null for what was not measured."""
    return {name: None if math.isnan(value) else float(f"{value:.4g}") for name, value in figures.items()}


def _page(run: Run) -> str:
    rows = "".join(
        f"<tr class={'held' if f.held else 'missed'}><td>{MEASURES[f.level.measure]}<td>{shown(f.measured)}"
        f"<td>{'' if math.isinf(f.level.lowest) else f'&ge; {f.level.lowest:g}'}"
        f"{'' if math.isinf(f.level.highest) else f'&le; {f.level.highest:g}'}<td>{'held' if f.held else 'missed'}"
        for f in run.findings
    )
    figures = "".join(f"<tr><td>{MEASURES[name]}<td>{shown(value)}" for name, value in run.measured.items())
    kinds = "".join(f"<tr><td>{html.escape(kind)}<td>{n}" for kind, n in run.recorder.kinds.most_common())
    versions = "".join(f"<tr><td>{html.escape(name)}<td>{n}" for name, n in run.recorder.versions.most_common())
    examples = "".join(f"<li>{html.escape(text)}" for text in run.recorder.examples) or "<li>none"
    options = ", ".join(f"{name} {value}" for name, value in run.options.items())
    found = f"<p>Knee: <b>{run.knee[0]:.0f} requests a second</b>; after it: {html.escape(run.knee[1])}.</p>"
    return f"""<!doctype html><html lang=en><meta charset=utf-8><title>Load test: {run.scenario.name}</title>
<style>body{{font:15px system-ui;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}
td,th{{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}}
.missed td:last-child{{color:#c0392b;font-weight:700}}
.held td:last-child{{color:#2a7f62}}img{{max-width:100%}}</style>
<h1>{run.scenario.name}: {"passed" if run.passed else "failed"}</h1>
<p>{html.escape(run.scenario.meaning)}, against {html.escape(run.host)}, {run.started_at:%Y-%m-%d %H:%M:%S} UTC.
Latency counts from the moment a request was meant to be sent. {html.escape(options)}.</p>
<h2>Service levels</h2><table><tr><th>measure<th>measured<th>level<th>{rows}</table>
{found if run.scenario.finds_knee else ""}
<h2>Course</h2><img alt="rates and latencies over time" src="{_png(_course(run))}">
<h2>Latency</h2><img alt="share of slower requests" src="{_png(_tail(run))}">
{f'<h2>Ramp</h2><img alt="latency over offered rate" src="{_png(_ramp(run))}">' if run.scenario.finds_knee else ""}
<h2>All measures</h2><table>{figures}</table>
<h2>What was sent</h2><table>{kinds}</table>
<h2>Who answered</h2><table>{versions}</table>
<h2>What went wrong first</h2><ul>{examples}</ul>
"""


def _course(run: Run) -> Figure:
    recorder = run.recorder
    seconds = sorted(recorder.seconds)
    figure = Figure(figsize=(11, 9))
    rates, latency, memory = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    rates.step(seconds, [run.scenario.expected_at(s) for s in seconds], "k--", lw=0.8, label="offered", where="post")
    totals = [[recorder.histogram([outcome], s, s + 1).total() for s in seconds] for outcome in OUTCOMES]
    rates.stackplot(seconds, totals, labels=OUTCOMES, colors=[COLOURS[o] for o in OUTCOMES], step="post", alpha=0.8)
    rates.set_ylabel("requests a second")
    for share, style in ((0.5, "-"), (0.99, "-"), (1.0, ":")):
        values = [percentile(recorder.histogram(ANSWERED, s, s + 1), share) for s in seconds]
        latency.plot(seconds, values, style, lw=1, label="max" if share == 1 else f"p{share * 100:.0f}")
    late = [percentile(recorder.histogram([LAG], s, s + 1), 0.99) for s in seconds]
    latency.plot(seconds, late, color="#bbb", lw=1, label="generator's lag p99")
    latency.set(ylabel="ms from the intended time", yscale="log")
    memory.plot([at for at, _ in run.memory], [size / 2**20 for _, size in run.memory], color="#34495e")
    memory.set(ylabel="service's memory, MiB", xlabel="seconds", ylim=(0, None))
    for axes in (rates, latency, memory):
        _mark(axes, run)
        axes.grid(alpha=0.3)
    rates.legend(ncols=6, fontsize=8)
    latency.legend(ncols=4, fontsize=8)
    return figure


def _mark(axes: Axes, run: Run) -> None:
    axes.axvspan(0, run.scenario.warmup_s, color="#f3f3f3")
    for at, _ in run.swaps:
        axes.axvline(at, color="#c0392b", lw=1, ls="--")


def _tail(run: Run) -> Figure:
    """The share of requests slower than a latency, on logarithmic axes."""
    figure = Figure(figsize=(11, 4))
    axes = figure.subplots()
    for name, whats in (("answered", ANSWERED), ("shed", ["shed"]), ("generator's lag", [LAG])):
        histogram = run.recorder.histogram(whats, run.scenario.warmup_s)
        n, slower = histogram.total(), histogram.total()
        points = []
        for edge in sorted(histogram):
            points.append((percentile(histogram, 1 - (slower - 1) / n), slower / n))
            slower -= histogram[edge]
        if points:
            axes.step(*zip(*points, strict=True), label=name, where="post")
    axes.set(xscale="log", yscale="log", xlabel="ms from the intended time", ylabel="share that took longer")
    axes.grid(alpha=0.3, which="both")
    if axes.has_data():
        axes.legend()
    return figure


def _ramp(run: Run) -> Figure:
    figure = Figure(figsize=(11, 4))
    axes = figure.subplots()
    offered = [stage["offered_rps"] for stage in run.stages]
    for name in ("p50_ms", "p99_ms", "lag_p99_ms"):
        axes.plot(offered, [stage[name] for stage in run.stages], "o-", label=MEASURES[name])
    axes.axhline(stage_limit_ms(run.levels), color="#c0392b", lw=0.8, label="limit of a stage")
    axes.axvline(run.knee[0], color="k", ls="--", lw=0.8, label=f"knee: {run.knee[0]:.0f} requests a second")
    axes.set(xlabel="offered, requests a second", ylabel="ms from the intended time", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left")
    shed = axes.twinx()
    shed.bar(offered, [stage["shed_share"] for stage in run.stages], [rps / 12 for rps in offered], color="#e0a030")
    shed.set(ylabel="share shed", ylim=(0, 1))
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
