"""From a request's body to its answer: decode, recall, featurize, score, decide, record, explain.

Every transport calls this one. Callers of one moment are scored together by `DataPlane.run`, each row by
itself: a bad one fails alone, and a transaction that was scored before gets the decision it had.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import msgspec
import numpy as np

from fraud.decisions.record import DecisionRecord
from fraud.decisions.verdict import verdict_of
from fraud.errors import FraudError, PastVersion, RequestError, StoreError, UnknownModel
from fraud.features.featurizer import Histories, Matrix, transactions_of
from fraud.models.scorer import Scorer
from fraud.pipeline.answers import (
    Prediction,
    Refused,
    RowsRefused,
    encode_answer,
    explain_answer,
    plain_answer,
    predict_answer,
    problem_of,
)
from fraud.pipeline.requests import CHUNK_ROWS, INLINE_ROWS, ScoreRequest, Task, transaction_id_of
from fraud.pipeline.shadow import Shadow, ShadowJob, copy_of, in_canary
from fraud.schema import Row, decode_envelope
from fraud.stores.protocol import Recalled, Store, distinct

NOTHING = Recalled({}, Histories.new(()))
"""What a store knows of rows that are not asked for: their models have no history, their names were given here."""


class DataPlane:
    """Scores requests with a few models over one store.

    Parameters
    ----------
    scorers : mapping of str to Scorer
        By the name a request may ask for; the first is the default. A swap assigns `scorers` anew;
        requests decoded before are answered by the version they found.
    store : Store
    on_stage : callable, optional
        Is called with a stage (``recall``, ``featurize``, ``score``, ``record``, ``explain``) and the
        seconds that a batch spent in it.
    on_scored : callable, optional
        Is called with a scorer and the probabilities it gave to a batch.
    canary_share : float
        Share of the customers whom the model's challenger answers, where `challengers` has one.
    shadow : Shadow, optional
        Where challengers score what champions answered.
    record_reasons : bool
        Whether a recorded decision carries its strongest contributions.
    record_unnamed : bool
        Whether rows without a transaction id are given one and recorded.
    past : mapping of str to Scorer, optional
        Versions that are not served any more, and may still explain what they decided.

    Attributes
    ----------
    counts : Counter
        Since the start: ``rows`` scored, ``rows_refused``, ``rows_recalled``, ``extra_fields`` ignored,
        ``degraded_<name>`` and ``labels_<outcome>``.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        store: Store,
        on_stage: Callable[[str, float], None] | None = None,
        on_scored: Callable[[Scorer, list[float]], None] | None = None,
        *,
        canary_share: float = 0.0,
        shadow: Shadow | None = None,
        record_reasons: bool = False,
        record_unnamed: bool = False,
        past: Mapping[str, Scorer] | None = None,
    ) -> None:
        self.scorers = dict(scorers)
        self.challengers: Mapping[str, Scorer] = {}
        self.canary_share = canary_share
        self.shadow = shadow
        self.record_reasons = record_reasons
        self.record_unnamed = record_unnamed
        self.past = {} if past is None else past
        self.store = store
        self.on_stage = on_stage
        self.on_scored = on_scored
        self.counts: Counter[str] = Counter()
        self._threads = ThreadPoolExecutor(1, "score")

    def decode(self, body: bytes, *, explain: bool, now_ms: int | None = None, request_id: str = "") -> ScoreRequest:
        """Read one body.

        Raises
        ------
        RequestError
            The whole of it is bad, be it that every row is.
        """
        raws, name = decode_envelope(body)
        scorers = self.scorers
        scorer = next(iter(scorers.values())) if name is None else scorers.get(name)
        if scorer is None:
            assert name is not None
            raise UnknownModel(name, list(scorers))
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        request = ScoreRequest(scorer, raws, explain, now_ms, request_id)
        request.decode_some()
        if self.canary_share and scorer.name.name in self.challengers:
            request = self._canary(request, self.challengers[scorer.name.name])
        request.decoded_at = time.perf_counter()
        return request

    def _canary(self, request: ScoreRequest, challenger: Scorer) -> ScoreRequest:
        """Give a request of one customer to the challenger, if that is whom it answers and it can read all rows."""
        customers = {row.customer_id or row.transaction_id if isinstance(row, Row) else None for row in request.rows}
        customer = customers.pop() if request.decoded and len(customers) == 1 else None
        if customer is None or not in_canary(customer, self.canary_share):
            return request
        other = ScoreRequest(challenger, request.raws, request.explain, request.now_ms, request.request_id)
        try:
            while not other.decoded:
                other.decode_some()
        except RequestError:
            return request
        return other if all(isinstance(row, Row) for row in other.rows) else request

    async def run(self, requests: Sequence[ScoreRequest]) -> list[bytes | FraudError]:
        """Answer a micro-batch: each caller's JSON, or the error that is its own."""
        if not self.record_unnamed and all(request.is_plain for request in requests):
            return self._answer_plain(requests)
        outcomes: dict[int, bytes | FraudError] = {}
        for i, request in enumerate(requests):
            try:
                while not request.decoded:
                    await asyncio.sleep(0)
                    request.decode_some()
            except RequestError as error:
                outcomes[i] = error.kept()
        tasks = {
            i: [
                Task(request, at, row, self.record_unnamed)
                for at, row in enumerate(request.rows)
                if isinstance(row, Row)
            ]
            for i, request in enumerate(requests)
            if i not in outcomes
        }
        try:
            await self._decide([task for of_request in tasks.values() for task in of_request])
        except StoreError as error:
            return [outcomes.get(i, error) for i in range(len(requests))]
        for i, of_request in tasks.items():
            outcomes[i] = await self._answer(requests[i], of_request)
        return [outcomes[i] for i in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        """Return the models served, for ``/readyz``."""
        return {"models": [msgspec.to_builtins(scorer.name) for scorer in self.scorers.values()]}

    async def close(self) -> None:
        """Close the store."""
        self._threads.shutdown()
        await self.store.close()

    async def _decide(self, tasks: list[Task]) -> None:
        """Give every task its decision or its error."""
        by_key: dict[str, Task] = {}
        again: list[Task] = []
        fresh: list[Task] = []
        for task in tasks:
            if task.key is None or not task.is_named:
                fresh.append(task)
            elif task.key in by_key:
                again.append(task)
            else:
                by_key[task.key] = task
        recalled = await self._recall(by_key)
        unrecorded: list[Task] = []
        for key, task in by_key.items():
            known = recalled.decided.get(key)
            if known is None:
                fresh.append(task)
            else:
                self.counts["rows_recalled"] += 1
                task.take(known)
                if key in recalled.unrecorded and task.decided is not None:
                    unrecorded.append(task)
        if fresh:
            await self._score(fresh, recalled)
        await self._record([task for task in (*fresh, *unrecorded) if task.key is not None], recalled)
        for task in again:
            first = by_key[task.key or ""]
            self.counts["rows_recalled"] += 1
            if first.decided is not None:
                task.take(first.decided)
                task.lacks = first.lacks
            else:
                task.error = first.error
        await self._explain([task for task in tasks if task.request.explain and task.decided is not None])
        for name in recalled.degraded:
            self.counts[f"degraded_{name}"] += len(fresh)

    async def _recall(self, tasks: Mapping[str, Task]) -> Recalled:
        if not tasks:
            return NOTHING
        rows = [task.row for task in tasks.values() if task.row.customer_id]
        customers = distinct(row.customer_id for row in rows)
        merchants = distinct(row.roles.get("merchant_id") for row in rows)
        started = time.perf_counter()
        recalled = await self.store.recall(list(tasks), customers, merchants)
        self._stage("recall", started)
        return recalled

    async def _score(self, tasks: list[Task], recalled: Recalled) -> None:
        if len(tasks) > INLINE_ROWS:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._score_now, tasks, recalled)
        else:
            self._score_now(tasks, recalled)

    def _score_now(self, tasks: list[Task], recalled: Recalled) -> None:
        for scorer, group in groupby(tasks, key=lambda task: task.scorer):
            some = list(group)
            challenger = self.challengers.get(scorer.name.name) if self.shadow is not None else None
            before = copy_of(recalled.histories) if challenger is not None else None
            started = time.perf_counter()
            X = _featurize(scorer, [task.row for task in some], recalled.histories)
            self._stage("featurize", started)
            started = time.perf_counter()
            margins, probabilities = scorer.score(X)
            self._stage("score", started)
            if self.on_scored is not None:
                self.on_scored(scorer, probabilities.tolist())
            degraded = list(recalled.degraded) if scorer.spec.kind == "transaction" else []
            for task, x, margin, probability in zip(some, X, margins.tolist(), probabilities.tolist(), strict=True):
                task.decided = _decided(task, scorer, x, margin, probability, degraded)
            self._contribute(scorer, some, X)
            if self.shadow is not None and challenger not in (None, scorer) and before is not None:
                decided = [task.decided for task in some if task.decided]
                self.shadow.offer(ShadowJob(challenger, [task.row.raw for task in some], before, decided))
        self.counts["rows"] += len(tasks)

    def _contribute(self, scorer: Scorer, tasks: Sequence[Task], X: Matrix) -> None:
        """Keep what each feature added, of the rows that it is asked for or recorded of."""
        recorded = [self.record_reasons and task.key is not None for task in tasks]
        wanted = [i for i, task in enumerate(tasks) if task.request.explain or recorded[i]]
        if not wanted:
            return
        started = time.perf_counter()
        contributions = scorer.contributions(X if len(wanted) == len(X) else X[wanted])
        strongest = scorer.explainer.strongest(contributions) if any(recorded) else None
        for at, i in enumerate(wanted):
            tasks[i].contributions = contributions[at]
            decided = tasks[i].decided
            if strongest is not None and recorded[i] and decided is not None:
                decided.reasons = strongest[at]
        self._stage("explain", started)

    async def _record(self, tasks: list[Task], recalled: Recalled) -> None:
        with_history = [task for task in tasks if task.row.customer_id]
        without = [task for task in tasks if not task.row.customer_id]
        for some, transactions in (
            (with_history, transactions_of([task.row for task in with_history])),
            (without, None),
        ):
            if not some:
                continue
            started = time.perf_counter()
            recorded = await self.store.record([task.decided for task in some if task.decided], transactions, recalled)
            self._stage("record", started)
            for task, decided in zip(some, recorded.decided, strict=True):
                task.lacks = recorded.degraded
                if decided is not task.decided:  # another worker was first
                    self.counts["rows_recalled"] += decided.key not in recalled.unrecorded
                    task.take(decided)

    async def _explain(self, tasks: list[Task]) -> None:
        served = {s.name.digest: s for s in (*self.past.values(), *self.scorers.values(), *(t.scorer for t in tasks))}
        by_digest: dict[str, list[Task]] = {}
        for task in tasks:
            if task.decided is None:
                continue
            digest = task.decided.model_digest
            if digest in served:
                by_digest.setdefault(digest, []).append(task)
            else:
                task.error = PastVersion(task.decided.model_name, digest, list(self.scorers))
        for digest, some in by_digest.items():
            if len(some) > INLINE_ROWS:
                await asyncio.get_running_loop().run_in_executor(self._threads, self._explain_now, served[digest], some)
            else:
                self._explain_now(served[digest], some)

    def _explain_now(self, scorer: Scorer, tasks: Sequence[Task]) -> None:
        """Explain rows as they were scored, by the version that did."""
        started = time.perf_counter()
        decided = [task.decided for task in tasks if task.decided is not None]
        X = np.frombuffer(b"".join([d.features for d in decided]), "<f8").reshape(len(decided), -1)
        if any(task.contributions is None for task in tasks):
            contributions = scorer.contributions(X)
        else:
            contributions = np.array([task.contributions for task in tasks])
        explained = scorer.explainer.explained(X, contributions)
        for task, of_task, explanation in zip(tasks, decided, explained, strict=True):
            task.explanation = explain_answer(of_task, explanation)
        self._stage("explain", started)

    async def _answer(self, request: ScoreRequest, tasks: Iterable[Task]) -> bytes | FraudError:
        rows: list[Prediction | Refused | None] = [None] * request.n_rows
        problems = {at: row for at, row in enumerate(request.rows) if isinstance(row, RequestError)}
        for task in tasks:
            if isinstance(task.error, PastVersion) and not request.is_second_try:
                return task.error
            self.counts["extra_fields"] += task.row.n_extra
            if task.error is not None:
                problems[task.at] = task.error
            elif task.decided is not None:
                row = task.explanation or predict_answer(task.decided)
                if task.lacks:
                    row.degraded = [*row.degraded, *task.lacks]
                    for name in task.lacks:
                        self.counts[f"degraded_{name}"] += 1
                rows[task.at] = row
        if problems:
            self.counts["rows_refused"] += len(problems)
            if len(problems) == request.n_rows:
                return RowsRefused([problems[at] for at in range(request.n_rows)])
            for at, problem in problems.items():
                rows[at] = Refused(transaction_id_of(request.raws[at]), problem_of(problem))
        if request.n_rows > CHUNK_ROWS:
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode_answer, rows)
        return encode_answer(rows)

    def _answer_plain(self, requests: Sequence[ScoreRequest]) -> list[bytes | FraudError]:
        """Answer `is_plain` requests with nothing on the way but the score."""
        outcomes: list[bytes | FraudError] = []
        for scorer, group in groupby(requests, key=lambda request: request.scorer):
            some = list(group)
            rows: list[Any] = [row for request in some for row in request.rows]
            started = time.perf_counter()
            _, probabilities = scorer.score(scorer.featurizer.ready(rows))
            self._stage("score", started)
            if self.on_scored is not None:
                self.on_scored(scorer, probabilities.tolist())
            answers = [plain_answer(scorer, probability) for probability in probabilities.tolist()]
            begin = 0
            for request in some:
                outcomes.append(encode_answer(answers[begin : begin + request.n_rows]))
                begin += request.n_rows
            self.counts["rows"] += begin
            self.counts["extra_fields"] += sum([row.n_extra for row in rows])
        return outcomes

    def _stage(self, name: str, started: float) -> None:
        if self.on_stage is not None:
            self.on_stage(name, time.perf_counter() - started)


def _featurize(scorer: Scorer, rows: Sequence[Row], histories: Histories) -> Matrix:
    if scorer.spec.kind == "features":
        return scorer.featurizer.ready(rows)
    return scorer.featurizer.advance(rows, histories)


def _decided(
    task: Task, scorer: Scorer, x: Any, margin: float, probability: float, degraded: list[str]
) -> DecisionRecord:
    row, request = task.row, task.request
    is_fraud, risk_level, decision = verdict_of(scorer.policy, probability)
    return DecisionRecord(
        row.transaction_id,
        task.fingerprint,
        scorer.name.name,
        scorer.name.digest,
        x.tobytes(),
        margin,
        probability,
        is_fraud,
        risk_level,
        decision,
        degraded,
        row.event_time_ms,
        request.now_ms,
        request.request_id,
        row.customer_id,
        row.roles.get("merchant_id"),
        row.amount,
    )
