"""Settings of W&B: server, credentials and time limits. Read once, passed down."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fraud.errors import SettingsError

_OFFLINE_MODES = ("offline", "disabled", "dryrun")
_ANOTHER_RUN = (
    "WANDB_RUN_ID",
    "WANDB_RESUME",
    "WANDB_RUN_GROUP",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_JOB_TYPE",
    "WANDB_NAME",
    "WANDB_LAUNCH",
    "WANDB_LAUNCH_CONFIG_PATH",
    "WANDB_CONFIG",
    "WANDB_CONFIG_PATHS",
)
"""What a sweep's agent or a job sets for a run of its own. The runs of this project have their own ids, under which
they are asked for again, so these are not passed on."""


class Variables(BaseSettings):
    """The environment variables that W&B and this package read, unparsed; no others are read."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    api_key: str | None = Field(None, validation_alias="WANDB_API_KEY", repr=False)
    mode: str | None = Field(None, validation_alias="WANDB_MODE")
    base_url: str | None = Field(None, validation_alias="WANDB_BASE_URL")
    project: str | None = Field(None, validation_alias="WANDB_PROJECT")
    entity: str | None = Field(None, validation_alias="WANDB_ENTITY")
    config_dir: Path | None = Field(None, validation_alias="WANDB_CONFIG_DIR")
    dir: Path = Field(Path("."), validation_alias="WANDB_DIR")
    bentoml_home: Path | None = Field(None, validation_alias="BENTOML_HOME")
    home: Path = Field(Path("~"), validation_alias="HOME")
    netrc: Path | None = Field(None, validation_alias="NETRC")
    look_up_timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False, validation_alias="FRAUD_WANDB_LOOK_UP_TIMEOUT_S")
    transfer_timeout_s: float = Field(
        180.0, gt=0, allow_inf_nan=False, validation_alias="FRAUD_WANDB_TRANSFER_TIMEOUT_S"
    )
    retries: float = Field(3, gt=0, allow_inf_nan=False, validation_alias="FRAUD_WANDB_RETRIES")
    retry_wait_s: float = Field(5, gt=0, allow_inf_nan=False, validation_alias="FRAUD_WANDB_RETRY_WAIT_S")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read only what `of` is given, not this process's environment."""
        return (init_settings,)

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Variables:
        """Return the variables of an environment; an empty one counts as unset.

        Raises
        ------
        SettingsError
            A limit is not a number above zero.
        """
        names = [str(setting.validation_alias) for setting in cls.model_fields.values()]
        given: dict[str, Any] = {name: environ[name] for name in names if environ.get(name)}
        try:
            return cls(**given)
        except ValidationError as error:
            wrong = [f"{e['loc'][0]}={e['input']!r}: allowed is a number above 0" for e in error.errors()]
            raise SettingsError("; ".join(wrong)) from None

    @property
    def user(self) -> Path:
        """The user's home folder."""
        return self.home.expanduser()


@dataclass(frozen=True)
class WandbSettings:
    """Settings of everything in wandb_sync.

    Attributes
    ----------
    home : Path
        Folder beside the Bento store for the registry, the outbox and staging: ``$BENTOML_HOME/fraud``.
    entity : str or None
        Team or user that owns the project; None is the key's default entity.
    look_up_timeout_s, transfer_timeout_s : float
        After this long a look-up (an upload or download) is ended and counts as failed.
    max_file_bytes : int
        A larger file in an artifact is refused before and during its download.
    """

    home: Path
    online: bool
    offline_because: str = ""
    """Why W&B is not asked, with the next step; empty where it is."""
    project: str = "fraud-bento"
    entity: str | None = None
    base_url: str = "https://api.wandb.ai"
    look_up_timeout_s: float = 30.0
    transfer_timeout_s: float = 180.0
    retries: int = 3
    retry_wait_s: int = 5
    max_file_bytes: int = 512 * 1024 * 1024
    passed_on: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, dotenv: Path = Path(".env")) -> WandbSettings:
        """Read WANDB_* and FRAUD_WANDB_* from `dotenv` and from the environment, which wins.

        Without a key, or with WANDB_MODE=offline, `online` is False.
        """
        file = {name: value for name, value in dotenv_values(dotenv).items() if value is not None}
        return cls.of({name: file[name] for name in file if "WANDB_" in name} | dict(os.environ))

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> WandbSettings:
        """Settings from these variables, the files of `wandb login` and `wandb init` behind them."""
        given = Variables.of(environ)
        saved = _saved(given)
        base_url = (given.base_url or saved.get("base_url") or cls.base_url).rstrip("/")
        mode = given.mode or saved.get("mode") or "online"
        key, doubt = given.api_key, ""
        if key is None:
            key, doubt = _key_in_netrc(given, base_url)
        because = f"WANDB_MODE={mode}" if mode in _OFFLINE_MODES else "" if key else doubt
        return cls(
            home=(given.bentoml_home or given.user / "bentoml") / "fraud",
            online=not because,
            offline_because=because,
            project=given.project or saved.get("project") or cls.project,
            entity=given.entity or saved.get("entity") or None,
            base_url=base_url,
            look_up_timeout_s=given.look_up_timeout_s,
            transfer_timeout_s=given.transfer_timeout_s,
            retries=int(given.retries),
            retry_wait_s=int(given.retry_wait_s),
            passed_on=dict(environ) | ({"WANDB_API_KEY": key} if key else {}),
        )

    @property
    def bentoml_home(self) -> Path:
        return self.home.parent

    def environment(self, root: Path) -> dict[str, str]:
        """Environment of a process that uses the SDK: everything it writes under `root`, every wait bounded.

        The SDK reads these at import. Its own limits are 20 tries of up to 60 s each.
        """
        bounds = {}
        for service in ("GRAPHQL", "FILE_TRANSFER", "FILE_STREAM"):
            bounds[f"WANDB_X_{service}_RETRY_MAX"] = str(self.retries)
            bounds[f"WANDB_X_{service}_RETRY_WAIT_MAX_SECONDS"] = str(self.retry_wait_s)
            bounds[f"WANDB_X_{service}_TIMEOUT_SECONDS"] = str(int(self.look_up_timeout_s))
        places = {"DIR": "wandb", "CACHE_DIR": "cache", "DATA_DIR": "data", "CONFIG_DIR": "config"}
        places["ARTIFACT_DIR"] = "artifacts"
        not_passed = ("WANDB_MODE", *_ANOTHER_RUN)
        environment = {name: value for name, value in self.passed_on.items() if name not in not_passed}
        environment |= {f"WANDB_{name}": str(root / folder) for name, folder in places.items()}
        environment |= {
            **bounds,
            "WANDB_BASE_URL": self.base_url,
            "WANDB_PROJECT": self.project,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
            "WANDB_DISABLE_GIT": "true",
            "WANDB_DISABLE_CODE": "true",
            "WANDB_INIT_TIMEOUT": str(int(self.look_up_timeout_s)),
            "WANDB_HTTP_TIMEOUT": "10",
            "WANDB_FINISH_TIMEOUT": str(int(self.transfer_timeout_s)),
            "WANDB_FINISH_TIMEOUT_RAISES": "true",
        }
        if self.entity is not None:
            environment["WANDB_ENTITY"] = self.entity
        return environment


class SdkSettings(BaseSettings):
    """The settings that `WandbSettings.environment` passes to the SDK's process."""

    model_config = SettingsConfigDict(env_prefix="WANDB_", extra="ignore", frozen=True)

    project: str
    entity: str | None = None
    dir: Path
    finish_timeout: int


def _saved(given: Variables) -> dict[str, str]:
    """The settings saved by `wandb login --host` and `wandb init`: the user's, overridden by the working folder's.

    A file that cannot be read counts as empty, as it does for W&B's own commands.
    """
    user = given.config_dir or given.user / ".config" / "wandb"
    folder = given.dir
    found: dict[str, str] = {}
    for path in (user / "settings", folder / "wandb" / "settings", folder / ".wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
            found |= dict(parser["default"]) if parser.has_section("default") else {}
        except (OSError, UnicodeDecodeError, configparser.Error):
            continue
    return found


def _key_in_netrc(given: Variables, base_url: str) -> tuple[str | None, str]:
    """The key that `wandb login` left in the user's netrc file, or None and why there is none."""
    path = given.netrc or given.user / ".netrc"
    address = urlsplit(base_url)
    try:
        hosts = netrc.netrc(str(path)).hosts
    except FileNotFoundError:
        hosts = {}
    except netrc.NetrcParseError as error:
        return None, f"{path} cannot be read: {error.msg} in line {error.lineno}; mend it, or set WANDB_API_KEY"
    except (OSError, UnicodeDecodeError) as error:
        return None, f"{path} cannot be read: {error}; mend it, or set WANDB_API_KEY"
    for host in (address.netloc, address.hostname or ""):
        if host in hosts and hosts[host][2]:
            return hosts[host][2], ""
    return None, f"no WANDB_API_KEY, and no key of {address.netloc} in {path}"
