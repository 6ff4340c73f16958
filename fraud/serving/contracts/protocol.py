"""What a contract is: the routes, answers and errors that clients of another system know, over a model served here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from fraud.errors import FraudError, NotReady
from fraud.models.scorer import Scorer
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import Decision, Outcome, Rejection
from fraud.schema import Kind
from fraud.serving.bodies import expect_count
from fraud.serving.contract import ContractStatus
from fraud.serving.engine import Engine
from fraud.serving.http import JSON, Answer, Call, ErrorShape, Headers, Route
from fraud.serving.parameters import idempotency_key
from fraud.settings import Settings

MAX_DECISIONS_SHOWN = 64
"""Rows up to which X-Fraud-Decision is sent: clients limit the length of a header."""

Misfit = Callable[[Scorer], str | None]
"""Says why a contract cannot score with a model; None if it can."""


def needs_probability(kind: Kind) -> Misfit:
    """Return the check of a contract that takes every model of one kind with a calibrated probability."""

    def misfit(scorer: Scorer) -> str | None:
        if scorer.spec.kind != kind:
            return f"it is a {scorer.spec.kind} model; a {kind} model is needed"
        return None if scorer.detector.is_calibrated else "it gives no calibrated probability"

    return misfit


@dataclass(frozen=True)
class OtherBody:
    """A body that a contract takes on `/predict`, which has the product's own form where it holds `instances`.

    Parameters
    ----------
    field : str
        The field that says that a body without `instances` is the contract's.
    request, answer : type
        The msgspec types of its body and answer.
    handler : callable
        ``async handler(call, body)``. Its errors have the shape of `/predict`.
    """

    field: str
    request: type[msgspec.Struct]
    answer: type[msgspec.Struct]
    handler: Callable[[Call, bytes], Awaitable[Answer]]


@dataclass(frozen=True)
class Contract:
    """One contract, as its module declares it.

    Parameters
    ----------
    name : str
        Stands in FRAUD_CONTRACTS, in FRAUD_CONTRACT_MODELS and with every decision.
    errors : ErrorShape
        Encodes the errors of its routes and of undeclared paths under its prefixes.
    routes : callable
        ``routes(model, settings)`` returns its routes; each has its own `errors`.
    misfit : callable
        Says why a model does not fit the contract.
    prefixes : tuple of str
        Such as ``/api/v1``.
    needs_anomaly : bool
        Whether its model has to measure anomalies, itself or by the anomaly model beside it.
    on_predict : callable, optional
        ``on_predict(model, settings)`` returns the body that it takes on `/predict`.
    """

    name: str
    errors: ErrorShape
    routes: Callable[[ContractModel, Settings], Iterable[Route]]
    misfit: Misfit
    prefixes: tuple[str, ...] = ()
    needs_anomaly: bool = False
    on_predict: Callable[[ContractModel, Settings], OtherBody] | None = None


class ContractModel:
    """The model behind one contract: the one that FRAUD_CONTRACT_MODELS names, else the first served one that fits.

    Parameters
    ----------
    contract : Contract
    engine : Engine
    named : str, optional
        The name of the model.
    """

    def __init__(self, contract: Contract, engine: Engine, named: str | None = None) -> None:
        self.contract = contract
        self.engine = engine
        self._named = named
        self._found: tuple[Mapping[str, Scorer], Scorer | None, str] = ({}, None, "no model is loaded yet")

    def scorer(self) -> Scorer:
        """Return the version in service.

        Raises
        ------
        NotReady
            No model is loaded, or none that fits.
        """
        scorer, problem = self._find(self.engine.pipeline.scorers)
        if scorer is None:
            raise NotReady(problem)
        return scorer

    def read(
        self,
        call: Call,
        rows: Sequence[bytes | msgspec.Raw],
        *,
        explain: bool = False,
        reasons: bool = False,
        request_id: str = "",
        model: str | None = None,
    ) -> ScoreRequest:
        """Return rows of JSON, each as `/predict` takes it, as a request for `Engine.decide`.

        A row without an id has that of the header Idempotency-Key. `reasons` are what moved the score most, `explain`
        asks for them in words. `request_id` traces; the call's own by default.
        `model` is another served model than the contract's, which the body names.

        Raises
        ------
        InvalidRequest
            There are no rows or too many, or the idempotency key is none.
        NotReady, Overloaded
            As `Engine.admit`; `NotReady` also if no model fits.
        UnknownModel
            No model `model` is served.
        """
        pipeline = self.engine.admit()
        expect_count(len(rows), "rows")
        return pipeline.read(
            rows,
            model=model or self.scorer().name.name,
            explain=explain,
            request_id=request_id or call.request_id,
            contract=self.contract.name,
            transaction_id=idempotency_key(call),
            reasons=reasons,
        )

    async def decide(
        self,
        call: Call,
        rows: Sequence[bytes | msgspec.Raw],
        *,
        explain: bool = False,
        request_id: str = "",
        model: str | None = None,
    ) -> list[Outcome]:
        """Decide on rows, read as `read` does; returns their outcomes in order, and raises as `read` does."""
        return await self.engine.decide(self.read(call, rows, explain=explain, request_id=request_id, model=model))

    async def decide_one(
        self, call: Call, row: bytes | msgspec.Raw, *, explain: bool = False, request_id: str = ""
    ) -> Decision:
        """Decide on one row as `decide` does; raises the error of a row that is rejected."""
        (outcome,) = await self.decide(call, [row], explain=explain, request_id=request_id)
        return decision_of(outcome)

    def status(self) -> ContractStatus:
        """Return what the contract scores with; raises `NotReady` if no model is loaded."""
        scorer, problem = self._find(self.engine.pipeline.scorers)
        if scorer is None:
            return ContractStatus(self.contract.name, None, problem)
        return ContractStatus(self.contract.name, scorer.name.name, None)

    def _find(self, scorers: Mapping[str, Scorer]) -> tuple[Scorer | None, str]:
        """Return the scorer among those served, or why there is none; a swap replaces the mapping, so it is kept."""
        if self._found[0] is not scorers:
            self._found = (scorers, *self._choose(scorers))
        return self._found[1:]

    def _choose(self, scorers: Mapping[str, Scorer]) -> tuple[Scorer | None, str]:
        candidates = scorers if self._named is None else {n: s for n, s in scorers.items() if n == self._named}
        problems = {name: self._problem(scorer) for name, scorer in candidates.items()}
        for name, problem in problems.items():
            if problem is None:
                return scorers[name], ""
        said = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        return None, said or f"model {self._named!r}, which FRAUD_CONTRACT_MODELS names, is not served here"

    def _problem(self, scorer: Scorer) -> str | None:
        """Return why a model cannot serve the contract."""
        problem = self.contract.misfit(scorer)
        if problem is not None or not self.contract.needs_anomaly or scorer.measures_anomaly:
            return problem
        beside = self.engine.pipeline.beside
        if beside is None:
            return "it measures no anomaly, and FRAUD_ANOMALY_MODEL names no model that does"
        return beside.misfit(scorer)


def field_of(error: FraudError) -> str:
    """Return the field of a row that an error is about, or "" if it is about the whole row."""
    _, in_row, name = (error.path or "").rpartition("].")
    return name if in_row else ""


def decision_of(outcome: Outcome) -> Decision:
    """Return a decision; raises the error of a rejection."""
    if isinstance(outcome, Rejection):
        raise outcome.error
    return outcome


def probability_of(decision: Decision) -> float:
    """Return the calibrated probability of a decision by a model that `needs_probability` lets through."""
    assert decision.fraud_probability is not None
    return decision.fraud_probability


def decided_headers(outcomes: Sequence[Outcome]) -> Headers:
    """Return the headers of an answer to some rows: X-Fraud-Decision has the decision of each, in order.

    The header is left out beyond `MAX_DECISIONS_SHOWN` rows; a row that was rejected is ``refused``.
    """
    if len(outcomes) > MAX_DECISIONS_SHOWN:
        return JSON
    return _headers(tuple(["refused" if isinstance(o, Rejection) else o.verdict.decision for o in outcomes]))


@lru_cache(64)
def _headers(decisions: tuple[str, ...]) -> Headers:
    return (*JSON, (b"x-fraud-decision", ", ".join(decisions).encode("ascii")))
