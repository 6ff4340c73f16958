"""Load scenarios as stages of constant rates, and the arrival times drawn from them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

BURST_CHANCE = 0.02
BURST_SIZES = (2, 8)


@dataclass(frozen=True)
class Stage:
    seconds: float
    rps: float


@dataclass(frozen=True)
class Scenario:
    """A named load.

    Parameters
    ----------
    stages : tuple of Stage
        Offered one after the other; the first one's rate is the one that `--rate` replaces.
    warmup_s : float
        Seconds at the start that are offered and drawn, but not judged.
    finds_knee : bool
        Whether the rates climb until a stage fails, which ends the run.
    swap_at : float, optional
        When the swap command runs, as a share of the whole.
    """

    name: str
    meaning: str
    stages: tuple[Stage, ...]
    warmup_s: float = 0.0
    finds_knee: bool = False
    swap_at: float | None = None

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def scaled(self, rate: float | None = None, seconds: float | None = None) -> Scenario:
        """The same shape at another first rate (requests a second) and another length (s)."""
        louder = 1.0 if rate is None else rate / self.stages[0].rps
        longer = 1.0 if seconds is None else seconds / self.seconds
        stages = tuple(Stage(stage.seconds * longer, stage.rps * louder) for stage in self.stages)
        return replace(self, stages=stages, warmup_s=self.warmup_s * min(longer, 1.0))

    def stage_at(self, second: float) -> int:
        """The index of the stage that holds a time; the last one past the end."""
        end = 0.0
        for index, stage in enumerate(self.stages):
            end += stage.seconds
            if second < end:
                return index
        return len(self.stages) - 1

    def expected_at(self, second: float) -> float:
        """The rate offered at a time, requests a second."""
        return self.stages[self.stage_at(second)].rps if second < self.seconds else 0.0


def _climbing(start: float, factor: float, steps: int, seconds: float) -> tuple[Stage, ...]:
    return tuple(Stage(seconds, round(start * factor**step)) for step in range(steps))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("smoke", "does it answer, and rightly: ten seconds at 20 rps", (Stage(10, 20),)),
        Scenario("steady", "an ordinary day: five minutes at 100 rps", (Stage(300, 100),), warmup_s=5),
        Scenario(
            "ramp",
            "where is the knee: from 100 rps up by a quarter every ten seconds until it gives way",
            _climbing(100, 1.25, 24, 10),
            warmup_s=2,
            finds_knee=True,
        ),
        Scenario(
            "spike",
            "ten seconds of ten times the load between two calm minutes",
            (Stage(60, 100), Stage(10, 1000), Stage(60, 100)),
            warmup_s=5,
        ),
        Scenario("soak", "does it leak: thirty minutes at 200 rps", (Stage(1800, 200),), warmup_s=600),
        Scenario("swap", "another model takes over in the middle of a minute", (Stage(60, 100),), 5, swap_at=0.5),
    )
}


def arrivals(scenario: Scenario, stream: int, streams: int, seed: int, *, endless: bool = False) -> Iterator[float]:
    """Yield the intended send times of one stream, s since the start, ascending.

    Arrivals are Poisson: streams drawn apart add up to the whole rate, on however many machines they run. About
    one request in ten comes in a burst of several at once, as from a till that was offline; the rate holds.

    Parameters
    ----------
    stream, streams : int
        The number of this stream, and the number of equal streams.
    endless : bool
        Whether the last stage goes on for ever.
    """
    draw = random.Random(f"{seed}/arrivals/{stream}")
    together = 1 - BURST_CHANCE + BURST_CHANCE * sum(BURST_SIZES) / 2
    begin = 0.0
    for index, stage in enumerate(scenario.stages):
        end = math.inf if endless and index == len(scenario.stages) - 1 else begin + stage.seconds
        rate = stage.rps / streams / together
        at = begin + draw.expovariate(rate)
        while at < end:
            for _ in range(draw.randint(*BURST_SIZES) if draw.random() < BURST_CHANCE else 1):
                yield at
            at += draw.expovariate(rate)
        begin = end


def evenly(delay_s: float, stream: int, streams: int) -> Iterator[float]:
    """Yield send times `delay_s` apart over all streams, without end, s since the start."""
    at = stream * delay_s
    while True:
        yield at
        at += streams * delay_s
