"""The contract of a bank's service: one transaction on `/predict`, answered with a risk level in a word."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fraud.decisions.record import decision_key_of
from fraud.errors import FraudError, IdempotencyConflict
from fraud.models.scorer import Scorer
from fraud.pipeline.in_flight import given_id
from fraud.pipeline.rows import Decision, Outcome, Rejection
from fraud.serving.bodies import decode_body
from fraud.serving.contract import ID_SCHEMA
from fraud.serving.contracts.protocol import (
    Contract,
    ContractModel,
    OtherBody,
    decided_headers,
    field_of,
    needs_probability,
    probability_of,
)
from fraud.serving.http import ONE_SHAPE, Answer, Call
from fraud.serving.parameters import idempotency_key
from fraud.settings import ContractSettings, Settings

EXAMPLE = '{"customer_id": "c-17", "transaction_amount": 129.9, "device_id": "d-4", "merchant_category": "travel", ...}'
OWN_NAMES = {"transaction_amount": "amount", "merchant_category": "category"}
"""The contract's fields that have another name in a row of `/predict`."""
_BANK_NAMES = {own: name for name, own in OWN_NAMES.items()}

Number = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": "number", "exclusiveMinimum": 0})]
Id = Annotated[msgspec.Raw, Meta(extra_json_schema=ID_SCHEMA)]
Text = Annotated[msgspec.Raw, Meta(extra_json_schema={"type": ["string", "integer", "null"]})]


class BankTransaction(msgspec.Struct, omit_defaults=True):
    """One transaction. Its time is its arrival where it carries none, and it gets an id where it has none."""

    transaction_amount: Number
    customer_id: Id | msgspec.UnsetType = msgspec.UNSET
    device_id: Text | msgspec.UnsetType = msgspec.UNSET
    merchant_category: Text | msgspec.UnsetType = msgspec.UNSET
    channel: Text | msgspec.UnsetType = msgspec.UNSET
    transaction_id: Id | msgspec.UnsetType = msgspec.UNSET
    event_time: Text | msgspec.UnsetType = msgspec.UNSET


class BankScore(msgspec.Struct):
    """How likely a transaction is fraud."""

    fraud_probability: Annotated[float, Meta(ge=0, le=1, description="calibrated")]
    risk_level: Literal["High", "Medium", "Low"]
    is_fraud: Literal[0, 1]
    transaction_id: str | None


_decode = msgspec.json.Decoder(BankTransaction)
_encode = msgspec.json.Encoder().encode
_FIELD = re.compile(r"\b(amount|category)\b")


def bank_body(model: ContractModel, settings: Settings) -> OtherBody:
    """The body with `transaction_amount` that `/predict` takes beside its own."""

    async def score(call: Call, body: bytes) -> Answer:
        said = decode_body(_decode, body, EXAMPLE)
        outcome = await decide(model, call, said)
        if isinstance(outcome, Rejection):
            raise under_bank_names(outcome.error)
        answer = score_of(outcome, settings.contracts)
        return Answer(_encode(answer), headers=decided_headers([outcome]))

    return OtherBody("transaction_amount", BankTransaction, BankScore, score)


def takes_the_transaction(scorer: Scorer) -> str | None:
    """Say why a model cannot score transactions of the bank; None if it can."""
    if (problem := needs_probability("transaction")(scorer)) is not None:
        return problem
    needed = [role.name for role in scorer.spec.roles if not role.missing]
    needed += [feature.name for feature in scorer.spec.requested if not feature.missing]
    carried = {OWN_NAMES.get(name, name) for name in BankTransaction.__struct_fields__}
    others = sorted({*needed} - carried)
    return f"it needs {', '.join(others)}, which the bank's transactions have not" if others else None


BANK_TRANSACTION = Contract(
    "bank-transaction", ONE_SHAPE, lambda model, settings: (), takes_the_transaction, on_predict=bank_body
)


async def decide(model: ContractModel, call: Call, said: BankTransaction) -> Outcome:
    """Decide on a transaction; one that is sent again without a time has the time of the first."""
    row: dict[str, object] = {
        OWN_NAMES.get(name, name): value
        for name in said.__struct_fields__
        if (value := getattr(said, name)) is not msgspec.UNSET
    }
    if said.transaction_id is msgspec.UNSET:
        row["transaction_id"] = idempotency_key(call) or given_id()
    if said.event_time is not msgspec.UNSET:
        return (await model.decide(call, [_encode(row)]))[0]
    now_ms = time.time_ns() // 1_000_000
    (outcome,) = await model.decide(call, [_encode(row | {"event_time": rfc3339(now_ms)})])
    if isinstance(outcome, Rejection) and isinstance(outcome.error, IdempotencyConflict) and outcome.transaction_id:
        key = decision_key_of(outcome.transaction_id, None)
        earlier = (await model.engine.pipeline.store.recall([key], [], [])).decided.get(key)
        if earlier is not None:
            (outcome,) = await model.decide(call, [_encode(row | {"event_time": rfc3339(earlier.event_time_ms)})])
    return outcome


def rfc3339(ms: int) -> str:
    """Return a time in ms since the epoch as RFC 3339."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")


def under_bank_names(error: FraudError) -> FraudError:
    """Return the error of a row with the contract's names of its fields."""
    name = field_of(error)
    error.path = f"$.{_BANK_NAMES.get(name, name)}" if name else "$"
    if error.message.startswith("missing "):
        error.message = _FIELD.sub(lambda match: _BANK_NAMES[match[1]], error.message)
    return error


def score_of(decision: Decision, settings: ContractSettings) -> BankScore:
    """Return what the contract says of a decision."""
    probability = probability_of(decision)
    level: Literal["High", "Medium", "Low"] = (
        "High"
        if probability > settings.bank_high_above
        else "Medium"
        if probability > settings.bank_medium_above
        else "Low"
    )
    return BankScore(probability, level, 1 if probability > settings.bank_fraud_above else 0, decision.transaction_id)
