"""What can go wrong on the way, on demand."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["status", "slow", "cut", "cut_after", "corrupt", "truncate", "kill_before", "kill_after"]


@dataclass
class Fault:
    """Disturb the requests whose label contains `match`.

    A label is ``"METHOD /path"``, and for GraphQL ``"POST /graphql field,field"`` with the root fields.
    `skip` matching requests pass first and `times` are disturbed (all, when None). `kill_*` end the process
    group `pid`, once that is known, with SIGKILL before the request is applied, or after it was; from then on
    nothing is applied, as from a machine that is off, until the faults are cleared.
    """

    match: str
    action: Action
    status: int = 500
    delay_s: float = 10.0
    skip: int = 0
    times: int | None = None
    pid: int = 0
    hits: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)


class Faults:
    """The active faults, asked once a request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._dead = False

    def set(self, *faults: Fault) -> None:
        with self._lock:
            self._faults = list(faults)
            self._dead = False

    def clear(self) -> None:
        self.set()

    def take(self, label: str) -> Fault | None:
        with self._lock:
            if self._dead:
                return Fault("", "cut")
            for fault in self._faults:
                if fault.match not in label or (fault.action.startswith("kill") and not fault.pid):
                    continue
                fault.seen += 1
                if fault.seen <= fault.skip or (fault.times is not None and fault.hits >= fault.times):
                    continue
                fault.hits += 1
                self._dead = fault.action.startswith("kill")
                return fault
        return None
