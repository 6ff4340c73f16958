"""Where W&B is, and how long it may take. Read once, passed down."""

from __future__ import annotations

import configparser
import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic_settings import BaseSettings, SettingsConfigDict

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
        saved = _saved(environ)
        base_url = (environ.get("WANDB_BASE_URL") or saved.get("base_url") or cls.base_url).rstrip("/")
        mode = environ.get("WANDB_MODE") or saved.get("mode") or "online"
        key, doubt = environ.get("WANDB_API_KEY") or None, ""
        if key is None:
            key, doubt = _key_in_netrc(environ, base_url)
        because = f"WANDB_MODE={mode}" if mode in _OFFLINE_MODES else "" if key else doubt
        store = Path(environ.get("BENTOML_HOME") or Path(environ.get("HOME", "~")).expanduser() / "bentoml")
        return cls(
            home=store / "fraud",
            online=not because,
            offline_because=because,
            project=environ.get("WANDB_PROJECT") or saved.get("project") or cls.project,
            entity=environ.get("WANDB_ENTITY") or saved.get("entity") or None,
            base_url=base_url,
            look_up_timeout_s=_seconds(environ, "FRAUD_WANDB_LOOK_UP_TIMEOUT_S", cls.look_up_timeout_s),
            transfer_timeout_s=_seconds(environ, "FRAUD_WANDB_TRANSFER_TIMEOUT_S", cls.transfer_timeout_s),
            retries=int(_seconds(environ, "FRAUD_WANDB_RETRIES", cls.retries)),
            retry_wait_s=int(_seconds(environ, "FRAUD_WANDB_RETRY_WAIT_S", cls.retry_wait_s)),
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
    """What `WandbSettings.environment` told the process that uses the SDK."""

    model_config = SettingsConfigDict(env_prefix="WANDB_", extra="ignore", frozen=True)

    project: str
    entity: str | None = None
    dir: Path
    finish_timeout: int


def _saved(environ: Mapping[str, str]) -> dict[str, str]:
    """What `wandb login --host` and `wandb init` saved: of the user, then of the working folder, which wins.

    A file that cannot be read counts as empty, as it does for W&B's own commands.
    """
    user = Path(environ.get("WANDB_CONFIG_DIR") or Path(environ.get("HOME", "~")).expanduser() / ".config" / "wandb")
    folder = Path(environ.get("WANDB_DIR") or ".")
    found: dict[str, str] = {}
    for path in (user / "settings", folder / "wandb" / "settings", folder / ".wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
            found |= dict(parser["default"]) if parser.has_section("default") else {}
        except (OSError, UnicodeDecodeError, configparser.Error):
            continue
    return found


def _key_in_netrc(environ: Mapping[str, str], base_url: str) -> tuple[str | None, str]:
    """The key that `wandb login` left in the user's netrc file, or None and why there is none."""
    path = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
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


def _seconds(environ: Mapping[str, str], name: str, default: float) -> float:
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise SettingsError(f"{name}={text!r}: allowed is a number above 0")
    return value
