"""docs/wandb.md names every setting and every command of its subject."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fraud.cli.registry import app
from fraud.errors import SettingsError
from wandb_sync.settings import Variables, WandbSettings

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "wandb.md").read_text()


def test_every_setting_is_documented_with_its_default() -> None:
    read = {str(setting.validation_alias) for setting in Variables.model_fields.values()} - {"HOME", "NETRC"}
    assert len(read) >= 9
    for name in read:
        assert f"| `{name}` |" in DOCS, name
    rows = dict(re.findall(r"^\| `(FRAUD_WANDB_\w+)` \|.*\| (\S+) \|$", DOCS, re.M))
    defaults = WandbSettings(Path("home"), online=False)
    assert {name: float(text) for name, text in rows.items()} == {
        "FRAUD_WANDB_LOOK_UP_TIMEOUT_S": defaults.look_up_timeout_s,
        "FRAUD_WANDB_TRANSFER_TIMEOUT_S": defaults.transfer_timeout_s,
        "FRAUD_WANDB_RETRIES": defaults.retries,
        "FRAUD_WANDB_RETRY_WAIT_S": defaults.retry_wait_s,
    }


def test_every_command_is_documented() -> None:
    for command in app.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        assert f"fraud {name}" in DOCS, name


def test_settings_come_from_the_environment_then_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("WANDB_API_KEY=k\nWANDB_ENTITY=from-file\nWANDB_PROJECT=from-file\nBENTOML_HOME=/elsewhere\n")
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("WANDB_ENTITY", "from-environment")
    settings = WandbSettings.read(dotenv)
    assert (settings.online, settings.entity, settings.project) == (True, "from-environment", "from-file")
    assert settings.home == tmp_path / "bentoml" / "fraud"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not WandbSettings.read(dotenv).online


def test_the_key_of_wandb_login_counts(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password kkk\n")
    assert WandbSettings.of({"HOME": str(tmp_path)}).online
    assert not WandbSettings.of({"HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"}).online


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_limit_that_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=rf"FRAUD_WANDB_RETRIES='{text}': allowed is a number above 0"):
        WandbSettings.of({"FRAUD_WANDB_RETRIES": text})
