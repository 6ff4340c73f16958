"""The settings of `fraud stream`: the Kafka cluster, its topics, and how they are read and written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, SecretStr

from fraud.environment import Group

TOPIC = r"^[A-Za-z0-9._-]{1,249}$"


class KafkaSettings(Group):
    """How a Kafka cluster is reached."""

    bootstrap_servers: str = Field(
        "localhost:9092",
        min_length=1,
        validation_alias="FRAUD_KAFKA_BOOTSTRAP_SERVERS",
        description="Brokers to begin with, host:port, comma-separated.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT",
        validation_alias="FRAUD_KAFKA_SECURITY_PROTOCOL",
        description="PLAINTEXT, SSL (TLS), SASL_PLAINTEXT or SASL_SSL.",
    )
    ca: str = Field(
        "",
        validation_alias="FRAUD_KAFKA_CA",
        description="Certificates of the authorities that the brokers' are checked against, PEM; empty: the system's.",
    )
    cert: str = Field("", validation_alias="FRAUD_KAFKA_CERT", description="Certificate of this client, PEM.")
    key: SecretStr = Field(
        SecretStr(""), validation_alias="FRAUD_KAFKA_KEY", description="Private key of that certificate, PEM."
    )
    key_password: SecretStr = Field(
        SecretStr(""),
        validation_alias="FRAUD_KAFKA_KEY_PASSWORD",
        description="Password of the private key, where it has one.",
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512",
        validation_alias="FRAUD_KAFKA_SASL_MECHANISM",
        description="How the SASL user is authenticated.",
    )
    sasl_username: str = Field(
        "", validation_alias="FRAUD_KAFKA_SASL_USERNAME", description="User of SASL; empty without SASL."
    )
    sasl_password: SecretStr = Field(
        SecretStr(""), validation_alias="FRAUD_KAFKA_SASL_PASSWORD", description="Password of that user."
    )


class StreamSettings(Group):
    """What `fraud stream` reads and writes."""

    group: str = Field(
        "fraud",
        min_length=1,
        validation_alias="FRAUD_STREAM_GROUP",
        description="Consumer group: the processes of one group share the partitions.",
    )
    instance: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]{0,100}$",
        validation_alias="FRAUD_STREAM_INSTANCE",
        description="A name that no other process of the group has and that this one keeps over restarts, such as a "
        "pod's: an unfinished transaction of the process before it is then ended at once. Empty: a new name each time.",
    )
    transactions: str = Field(
        "transactions",
        pattern=TOPIC,
        validation_alias="FRAUD_STREAM_TRANSACTIONS",
        description="Topic of the transactions that are decided.",
    )
    labels: str = Field(
        "labels",
        pattern=r"^[A-Za-z0-9._-]{0,249}$",
        validation_alias="FRAUD_STREAM_LABELS",
        description="Topic of the labels that are applied; empty: none.",
    )
    decisions: str = Field(
        "decisions",
        pattern=TOPIC,
        validation_alias="FRAUD_STREAM_DECISIONS",
        description="Topic that gets the verdict on every transaction.",
    )
    anomalies: str = Field(
        "anomalies",
        pattern=TOPIC,
        validation_alias="FRAUD_STREAM_ANOMALIES",
        description="Topic that gets the verdicts that need a look: unusual transactions, and those not approved.",
    )
    dead: str = Field(
        "transactions.dead",
        pattern=TOPIC,
        validation_alias="FRAUD_STREAM_DEAD",
        description="Topic of dead letters: records that cannot be decided or applied, as they came.",
    )
    max_records: int = Field(
        500,
        ge=1,
        le=10_000,
        validation_alias="FRAUD_STREAM_MAX_RECORDS",
        description="Most records that are decided and committed together.",
    )
    max_message_bytes: int = Field(
        1_000_000,
        ge=100_000,
        validation_alias="FRAUD_STREAM_MAX_MESSAGE_BYTES",
        description="Largest record that is written, bytes, at most max.message.bytes of the topics; a dead letter "
        "beyond it carries the beginning of its value.",
    )
    session_timeout_s: float = Field(
        10.0,
        ge=1,
        le=300,
        validation_alias="FRAUD_STREAM_SESSION_TIMEOUT_S",
        description="Seconds without a sign of life after which the group gives a process's partitions to others.",
    )
    transaction_timeout_s: float = Field(
        10.0,
        ge=1,
        le=900,
        validation_alias="FRAUD_STREAM_TRANSACTION_TIMEOUT_S",
        description="Seconds after which brokers abort an unfinished Kafka transaction, which holds up readers of what "
        "is committed.",
    )
    max_lag: int = Field(
        100_000,
        ge=1,
        validation_alias="FRAUD_STREAM_MAX_LAG",
        description="Records that wait in the partitions of a process, above which its /readyz says behind.",
    )
    stalled_after_s: float = Field(
        60.0,
        gt=0,
        validation_alias="FRAUD_STREAM_STALLED_AFTER_S",
        description="Seconds without a commit while records wait after which /livez fails.",
    )
    host: str = Field(
        "127.0.0.1",
        validation_alias="FRAUD_STREAM_HOST",
        description="Address on which a stream process answers /livez, /readyz and /metrics.",
    )
    port: int = Field(
        3100, ge=0, le=65535, validation_alias="FRAUD_STREAM_PORT", description="Port of those; 0: any that is free."
    )
