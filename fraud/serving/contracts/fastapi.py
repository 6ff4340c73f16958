"""FastAPI's shape of an error: ``{"detail": ...}``, a text, or for a 422 a list of what is wrong and where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus

import msgspec

from fraud.errors import InvalidRequest
from fraud.serving.contract import Problem
from fraud.serving.http import Answer, ErrorShape, Failure

_PARTS = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_MISSING = re.compile(r"Object missing required field `(.*?)`")
_encode = msgspec.json.Encoder().encode


class NotADictionary(InvalidRequest):
    """A field of the body is no object."""

    code = "dict_type"

    def __init__(self, path: str) -> None:
        super().__init__("Input should be a valid dictionary", path)


TYPES: Mapping[str, str] = {"malformed_json": "json_invalid", NotADictionary.code: "dict_type"}
"""FastAPI's types of errors by this service's codes; all others are ``value_error``."""


class InvalidField(msgspec.Struct, frozen=True):
    """One thing that is wrong with a request."""

    type: str
    loc: list[str | int]
    msg: str


class FastApiError(msgspec.Struct, frozen=True):
    """An error as FastAPI answers it."""

    detail: str | list[InvalidField]


def fastapi_errors(internal: str = HTTPStatus.INTERNAL_SERVER_ERROR.phrase, *, where: str = "body") -> ErrorShape:
    """Return the error shape of a FastAPI application.

    Parameters
    ----------
    internal : str
        The detail of a failure of the service itself.
    where : str
        The part of the request in which the fields of a 422 are: ``body`` or ``query``.
    """

    def encode(failure: Failure) -> Answer:
        problem, status = failure.problem, failure.status
        if problem.code == "malformed_json":
            status = 422
        if status == 422:
            return Answer(_encode(FastApiError([_invalid(p, where) for p in failure.errors or [problem]])), status)
        return Answer(_encode(FastApiError(internal if problem.code == "internal" else problem.message)), status)

    return ErrorShape(encode, FastApiError)


def _invalid(problem: Problem, where: str) -> InvalidField:
    parts = _PARTS.findall((problem.path or "$").removeprefix("$"))
    place = [int(index) if index else name for index, name in parts]
    missing = _MISSING.match(problem.message)
    if missing is not None:
        return InvalidField("missing", [where, *place, missing[1]], "Field required")
    return InvalidField(TYPES.get(problem.code, "value_error"), [where, *place], problem.message)
