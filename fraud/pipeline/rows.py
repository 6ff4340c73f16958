"""The pipeline's input and output: pending rows, decisions and rejections."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fraud.decisions.anomaly import Anomaly, decision_score
from fraud.decisions.rules.sets import MODEL
from fraud.decisions.verdict import Verdict
from fraud.detectors.explain import Explained
from fraud.errors import FraudError
from fraud.models.scorer import ModelName, Scorer
from fraud.schema import Reading, Row


class PendingRow(msgspec.Struct, gc=False):
    """One valid row before its decision.

    Attributes
    ----------
    row : Row
        As read by the decoder of `scorer`.
    scorer : Scorer
        The model version that decides.
    now_ms : int
        When it arrived, ms since the epoch: the processing time of its decision.
    explain : bool
        Whether the decision is to carry its explanation.
    request_id : str
        Under which the decision is recorded.
    path : str
        The row's path in its request, such as ``$.instances[2]``, for errors.
    contract : str
        The contract by which it came; empty for the product's own.
    reasons : bool
        Whether the decision is to carry its reasons, which an explanation puts into words at a higher cost.
    """

    row: Row
    scorer: Scorer
    now_ms: int
    explain: bool = False
    request_id: str = ""
    path: str = "$"
    contract: str = ""
    reasons: bool = False


class Decision(msgspec.Struct, gc=False):
    """The decision on one row.

    Attributes
    ----------
    transaction_id : str or None
        None if the row came without one and got none.
    model : ModelName
        The version that decided; for a repeated transaction the version of the first time.
    raw_margin : float
        In the unit of the model's detector.
    fraud_probability : float or None
        Calibrated; None from a model that is not.
    verdict : Verdict
    degraded : tuple of str
        What was missing for the score or its record because a store was off.
    is_repeat : bool
        Whether this is the earlier decision on a repeated transaction.
    explanation : Explained, optional
        Present if it was asked for.
    anomaly : Anomaly, optional
        How unusual the transaction is, from a model that measures it.
    reading : Reading, optional
        Set if the row arrived with the names of the table that trained the model.
    decided_by : str
        The id of the rule that decided, or ``model``.
    rules_hit : sequence of str
        The rules that fired and count.
    reasons : list of (str, float)
        The features that moved the score most, and the contribution of each in the unit of the raw margin; present if
        they were asked for, or recorded.
    anomaly_model : ModelName, optional
        Which model measured that, where it is not `model` itself.
    features : bytes
        The row of `X` as it was scored by `model`, float64 little-endian; empty for a row without an id.
    """

    transaction_id: str | None
    model: ModelName
    raw_margin: float
    fraud_probability: float | None
    verdict: Verdict
    degraded: tuple[str, ...] = ()
    is_repeat: bool = False
    explanation: Explained | None = None
    anomaly: Anomaly | None = None
    reading: Reading | msgspec.UnsetType = msgspec.UNSET
    decided_by: str = MODEL
    rules_hit: Sequence[str] = ()
    reasons: list[tuple[str, float]] = []
    anomaly_model: ModelName | None = None
    features: bytes = b""

    @property
    def decision_score(self) -> float:
        """The score that the verdict was made on."""
        return decision_score(self.fraud_probability, self.anomaly)


class Rejection(msgspec.Struct):
    """Why a row has no decision: a `RequestError` of its caller, or a temporary `StoreError`."""

    transaction_id: str | None
    error: FraudError


Outcome = Decision | Rejection
