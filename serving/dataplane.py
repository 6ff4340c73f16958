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

from fraud.errors import FraudError, IdempotencyConflict, RequestError, StoreError, UnknownModel
from fraud.events import Decided, fingerprint, key_of
from fraud.features import Histories, Matrix, transactions_of
from fraud.schema import MAX_ID_LENGTH, Row, decode_envelope
from fraud.scorer import Scorer
from fraud.stores import Recalled, Store, distinct
from serving.answers import (
    Prediction,
    Refused,
    RowsRefused,
    encode_answer,
    explain_answer,
    predict_answer,
    problem_of,
)

CHUNK_ROWS = 64
"""Rows decoded or encoded before the event loop gets a turn."""
INLINE_ROWS = 64
INLINE_EXPLAINED = 4
"""Rows scored, and explained, on the event loop itself; more of them go to a thread."""


class ScoreRequest:
    """One caller's rows, decoded as far as `decoded` says, with the model version that answers them all."""

    __slots__ = ("explain", "n_rows", "now_ms", "raws", "request_id", "rows", "scorer")

    def __init__(
        self, scorer: Scorer, raws: Sequence[msgspec.Raw], explain: bool, now_ms: int, request_id: str
    ) -> None:
        self.scorer = scorer
        self.raws = raws
        self.n_rows = len(raws)
        self.explain = explain
        self.now_ms = now_ms
        self.request_id = request_id
        self.rows: list[Row | RequestError] = []

    @property
    def decoded(self) -> bool:
        return len(self.rows) == self.n_rows

    def decode_some(self) -> None:
        """Decode the next `CHUNK_ROWS` rows; a bad one is kept as its error."""
        decode = self.scorer.decoder.decode
        for i in range(len(self.rows), min(len(self.rows) + CHUNK_ROWS, self.n_rows)):
            try:
                self.rows.append(decode(self.raws[i], f"$.instances[{i}]", self.now_ms))
            except RequestError as error:
                self.rows.append(error)
        if self.decoded and all(isinstance(row, RequestError) for row in self.rows):
            raise RowsRefused([row for row in self.rows if isinstance(row, RequestError)])


class _Task:
    """One valid row on its way to its place in its caller's answer."""

    __slots__ = ("at", "decided", "error", "explanation", "fingerprint", "key", "request", "row")

    def __init__(self, request: ScoreRequest, at: int, row: Row) -> None:
        self.request = request
        self.at = at
        self.row = row
        self.key: str | None = None
        self.fingerprint = b""
        if row.transaction_id is not None:
            scope = None if row.customer_id else request.scorer.name.name
            self.key = key_of(row.transaction_id, scope)
            self.fingerprint = fingerprint(row)
        self.decided: Decided | None = None
        self.explanation: Prediction | None = None
        self.error: RequestError | None = None

    @property
    def scorer(self) -> Scorer:
        return self.request.scorer

    def take(self, decided: Decided) -> None:
        """Answer with a decision on record, if it was made of the same row."""
        if decided.said_the_same(self.fingerprint, self.scorer.name.digest):
            self.decided = decided
        else:
            assert self.row.transaction_id is not None
            self.error = IdempotencyConflict(self.row.transaction_id, f"$.instances[{self.at}].transaction_id")


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

    Attributes
    ----------
    counts : Counter
        Since the start: ``rows`` scored, ``rows_refused``, ``rows_recalled``, ``extra_fields`` ignored,
        and ``degraded_<name>``.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        store: Store,
        on_stage: Callable[[str, float], None] | None = None,
    ) -> None:
        self.scorers = dict(scorers)
        self.store = store
        self.on_stage = on_stage
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
        return request

    async def run(self, requests: Sequence[ScoreRequest]) -> list[bytes | FraudError]:
        """Answer a micro-batch: each caller's JSON, or the error that is its own."""
        outcomes: dict[int, bytes | FraudError] = {}
        for i, request in enumerate(requests):
            try:
                while not request.decoded:
                    await asyncio.sleep(0)
                    request.decode_some()
            except RequestError as error:
                outcomes[i] = error
        tasks = {
            i: [_Task(request, at, row) for at, row in enumerate(request.rows) if isinstance(row, Row)]
            for i, request in enumerate(requests)
            if i not in outcomes
        }
        try:
            degraded = await self._decide([task for of_request in tasks.values() for task in of_request])
        except StoreError as error:
            return [outcomes.get(i, error) for i in range(len(requests))]
        for i, of_request in tasks.items():
            outcomes[i] = await self._answer(requests[i], of_request, degraded)
        return [outcomes[i] for i in range(len(requests))]

    def describe(self) -> dict[str, Any]:
        """Return the models served, for ``/readyz``."""
        return {"models": [msgspec.to_builtins(scorer.name) for scorer in self.scorers.values()]}

    async def close(self) -> None:
        """Close the store."""
        self._threads.shutdown()
        await self.store.close()

    async def _decide(self, tasks: list[_Task]) -> tuple[str, ...]:
        """Give every task its decision or its error; return what the store could not do in time."""
        by_key: dict[str, _Task] = {}
        again: list[_Task] = []
        fresh: list[_Task] = []
        for task in tasks:
            if task.key is None:
                fresh.append(task)
            elif task.key in by_key:
                again.append(task)
            else:
                by_key[task.key] = task
        recalled = await self._recall(by_key)
        for key, task in by_key.items():
            known = recalled.decided.get(key)
            if known is None:
                fresh.append(task)
            else:
                self.counts["rows_recalled"] += 1
                task.take(known)
        degraded: tuple[str, ...] = ()
        if fresh:
            await self._score(fresh, recalled)
            degraded = await self._record([task for task in fresh if task.key is not None])
        for task in again:
            first = by_key[task.key or ""]
            self.counts["rows_recalled"] += 1
            if first.decided is not None:
                task.take(first.decided)
            else:
                task.error = first.error
        await self._explain([task for task in tasks if task.request.explain and task.decided is not None])
        for name in (*recalled.degraded, *degraded):
            self.counts[f"degraded_{name}"] += len(fresh)
        return degraded

    async def _recall(self, tasks: Mapping[str, _Task]) -> Recalled:
        rows = [task.row for task in tasks.values() if task.row.customer_id]
        customers = distinct(row.customer_id for row in rows)
        merchants = distinct(row.roles.get("merchant_id") for row in rows)
        if not tasks:
            return Recalled({}, Histories.new(()))
        started = time.perf_counter()
        recalled = await self.store.recall(list(tasks), customers, merchants)
        self._stage("recall", started)
        return recalled

    async def _score(self, tasks: list[_Task], recalled: Recalled) -> None:
        if len(tasks) > INLINE_ROWS:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._score_now, tasks, recalled)
        else:
            self._score_now(tasks, recalled)

    def _score_now(self, tasks: list[_Task], recalled: Recalled) -> None:
        for scorer, group in groupby(tasks, key=lambda task: task.scorer):
            some = list(group)
            started = time.perf_counter()
            X = _featurize(scorer, [task.row for task in some], recalled.histories)
            self._stage("featurize", started)
            started = time.perf_counter()
            margins, probabilities = scorer.score(X)
            self._stage("score", started)
            degraded = list(recalled.degraded) if scorer.spec.kind == "transaction" else []
            for task, x, margin, probability in zip(some, X, margins.tolist(), probabilities.tolist(), strict=True):
                task.decided = _decided(task, scorer, x, margin, probability, degraded)
        self.counts["rows"] += len(tasks)

    async def _record(self, tasks: list[_Task]) -> tuple[str, ...]:
        degraded: tuple[str, ...] = ()
        with_history = [task for task in tasks if task.row.customer_id]
        without = [task for task in tasks if not task.row.customer_id]
        for some, transactions in (
            (with_history, transactions_of([task.row for task in with_history])),
            (without, None),
        ):
            if not some:
                continue
            started = time.perf_counter()
            recorded = await self.store.record([task.decided for task in some if task.decided], transactions)
            self._stage("record", started)
            degraded += recorded.degraded
            for task, decided in zip(some, recorded.decided, strict=True):
                if decided is not task.decided:  # another worker was first
                    self.counts["rows_recalled"] += 1
                    task.decided = None
                    task.take(decided)
        return degraded

    async def _explain(self, tasks: list[_Task]) -> None:
        if len(tasks) > INLINE_EXPLAINED:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._explain_now, tasks)
        elif tasks:
            self._explain_now(tasks)

    def _explain_now(self, tasks: list[_Task]) -> None:
        """Explain rows as they were scored, by the version that did."""
        started = time.perf_counter()
        served = {scorer.name.digest: scorer for scorer in (*self.scorers.values(), *(t.scorer for t in tasks))}
        by_digest: dict[str, list[tuple[_Task, Decided]]] = {}
        for task in tasks:
            if task.decided is not None:
                by_digest.setdefault(task.decided.model_digest, []).append((task, task.decided))
        for digest, some in by_digest.items():
            scorer = served.get(digest)
            if scorer is None:
                for task, decided in some:
                    task.error = UnknownModel(f"{decided.model_name} {digest}", list(served))
                continue
            X = np.frombuffer(b"".join(decided.features for _, decided in some), "<f8").reshape(len(some), -1)
            for (task, decided), x, contributions in zip(some, X, scorer.contributions(X), strict=True):
                task.explanation = explain_answer(decided, scorer, x, contributions)
        self._stage("explain", started)

    async def _answer(
        self, request: ScoreRequest, tasks: Iterable[_Task], degraded: tuple[str, ...]
    ) -> bytes | FraudError:
        rows: list[Prediction | Refused | None] = [None] * request.n_rows
        problems = {at: row for at, row in enumerate(request.rows) if isinstance(row, RequestError)}
        for task in tasks:
            self.counts["extra_fields"] += task.row.n_extra
            if task.error is not None:
                problems[task.at] = task.error
            elif task.decided is not None:
                row = task.explanation or predict_answer(task.decided)
                if degraded and task.key is not None:
                    row.degraded = [*row.degraded, *degraded]
                rows[task.at] = row
        if problems:
            self.counts["rows_refused"] += len(problems)
            if len(problems) == request.n_rows:
                return RowsRefused([problems[at] for at in range(request.n_rows)])
            for at, problem in problems.items():
                rows[at] = Refused(_transaction_id(request.raws[at]), problem_of(problem))
        if request.n_rows > CHUNK_ROWS:
            return await asyncio.get_running_loop().run_in_executor(self._threads, encode_answer, rows)
        return encode_answer(rows)

    def _stage(self, name: str, started: float) -> None:
        if self.on_stage is not None:
            self.on_stage(name, time.perf_counter() - started)


def _featurize(scorer: Scorer, rows: Sequence[Row], histories: Histories) -> Matrix:
    if scorer.spec.kind == "features":
        return scorer.featurizer.ready(rows)
    return scorer.featurizer.advance(rows, histories)


def _decided(task: _Task, scorer: Scorer, x: Any, margin: float, probability: float, degraded: list[str]) -> Decided:
    row, request = task.row, task.request
    is_fraud, risk_level, decision = scorer.policy.decide(probability)
    return Decided(
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


_any = msgspec.json.Decoder(dict[str, Any])


def _transaction_id(raw: msgspec.Raw) -> str | None:
    """Return the id of a bad row where it has a usable one."""
    try:
        name = _any.decode(raw).get("transaction_id")
    except msgspec.DecodeError:
        return None
    return name if isinstance(name, str) and len(name) <= MAX_ID_LENGTH else None
