"""The libraries that decide a score: their versions in training, and here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("lightgbm", "numpy", "scikit-learn", "numba", "llvmlite", "scipy")
"""Training records the version of each in the bundle's manifest. A service lacks those that only training uses."""


def installed_libraries() -> dict[str, str]:
    """Return the version of each of `LIBRARIES` that is installed."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def differing(trained: Mapping[str, str]) -> str:
    """Return which installed libraries have another version than in training, in words; empty if none has."""
    installed = installed_libraries()
    others = [name for name in LIBRARIES if name in installed and trained.get(name, installed[name]) != installed[name]]
    return ", ".join(f"{name} {trained[name]} in training, {installed[name]} here" for name in others)
