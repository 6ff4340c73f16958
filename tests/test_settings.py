"""Settings: read in one place, in groups, each with its variable, its file and its refusal."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fraud.errors import SettingsError
from fraud.settings import Settings, StoreSettings, group_types, variables
from tests.test_imports import all_modules

MAY_READ = {"fraud.environment", "wandb_sync.settings"}
MAY_SET = {"fraud"}
"""Its `__init__` tells OpenMP and BentoML what they read when they are loaded."""


def touched(path: Path) -> set[str]:
    """Return what a file does with the environment: the names of `os` that reach it, where they stand."""
    return {
        f"{node.attr}, line {node.lineno}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "putenv")
        if isinstance(node.value, ast.Name) and node.value.id == "os"
    }


def test_only_settings_read_the_environment() -> None:
    modules = {**all_modules(), "service": Path(__file__).parent.parent / "service.py"}
    assert {name: touched(path) for name, path in modules.items() if touched(path)}.keys() == MAY_READ | MAY_SET


def test_every_variable_has_one_setting() -> None:
    assert len(variables()) == sum(len(group.model_fields) for group in group_types().values())
    assert all(variable.startswith("FRAUD_") for variable in variables().keys() - OF_OTHERS)


OF_OTHERS = {"BENTOML_HOME", "BENTOML_PORT", "PROMETHEUS_MULTIPROC_DIR"}


def test_names_of_fields_are_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_URL", "redis://elsewhere")
    monkeypatch.setenv("FRAUD_STORE", "sqlite:other.db")
    assert Settings.read().store.url == "sqlite:other.db"


def test_what_is_wrong_in_any_group_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"FRAUD_WORKERS": "many", "FRAUD_STORE_QUEUE": "0", "FRAUD_LOG_FORMAT": "xml"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as refusal:
        Settings.read()
    said = str(refusal.value).split("; ")
    assert said[0] == "FRAUD_WORKERS='many': Input should be a valid integer, unable to parse string as an integer"
    assert said[1] == "FRAUD_STORE_QUEUE='0': Input should be greater than or equal to 1"
    assert said[2] == "FRAUD_LOG_FORMAT='xml': Input should be 'json' or 'text'"


def test_a_file_gives_any_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("postgresql://user:secret@host/db\n")
    monkeypatch.setenv("FRAUD_STORE_FILE", str(tmp_path / "url"))
    settings = StoreSettings.read()
    assert settings.url == "postgresql://user:secret@host/db"
    assert "secret" not in repr(Settings.read())


@pytest.mark.parametrize("value", ["*", "proxy.internal", "10.0.0.0/40", "10.0.0.1/8", "127.0.0.1; ::1"])
def test_a_trusted_proxy_is_an_address_or_a_network(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_TRUSTED_PROXIES", value)
    with pytest.raises(SettingsError, match="FRAUD_TRUSTED_PROXIES="):
        Settings.read()
    monkeypatch.setenv("FRAUD_TRUSTED_PROXIES", " 10.0.0.0/8, ::1 ,192.0.2.7")
    assert Settings.read().http.trusted_proxies == "10.0.0.0/8, ::1 ,192.0.2.7"
