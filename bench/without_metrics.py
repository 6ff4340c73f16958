"""The service with a telemetry that counts nothing of a request, to tell what counting costs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import fraud.telemetry.recorder


class Silent(fraud.telemetry.recorder.Telemetry):
    """Shows the models it serves, and no more."""

    def stage(self, name: str, seconds: float) -> None: ...

    def scored(self, scorer: Any, probabilities: Any) -> None: ...

    def answered(self, *call: Any) -> None: ...

    def timed(self, run: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        return run


fraud.telemetry.recorder.Telemetry = Silent  # type: ignore[misc]

from service import FraudBento  # noqa: E402, F401
