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


def _merchant(row: Row) -> dict[str, Any]:
    if "amt" in row:
        return without_id(row)
    return {"amt": row.get("amount", 12.5), "hour": 14, "day_of_week": 2, "category": row.get("category", "fuel")}


BANK_NAMES = {
    **{name: name for name in ("transaction_id", "event_time", "customer_id", "device_id", "channel")},
    "amount": "transaction_amount",
    "category": "merchant_category",
}
"""The fields of a row that a bank's transaction has, with their names there."""


def _bank(row: Row) -> dict[str, Any]:
    return {"transaction_amount": 12.5} | {BANK_NAMES[name]: value for name, value in row.items() if name in BANK_NAMES}


def _tensors(rows: Sequence[Row]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {"inputs": [_tensor(name, [row.get(name) for row in rows]) for name in names]}


def _tensor(name: str, values: list[Any]) -> dict[str, Any]:
    kinds = {type(value) for value in values} - {type(None)}
    datatype = "BYTES" if str in kinds else "BOOL" if kinds == {bool} else "FP64"
    return {"name": name, "shape": [len(values)], "datatype": datatype, "data": values}


def _of_tensors(answer: Any) -> list[float]:
    by_name = {output["name"]: output["data"] for output in answer["outputs"]}
    probabilities: list[float] = by_name["fraud_probability"]
    return probabilities


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
    "merchant-form": (
        Carrier("/predict/", lambda rows, _: _merchant(rows[0]), lambda answer: [answer["fraud_probability"]]),
        Carrier(
            "/predict/batch",
            lambda rows, _: [_merchant(row) for row in rows],
            lambda answer: [verdict["fraud_probability"] for verdict in answer],
            MAX_INSTANCES,
        ),
    ),
    "bank-transaction": (
        Carrier("/predict", lambda rows, _: _bank(rows[0]), lambda answer: [answer["fraud_probability"]], has_id=True),
    ),
    "open-inference": tuple(
        Carrier(f"{path}/infer", lambda rows, _: _tensors(rows), _of_tensors, MAX_INSTANCES, has_id=True)
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    ),
    "kserve-v1": (_predict("/v1/models/{name}:predict"),),
    "sagemaker": (_predict("/invocations"),),
}
"""The carriers of every contract of the product, by its name."""
