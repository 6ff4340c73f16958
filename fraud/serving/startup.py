"""Ends a service when none of its workers can start, instead of restarting them for ever.

BentoML's parent process restarts every worker that ends. Workers signal to it whether they started; after some failures
it ends with status 1.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

logger = logging.getLogger("fraud.serving.startup")

TRIES = 3
FAILED, READY = signal.SIGUSR1, signal.SIGUSR2


class _Starts:
    """The parent's record of worker starts."""

    def __init__(self) -> None:
        self.failures = 0
        self.is_ready = False

    def ready(self, *_: int | FrameType | None) -> None:
        self.is_ready = True

    def failed(self, *_: int | FrameType | None) -> None:
        """Count a failure; after a worker was ready, BentoML restarts the failed ones as usual."""
        self.failures += 1
        if self.failures == TRIES and not self.is_ready:
            print(f"error: no worker could start in {TRIES} tries; the log says why", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """Exit with a failure status; BentoML itself would end with status 0."""
        if self.failures >= TRIES and not self.is_ready:
            sys.stdout.flush()
            os._exit(1)


def end_unless_a_worker_starts() -> None:
    """Listen for worker signals, in the parent process."""
    if threading.current_thread() is not threading.main_thread():
        return  # started from Python beside other work, which is not ours to end
    starts = _Starts()
    signal.signal(FAILED, starts.failed)
    signal.signal(READY, starts.ready)
    atexit.register(starts.end)


def signal_ready() -> None:
    """Signal to the parent process that this worker started."""
    _signal(READY)


def signal_failed(error: BaseException) -> None:
    """Log why this worker cannot start, and signal it to the parent process."""
    logger.critical("this worker cannot start: %s", error)
    _signal(FAILED)


def _signal(number: signal.Signals) -> None:
    """Signal the parent if it has a handler; without one the signal would kill it."""
    parent = os.getppid()
    try:
        status = Path(f"/proc/{parent}/status").read_text()
    except OSError:
        return
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
    if caught >> (number - 1) & 1:
        os.kill(parent, number)
