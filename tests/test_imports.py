"""Who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fraud", "training", "wandb_sync", "load_tests")

CORE = (
    "compiling",
    "errors",
    "forms",
    "refusals",
    "currencies",
    "columns",
    "schema",
    "old_variables",
    "environment",
    "case_settings",
    "stream_settings",
    "telemetry_settings",
    "settings",
    "history",
    "features",
    "detectors",
    "decisions",
    "cases",
)
MAY_IMPORT: dict[str, set[str]] = {
    "compiling": set(),
    "errors": set(),
    "forms": {"errors", "refusals"},
    "refusals": {"errors"},
    "currencies": set(),
    "columns": {"errors", "forms", "refusals"},
    "schema": {"errors", "forms", "refusals", "currencies", "columns"},
    "old_variables": {"errors"},
    "environment": {"errors", "old_variables"},
    "case_settings": {"environment"},
    "stream_settings": {"environment"},
    "telemetry_settings": {"environment"},
    "settings": {"errors", "environment", "case_settings", "stream_settings", "telemetry_settings"},
    "history": {"compiling", "errors", "schema"},
    "features": {"compiling", "errors", "schema", "history"},
    "detectors": {"compiling", "errors", "currencies", "schema", "features", "decisions"},
    "decisions": {"errors", "refusals", "schema", "history"},
    "cases": {"errors", "decisions"},
    "stores": {"compiling", "errors", "schema", "settings", "history", "features", "decisions", "cases"},
    "models": {
        "errors",
        "currencies",
        "columns",
        "forms",
        "schema",
        "environment",
        "settings",
        "features",
        "detectors",
        "decisions",
    },
    "monitoring": {"compiling", "errors", "schema", "decisions", "stores"},
    "pipeline": {"errors", "forms", "refusals", "schema", "features", "detectors", "decisions", "stores", "models"},
    "telemetry": {"decisions", "telemetry_settings", "stores", "models", "pipeline"},
    "composition": {"decisions", "settings", "stores", "models", "pipeline", "telemetry"},
    "serving": {*CORE, "stores", "models", "pipeline", "telemetry", "composition"},
    "streams": {*CORE, "stores", "models", "pipeline", "telemetry", "composition"},
    "simulation": {"errors"},
    "training": {*CORE, "stores", "models", "pipeline"},
    "wandb_sync": {"errors", "settings", "models"},
    "load_tests": {"errors", "schema", "simulation"},
    "checks": {
        *CORE,
        "stores",
        "models",
        "pipeline",
        "telemetry",
        "serving",
        "streams",
        "simulation",
        "training",
        "monitoring",
    },
    "cli": {
        *CORE,
        "stores",
        "models",
        "pipeline",
        "telemetry",
        "serving",
        "streams",
        "simulation",
        "training",
        "wandb_sync",
        "checks",
        "monitoring",
    },
}
"""Each room of `fraud` and each package beside it, with the rooms and packages that it may import: no circles."""

HEAVY = {"pandas", "sklearn", "shap", "matplotlib", "optuna", "locust"}
FORBIDDEN_LIBRARIES: dict[str, set[str]] = {
    **{room: HEAVY | {"bentoml", "wandb", "redis", "psycopg", "sqlite3", "asyncio"} for room in CORE},
    "stores": HEAVY | {"bentoml", "wandb"},
    "models": HEAVY | {"wandb"},
    "monitoring": HEAVY | {"bentoml", "wandb", "redis", "psycopg", "sqlite3", "asyncio"},
    "pipeline": HEAVY | {"bentoml", "wandb"},
    "telemetry": HEAVY | {"bentoml", "wandb"},
    "composition": HEAVY | {"bentoml", "wandb"},
    "serving": HEAVY | {"wandb"},
    "streams": HEAVY | {"bentoml", "wandb"},
    "simulation": {"bentoml", "wandb", "sklearn", "shap", "matplotlib", "optuna", "locust"},
    "training": {"bentoml", "wandb", "locust"},
    "wandb_sync": HEAVY,
    "load_tests": {"bentoml", "wandb", "sklearn", "lightgbm", "shap", "optuna"},
    "checks": {"wandb"},
    "cli": set(),
}


LONGEST = 400


def room_of(name: str) -> str:
    """Return the room of a module of the project, by its full name."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fraud" and len(parts) > 1 else parts[0]


def modules(package: str) -> list[Path]:
    """Return the files of a package; what a benchmark keeps in a hidden folder is no part of it."""
    found = (ROOT / package).rglob("*.py")
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def all_modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in modules(package)
    }


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    own = {name: path for name, path in all_modules().items() if room_of(name) == room}
    assert own, f"there is no room {room}"
    for name, path in own.items():
        for other in imported(path):
            top = other.partition(".")[0]
            assert top not in FORBIDDEN_LIBRARIES[room], f"{name} imports {other}"
            assert top not in {"service", "tests", "bench"}, f"{name} imports {other}"
            if top in PACKAGES:
                assert room_of(other) in MAY_IMPORT[room] | {room, "fraud"}, f"{name} imports {other}"


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for package in (*PACKAGES, "bench", "scripts")
        for path in modules(package)
    }
    assert lengths
    too_long = {name: length for name, length in lengths.items() if length > LONGEST}
    assert not too_long, f"split these where a concept ends: {too_long}"


def test_every_module_has_a_room() -> None:
    for name in all_modules():
        assert name == "fraud" or room_of(name) in MAY_IMPORT, f"{name} has no room in MAY_IMPORT"


def test_the_rooms_have_no_circle() -> None:
    left = {room: set(others) for room, others in MAY_IMPORT.items()}
    while free := [room for room, others in left.items() if not others & left.keys()]:
        for room in free:
            del left[room]
    assert not left, f"these rooms import each other: {sorted(left)}"


def test_no_two_modules_import_each_other() -> None:
    """A package's `__init__` counts as a module; imports within functions and for types only count too."""
    names = all_modules()
    left = {
        name: {
            found
            for other in imported(path)
            for found in (other, other.rpartition(".")[0])
            if found in names and found != name
        }
        for name, path in names.items()
    }
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle is among these: {sorted(left)}"


def test_nothing_unpickles() -> None:
    for name, path in all_modules().items():
        loads = {"pickle", "cloudpickle", "joblib", "dill", "marshal"} & {n.partition(".")[0] for n in imported(path)}
        assert not loads, f"{name} imports {loads}"
