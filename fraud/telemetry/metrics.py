"""The metrics of the service, as docs/operations.md lists them.

They stand in one list because the parts know no Prometheus: each counts in plain attributes or calls a function that it
was given, and `fraud.telemetry.recorder` turns these into metrics.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
PROBABILITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *(n / 10 for n in range(1, 10)), 0.95, 0.98, 0.99, 1.0)
MODEL = ("name", "version")


class Metric(NamedTuple):
    """One metric: its Prometheus name and type, the names of its labels, and what it says."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = SECONDS
    mode: Literal["livesum", "livemax", "liveall"] = "livesum"


METRICS = (
    Metric("fraud_requests_total", "counter", ("route", "status"), "Requests answered, by route and HTTP status."),
    Metric("fraud_request_seconds", "histogram", ("route",), "From the headers' arrival to the answer, seconds."),
    Metric("fraud_errors_total", "counter", ("code",), "Requests answered with an error, by its code."),
    Metric(
        "fraud_stage_seconds",
        "histogram",
        ("stage",),
        "Time in a stage, seconds: queue of a request; recall, featurize, score, anomaly, record, explain of a batch.",
    ),
    Metric("fraud_batch_rows", "histogram", (), "Rows scored in one batch.", ROWS),
    Metric("fraud_rows_total", "counter", (*MODEL, "decision"), "Rows scored, by the decision made."),
    Metric("fraud_rule_hits_total", "counter", ("name", "rule"), "Rows on which a rule of a model fired and counted."),
    Metric(
        "fraud_rules_stopped", "gauge", ("name", "rule"), "Workers that stopped a rule that fired on too many rows."
    ),
    Metric("fraud_score", "histogram", MODEL, "Scores that decided: probabilities, or anomaly scores.", PROBABILITIES),
    Metric("fraud_rows_refused_total", "counter", (), "Rows that could not be scored, in requests where others could."),
    Metric("fraud_rows_ahead_of_clock_total", "counter", (), "Rows refused for lying ahead of this machine's clock."),
    Metric("fraud_rows_recalled_total", "counter", (), "Rows answered with the decision they had before."),
    Metric("fraud_extra_fields_total", "counter", (), "Fields that were sent and that no model reads."),
    Metric("fraud_degraded_rows_total", "counter", ("reason",), "Rows scored or recorded without something."),
    Metric(
        "fraud_labels_total",
        "counter",
        ("outcome",),
        "Labels that arrived: applied, known before, superseded, of an unknown transaction, or refused.",
    ),
    Metric("fraud_store_waiting", "gauge", (), "Decisions that wait for a store that does not answer, all workers."),
    Metric("fraud_store_off", "gauge", ("store",), "Workers for which a store is off now, by the store."),
    Metric("fraud_store_outages_total", "counter", ("store",), "Times a worker took a store off, by the store."),
    Metric("fraud_store_late_calls_total", "counter", ("store",), "Calls that took longer than the store's budget."),
    Metric("fraud_model_info", "gauge", (*MODEL, "digest", "role"), "Workers that serve this version in this role."),
    Metric("fraud_swaps_total", "counter", ("name", "role", "result"), "Loads of another version: ok or refused."),
    Metric(
        "fraud_swap_seconds",
        "histogram",
        (),
        "Time to load, verify and warm a version, seconds.",
        (0.05, *SECONDS[-5:]),
    ),
    Metric(
        "fraud_failed_swaps", "gauge", ("name", "role"), "Workers that could not load the version they should serve."
    ),
    Metric(
        "fraud_following_failed", "gauge", ("name",), "1 while the last look at W&B's aliases failed.", mode="livemax"
    ),
    Metric(
        "fraud_following_look_timestamp_seconds",
        "gauge",
        ("name",),
        "When W&B's aliases were last looked at, seconds since 1970; nothing where nobody follows.",
        mode="livemax",
    ),
    Metric(
        "fraud_shadow_rows_total",
        "counter",
        ("name", "agreed"),
        "Rows that a shadow scored, by whether it decided alike.",
    ),
    Metric("fraud_shadow_dropped_total", "counter", (), "Rows that a shadow did not score because it was behind."),
    Metric("fraud_queue_rows", "gauge", (), "Rows that wait to be scored, all workers together."),
    Metric(
        "fraud_memory_bytes",
        "gauge",
        (),
        "Memory of each worker without the files that it maps, bytes.",
        mode="liveall",
    ),
    Metric("fraud_stream_records_total", "counter", ("topic",), "Records read from a topic and committed."),
    Metric("fraud_stream_batch_records", "histogram", (), "Records decided and committed together.", ROWS),
    Metric("fraud_stream_commit_seconds", "histogram", (), "Time to write and commit one Kafka transaction, seconds."),
    Metric(
        "fraud_stream_latency_seconds",
        "histogram",
        (),
        "From a transaction's timestamp in Kafka to the commit of its verdict, seconds.",
    ),
    Metric("fraud_stream_dead_letters_total", "counter", ("code",), "Dead letters written, by the code of the error."),
    Metric(
        "fraud_stream_rebalances_total",
        "counter",
        ("change",),
        "Times the group gave a process partitions, took some back, or gave them away as the process was lost.",
    ),
    Metric(
        "fraud_stream_aborted_total", "counter", (), "Kafka transactions that were aborted; their records come again."
    ),
    Metric(
        "fraud_stream_lag_records",
        "gauge",
        ("topic", "partition"),
        "Records of a partition that wait to be decided, seen by the process that reads it.",
    ),
    Metric(
        "fraud_stream_waiting",
        "gauge",
        ("reason",),
        "Stream processes that wait: for the broker or the store.",
    ),
)
