"""What enters the pipeline and what leaves it: rows that wait for a decision, decisions, and rejections."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fraud.decisions.verdict import Verdict
from fraud.detectors.explain import Explained
from fraud.errors import FraudError
from fraud.models.scorer import ModelName, Scorer
from fraud.schema import Row


class PendingRow(msgspec.Struct, gc=False):
    """One valid row that waits for its decision.

    Attributes
    ----------
    row : Row
        As the decoder of `scorer` read it.
    scorer : Scorer
        The model version that decides.
    now_ms : int
        When it arrived, ms since the epoch: the processing time of its decision.
    explain : bool
        Whether the decision is to carry its explanation.
    request_id : str
        Under which the decision is recorded.
    path : str
        Where the row stood in its request, such as ``$.instances[2]``; errors name it.
    """

    row: Row
    scorer: Scorer
    now_ms: int
    explain: bool = False
    request_id: str = ""
    path: str = "$"


class Decision(msgspec.Struct, gc=False):
    """What was decided on one row.

    Attributes
    ----------
    transaction_id : str or None
        None where the row came without one and none was given to it.
    model : ModelName
        The version that decided; for a repeated transaction the one that decided then.
    raw_margin : float
        Log-odds.
    fraud_probability : float
        Calibrated.
    verdict : Verdict
    degraded : tuple of str
        What the score, or its record, had to do without.
    is_repeat : bool
        Whether the transaction was decided before, and this is the decision it had.
    explanation : Explained, optional
        Where it was asked for.
    """

    transaction_id: str | None
    model: ModelName
    raw_margin: float
    fraud_probability: float
    verdict: Verdict
    degraded: tuple[str, ...] = ()
    is_repeat: bool = False
    explanation: Explained | None = None


class Rejection(msgspec.Struct):
    """Why there is no decision on a row: a `RequestError` of its caller, or a `StoreError` that passes."""

    transaction_id: str | None
    error: FraudError


Outcome = Decision | Rejection


def are_plain(rows: Sequence[PendingRow]) -> bool:
    """Tell whether there is nothing to recall, to record or to explain: ready features without an id."""
    for row in rows:
        if row.explain or row.row.transaction_id is not None or row.scorer.spec.kind != "features":
            return False
    return True
