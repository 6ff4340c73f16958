"""The interpreter's switch interval: one value per process, shared by all users of short turns."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

SHORTER = 50
"""How many times as often threads take turns while someone asks for it."""

_lock = threading.Lock()
_asking = 0
_usual_s = 0.0


def set_usual_turns(seconds: float) -> None:
    """Set the interval used outside of short turns, seconds."""
    global _usual_s
    with _lock:
        _usual_s = seconds
        sys.setswitchinterval(seconds / SHORTER if _asking else seconds)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Let threads take turns 50 times as often, so that requests are answered while a model loads in another thread.

    A request changes threads several times, and would wait for the usual interval each time. A lower operating system
    priority for the loading thread makes it worse, because that thread then waits while it holds the interpreter lock.
    Uses may overlap, in coroutines and in threads: the first shortens the interval, and the last one restores it, or
    the value set by `set_usual_turns` meanwhile.
    """
    global _asking, _usual_s
    with _lock:
        if _asking == 0:
            _usual_s = sys.getswitchinterval()
            sys.setswitchinterval(_usual_s / SHORTER)
        _asking += 1
    try:
        yield
    finally:
        with _lock:
            _asking -= 1
            if _asking == 0:
                sys.setswitchinterval(_usual_s)
