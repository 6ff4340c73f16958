"""How each contract carries a row: the request that a client of it sends, and the probability in its answer.

A row is an instance as `/predict` takes it. Whoever adds a contract adds its carriers here: the checks, the tests that
compare contracts, and the benchmark go over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fraud.schema import MAX_INSTANCES

Row = Mapping[str, Any]


class Carrier(NamedTuple):
    """One route of a contract that scores.

    Attributes
    ----------
    path : str
        As the route declares it.
    body : callable
        Makes the body, as JSON, of rows and the name of the model.
    probabilities : callable
        Reads the score of each row from an answer: its probability, or its anomaly score.
    most : int
        Rows that it takes at once.
    has_id : bool
        Whether the body carries the transaction id; otherwise the header Idempotency-Key does.
    """

    path: str
    body: Callable[[Sequence[Row], str], Any]
    probabilities: Callable[[Any], list[float]]
    most: int = 1
    has_id: bool = False


def without_id(row: Row) -> dict[str, Any]:
    """Return a row without its transaction id."""
    return {name: value for name, value in row.items() if name != "transaction_id"}


def _predict(path: str) -> Carrier:
    return Carrier(
        path,
        lambda rows, model: {"instances": rows, "model": model},
        lambda answer: [prediction["fraud_probability"] for prediction in answer["predictions"]],
        MAX_INSTANCES,
        has_id=True,
    )


def _transaction(row: Row) -> dict[str, Any]:
    """Return a row as a transaction of the contract anomaly-inference."""
    names = {"transaction_id": "tx_id", "merchant_id": "merchant", "event_time": "time"}
    return {names.get(name, name): value for name, value in row.items() if name != "customer_id"}


OWN = (_predict("/predict"), _predict("/explain"))
"""The product's own routes."""

CARRIERS: dict[str, tuple[Carrier, ...]] = {
    "application-score": (
        Carrier(
            "/api/v1/score",
            lambda rows, _: {"features": without_id(rows[0]), "request_id": "r-1"},
            lambda answer: [answer["confidence_score"]],
        ),
    ),
    "registry-predict": (_predict("/v1/predict"),),
    "anomaly-inference": (
        Carrier(
            "/v1/inference",
            lambda rows, _: {"user_id": rows[0].get("customer_id", "u-1"), "transaction": _transaction(rows[0])},
            lambda answer: [answer["anomaly_score"]],
            has_id=True,
        ),
    ),
}
"""The carriers of every contract of the product, by its name."""
