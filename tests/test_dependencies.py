"""Every package that the source imports is declared in the dependency group that its room is installed with."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GROUP_OF = {
    "service.py": "serve",
    "fraud": "serve",
    "fraud/checks": "train",
    "fraud/simulation": "train",
    "training": "train",
    "fraud/cli": "wandb",
    "wandb_sync": "wandb",
    "load_tests": "load",
    "bench": "dev",
    "scripts": "dev",
    "tests": "dev",
}
"""Each part of the source and the group that is installed where it runs; the longest name that fits counts."""
OURS = {"fraud", "service", "training", "wandb_sync", "load_tests", "bench", "scripts", "tests"}


def declared(group: str) -> set[str]:
    """Return the names of the distributions that a group declares, included groups with it."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    found: set[str] = set()
    for entry in groups[group]:
        if isinstance(entry, dict):
            found |= declared(entry["include-group"])
        else:
            found.add(normalized(re.match(r"[A-Za-z0-9._-]+", entry)[0]))  # type: ignore[index]
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imports(path: Path) -> Iterator[str]:
    """Yield the first part of the name of every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def distributions(module: str, providers: Any) -> set[str]:
    """Return the distributions that a module may come from; of a shared namespace the one with its longest name."""
    found = {normalized(name) for name in providers.get(module.partition(".")[0], ())}
    if len(found) > 1:  # opentelemetry.sdk is of opentelemetry-sdk
        words = normalized(module.replace("_", "."))
        fitting = {name for name in found if words.startswith(name) or name.startswith(words)}
        found = fitting or found
    return found


def sources() -> list[Path]:
    files = [path for part in OURS for path in (ROOT / part).rglob("*.py")]
    return sorted([*files, ROOT / "service.py"])


@pytest.mark.parametrize("part", sorted(GROUP_OF))
def test_what_is_imported_is_declared(part: str) -> None:
    providers = importlib.metadata.packages_distributions()
    allowed = declared(GROUP_OF[part])
    missing: dict[str, str] = {}
    for path in sources():
        where = path.relative_to(ROOT).as_posix()
        fitting = [name for name in GROUP_OF if where == name or where.startswith(f"{name}/")]
        if not fitting or max(fitting, key=len) != part or "peers" in where:
            continue
        for module in imports(path):
            first = module.partition(".")[0]
            if first in sys.stdlib_module_names or first in OURS:
                continue
            found = distributions(module, providers)
            if found and not found & allowed:
                missing[module] = f"{where}, of {', '.join(sorted(found))}; undeclared in {GROUP_OF[part]}"
    assert missing == {}


def test_the_parts_cover_the_source() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} <= {name.partition("/")[0] for name in GROUP_OF}


def test_a_module_of_a_shared_namespace_is_told_apart() -> None:
    providers = {"opentelemetry": ["opentelemetry-api", "opentelemetry-sdk", "opentelemetry-semantic-conventions"]}
    assert distributions("opentelemetry.sdk.trace", providers) == {"opentelemetry-sdk"}
    assert "opentelemetry-api" in distributions("opentelemetry.trace", providers)


@pytest.mark.parametrize("package", ["bentoml", "uvicorn", "wandb"])
def test_what_is_reached_into_is_pinned(package: str) -> None:
    """An upgrade of these may move a private part that is used: it is made on purpose, with the tests at hand."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    entries = {entry for group in groups.values() for entry in group if isinstance(entry, str)}
    pins = [entry for entry in entries if re.match(rf"{package}[^a-z0-9-]", entry)]
    assert pins
    assert all("==" in pin for pin in pins)
