"""The interpreter's switch interval, which is one for the whole process, shared by whoever asks for short turns."""

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
    """Set the interval that holds while nobody asks for short turns, seconds."""
    global _usual_s
    with _lock:
        _usual_s = seconds
        sys.setswitchinterval(seconds / SHORTER if _asking else seconds)


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Let threads take turns 50 times as often, so that requests are answered while a model loads in another thread.

    A request changes threads several times, and would wait for the usual interval each time. Loading at a lower
    priority of the system instead makes it worse: a thread that holds the interpreter must not be made to wait.

    Those who ask may overlap, in coroutines and in threads: the interval is shortened for the first of them, and the
    last one to end gives back what it was before the first, or what `set_usual_turns` was told meanwhile.
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
