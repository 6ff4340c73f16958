"""The clients of other systems, unmodified: tritonclient and KServe's SDK, in an environment of their own.

    .venv/clients/bin/python tests/protocol_clients.py URL < question.json > answer.json

`tests/test_protocols.py` runs it; `make .venv/clients.done` makes the environment.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from tritonclient.utils import InferenceServerException

Row = dict[str, Any]
DTYPES = {"FP64": np.float64, "BOOL": np.bool_, "BYTES": np.object_}


def column(rows: list[Row], name: str, datatype: str) -> Any:
    """The values of a field as a client holds them; a number that is missing is NaN."""
    values = [row.get(name) for row in rows]
    if datatype == "FP64":
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return np.array(values, DTYPES[datatype])


def complete(rows: list[Row]) -> list[Row]:
    """The rows that lack nothing: numpy's NaN has no JSON."""
    most = max(map(len, rows))
    return [row for row in rows if len(row) == most]


def fields(metadata: dict[str, Any], rows: list[Row]) -> list[tuple[str, str]]:
    return [(t["name"], t["datatype"]) for t in metadata["inputs"] if any(t["name"] in row for row in rows)]


def ask_triton(url: str, model: str, rows: list[Row]) -> dict[str, Any]:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    metadata = client.get_model_metadata(model)
    said: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(model),
        "unknown_ready": client.is_model_ready("nobody"),
        "extensions": client.get_server_metadata()["extensions"],
        "metadata": metadata,
    }
    for binary in (True, False):
        inputs = []
        some = rows if binary else complete(rows)
        for name, datatype in fields(metadata, some):
            tensor = triton.InferInput(name, [len(some), 1], datatype)
            tensor.set_data_from_numpy(column(some, name, datatype).reshape(-1, 1), binary_data=binary)
            inputs.append(tensor)
        outputs = None if binary else [triton.InferRequestedOutput("fraud_probability", binary_data=False)]
        found = client.infer(model, inputs, model_version=metadata["versions"][0], outputs=outputs, request_id="r-1")
        said["binary" if binary else "json"] = found.as_numpy("fraud_probability").tolist()
        if binary:
            said["decisions"] = [text.decode() for text in found.as_numpy("decision")]
            said["ids"] = [text.decode() for text in found.as_numpy("transaction_id")]
            said["id"] = found.get_response()["id"]
    try:
        client.infer(model, [triton.InferInput("amount", [1], "FP64").set_data_from_numpy(np.array([1.0]))])
    except InferenceServerException as error:
        said["error"] = str(error)
    client.close()
    return said


async def ask_kserve(url: str, model: str, rows: list[Row]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        said["live"], said["ready"] = await client.is_server_live(url), await client.is_server_ready(url)
        said["model_ready"] = await client.is_model_ready(url, model)
        said["unknown_ready"] = await client.is_model_ready(url, "nobody")
        for binary in (True, False):
            inputs = []
            some = rows if binary else complete(rows)
            for name, datatype in fields({"inputs": DATATYPES}, some):
                tensor = InferInput(name, [len(some)], datatype)
                tensor.set_data_from_numpy(column(some, name, datatype), binary_data=binary)
                inputs.append(tensor)
            found = await client.infer(url, InferRequest(model, inputs), model)
            (output,) = [o for o in found.outputs if o.name == "fraud_probability"]
            said["binary" if binary else "json"] = output.as_numpy().tolist()
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        said["v1_ready"] = await client.is_model_ready(url, model)
        said["v1"] = (await client.infer(url, {"instances": rows}, model))["predictions"]
        try:
            await client.infer(url, {"instances": [{}]}, model)
        except Exception as error:
            said["v1_error"] = str(error)
    return said


if __name__ == "__main__":
    question = json.load(sys.stdin)
    answer = {"triton": ask_triton(sys.argv[1], question["model"], question["rows"])}
    DATATYPES = answer["triton"]["metadata"]["inputs"]
    answer["kserve"] = asyncio.run(ask_kserve(sys.argv[1], question["model"], question["rows"]))
    json.dump(answer, sys.stdout)
