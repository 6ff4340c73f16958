"""Payments of the contract merchant-form, one after the other: `--num_requests`, `--delay`, and BASE_URL.

BASE_URL=http://127.0.0.1:3000 python -m load_tests --num_requests 100 --delay 0.1
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from pydantic import Field
from pydantic_settings import BaseSettings

from fraud.simulation.world import CATEGORIES

DEFAULT_URL = "http://127.0.0.1:3000"
TIMEOUT_S = 30.0


class Service(BaseSettings):
    """The service that payments are sent to, as the environment says."""

    url: str | None = Field(None, validation_alias="BASE_URL")
    key: str | None = Field(None, validation_alias="FRAUD_API_KEY", repr=False)


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether a command means this traffic: it has `--num_requests`, or BASE_URL is set and it has no host."""
    names = {argument.partition("=")[0] for argument in arguments}
    return "--num_requests" in names or (Service().url is not None and names.isdisjoint({"-H", "--host"}))


def main(arguments: Sequence[str], print_line: Callable[[str], None] = print) -> int:
    """Send the payments, print each answer and a summary; returns 0 if every payment got a verdict."""
    parser = argparse.ArgumentParser("python -m load_tests", description="Send payments to POST /predict/, in turn.")
    parser.add_argument("--num_requests", type=_count, default=100, help="how many payments (default 100)")
    parser.add_argument("--delay", type=_seconds, default=0.1, help="seconds between two payments (default 0.1)")
    parser.add_argument("--seed", type=int, default=None, help="the same seed sends the same payments")
    options = parser.parse_args(arguments)
    service = Service()
    url, key = (service.url or DEFAULT_URL).rstrip("/"), service.key
    rng = random.Random(options.seed)
    outcomes: Counter[str] = Counter()
    took_ms: list[float] = []
    with httpx.Client(base_url=url, headers={"X-API-Key": key} if key else None, timeout=TIMEOUT_S) as client:
        for number in range(1, options.num_requests + 1):
            if number > 1:
                time.sleep(options.delay)
            outcome, ms = send(client, payment(rng))
            print_line(f"{number}/{options.num_requests} {outcome} {ms:.1f} ms")
            outcomes[outcome.partition(",")[0]] += 1
            took_ms.append(ms)
    verdicts = outcomes["fraudulent"] + outcomes["non-fraudulent"]
    counts = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    print_line(f"{url}: {options.num_requests} payments: {counts}; median {statistics.median(took_ms):.1f} ms")
    return 0 if verdicts == options.num_requests else 1


def payment(rng: random.Random) -> dict[str, Any]:
    """Return a random payment; amounts are log-normal with a median of 40."""
    return {
        "amt": round(rng.lognormvariate(3.7, 1.2) + 0.01, 2),
        "hour": rng.randrange(24),
        "day_of_week": rng.randrange(7),
        "category": rng.choice(CATEGORIES),
    }


def send(client: httpx.Client, form: dict[str, Any]) -> tuple[str, float]:
    """Return the verdict on a payment, or what happened instead, and the milliseconds that it took."""
    started = time.perf_counter()
    try:
        answer = client.post("/predict/", json=form)
    except httpx.HTTPError as error:
        return f"no answer, {type(error).__name__}: {error}", 1000 * (time.perf_counter() - started)
    ms = 1000 * (time.perf_counter() - started)
    if answer.status_code != 200:
        return f"status {answer.status_code}, {answer.text[:200]}", ms
    said = answer.json()
    return f"{said['prediction']}, probability {said['fraud_probability']:.4f}", ms


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 3600")
    return seconds
