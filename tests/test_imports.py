"""Who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("fraud", "serving", "training", "wandb_sync", "load_tests", "cli")

ALLOWED = {
    "fraud": {"fraud"},
    "serving": {"fraud", "serving"},
    "training": {"fraud", "training"},
    "wandb_sync": {"fraud", "wandb_sync"},
    "load_tests": {"load_tests"},
    "cli": set(PACKAGES),
}
FORBIDDEN_LIBRARIES = {
    "fraud": {"bentoml", "wandb", "pandas", "sklearn", "shap", "matplotlib", "optuna", "locust"},
    "serving": {"wandb", "pandas", "sklearn", "shap", "matplotlib", "optuna", "locust"},
    "training": {"bentoml", "wandb", "locust"},
    "wandb_sync": {"pandas", "sklearn", "shap", "matplotlib", "optuna", "locust"},
    "load_tests": {"bentoml", "wandb", "pandas", "sklearn", "lightgbm", "shap", "optuna"},
    "cli": set(),
}
LAYERS = (
    {"errors"},
    {"settings", "decision", "schema", "chain", "booster", "booster_text", "lanes"},
    {"history", "treeshap_kernels"},
    {"featurize", "treeshap"},
    {"features", "model"},
    {"bundle", "explain", "events"},
    {"scorer", "profile"},
)
"""The core from left to right; a module imports only from layers before its own, or beside it in its package."""


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_lies_left_of_it(package: str) -> None:
    for path in modules(package):
        for name in imported(path):
            top = name.partition(".")[0]
            if top == "load_tests" and package == "load_tests":
                continue
            if package == "load_tests" and top == "fraud":
                assert name.split(".")[1] in {"schema", "errors"}, f"{path} imports {name}"
                continue
            assert top not in PACKAGES or top in ALLOWED[package], f"{path} imports {name}"
            assert top not in FORBIDDEN_LIBRARIES[package], f"{path} imports {name}"
            assert top not in {"service", "tests", "bench"}, f"{path} imports {name}"


def test_the_core_imports_from_left_to_right() -> None:
    place = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in modules("fraud"):
        inside = path.relative_to(ROOT / "fraud").parts
        if inside[0] in {"stores", "__init__.py", "registry.py", "registry_rows.py"}:
            continue
        own = path.stem
        assert own in place, f"{path} has no layer; give it one in LAYERS"
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fraud" and len(parts) > 1 and parts[1] in place and parts[1] != own:
                assert place[parts[1]] < place[own], f"fraud.{own} imports fraud.{parts[1]}"


def test_nothing_imports_the_commands() -> None:
    for package in PACKAGES[:-1]:
        for path in modules(package):
            assert not any(name.partition(".")[0] == "cli" for name in imported(path)), path


def test_nothing_unpickles() -> None:
    for package in PACKAGES:
        for path in modules(package):
            loads = {"pickle", "cloudpickle", "joblib", "dill", "marshal"} & {
                n.partition(".")[0] for n in imported(path)
            }
            assert not loads, f"{path} imports {loads}"
