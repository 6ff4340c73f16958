"""Every setting of the service: one environment variable each, `FRAUD_` before the name in capitals.

Values are read once at start and passed down; nothing else reads the environment. A secret may also be
given as a file: `FRAUD_<NAME>_FILE` holds its path.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fraud.errors import SettingsError


class Settings(BaseSettings):
    """What an operator may set; each field says its meaning and unit."""

    model_config = SettingsConfigDict(env_prefix="FRAUD_", extra="ignore", frozen=True)

    model: str = Field(
        "fraud-transaction",
        description="Models to serve, comma-separated, the first being the default: a name follows the "
        "production alias of the local registry, name:version pins a version of the Bento store.",
    )
    state_dir: Path = Field(Path(".fraud"), description="Folder for what the service keeps: history and decisions.")
    bentoml_home: Path = Field(
        Path.home() / "bentoml",
        validation_alias="BENTOML_HOME",
        description="BentoML's own folder: its store of models, and the registry of their versions.",
    )
    max_clock_ahead_s: float = Field(
        300.0, gt=0, description="How far an event time may lie ahead of the server's clock, seconds."
    )
    max_body_bytes: int = Field(4_194_304, gt=0, description="Largest body of a request, bytes; beyond it 413.")
    body_timeout_s: float = Field(
        10.0, gt=0, description="Seconds from the headers of a request to the end of its body; beyond it 408."
    )
    max_batch_rows: int = Field(256, gt=0, description="Rows of small requests that are scored in one call.")
    bulk_rows: int = Field(
        64, gt=0, description="A request of more rows than this is scored beside the small ones, by itself."
    )
    max_queued_rows: int = Field(
        4096, ge=1000, description="Rows that may wait to be scored, small requests and large ones each; then 503."
    )

    model_poll_s: float = Field(
        1.0,
        ge=0.05,
        description="How often each worker looks for another version of its models, seconds, give or take 20%.",
    )
    shadow: bool = Field(
        False, description="Whether the registry's challenger also scores what the champion answers, and is recorded."
    )
    canary_share: float = Field(
        0.0, ge=0, le=1, description="Share of the customers whom the registry's challenger answers, 0 to 1."
    )

    @classmethod
    def read(cls) -> Settings:
        """Return the settings of this environment.

        Raises
        ------
        SettingsError
            Names each variable, what arrived and what is allowed.
        """
        try:
            return cls()
        except ValidationError as error:
            said = [f"FRAUD_{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg']}" for e in error.errors()]
            raise SettingsError("; ".join(said)) from None
