"""The shadow: a challenger scores the champion's rows after the answer, and its scores are recorded."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import verdict_of
from fraud.errors import RequestError
from fraud.features.featurizer import Histories
from fraud.models.scorer import Scorer

logger = logging.getLogger("fraud.serving.shadow")

MAX_WAITING = 256
SCHEMA = """
CREATE TABLE IF NOT EXISTS shadows (
    processing_time_ms INTEGER NOT NULL, transaction_id TEXT, request_id TEXT NOT NULL,
    champion TEXT NOT NULL, champion_score REAL NOT NULL, champion_decision TEXT NOT NULL,
    challenger TEXT NOT NULL, raw_margin REAL NOT NULL, decision_score REAL NOT NULL, decision TEXT NOT NULL
) STRICT
"""
RENAMED = {"champion_probability": "champion_score", "fraud_probability": "decision_score"}
"""Columns of files from before some models had no probability."""


class ShadowJob(NamedTuple):
    """Answered rows of one model, with the histories needed to score them again."""

    scorer: Scorer
    raws: Sequence[bytes]
    histories: Histories
    decided: Sequence[DecisionRecord]


class Shadow:
    """Scores answered rows with challengers in its own thread, and records their decisions.

    Parameters
    ----------
    path : Path
        A SQLite file, shared by all workers.
    on_scored : callable
        Is called with a model's name and the numbers of equal and different decisions.
    on_dropped : callable
        Is called with the number of rows dropped because the queue was full.
    """

    def __init__(
        self, path: Path, on_scored: Callable[[str, int, int], None], on_dropped: Callable[[int], None]
    ) -> None:
        self._on_scored = on_scored
        self._on_dropped = on_dropped
        self._waiting: queue.Queue[ShadowJob | None] = queue.Queue(MAX_WAITING)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # with the rights that the umask gives; SQLite alone would keep its write from the group
        with closing(sqlite3.connect(path, timeout=30)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            _prepare(db)
        self._thread = threading.Thread(target=self._work, args=(path,), name="shadow", daemon=True)
        self._thread.start()

    def offer(self, job: ShadowJob) -> None:
        """Queue rows; never waits."""
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            self._on_dropped(len(job.raws))

    def close(self) -> None:
        """Score the queued rows, and stop."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self, path: Path) -> None:
        with closing(sqlite3.connect(path, timeout=30)) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            while (job := self._waiting.get()) is not None:
                try:
                    self._score(db, job)
                except RequestError:  # the challenger asks for more than these callers send
                    self._on_dropped(len(job.raws))
                except Exception:
                    logger.exception("the shadow of %d rows failed", len(job.raws))
                    self._on_dropped(len(job.raws))

    def _score(self, db: sqlite3.Connection, job: ShadowJob) -> None:
        scorer = job.scorer
        rows = [scorer.decoder.decode(raw, "$") for raw in job.raws]
        if scorer.spec.kind == "features":
            X = scorer.featurizer.ready(rows)
        else:
            X = scorer.featurizer.advance(rows, job.histories)
        scores = scorer.score(X)
        agreed = 0
        records = []
        for d, score in zip(job.decided, scores.rows(), strict=True):
            severity = score.severity if score.anomaly is not None else d.severity_beside
            decision = verdict_of(scorer.policy, score.decision_score, severity).decision
            agreed += decision == d.model_decision
            then = (
                d.processing_time_ms,
                d.transaction_id,
                d.request_id,
                d.model_digest,
                d.decision_score,
                d.model_decision,
            )
            records.append((*then, scorer.name.digest, score.raw_margin, score.decision_score, decision))
        with db:
            db.executemany(f"INSERT INTO shadows VALUES ({','.join('?' * 10)})", records)
        self._on_scored(scorer.name.name, agreed, len(records) - agreed)


def _prepare(db: sqlite3.Connection) -> None:
    """Make the table, or bring that of an earlier release to this one's names; workers take turns."""
    db.execute("BEGIN IMMEDIATE")
    db.execute(SCHEMA)
    names = {row[1] for row in db.execute("PRAGMA table_info(shadows)")}
    for before, now in RENAMED.items():
        if before in names:
            db.execute(f"ALTER TABLE shadows RENAME COLUMN {before} TO {now}")
    db.commit()


def copy_of(histories: Histories) -> Histories:
    """Return a copy of histories, unaffected when the champion updates the originals."""
    return Histories(
        histories.customer_ids, histories.merchant_ids, histories.customers.copy(), histories.merchants.copy()
    )
