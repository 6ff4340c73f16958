"""The OpenAPI document, derived from the declared routes and their msgspec types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from http import HTTPStatus
from typing import Any, get_args, get_type_hints

import msgspec

from fraud.serving.contract import COMPONENTS
from fraud.serving.http import Route
from fraud.serving.scopes import KEYLESS, SCOPES

SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
KEYS: list[dict[str, list[str]]] = [{name: []} for name in SECURITY_SCHEMES]
KEY_FAILS = {
    401: "No API key arrived where one is required, or one that is not known.",
    403: "The API key lacks the scope of this path.",
    429: "Too many requests of this caller; try again after Retry-After seconds.",
}
BODY_FAILS = {
    400: "The body is no JSON.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared as JSON.",
    422: "The body breaks the contract, or every one of its rows does.",
}
PARAMETER_FAILS = {422: "A parameter breaks the contract."}
ALWAYS_FAILS = {
    500: "The service failed; the cause is in its log under the request id.",
    503: "Overloaded or not ready; try again after Retry-After seconds.",
}


def document(
    routes: Iterable[Route], title: str, description: str, version: str, root_path: str = ""
) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the routes that have a tag, as they are found under a root path."""
    shown = [route for route in routes if route.tag]
    named = {
        kind
        for route in shown
        for kinds in (route.request, route.answer, route.parameters, route.errors.body)
        for kind in _each(kinds)
    }
    _, schemas = msgspec.json.schema_components(
        sorted(_with_members(named), key=str),
        ref_template=f"{COMPONENTS}{{name}}",
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in shown:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schemas)
    for kind in {route.parameters for route in shown if route.parameters is not None}:
        del schemas[kind.__name__]  # stands in the operations
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": description, "version": version},
        "servers": [{"url": root_path or "."}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": SECURITY_SCHEMES},
    }


def _operation(route: Route, schemas: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "tags": [route.tag],
        "summary": route.summary.partition(": ")[0].removesuffix("."),
        "description": route.summary,
    }
    if route.scope is not None:
        operation["description"] += f" Scope {route.scope}: {SCOPES[route.scope]}."
        operation["security"] = [{}, *KEYS] if route.scope in KEYLESS else KEYS
    if route.parameters is not None:
        operation["parameters"] = list(_parameters(route, schemas[route.parameters.__name__]))
    if route.request is not None:
        operation["requestBody"] = {"required": True, **_json(route.request)}
    answered = (
        " Or: ".join(kind.__doc__ or HTTPStatus.OK.phrase for kind in _each(route.answer)) or HTTPStatus.OK.phrase
    )
    responses = {200: {"description": answered, **({} if route.answer is None else _json(route.answer))}}
    failure = _json(route.errors.body)
    responses |= {status: {"description": meaning, **failure} for status, meaning in sorted(_fails(route).items())}
    operation["responses"] = {str(status): response for status, response in responses.items()}
    return operation


def _fails(route: Route) -> dict[int, str]:
    fails = dict(ALWAYS_FAILS)
    if route.scope is not None:
        fails |= KEY_FAILS
    if route.parameters is not None:
        fails |= PARAMETER_FAILS
    if route.request is not None:
        fails |= BODY_FAILS
    return fails | dict(route.fails)


def _parameters(route: Route, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, field in schema["properties"].items():
        in_path = f"{{{name}}}" in route.path
        required = in_path or name in schema.get("required", ())
        yield {
            "name": name,
            "in": "path" if in_path else "query",
            "required": required,
            "description": field.get("description", ""),
            "schema": {key: value for key, value in field.items() if key != "description"},
        }


def _json(kinds: Any) -> dict[str, Any]:
    """Return the content of a body: one type, or one of several."""
    schemas, _ = msgspec.json.schema_components(_each(kinds), ref_template=f"{COMPONENTS}{{name}}")
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": [*schemas]}
    return {"content": {"application/json": {"schema": schema}}}


def _each(kinds: Any) -> tuple[Any, ...]:
    if kinds is None:
        return ()
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _with_members(kinds: set[Any]) -> set[Any]:
    """Add the structs inside an `Either` of a type's fields, recursively."""
    found: set[Any] = set()
    left = list(kinds)
    while left:
        kind = left.pop()
        if kind not in found:
            found.add(kind)
            hints = get_type_hints(kind, include_extras=True).values() if isinstance(kind, type) else [kind]
            left += [member for hint in hints for member in _members(hint)]
    return found


def _members(hint: Any) -> Iterator[Any]:
    for part in get_args(hint):
        if isinstance(part, msgspec.Meta):
            yield from (part.extra or {}).get("members", ())
        else:
            yield from _members(part)
