"""The process that derives cases and writes the labels of resolutions, beside the workers of a service.

The parent of the workers starts it, and starts it again if it ends. It ends when its parent does, whatever ended that.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import fraud
from fraud.environment import with_sources
from fraud.settings import Settings
from fraud.stores.cases import keeps_cases
from fraud.stores.opening import StoreOptions

logger = logging.getLogger("fraud.serving.cases")

RESTART_S = 2.0
END_S = 5.0


def run_beside(settings: Settings) -> None:
    """Start the process, if the store keeps cases and the setting asks for it; for the parent of the workers."""
    if settings.cases.work and keeps_cases(settings.store.url, StoreOptions.of(settings)):
        beside = _Beside()
        atexit.register(beside.end)
        threading.Thread(target=beside.keep, name="cases", daemon=True).start()


class _Beside:
    def __init__(self) -> None:
        self._over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """Run the process until the end, again after each failure."""
        while not self._over.is_set():
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(os.getpid())],
                env=with_sources(Path(fraud.__file__).parent.parent),
                stdin=subprocess.DEVNULL,
            )
            status = self._process.wait()
            if not self._over.wait(RESTART_S):
                logger.warning("the process of cases ended with status %d and is started again", status)

    def end(self) -> None:
        self._over.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()


def main() -> None:
    """Work on cases until the process whose id is the argument is no longer the parent."""
    from fraud.stores.case_work import work_for
    from fraud.telemetry.logs import configure_logging

    parent = int(sys.argv[1])
    settings = Settings.read()
    configure_logging(settings.log.level, settings.log.format)
    asyncio.run(work_for(settings, lambda: os.getppid() != parent))


if __name__ == "__main__":
    main()
