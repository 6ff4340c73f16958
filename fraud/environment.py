"""Reads groups of settings from the environment, and passes it on; only this and `wandb_sync.settings` touch it.

A secret may also be given as a file: `FRAUD_<NAME>_FILE` holds its path. Names of earlier systems count where the
product's own is not set (`fraud.old_variables`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from fraud.errors import SettingsError
from fraud.old_variables import REFUSED, readings

_used: dict[str, str] = {}


class Group(BaseSettings):
    """Settings of one part; each field says its meaning and unit."""

    model_config = SettingsConfigDict(env_prefix="FRAUD_", extra="ignore", frozen=True)

    @classmethod
    def read(cls) -> Self:
        """Return the group as this environment has it.

        Raises
        ------
        SettingsError
            Names each variable, what arrived and what is allowed.
        """
        old = {reading.own: reading for reading in readings(os.environ) if reading.is_used}
        given: dict[str, Any] = {}
        for name, setting in cls.model_fields.items():
            if reading := old.get(variable_of(name, setting)):
                given[_given_as(cls, name)] = reading.value(os.environ)
                _used[reading.own] = reading.remark
        try:
            return cls(**given, **_from_files(cls))
        except ValidationError as error:
            said = [_said(cls, dict(e), {own: reading.name for own, reading in old.items()}) for e in error.errors()]
            raise SettingsError("; ".join(said)) from None


def variable_of(name: str, setting: FieldInfo) -> str:
    """Return the environment variable of a setting."""
    return str(setting.validation_alias or f"FRAUD_{name.upper()}")


def remarks() -> list[str]:
    """Return what was read from a name of an earlier system, and what was not, one sentence each."""
    return [reading.remark for reading in readings(os.environ)]


def used() -> dict[str, str]:
    """Return what this process has read from names of earlier systems: the remark by the product's own variable."""
    return _used


def expect_none_refused() -> None:
    """Raise `SettingsError` if a variable of an earlier system is set that cannot be honoured."""
    found = [f"{name}={os.environ[name]!r}: {advice}" for name, advice in REFUSED.items() if os.environ.get(name)]
    if found:
        raise SettingsError("; ".join(found))


def hand_down(variable: str, value: str) -> None:
    """Set a variable for the processes that are started from this one."""
    os.environ[variable] = value


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with some variables changed, for a process that it starts."""
    return {**os.environ, **changes}


def with_sources(folder: Path) -> dict[str, str]:
    """Return this process's environment for one that imports the modules in a folder before all others."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return child_environment({"PYTHONPATH": path})


def _given_as(group: type[Group], name: str) -> str:
    return str(group.model_fields[name].validation_alias or name)


def _said(group: type[Group], error: dict[str, Any], old: Mapping[str, str]) -> str:
    name = str(error["loc"][0])
    by_variable = {variable_of(name, setting): setting for name, setting in group.model_fields.items()}
    variable = name if name in by_variable else f"FRAUD_{name.upper()}"
    setting = by_variable.get(variable)
    is_secret = setting is not None and (setting.annotation is SecretStr or not setting.repr)
    arrived = "" if is_secret else f"={error['input']!r}"
    return f"{old.get(variable, variable)}{arrived}: {error['msg']}"


def _from_files(group: type[Group]) -> dict[str, Any]:
    values = {}
    for name, setting in group.model_fields.items():
        variable = f"{variable_of(name, setting)}_FILE"
        path = os.environ.get(variable) if variable.startswith("FRAUD_") else None
        if path:
            try:
                values[_given_as(group, name)] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{variable}={path!r} cannot be read: {error}") from None
    return values
