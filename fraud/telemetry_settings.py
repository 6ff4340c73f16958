"""The settings of logs, traces and metrics, two groups of `fraud.settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from fraud.environment import Group


class LogSettings(Group):
    """What the service writes of itself."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias="FRAUD_LOG_LEVEL", description="Of the service's own log."
    )
    format: Literal["json", "text"] = Field(
        "json", validation_alias="FRAUD_LOG_FORMAT", description="One JSON object a line, or text for a person."
    )
    requests: Literal["all", "failed", "none"] = Field(
        "failed",
        validation_alias="FRAUD_LOG_REQUESTS",
        description="Which requests get a line in the log; every decision is in the decision log anyway.",
    )


class TelemetrySettings(Group):
    """Traces, and where metrics are gathered."""

    otlp_endpoint: str = Field(
        "", description="OpenTelemetry collector, OTLP over HTTP, such as http://collector:4318; empty: no traces."
    )
    trace_share: float = Field(
        1.0, ge=0, le=1, description="Share of the traces begun here that are sent, 0 to 1; a caller's choice is kept."
    )
    metrics_dir: Path | None = Field(
        None,
        validation_alias="PROMETHEUS_MULTIPROC_DIR",
        description="Folder in which workers add up their metrics; BentoML makes one and says so to its workers.",
    )
