"""What a benchmark ran on: figures say nothing without it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

VECTOR_FLAGS = ("avx512f", "avx2", "fma", "asimd")


def describe_hardware(libraries: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return processor, cores, memory, load, system, Python and the versions of `libraries`."""
    cpu_info = _cpu_info()
    return {
        "processor": cpu_info.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector_instructions": [flag for flag in VECTOR_FLAGS if flag in _flags(cpu_info)],
        "cache": cpu_info.get("cache size", ""),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }


def _cpu_info() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo, empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.split("\n"))}


def _flags(cpu_info: dict[str, str]) -> set[str]:
    return set((cpu_info.get("flags") or cpu_info.get("Features", "")).split())
