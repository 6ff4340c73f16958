"""Every setting of the service: one environment variable each, `FRAUD_` before the name in capitals.

Values are read once at start and passed down; nothing else reads the environment. A secret may also be
given as a file: `FRAUD_<NAME>_FILE` holds its path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError
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
    workers: int = Field(
        1, ge=1, le=256, description="Processes that answer requests, on one port and one state folder."
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
    header_timeout_s: float = Field(
        10.0, gt=0, description="Seconds from a connection, or a request's first byte, to the end of its headers."
    )
    max_header_bytes: int = Field(32_768, ge=1024, description="Longest headers of a request, bytes; beyond it 431.")
    max_connections: int = Field(
        4096,
        ge=8,
        description="Connections to each worker; beyond it the one longest without complete headers is closed.",
    )
    max_batch_rows: int = Field(1024, gt=0, description="Rows of small requests that are scored in one call.")
    bulk_rows: int = Field(
        64, gt=0, description="A request of more rows than this is scored beside the small ones, by itself."
    )
    max_queued_rows: int = Field(
        4096, ge=1000, description="Rows that may wait to be scored, small requests and large ones each; then 503."
    )
    max_wait_s: float = Field(
        0.06, gt=0, description="Seconds that a small request may have to wait; one that would wait longer gets 503."
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

    record_reasons: bool = Field(
        True, description="Whether each recorded decision carries the contributions of its five strongest features."
    )
    record_unnamed: bool = Field(
        True,
        description="Whether rows of ready features that carry no transaction id are recorded too, under an id that "
        "their answer tells.",
    )
    audit_key: SecretStr = Field(
        SecretStr(""), description="Key of the decision log's hash chain, to be kept apart from the log."
    )
    personal_fields: str = Field(
        "",
        pattern=r"^((customer_id|merchant_id)(,(customer_id|merchant_id))*)?$",
        description="Ids that are stored only as keyed hashes, comma-separated: customer_id, merchant_id.",
    )
    personal_key: SecretStr = Field(
        SecretStr(""), description="Key of those hashes; whoever has it can test a guess of an id."
    )
    api_keys: SecretStr = Field(
        SecretStr(""), description="Hashed API keys as `fraud keys create` prints them, separated by commas or lines."
    )
    require_keys: bool = Field(
        False,
        description="Whether routes of the scopes score and read ask for an API key too; those of other scopes always "
        "do, health never.",
    )
    rate_limit_per_s: float = Field(
        0.0,
        ge=0,
        description="Requests a second of one key, or of one address without a key, in each worker; 0: no limit.",
    )
    rate_limit_burst: float = Field(
        0.0, ge=0, description="Requests at once of one caller, in each worker; 0: one second's worth."
    )
    cors_origins: str = Field(
        "", description="Origins whose pages may call the service from a browser, comma-separated; empty: none."
    )
    gzip_min_bytes: int = Field(
        0, ge=0, description="Answers of at least this many bytes are compressed where the caller takes gzip; 0: none."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Of the service's own log.")
    log_format: Literal["json", "text"] = Field("json", description="One JSON object a line, or text for a person.")
    log_requests: Literal["all", "failed", "none"] = Field(
        "failed", description="Which requests get a line in the log; every decision is in the decision log anyway."
    )
    otlp_endpoint: str = Field(
        "", description="OpenTelemetry collector, OTLP over HTTP, such as http://collector:4318; empty: no traces."
    )
    trace_share: float = Field(
        1.0, ge=0, le=1, description="Share of the traces begun here that are sent, 0 to 1; a caller's choice is kept."
    )

    store: str = Field(
        "sqlite:",
        description="Where histories and decisions live: sqlite: (history.db in the state folder), sqlite:path, "
        "redis://host:port/db or postgresql://user@host/db.",
    )
    cold_store: str | None = Field(
        None,
        description="A postgresql:// URL behind a redis:// store: decisions and histories are kept there, and what "
        "Redis has lost is read from it.",
    )
    store_budget_ms: float = Field(
        5.0, gt=0, description="Longest wait for one answer of Redis, ms; the score is then made without it."
    )
    cold_budget_ms: float = Field(100.0, gt=0, description="Longest wait for one answer of PostgreSQL, ms.")
    store_queue: int = Field(
        20_000, ge=1, description="Decisions that may wait for a store that does not answer; beyond it 503."
    )
    durable: bool = Field(
        True,
        description="Whether a decision is on the disk before it is answered; without, a crash of the machine may "
        "lose the last ones.",
    )
    history_ttl_days: float = Field(
        90.0, gt=0, description="Days after which Redis forgets a customer or merchant of whom nothing was heard."
    )
    decision_ttl_days: float = Field(7.0, gt=0, description="Days for which Redis recalls a transaction id.")

    @classmethod
    def read(cls) -> Settings:
        """Return the settings of this environment.

        Raises
        ------
        SettingsError
            Names each variable, what arrived and what is allowed.
        """
        try:
            return cls(**_from_files(cls.model_fields))
        except ValidationError as error:
            raise SettingsError("; ".join(_said(cls, dict(e)) for e in error.errors())) from None


def _said(settings: type[Settings], error: dict[str, Any]) -> str:
    name = str(error["loc"][0])
    field = settings.model_fields.get(name)
    arrived = "" if field is not None and field.annotation is SecretStr else f"={error['input']!r}"
    return f"FRAUD_{name.upper()}{arrived}: {error['msg']}"


def _from_files(names: Iterable[str]) -> dict[str, Any]:
    values = {}
    for name in names:
        variable = f"FRAUD_{name.upper()}_FILE"
        path = os.environ.get(variable)
        if path:
            try:
                values[name] = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{variable}={path!r} cannot be read: {error}") from None
    return values
