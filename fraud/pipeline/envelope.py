"""The envelope of the contract anomaly-inference: a transaction of a user, which HTTP and a stream take alike."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from fraud.errors import InvalidRequest
from fraud.forms import fields_of
from fraud.schema import MAX_ID_LENGTH

NAMES = {"tx_id": "transaction_id", "merchant": "merchant_id", "time": "event_time"}
"""Fields of the contract's transaction, and what they are in a row; others keep their names."""
PLACES = {
    **{own: f"$.transaction.{name}" for name, own in NAMES.items()},
    "customer_id": "$.user_id",
}
MISSING = "missing "
"""How a refused row begins to say which fields it lacks."""
ID = {"type": ["string", "integer"], "minLength": 1, "maxLength": MAX_ID_LENGTH}

Transaction = Annotated[
    msgspec.Raw,
    Meta(
        description="The transaction; a model may read further fields of it, by the names of its mapping.",
        extra_json_schema={
            "type": "object",
            "required": ["tx_id", "amount"],
            "properties": {
                "tx_id": ID,
                "amount": {"type": "number", "exclusiveMinimum": 0},
                "currency": {"type": "string"},
                "merchant": ID,
                "time": {"type": "string", "description": "RFC 3339 with a zone; when it arrives, if left out"},
            },
            "additionalProperties": True,
        },
    ),
]


class InferenceBody(msgspec.Struct):
    """One transaction of a user."""

    user_id: Annotated[msgspec.Raw, Meta(extra_json_schema=ID)]
    transaction: Transaction


def row_of(said: InferenceBody) -> dict[str, msgspec.Raw]:
    """Return the fields of a row as `/predict` takes it, undecoded; without ``event_time`` if no time was sent.

    Raises
    ------
    InvalidRequest
        The transaction is no object, or has no id.
    """
    fields = fields_of(bytes(said.transaction), "$.transaction", "a transaction")
    row = {NAMES.get(name, name): value for name, value in fields.items()}
    if "tx_id" not in fields:
        raise InvalidRequest("Object missing required field `tx_id`", "$.transaction")
    return {**row, "customer_id": said.user_id}


def in_contract(error: InvalidRequest) -> InvalidRequest:
    """Return the refusal of a row with the path that its field has in the contract."""
    _, is_field, name = (error.path or "").rpartition("].")
    if not is_field and error.message.startswith(MISSING):
        first = error.message.removeprefix(MISSING).partition(",")[0]
        place = PLACES.get(first, f"$.transaction.{first}")
        return InvalidRequest(f"Object missing required field `{place.rpartition('.')[2]}`", "$.transaction")
    return InvalidRequest(error.message, PLACES.get(name, f"$.transaction.{name}") if is_field else "$.transaction")
