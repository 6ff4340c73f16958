"""The verdict: a run's measures compared with its service levels."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path

STAGE_LIMIT = "stage_p99_ms"
MEASURES = {
    "p50_ms": "median latency, ms",
    "p90_ms": "90th percentile, ms",
    "p99_ms": "99th percentile, ms",
    "p999_ms": "99.9th percentile, ms",
    "max_ms": "longest latency, ms",
    "error_share": "requests without a right answer",
    "shed_share": "requests refused with 429 or 503",
    "shed_p99_ms": "how quickly load is shed, 99th percentile, ms",
    "degraded_share": "answers scored without something",
    "lag_p99_ms": "how late the generator sent, 99th percentile, ms",
    "answered_rps": "answers a second",
    "requests": "requests judged",
    "knee_rps": "highest rate that held, requests a second",
    "last_stage_p99_ms": "99th percentile of the last stage, ms",
    "memory_growth_share": "growth of the service's memory after the warm-up",
    "versions": "model versions that answered",
}


class LevelsError(ValueError):
    """A service-level file that cannot be used."""


@dataclass(frozen=True)
class Level:
    measure: str
    lowest: float = -math.inf
    highest: float = math.inf


@dataclass(frozen=True)
class Finding:
    """One level and its measured value; a level that could not be measured counts as missed."""

    level: Level
    measured: float

    @property
    def held(self) -> bool:
        return self.level.lowest <= self.measured <= self.level.highest

    def __str__(self) -> str:
        bounds = {"at least": self.level.lowest, "at most": self.level.highest}
        allowed = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))
        verdict = "held  " if self.held else "MISSED"
        return f"{verdict} {self.level.measure} = {shown(self.measured)} ({allowed})"


def shown(value: float) -> str:
    """A measure formatted for people."""
    return "not measured" if math.isnan(value) else f"{value:.4g}"


def read_levels(path: Path, scenario: str) -> list[Level]:
    """Return the levels of a scenario.

    Raises
    ------
    LevelsError
        The file has no such scenario, or a measure or bound that does not exist.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise LevelsError(f"{path} is no TOML: {error}") from None
    if scenario not in tables:
        raise LevelsError(f"{path} has no [{scenario}]; it has {', '.join(sorted(tables))}")
    levels = []
    for measure, bounds in tables[scenario].items():
        if measure not in MEASURES and measure != STAGE_LIMIT:
            raise LevelsError(f"{path}: [{scenario}] {measure} is not measured; there are {', '.join(MEASURES)}")
        if not isinstance(bounds, dict) or not bounds or not bounds.keys() <= {"min", "max"}:
            raise LevelsError(f"{path}: [{scenario}] {measure} takes {{ min = …, max = … }}; {bounds!r} arrived")
        levels.append(Level(measure, bounds.get("min", -math.inf), bounds.get("max", math.inf)))
    return levels


def stage_limit_ms(levels: list[Level]) -> float:
    """Up to which p99, ms, a stage of a ramp holds."""
    return next((level.highest for level in levels if level.measure == STAGE_LIMIT), 100.0)


def judge(levels: list[Level], measured: dict[str, float]) -> list[Finding]:
    return [Finding(level, measured.get(level.measure, math.nan)) for level in levels if level.measure != STAGE_LIMIT]
