"""The pipeline: from pending rows to decisions, in the stages recall, featurize, score, explain, decide and record.

Every transport calls it: the transport decodes pending rows before, and encodes the outcomes after. Rows of
several models and callers may come in one call. Rows are independent: a failing row is rejected alone, and a repeated
transaction gets its earlier decision.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import attrgetter
from typing import ParamSpec, TypeVar, Unpack

import msgspec
import numpy as np

from fraud.decisions.rules.in_force import RulesInForce
from fraud.errors import AheadOfClock, PastVersion, StoreError, UnknownModel
from fraud.features.featurizer import Histories, Matrix, Records, transactions_of
from fraud.models.beside import NOT_MEASURED, Beside, Measured, measure
from fraud.models.scorer import ModelName, Scorer, Scores
from fraud.pipeline.canary import for_canary
from fraud.pipeline.in_flight import RowInFlight, firsts, reject
from fraud.pipeline.plain import are_plain, decide_plain
from fraud.pipeline.requests import RequestOptions, ScoreRequest
from fraud.pipeline.rows import Decision, Outcome, PendingRow, Rejection
from fraud.pipeline.shadow import Shadow, ShadowJob, copy_of
from fraud.schema import Row
from fraud.stores.protocol import Recalled, Store, distinct

logger = logging.getLogger("fraud.pipeline")

P = ParamSpec("P")
T = TypeVar("T")

NO_TRANSACTIONS = transactions_of(())
INLINE_ROWS = 64
"""Rows scored, or encoded, on the event loop itself; more of them go to a thread."""


class Pipeline:
    """Decides with a few models over one store.

    Parameters
    ----------
    scorers : mapping of str to Scorer
        By model name; the first is the default. A swap replaces `scorers`; rows read earlier are decided by the version
        that read them.
    store : Store
    on_stage : callable, optional
        Is called with a stage (``recall``, ``featurize``, ``score``, ``anomaly``, ``record``, ``explain``) and the
        seconds that a batch spent in it.
    on_decided : callable, optional
        Is called on the event loop with the new decisions of a batch, without repeated ones.
    canary_share : float
        Share of customers answered by the model's challenger, if `challengers` has one.
    shadow : Shadow, optional
        Scores the champions' requests with the challengers.
    record_reasons : bool
        Whether a recorded decision carries its strongest contributions.
    record_unnamed : bool
        Whether rows without a transaction id are given one and recorded.
    past : mapping of str to Scorer, optional
        Versions by digest that are no longer served, kept to explain their decisions.

    Attributes
    ----------
    rules : mapping of str to RulesInForce
        By the digest of the model version that they belong to; a swap replaces it, between two batches.
    beside : Beside or None
        The model that measures how unusual the rows of other models are.
    counts : Counter
        Since the start: ``rows`` scored, ``rows_refused``, ``rows_ahead_of_clock``, ``rows_recalled``, ``extra_fields``
        ignored, ``degraded_<name>`` and ``labels_<outcome>``.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        store: Store,
        on_stage: Callable[[str, float], None] | None = None,
        on_decided: Callable[[Sequence[Decision]], None] | None = None,
        *,
        canary_share: float = 0.0,
        shadow: Shadow | None = None,
        record_reasons: bool = False,
        record_unnamed: bool = False,
        past: Mapping[str, Scorer] | None = None,
    ) -> None:
        self.scorers = dict(scorers)
        self.challengers: Mapping[str, Scorer] = {}
        self.rules: Mapping[str, RulesInForce] = {}
        self.beside: Beside | None = None
        self.canary_share = canary_share
        self.shadow = shadow
        self.record_reasons = record_reasons
        self.record_unnamed = record_unnamed
        self.past = {} if past is None else past
        self.store = store
        self.on_stage = on_stage
        self.on_decided = on_decided
        self.counts: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(1, "score")

    def read(
        self, raws: Sequence[bytes | msgspec.Raw], *, model: str | None = None, **options: Unpack[RequestOptions]
    ) -> ScoreRequest:
        """Return a caller's rows of JSON as a request, the first rows of it read.

        Parameters
        ----------
        model : str, optional
            The model's name; the default model if None.
        options
            Parameters of `ScoreRequest`.

        Raises
        ------
        UnknownModel
            No model of that name is served.
        """
        scorers = self.scorers
        scorer = next(iter(scorers.values())) if model is None else scorers.get(model)
        if scorer is None:
            assert model is not None
            raise UnknownModel(model, list(scorers))
        request = ScoreRequest(scorer, raws, **options)
        self._read_some(request)
        challenger = self.challengers.get(scorer.name.name) if self.canary_share else None
        return request if challenger is None else for_canary(request, challenger, self.canary_share)

    def _read_some(self, request: ScoreRequest) -> None:
        """Read the next rows, and count those ahead of the clock: if most are, this machine's clock is slow."""
        ahead = [error for error in request.read_some() if isinstance(error, AheadOfClock)]
        if ahead:
            if not self.counts["rows_ahead_of_clock"]:
                logger.warning("a row is refused: %s; is the time of this machine right?", ahead[0].message)
            self.counts["rows_ahead_of_clock"] += len(ahead)

    async def decide_requests(self, requests: Sequence[ScoreRequest]) -> list[list[Outcome]]:
        """Decide on the rows of several callers together; each gets the outcomes of its own rows, in order.

        A large request is read to its end first; the event loop gets a turn after each chunk.
        """
        for request in requests:
            while not request.is_read:
                await asyncio.sleep(0)
                self._read_some(request)
        rows = [row for request in requests for row in request.rows if isinstance(row, PendingRow)]
        decided = iter(await self.decide(rows))
        answered: list[list[Outcome]] = []
        for request in requests:
            outcomes = [row if isinstance(row, Rejection) else next(decided) for row in request.rows]
            if len(outcomes) > 1:
                refused = sum([isinstance(outcome, Rejection) for outcome in outcomes])
                if refused < len(outcomes):  # otherwise it is a request that is refused
                    self.counts["rows_refused"] += refused
            answered.append(outcomes)
        return answered

    async def decide(self, rows: Sequence[PendingRow]) -> list[Outcome]:
        """Decide on rows independently; return one outcome per row in the same order.

        A rejected row carries its error: a transaction id that came before with other contents, an explanation that
        needs a version no longer served (`PastVersion`), a store that failed.
        """
        self.counts["extra_fields"] += sum([row.row.n_extra for row in rows])
        if not self.record_unnamed and are_plain(rows):
            decisions = await self._in_turn(rows, decide_plain, rows, self._measure, self.rules, self._timed)
            self.counts["rows"] += len(rows)
            self._notify(decisions)
            return [*decisions]
        in_flight = [RowInFlight(row, name_it=self.record_unnamed) for row in rows]
        named, repeats, fresh = firsts(in_flight)
        recalled = await self._recall(named)
        unrecorded: list[RowInFlight] = []
        for key, row in named.items():
            known = recalled.decided.get(key)
            if known is not None:
                row.repeat(known)
                if key in recalled.unrecorded and row.record is not None:
                    unrecorded.append(row)
            elif row.error is None:
                fresh.append(row)
        transactions = NO_TRANSACTIONS
        if fresh:
            transactions = await self._in_turn(fresh, self._score, fresh, recalled)
            self.counts["rows"] += len(fresh)
            for row in fresh:
                for name in row.record.degraded if row.record is not None else ():
                    self.counts[f"degraded_{name}"] += 1
        await self._record([row for row in (*fresh, *unrecorded) if row.key is not None], recalled, transactions)
        for row in repeats:
            row.follow(named[row.key or ""])
        await self._explain_recorded([row for row in in_flight if row.lacks_words])
        for row in in_flight:
            self.counts["rows_recalled"] += row.is_repeat
            for name in row.lacks if row.record is not None else ():
                self.counts[f"degraded_{name}"] += 1
        outcomes = [row.outcome() for row in in_flight]
        self._notify([outcome for outcome in outcomes if isinstance(outcome, Decision) and not outcome.is_repeat])
        return outcomes

    def version(self, digest: str) -> Scorer | None:
        """Return the model version of a digest, if it is loaded here."""
        versions = (*self.scorers.values(), *self.challengers.values())
        return next((version for version in versions if version.name.digest == digest), self.past.get(digest))

    def describe(self) -> list[ModelName]:
        """Return the models served."""
        return [scorer.name for scorer in self.scorers.values()]

    async def close(self) -> None:
        """Close the store."""
        self._threads.shutdown()
        await self.store.close()

    async def _recall(self, named: Mapping[str, RowInFlight]) -> Recalled:
        """Return the earlier decisions by key, and the histories of the customers and merchants of the rows."""
        with_history = [row.row for row in named.values() if row.row.customer_id]
        if not named:
            return Recalled({}, Histories.new(()))
        customers = distinct(row.customer_id for row in with_history)
        merchants = distinct(row.text_role("merchant_id") for row in with_history)
        started = time.perf_counter()
        try:
            return await self.store.recall(list(named), customers, merchants)
        except StoreError as error:
            reject([*named.values()], error.kept())
            return Recalled({}, Histories.new(()))
        finally:
            self._timed("recall", started)

    def _score(self, rows: Sequence[RowInFlight], recalled: Recalled) -> Records:
        """Give every row its decision record, and add its transaction to the histories.

        Returns the transactions of the rows that have histories.
        """
        scored: list[Records] = []
        in_force = self.rules  # one set for all rows of a batch
        for scorer, group in groupby(rows, key=attrgetter("scorer")):
            some = list(group)
            challenger = self.challengers.get(scorer.name.name) if self.shadow is not None else None
            before = copy_of(recalled.histories) if challenger is not None else None
            X, transactions = self._featurize(scorer, some, recalled.histories)
            scored.append(transactions)
            started = time.perf_counter()
            scores = scorer.score(X)
            self._timed("score", started)
            self._explain(scorer, some, X)
            measured = self._measure(scorer, X, scores, [row.row for row in some])
            rules = in_force.get(scorer.name.digest)
            degraded = (*(recalled.degraded if scorer.spec.kind == "transaction" else ()), *measured.lacks)
            for row, x, score in zip(some, X, measured.rows(scores), strict=True):
                lacks = degraded
                if recalled.is_unread(row.row.customer_id, row.row.text_role("merchant_id")):
                    lacks = (*degraded, *({"history"} - {*degraded}))
                row.decide(x, score, lacks, rules, measured.model)
            if self.shadow is not None and challenger not in (None, scorer) and before is not None:
                records = [row.record for row in some if row.record is not None]
                self.shadow.offer(ShadowJob(challenger, [row.row.raw for row in some], before, records))
        return scored[0] if len(scored) == 1 else np.concatenate(scored)

    def _featurize(self, scorer: Scorer, rows: Sequence[RowInFlight], histories: Histories) -> tuple[Matrix, Records]:
        """Return the rows of `X`, and their transactions if they have histories."""
        started = time.perf_counter()
        said, transactions = [row.row for row in rows], NO_TRANSACTIONS
        if scorer.spec.kind == "features":
            X = scorer.featurizer.ready(said)
        else:
            transactions = transactions_of(said)
            X = scorer.featurizer.advance(said, histories, transactions)
        self._timed("featurize", started)
        return X, transactions

    def _explain(self, scorer: Scorer, rows: Sequence[RowInFlight], X: Matrix) -> None:
        """Explain the rows that ask for it, and keep the strongest reasons of those that are recorded."""
        wanted = [
            i
            for i, row in enumerate(rows)
            if row.asks_explanation or row.asks_reasons or (self.record_reasons and row.key)
        ]
        if not wanted:
            return
        started = time.perf_counter()
        if len(wanted) < len(rows):
            rows, X = [rows[i] for i in wanted], X[wanted]
        contributions = scorer.contributions(X)
        asking = [i for i, row in enumerate(rows) if row.asks_explanation]
        if asking:
            whole = len(asking) == len(rows)
            explained = scorer.explainer.explained(
                X if whole else X[asking],
                contributions if whole else contributions[asking],
                [rows[i].row for i in asking],
            )
            for i, explanation in zip(asking, explained, strict=True):
                rows[i].explanation = explanation
        if self.record_reasons or any(row.asks_reasons for row in rows):
            for row, reasons in zip(rows, scorer.explainer.strongest(contributions), strict=True):
                row.reasons = reasons
                if self.record_reasons:
                    row.recorded_reasons = reasons
        self._timed("explain", started)

    async def _record(self, rows: Sequence[RowInFlight], recalled: Recalled, scored: Records) -> None:
        """Record decisions and update the histories; if another worker recorded first, its decision counts.

        `scored` are the transactions of the first of the rows that have histories.
        """
        with_history = [row for row in rows if row.row.customer_id]
        without = [row for row in rows if not row.row.customer_id]
        unscored = with_history[len(scored) :]
        known = np.concatenate([scored, transactions_of([row.row for row in unscored])]) if unscored else scored
        for some in (with_history, without):
            if not some:
                continue
            transactions = known if some is with_history else None
            started = time.perf_counter()
            try:
                recorded = await self.store.record([row.record for row in some if row.record], transactions, recalled)
            except StoreError as error:
                reject(some, error.kept())
                continue
            finally:
                self._timed("record", started)
            for row, record in zip(some, recorded.decided, strict=True):
                row.lacks = recorded.degraded
                if record is not row.record:  # another worker was first
                    row.repeat(record)

    async def _explain_recorded(self, rows: Sequence[RowInFlight]) -> None:
        """Explain recorded decisions from their recorded features, by the version that decided."""
        by_digest: dict[str, list[RowInFlight]] = {}
        for row in rows:
            if row.record is not None:
                by_digest.setdefault(row.record.model_digest, []).append(row)
        for digest, some in by_digest.items():
            asked = some[0].scorer
            scorer = asked if asked.name.digest == digest else self.version(digest)
            if scorer is not None:
                await self._in_turn(some, self._explain_as_scored, scorer, some)
            else:
                record = some[0].record
                assert record is not None
                reject(some, PastVersion(record.model_name, digest, list(self.scorers)))

    def _explain_as_scored(self, scorer: Scorer, rows: Sequence[RowInFlight]) -> None:
        started = time.perf_counter()
        features = b"".join([row.record.features for row in rows if row.record is not None])
        X = np.frombuffer(features, "<f8").reshape(len(rows), -1)
        explained = scorer.explainer.explained(X, scorer.contributions(X), [row.row for row in rows])
        for row, explanation in zip(rows, explained, strict=True):
            row.explanation = explanation
        self._timed("explain", started)

    def _measure(self, scorer: Scorer, X: Matrix, scores: Scores, rows: Sequence[Row]) -> Measured:
        started = time.perf_counter()
        measured = measure(scorer, self.beside, X, scores, rows)
        if measured is not NOT_MEASURED:
            self._timed("anomaly", started)
        return measured

    async def _in_turn(self, rows: Sequence[object], stage: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run a stage on the event loop, or in the thread if it has many rows."""
        if len(rows) <= INLINE_ROWS:
            return stage(*arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: stage(*arguments, **named))

    def _timed(self, name: str, started: float) -> None:
        if self.on_stage is not None:
            self.on_stage(name, time.perf_counter() - started)

    def _notify(self, decisions: Sequence[Decision]) -> None:
        if self.on_decided is not None and decisions:
            self.on_decided(decisions)
