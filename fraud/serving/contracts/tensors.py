"""Tensors of the Open Inference Protocol, version 2: rows from named inputs, and named outputs from decisions.

The protocol is at https://github.com/kserve/open-inference-protocol. Binary data is its extension
``binary_tensor_data``: tensors follow the JSON of a body, each in row-major order and little-endian, and each text has
its length in four bytes before it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain, islice

import msgspec
import numpy as np

from fraud.errors import InvalidRequest
from fraud.forms import Value
from fraud.refusals import listed, shown
from fraud.schema import MAX_INSTANCES

NUMBERS = {
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
DATATYPES = dict.fromkeys(("BOOL", "BYTES", *NUMBERS))
Element = str | int | float | bool | None
_LENGTH = struct.Struct("<I")
_encode = msgspec.json.Encoder().encode


class TensorParameters(msgspec.Struct, omit_defaults=True):
    """Parameters of a tensor."""

    binary_data_size: int | None = None
    binary_data: bool = False


class InputTensor(msgspec.Struct, kw_only=True, gc=False):
    """One field of all rows."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Element | list[Element]] | None = None
    parameters: TensorParameters | None = None


class WantedOutput(msgspec.Struct):
    """One output that is asked for."""

    name: str
    parameters: TensorParameters = msgspec.field(default_factory=TensorParameters)


class OutputTensor(msgspec.Struct, omit_defaults=True, gc=False):
    """One result of all rows."""

    name: str
    shape: list[int]
    datatype: str
    data: Sequence[str | float | bool] | None = None
    parameters: TensorParameters | None = None


def rows_of(inputs: Sequence[InputTensor], tail: bytes) -> list[bytes]:
    """Return the rows of some tensors as JSON: each row has the value of every tensor under its name.

    Parameters
    ----------
    inputs : sequence of InputTensor
        Each of shape (n,) or (n, 1), with the same n.
    tail : bytes
        What follows the JSON of the body: the tensors that are binary.

    Raises
    ------
    InvalidRequest
        A tensor has another shape, an unknown type, or not the data that its shape says.
    """
    if not inputs:
        raise InvalidRequest("0 tensors arrived; send one for each field of a row, by its name", "$.inputs")
    n_rows = _n_rows(inputs)
    if n_rows == 1 and not tail and (row := _plain_row(inputs)) is not None:
        return [row]
    columns: dict[str, Sequence[object]] = {}
    begin = 0
    for i, tensor in enumerate(inputs):
        if tensor.name in columns:
            raise InvalidRequest(f"tensor {shown(tensor.name)!r} arrived twice", f"$.inputs[{i}]")
        size = None if tensor.parameters is None else tensor.parameters.binary_data_size
        if size is None:
            columns[tensor.name] = _said(tensor, n_rows, i)
            continue
        path = f"$.inputs[{i}]"
        if not 0 <= size <= len(tail) - begin:
            raise InvalidRequest(
                f"binary_data_size says {size} bytes, and {len(tail) - begin} are left of the body", path
            )
        columns[tensor.name] = _binary(tensor.datatype, tail[begin : begin + size], n_rows, path)
        begin += size
    if begin < len(tail):
        raise InvalidRequest(f"{len(tail) - begin} bytes of the body belong to no tensor", "$.inputs")
    rows = zip(*columns.values(), strict=True)
    try:
        return [_encode(dict(zip(columns, row, strict=True))) for row in rows]
    except (UnicodeEncodeError, OverflowError):
        raise InvalidRequest("a tensor holds text that is not Unicode, or an integer of more than 64 bits") from None


def _plain_row(inputs: Sequence[InputTensor]) -> bytes | None:
    """Return one row whose tensors hold a value each, as most do; None where one has to be looked at further."""
    row = {tensor.name: tensor.data[0] for tensor in inputs if tensor.data and tensor.parameters is None}
    if len(row) < len(inputs) or list in map(type, row.values()) or any(len(t.data or ()) != 1 for t in inputs):
        return None
    try:
        return _encode(row)
    except (UnicodeEncodeError, OverflowError):
        return None


def _n_rows(inputs: Sequence[InputTensor]) -> int:
    first = inputs[0].shape
    for i, tensor in enumerate(inputs):
        shape = tensor.shape
        if shape == first and i and tensor.datatype in DATATYPES:
            continue
        if not (len(shape) in (1, 2) and shape[1:] in ([], [1]) and 1 <= shape[0] <= MAX_INSTANCES):
            raise InvalidRequest(
                f"tensor {shown(tensor.name)!r} has the shape {shape[:5]}; [n] or [n, 1] with n rows, 1 to "
                f"{MAX_INSTANCES}, is allowed",
                f"$.inputs[{i}].shape",
            )
        if shape[0] != inputs[0].shape[0]:
            raise InvalidRequest(
                f"tensor {shown(tensor.name)!r} has {shape[0]} rows, and the first one {inputs[0].shape[0]}",
                f"$.inputs[{i}].shape",
            )
        if tensor.datatype not in DATATYPES:
            raise InvalidRequest(
                f"datatype {shown(tensor.datatype)!r} is not read here; allowed: {', '.join(DATATYPES)}",
                f"$.inputs[{i}].datatype",
            )
    return first[0]


def _said(tensor: InputTensor, n_rows: int, i: int) -> Sequence[object]:
    """Return the data of a tensor in JSON, where a missing value is null."""
    data = tensor.data
    if data is None:
        raise InvalidRequest(f"tensor {shown(tensor.name)!r} has no data", f"$.inputs[{i}]")
    values: Sequence[object] = data
    if list in map(type, data):
        values = [*chain.from_iterable(v if isinstance(v, list) else [v] for v in islice(data, MAX_INSTANCES + 1))]
    if len(values) != n_rows or len(data) > n_rows:
        raise InvalidRequest(f"{len(values)} elements arrived; the shape says {n_rows}", f"$.inputs[{i}].data")
    return values


def _binary(datatype: str, data: bytes, n_rows: int, path: str) -> Sequence[Value]:
    """Return the data of a binary tensor, where a missing number is NaN."""
    if datatype == "BYTES":
        return _texts(data, n_rows, path)
    dtype = NUMBERS.get(datatype, np.dtype("?"))
    if len(data) != n_rows * dtype.itemsize:
        raise InvalidRequest(f"{len(data)} bytes arrived; {n_rows} of {datatype} have {n_rows * dtype.itemsize}", path)
    values: list[Value] = np.frombuffer(data, dtype).tolist()
    return [None if value != value else value for value in values]


def _texts(data: bytes, n_rows: int, path: str) -> Sequence[Value]:
    texts: list[Value] = []
    begin = 0
    while begin < len(data):
        end = begin + _LENGTH.size
        size = _LENGTH.unpack(data[begin:end])[0] if end <= len(data) else len(data)
        if end + size > len(data) or len(texts) == n_rows:
            raise InvalidRequest(f"the binary text is not {n_rows} elements, each with its length before it", path)
        try:
            texts.append(data[end : end + size].decode())
        except UnicodeDecodeError:
            raise InvalidRequest(f"element {len(texts)} is not UTF-8", path) from None
        begin = end + size
    if len(texts) != n_rows:
        raise InvalidRequest(f"{len(texts)} texts arrived; the shape says {n_rows}", path)
    return texts


def outputs_of(
    results: Mapping[str, tuple[str, Sequence[str | float | bool]]],
    wanted: Sequence[WantedOutput] | None,
    is_binary: bool,
) -> tuple[list[OutputTensor], bytes]:
    """Return the outputs that are wanted, all by default, and the bytes that follow their JSON.

    Parameters
    ----------
    results : mapping of str to (datatype, values)
    wanted : sequence of WantedOutput, optional
        Each in JSON or binary, as it says.
    is_binary : bool
        Whether outputs are binary where none is named.

    Raises
    ------
    InvalidRequest
        There is no such output.
    """
    if not wanted and not is_binary:
        return [
            OutputTensor(name, [len(values)], datatype, values) for name, (datatype, values) in results.items()
        ], b""
    asked = wanted or [WantedOutput(name, TensorParameters(binary_data=True)) for name in results]
    tensors: list[OutputTensor] = []
    tail: list[bytes] = []
    for i, output in enumerate(asked):
        if output.name not in results:
            raise InvalidRequest(
                f"there is no output {shown(output.name)!r}; there are {listed([*results])}", f"$.outputs[{i}].name"
            )
        datatype, values = results[output.name]
        if output.parameters.binary_data:
            data = _packed(datatype, values)
            parameters = TensorParameters(binary_data_size=len(data))
            tensors.append(OutputTensor(output.name, [len(values)], datatype, parameters=parameters))
            tail.append(data)
        else:
            tensors.append(OutputTensor(output.name, [len(values)], datatype, values))
    return tensors, b"".join(tail)


def _packed(datatype: str, values: Sequence[str | float | bool]) -> bytes:
    if datatype == "BYTES":
        encoded = [str(value).encode() for value in values]
        return b"".join(_LENGTH.pack(len(text)) + text for text in encoded)
    return np.array(values, NUMBERS.get(datatype, np.dtype("?"))).tobytes()
