"""The canary: a share of the customers is answered by the challenger of the model that they ask for."""

from __future__ import annotations

from hashlib import blake2b

from fraud.models.scorer import Scorer
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import PendingRow


def in_canary(customer_id: str, share: float) -> bool:
    """Tell whether a customer is among the share whom the challenger answers: always the same ones."""
    return int.from_bytes(blake2b(customer_id.encode(), digest_size=8).digest(), "big") < share * 2**64


def for_canary(request: ScoreRequest, challenger: Scorer, share: float) -> ScoreRequest:
    """Return the request as the challenger reads it, or unchanged where the champion is to answer.

    One version answers a whole request. It is the challenger's when all of its rows are of one customer (ready
    features: of one transaction id) who is in the canary, and when the challenger can read every one of them.
    """
    if not request.is_read:
        return request
    customers = {row.row.customer_id or row.row.transaction_id for row in request.rows if isinstance(row, PendingRow)}
    customer = customers.pop() if len(customers) == 1 else None
    if customer is None or not in_canary(customer, share) or not _all_pending(request):
        return request
    other = ScoreRequest(
        challenger, request.raws, explain=request.explain, now_ms=request.now_ms, request_id=request.request_id
    )
    while not other.is_read:
        other.read_some()
    return other if _all_pending(other) else request


def _all_pending(request: ScoreRequest) -> bool:
    return all(isinstance(row, PendingRow) for row in request.rows)
