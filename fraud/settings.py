"""Every setting, in groups: one environment variable each, `FRAUD_` before the name in capitals.

Values are read once at start and passed down (`fraud.environment`). A secret may also be given as a file:
`FRAUD_<NAME>_FILE` holds its path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import Field, SecretStr, field_validator
from pydantic.fields import FieldInfo

from fraud.case_settings import CaseSettings
from fraud.environment import Group, expect_none_refused, hand_down, variable_of
from fraud.errors import SettingsError
from fraud.stream_settings import KafkaSettings, StreamSettings
from fraud.telemetry_settings import LogSettings, TelemetrySettings

_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,49}")
_REFERENCE = re.compile(r"v\d+|[0-9a-f]{12,64}")
_OTHER_ALIASES = ("candidate", "challenger", "previous", "latest")
"""Aliases with a meaning of their own; W&B moves ``latest`` by itself."""


class ProcessSettings(Group):
    """The processes of the service."""

    workers: int = Field(
        1, ge=1, le=256, description="Processes that answer requests, on one port and one state folder."
    )
    port: int = Field(
        3000, ge=0, le=65535, validation_alias="BENTOML_PORT", description="Port of the service, without --port."
    )
    state_dir: Path = Field(Path(".fraud"), description="Folder for what the service keeps: history and decisions.")


class HttpSettings(Group):
    """What a connection and a request may ask for."""

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
        description="Connections to each worker; beyond it the one that is idle longest, or else longest without "
        "complete headers, is closed.",
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        description="Seconds for which a connection is kept after an answer; longer than a load balancer's own, which "
        "often is 60.",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses and networks of the proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, "
        "comma-separated, such as 10.0.0.0/8; empty: none.",
    )
    root_path: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$",
        description="Path prefix under which a proxy offers the service, such as /fraud, whether the proxy passes it "
        "on or strips it; empty: none.",
    )
    cors_origins: str = Field(
        "", description="Origins whose pages may call the service from a browser, comma-separated; empty: none."
    )
    gzip_min_bytes: int = Field(
        0, ge=0, description="Answers of at least this many bytes are compressed where the caller takes gzip; 0: none."
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: str) -> str:
        for network in filter(None, (part.strip() for part in value.split(","))):
            ip_network(network)
        return value.strip()


class AccessSettings(Group):
    """Who may call, and how often."""

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
    failed_keys_per_s: float = Field(
        1.0,
        ge=0,
        description="Requests a second of one address that lack a right key where one is needed, in each worker, 30 at "
        "once; beyond it 429 instead of 401. 0: no limit.",
    )


class ModelSettings(Group):
    """Which models are served, and how their versions change."""

    names: str = Field(
        "",
        validation_alias="FRAUD_MODEL",
        description="Models to serve, comma-separated, the first being the default: a name follows the "
        "alias in force of the local registry, name:version pins a version of the Bento store. Empty: the one model "
        "that is in production.",
    )
    version: str = Field(
        "",
        pattern=r"^(v\d+|(sha256:)?[0-9a-f]{12,64})?$",
        validation_alias="FRAUD_MODEL_VERSION",
        description="Version to which the first model is pinned where FRAUD_MODEL names none: v and a number of the "
        "registry, or the digits of a digest, 12 at least; empty: what the alias in force names.",
    )
    bentoml_home: Path = Field(
        Path.home() / "bentoml",
        validation_alias="BENTOML_HOME",
        description="BentoML's own folder: its store of models, and the registry of their versions.",
    )
    poll_s: float = Field(
        1.0,
        ge=0.05,
        validation_alias="FRAUD_MODEL_POLL_S",
        description="How often each worker looks for another version of its models, seconds, give or take 20%.",
    )
    aliases: str = Field(
        "production",
        validation_alias="FRAUD_MODEL_ALIASES",
        description="Aliases of the version to serve, comma-separated: the first that names a version is in force, and "
        "is what promote and rollback move; such as champion,production,staging.",
    )
    anomaly_model: str = Field(
        "",
        description="A model that says of every transaction how unusual it is, beside the models that are served: a "
        "name or name:version, as in FRAUD_MODEL. Empty: none.",
    )
    shadow: bool = Field(
        False, description="Whether the registry's challenger also scores what the champion answers, and is recorded."
    )
    canary_share: float = Field(
        0.0, ge=0, le=1, description="Share of the customers that the registry's challenger answers, 0 to 1."
    )

    @field_validator("aliases")
    @classmethod
    def _aliases(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        for name in names:
            if not _ALIAS.fullmatch(name) or name in _OTHER_ALIASES or _REFERENCE.fullmatch(name):
                raise ValueError(
                    f"{name!r} cannot be the alias of what is served; allowed are at most 50 lower-case letters, "
                    f"digits, - and _, a letter first, but not {', '.join(_OTHER_ALIASES)}, v and a number, or a digest"
                )
        if len(set(names)) < len(names):
            raise ValueError("an alias is named twice")
        return ",".join(names)

    @property
    def alias_order(self) -> tuple[str, ...]:
        """The aliases of the version to serve; the first that names a version is in force."""
        return tuple(self.aliases.split(","))

    @staticmethod
    def hand_down(names: str) -> None:
        """Set FRAUD_MODEL for the processes that are started from this one."""
        hand_down("FRAUD_MODEL", names)


class ScoringSettings(Group):
    """How transactions are read, gathered and recorded."""

    max_clock_ahead_s: float = Field(
        300.0, gt=0, description="How far an event time may lie ahead of the server's clock, seconds."
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
    record_reasons: bool = Field(
        True, description="Whether each recorded decision carries the contributions of its five strongest features."
    )
    record_unnamed: bool = Field(
        True,
        description="Whether rows of ready features without a transaction id are recorded too, under a generated id "
        "that their answer carries.",
    )


class ContractSettings(Group):
    """The contracts of other systems that the service keeps."""

    names: str = Field(
        "all",
        validation_alias="FRAUD_CONTRACTS",
        description="Contracts that are answered, comma-separated: names of docs/contracts.md, all for every one of "
        "them, a dotted Python module for one of your own; empty: none.",
    )
    models: str = Field(
        "",
        validation_alias="FRAUD_CONTRACT_MODELS",
        description="Models that contracts score with, comma-separated, such as application-score=loans; a contract "
        "that is not named takes the first served model that fits it.",
    )
    anomaly_threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Anomaly score above which the contract anomaly-inference answers is_anomaly true.",
    )
    bank_high_above: float = Field(0.8, ge=0, le=1, description="Probability above which bank-transaction says High.")
    bank_medium_above: float = Field(
        0.5, ge=0, le=1, description="Probability above which bank-transaction says Medium, up to the one of High."
    )
    bank_fraud_above: float = Field(
        0.7, ge=0, le=1, description="Probability above which is_fraud of bank-transaction is 1."
    )


class RulesSettings(Group):
    """How the rules of a team are applied."""

    max_share: float = Field(
        0.5,
        gt=0,
        le=1,
        validation_alias="FRAUD_RULES_MAX_SHARE",
        description="Share of the transactions, 0 to 1, above which a rule is stopped in a worker, unless the rule "
        "names a share of its own; judged from 200 transactions on.",
    )


class StoreSettings(Group):
    """Where histories and decisions live."""

    url: str = Field(
        "sqlite:",
        repr=False,
        validation_alias="FRAUD_STORE",
        description="Where histories and decisions live: sqlite: (history.db in the state folder), sqlite:path, "
        "redis://host:port/db or postgresql://user@host/db.",
    )
    cold_url: str | None = Field(
        None,
        repr=False,
        validation_alias="FRAUD_COLD_STORE",
        description="A postgresql:// URL behind a redis:// store: decisions and histories are kept there, and what "
        "Redis has lost is read from it.",
    )
    budget_ms: float = Field(
        5.0,
        gt=0,
        validation_alias="FRAUD_STORE_BUDGET_MS",
        description="Longest wait for one answer of Redis, ms; the score is then made without it.",
    )
    cold_budget_ms: float = Field(100.0, gt=0, description="Longest wait for one answer of PostgreSQL, ms.")
    queue: int = Field(
        20_000,
        ge=1,
        validation_alias="FRAUD_STORE_QUEUE",
        description="Decisions that may wait for a store that does not answer; beyond it 503.",
    )
    durable: bool = Field(
        True,
        description="Whether a decision is on the disk before it is answered; without, a crash of the machine may "
        "lose the last ones.",
    )
    history_ttl_days: float = Field(
        90.0, gt=0, description="Days without a transaction after which Redis forgets a customer or merchant."
    )
    decision_ttl_days: float = Field(7.0, gt=0, description="Days for which Redis recalls a transaction id.")


class PrivacySettings(Group):
    """Keys of what is stored: its chain, and the hashes of personal ids."""

    audit_key: SecretStr = Field(
        SecretStr(""), description="Key of the decision log's hash chain, to be kept apart from the log."
    )
    personal_fields: str = Field(
        "",
        pattern=r"^([a-z_][a-z0-9_]*(,[a-z_][a-z0-9_]*)*)?$",
        description="Fields that are stored only as keyed hashes, comma-separated: customer_id, merchant_id, others.",
    )
    personal_key: SecretStr = Field(
        SecretStr(""), description="Key of those hashes; with it, guessed ids can be tested."
    )


@dataclass(frozen=True)
class Settings:
    """All groups; each is read from the environment unless it is given."""

    process: ProcessSettings = field(default_factory=ProcessSettings.read)
    http: HttpSettings = field(default_factory=HttpSettings.read)
    access: AccessSettings = field(default_factory=AccessSettings.read)
    models: ModelSettings = field(default_factory=ModelSettings.read)
    scoring: ScoringSettings = field(default_factory=ScoringSettings.read)
    contracts: ContractSettings = field(default_factory=ContractSettings.read)
    rules: RulesSettings = field(default_factory=RulesSettings.read)
    cases: CaseSettings = field(default_factory=CaseSettings.read)
    store: StoreSettings = field(default_factory=StoreSettings.read)
    privacy: PrivacySettings = field(default_factory=PrivacySettings.read)
    kafka: KafkaSettings = field(default_factory=KafkaSettings.read)
    stream: StreamSettings = field(default_factory=StreamSettings.read)
    log: LogSettings = field(default_factory=LogSettings.read)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings.read)

    @classmethod
    def read(cls) -> Settings:
        """Return the settings of this environment.

        Raises
        ------
        SettingsError
            Names each variable of every group, what arrived and what is allowed.
        """
        groups: dict[str, Any] = {}
        wrong: list[str] = []
        try:
            expect_none_refused()
        except SettingsError as error:
            wrong.append(error.message)
        for name, kind in group_types().items():
            try:
                groups[name] = kind.read()
            except SettingsError as error:
                wrong.append(error.message)
        if wrong:
            raise SettingsError("; ".join(wrong))
        return cls(**groups)


def group_types() -> dict[str, type[Group]]:
    """Return every group's type by its name in `Settings`."""
    return get_type_hints(Settings)


def variables() -> dict[str, FieldInfo]:
    """Return every setting by its environment variable."""
    return {
        variable_of(name, setting): setting
        for group in group_types().values()
        for name, setting in group.model_fields.items()
    }
