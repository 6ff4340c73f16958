"""Environment names of earlier systems: read where the product's own are not set, and said; two are refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fraud.environment import remarks
from fraud.errors import SettingsError, Unauthenticated
from fraud.models.served import Served
from fraud.old_variables import ALTERNATIVES, REFUSED
from fraud.serving.security import AccessControl
from fraud.settings import ModelSettings, Settings, variables
from tests.test_registry import NAME, digest, register
from tests.test_registry import registry as registry  # the fixture

POSTGRESQL = "postgresql://user:secret@host/db"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALTERNATIVES, *REFUSED, *variables()):
        monkeypatch.delenv(name, raising=False)


def read(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings.read()


def value_of(settings: Settings, path: str) -> Any:
    group, _, name = path.partition(".")
    value = getattr(getattr(settings, group), name)
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def hashed(*keys: str) -> str:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return ",".join(f"{digest[:8]}:{digest}:admin" for digest in digests)


@pytest.mark.parametrize(
    ("name", "value", "path", "read_as"),
    [
        ("WORKERS", "4", "process.workers", 4),
        ("PORT", " 8000", "process.port", 8000),
        ("LOG_LEVEL", "debug", "log.level", "DEBUG"),
        ("LOG_LEVEL", "Warn", "log.level", "WARNING"),
        ("LOG_LEVEL", "CRITICAL", "log.level", "ERROR"),
        ("API_KEYS", "one, two,one,", "access.api_keys", hashed("one", "two")),
        ("API_KEYS", '["one", "two"]', "access.api_keys", hashed("one", "two")),
        ("CORS_ORIGINS", "https://a.test, https://b.test", "http.cors_origins", "https://a.test, https://b.test"),
        ("CORS_ORIGINS", '["https://a.test", "https://b.test"]', "http.cors_origins", "https://a.test,https://b.test"),
        ("ALLOWED_ORIGINS", "*", "http.cors_origins", "*"),
        ("REDIS_URL", "redis://:secret@host:6379/0", "store.url", "redis://:secret@host:6379/0"),
        ("DATABASE_URL", POSTGRESQL, "store.url", POSTGRESQL),
        ("DATABASE_URL", "postgres://user:secret@host/db", "store.url", POSTGRESQL),
        ("DATABASE_URL", "postgresql+asyncpg://user:secret@host/db", "store.url", POSTGRESQL),
        ("DATABASE_URL", "sqlite:///data/fraud.db", "store.url", "sqlite:data/fraud.db"),
        ("DATABASE_URL", "sqlite+aiosqlite:////srv/fraud.db", "store.url", "sqlite:/srv/fraud.db"),
        ("MODEL_VERSION", "v3", "models.version", "v3"),
        ("MODEL_VERSION", "3", "models.version", "v3"),
        ("MODEL_VERSION", "0123456789abcdef", "models.version", "0123456789abcdef"),
        ("MODEL_VERSION", "latest", "models.version", ""),
        ("MODEL_VERSION", "Staging", "models.alias_order", ("staging",)),
    ],
)
def test_each_is_read_as_the_products_own(
    name: str, value: str, path: str, read_as: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert value_of(read(monkeypatch, **{name: value}), path) == read_as
    (remark,) = remarks()
    assert remark.startswith(f"{name} is read as ")
    assert "secret" not in remark


@pytest.mark.parametrize(
    ("name", "value", "own", "own_value", "path"),
    [
        ("WORKERS", "4", "FRAUD_WORKERS", "2", "process.workers"),
        ("PORT", "8000", "BENTOML_PORT", "8001", "process.port"),
        ("LOG_LEVEL", "debug", "FRAUD_LOG_LEVEL", "ERROR", "log.level"),
        ("API_KEYS", "one", "FRAUD_API_KEYS", "", "access.api_keys"),
        ("ALLOWED_ORIGINS", "*", "FRAUD_CORS_ORIGINS", "https://a.test", "http.cors_origins"),
        ("ALLOWED_ORIGINS", "*", "CORS_ORIGINS", "https://a.test", "http.cors_origins"),
        ("REDIS_URL", "redis://a", "FRAUD_STORE", "sqlite:", "store.url"),
        ("DATABASE_URL", "mysql://a", "FRAUD_STORE", "sqlite:", "store.url"),
        ("MODEL_VERSION", "v3", "FRAUD_MODEL_VERSION", "v4", "models.version"),
        ("MODEL_VERSION", "v3", "FRAUD_MODEL", "a:0123456789abcdef", "models.names"),
        ("MODEL_VERSION", "staging", "FRAUD_MODEL_ALIASES", "champion", "models.aliases"),
    ],
)
def test_the_products_own_comes_first_and_this_is_said(
    name: str, value: str, own: str, own_value: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = read(monkeypatch, **{name: value, own: own_value})
    assert str(value_of(settings, path)) == own_value
    assert f"{name} is not used: {own} is set, and comes first" in remarks()


def test_a_file_of_the_products_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text(hashed("one"))
    settings = read(monkeypatch, API_KEYS="two", FRAUD_API_KEYS_FILE=str(tmp_path / "keys"))
    assert settings.access.api_keys.get_secret_value() == hashed("one")
    assert remarks() == ["API_KEYS is not used: FRAUD_API_KEYS_FILE is set, and comes first"]


def test_a_database_stands_behind_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, DATABASE_URL=POSTGRESQL, REDIS_URL="redis://host")
    assert (settings.store.url, settings.store.cold_url) == ("redis://host", POSTGRESQL)
    assert remarks() == ["REDIS_URL is read as FRAUD_STORE", "DATABASE_URL is read as FRAUD_COLD_STORE"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("WORKERS", "many", "WORKERS='many': Input should be a valid integer"),
        ("PORT", "99999", "PORT='99999': Input should be less than or equal to 65535"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL='LOUD': Input should be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("CORS_ORIGINS", "[https://a]", r"CORS_ORIGINS begins with \[ and is no JSON list of texts"),
        ("API_KEYS", "one two", "^API_KEYS: a key holds a space or another character than printable ASCII$"),
        (
            "DATABASE_URL",
            "mysql://u:secret@h/d",
            "^DATABASE_URL is mysql://…; allowed are postgresql://user@host/db and",
        ),
        ("DATABASE_URL", "sqlite://", "^DATABASE_URL is sqlite://…; allowed are"),
        ("DATABASE_URL", "secret", "^DATABASE_URL is a text without ://; allowed are"),
        ("MODEL_VERSION", "1.0.0", "MODEL_VERSION='1.0.0': Value error, '1.0.0' cannot be the alias of what is served"),
        (
            "MODEL_PATH",
            "/models/m.pkl",
            "^MODEL_PATH='/models/m.pkl': a pickled model is never loaded, .* `fraud train`",
        ),
        ("S3_BUCKET", "models", "^S3_BUCKET='models': models come from the Bento store of this machine or from W&B"),
    ],
)
def test_what_cannot_be_read_is_told_under_the_name_that_was_set(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=said) as refusal:
        read(monkeypatch, **{name: value})
    assert "secret" not in str(refusal.value)
    assert "one two" not in str(refusal.value)


def test_empty_ones_count_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **dict.fromkeys([*ALTERNATIVES, *REFUSED], "")) == Settings.read()
    assert remarks() == []


def test_a_plain_key_is_one_of_the_scope_admin(monkeypatch: pytest.MonkeyPatch) -> None:
    control = AccessControl.of(read(monkeypatch, API_KEYS="s3cret-of-operations,fk_01234567_" + "x" * 43))
    key = control.identify(b"s3cret-of-operations")
    assert key.scopes == {"admin"}
    assert "s3cret" not in repr(key)
    with pytest.raises(Unauthenticated, match="not known here"):
        control.identify(b"s3cret-of-operation")
    with pytest.raises(Unauthenticated, match="not known here"):
        control.identify(key.sha256.encode())


def test_a_version_pins_the_first_model(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    home = registry.path.parent.parent
    for n in (0xA1 << 248, 0xB2 << 248):
        register(registry, n)
    registry.move(NAME, "v1", "production", who="ann", why="")
    tag = f"{NAME}:{digest(0xA1 << 248)[7:23]}"
    for reference in ("v0", "0", digest(0xA1 << 248), digest(0xA1 << 248)[7:20]):
        monkeypatch.setenv("MODEL_VERSION", reference)
        served = Served(ModelSettings(BENTOML_HOME=home, **_version_of(ModelSettings.read())))
        assert served.champions() == {NAME: tag}
        assert served.followed() == []


def _version_of(settings: ModelSettings) -> dict[str, Any]:
    return {"FRAUD_MODEL_VERSION": settings.version}


def test_a_command_says_which_store_it_took_from_an_old_name(tmp_path: Path) -> None:
    environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path}/old.db", "PORT": "3100"}
    command = [str(Path(sys.executable).parent / "fraud"), "history", "profile", "nobody"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "note: DATABASE_URL is read as FRAUD_STORE\n" in run.stderr
    assert "PORT" not in run.stderr
    own = {**environment, "FRAUD_STORE": f"sqlite:{tmp_path}/own.db"}
    run = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert "note:" not in run.stderr
