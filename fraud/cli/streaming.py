"""`fraud stream`: transactions from Kafka, verdicts to Kafka."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def stream(
    create_topics: Annotated[
        int, typer.Option(min=0, help="Create topics that are missing, with so many partitions; 0: they must be there.")
    ] = 0,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of each partition of these.")] = 1,
    bento: Annotated[
        Path | None,
        typer.Option(help="The folder of a Bento, whose packed models are served; else those of the store."),
    ] = None,
) -> None:
    """Decide on the transactions of a Kafka topic, each exactly once, until SIGTERM.

    Reads the topics transactions and labels, and writes decisions, anomalies and transactions.dead; the settings
    FRAUD_KAFKA_* and FRAUD_STREAM_* name others (docs/streams.md). Processes of one group share the partitions.
    """
    from fraud.models.served import Packed
    from fraud.settings import Settings
    from fraud.streams.process import run_stream
    from fraud.telemetry.logs import configure_logging

    settings = Settings.read()
    configure_logging(settings.log.level, settings.log.format)
    packed = Packed()
    if bento is not None:
        import bentoml

        packed = Packed.of(bentoml.load(str(bento)))
    run_stream(settings, packed, new_partitions=create_topics, replicas=replicas)
