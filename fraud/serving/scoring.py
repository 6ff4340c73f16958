"""Scoring over HTTP: a body of JSON is decoded into a request, decided on, and its outcomes encoded."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fraud.errors import InvalidRequest
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import ScoreRequest
from fraud.schema import MAX_INSTANCES
from fraud.serving.answers import answer_of, encode_answer
from fraud.serving.bodies import decode_body, expect_count
from fraud.serving.contract import ScoreBody
from fraud.serving.engine import Engine

NO_INSTANCES = (
    f"0 instances arrived; 1 to {MAX_INSTANCES} a call are allowed: each row is an object in the list of "
    '{"instances": [{...}]}'
)


class WithoutInstances(InvalidRequest):
    """A body is an object that has no field `instances`."""

    def __init__(self) -> None:
        super().__init__(NO_INSTANCES, "$.instances")


_body_decoder = msgspec.json.Decoder(ScoreBody)


async def answer(
    engine: Engine, body: bytes, *, explain: bool, request_id: str = "", transaction_id: str | None = None
) -> bytes:
    """Score the instances of a JSON body; returns the JSON answer. A row without an id gets `transaction_id`.

    Raises
    ------
    RequestError
        The body is invalid as a whole, or every row is bad.
    StoreError
        The store failed on some of the rows.
    Overloaded
        Too many rows wait already.
    NotReady
        No model is loaded.
    """
    request = decode_request(
        engine.admit(), body, explain=explain, request_id=request_id, transaction_id=transaction_id
    )
    return await encode_answer(await engine.decide(request))


async def predictions(
    engine: Engine, instances: Sequence[dict[str, object]], model: str | None, *, explain: bool
) -> dict[str, object]:
    """Score instances that are Python objects already, and answer in Python objects; raises as `answer` does."""
    raws = [msgspec.json.encode(instance) for instance in instances]
    expect_count(len(raws), "instances")
    request = engine.admit().read(raws, model=model, explain=explain)
    answered: dict[str, object] = msgspec.to_builtins(answer_of(await engine.decide(request)))
    return answered


def decode_request(
    pipeline: Pipeline,
    body: bytes,
    *,
    explain: bool,
    now_ms: int | None = None,
    request_id: str = "",
    transaction_id: str | None = None,
) -> ScoreRequest:
    """Read a body's envelope and its first rows; the batcher reads the others in its turn.

    Raises
    ------
    RequestError
        It is not JSON, holds no rows or too many, or names a model that is not served.
    """
    raws, model = decode_envelope(body)
    return pipeline.read(
        raws, model=model, explain=explain, now_ms=now_ms, request_id=request_id, transaction_id=transaction_id
    )


def decode_envelope(body: bytes) -> tuple[list[msgspec.Raw], str | None]:
    """Return a request's instances, undecoded, and the name of its model.

    Raises
    ------
    MalformedJson
        The body is no JSON.
    InvalidRequest
        It is, but is no object with 1 to `MAX_INSTANCES` instances.
    """
    try:
        said = decode_body(_body_decoder, body, '{"instances": [{...}]}')
    except InvalidRequest as error:
        if error.message.startswith("Object missing required field `instances`"):
            raise WithoutInstances from None
        raise
    if not said.instances:
        raise InvalidRequest(NO_INSTANCES, "$.instances")
    expect_count(len(said.instances), "instances")
    return said.instances, said.model
