"""The canary: a share of the customers is answered by the challenger of the model that they ask for."""

from __future__ import annotations

from hashlib import blake2b

from fraud.models.scorer import Scorer
from fraud.pipeline.requests import ScoreRequest
from fraud.pipeline.rows import PendingRow


def in_canary(customer_id: str, share: float) -> bool:
    """Return whether a customer is in the canary share; the same customers always are."""
    return int.from_bytes(blake2b(customer_id.encode(), digest_size=8).digest(), "big") < share * 2**64


def for_canary(request: ScoreRequest, challenger: Scorer, share: float) -> ScoreRequest:
    """Return the request read by the challenger, or unchanged if the champion answers it.

    One version answers a whole request. The challenger answers if all rows belong to one customer (ready features: one
    transaction id) in the canary, and it can read every row.
    """
    if not request.is_read:
        return request
    customers = {row.row.customer_id or row.row.transaction_id for row in request.rows if isinstance(row, PendingRow)}
    customer = customers.pop() if len(customers) == 1 else None
    if customer is None or not in_canary(customer, share) or not _all_pending(request):
        return request
    other = request.of(challenger, request.raws)
    while not other.is_read:
        other.read_some()
    return other if _all_pending(other) else request


def _all_pending(request: ScoreRequest) -> bool:
    return all(isinstance(row, PendingRow) for row in request.rows)
