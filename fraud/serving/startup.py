"""A service none of whose workers can start ends, instead of keeping its port and starting them again for ever.

BentoML's first process starts a worker again whenever one ends. Workers tell it by signals whether they started;
after some tries it ends with status 1, which whoever started the service sees.
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
    """What the first process knows of its workers."""

    def __init__(self) -> None:
        self.failures = 0
        self.is_ready = False

    def ready(self, *_: int | FrameType | None) -> None:
        self.is_ready = True

    def failed(self, *_: int | FrameType | None) -> None:
        """Count a failure; once a worker was ready, one that cannot start is BentoML's to start again."""
        self.failures += 1
        if self.failures == TRIES and not self.is_ready:
            print(f"error: no worker could start in {TRIES} tries; the log says why", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """Give the status of a failure to an end that BentoML takes for a wanted one."""
        if self.failures >= TRIES and not self.is_ready:
            sys.stdout.flush()
            os._exit(1)


def end_unless_a_worker_starts() -> None:
    """Listen to workers, in the process that will start them."""
    if threading.current_thread() is not threading.main_thread():
        return  # started from Python beside other work, which is not ours to end
    starts = _Starts()
    signal.signal(FAILED, starts.failed)
    signal.signal(READY, starts.ready)
    atexit.register(starts.end)


def tell_ready() -> None:
    """Tell the first process that this worker started."""
    _tell(READY)


def tell_failed(error: BaseException) -> None:
    """Log why this worker cannot start, and tell the first process."""
    logger.critical("this worker cannot start: %s", error)
    _tell(FAILED)


def _tell(number: signal.Signals) -> None:
    """Send a signal to the parent, if it listens: one that does not would end by it."""
    parent = os.getppid()
    try:
        status = Path(f"/proc/{parent}/status").read_text()
    except OSError:
        return
    caught = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")), 0)
    if caught >> (number - 1) & 1:
        os.kill(parent, number)
