"""Bodies of /predict and /explain through a pipeline, as the HTTP routes send them, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fraud.errors import FraudError
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.requests import ScoreRequest
from fraud.serving.answers import encode_answer
from fraud.serving.scoring import decode_request


async def answers(pipeline: Pipeline, requests: Sequence[ScoreRequest]) -> list[bytes | FraudError]:
    """Decide on requests of one moment together; each caller's JSON, or the error that is its own."""
    answered: list[bytes | FraudError] = []
    for outcomes in await pipeline.decide_requests(requests):
        try:
            answered.append(await encode_answer(outcomes))
        except FraudError as error:
            answered.append(error)
    return answered


async def ask(
    pipeline: Pipeline, instances: Sequence[dict[str, Any]], *, explain: bool = False, model: str | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one answer; raises the error of a request that is refused as a whole."""
    body = json.dumps({"instances": instances, "model": model}).encode()
    (answer,) = await answers(pipeline, [decode_request(pipeline, body, explain=explain)])
    if isinstance(answer, FraudError):
        raise answer
    rows: list[dict[str, Any]] = json.loads(answer)["predictions"]
    return rows
