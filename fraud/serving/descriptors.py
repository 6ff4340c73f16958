"""The types of the HTTP contract for BentoML: pydantic models made from the msgspec structs."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from bentoml import IODescriptor
from pydantic import Field, WithJsonSchema, create_model


def descriptor(kind: type[msgspec.Struct]) -> type[IODescriptor]:
    """Return what BentoML calls an input or output specification, with the fields of a struct.

    It validates nothing; the pipeline does, and a list that is left out is empty. Elements of a list are shown as any
    object, because BentoML's clients send and return only those fields of an object that its schema names.
    """
    properties = msgspec.json.schema_components([kind])[1][kind.__name__]["properties"]
    fields: dict[str, Any] = {
        field.name: (
            Annotated[Any, WithJsonSchema(_shown(properties[field.encode_name]))],
            _default(field, properties[field.encode_name]),
        )
        for field in msgspec.structs.fields(kind)
    }
    made: type[IODescriptor] = create_model(kind.__name__, __base__=IODescriptor, __doc__=kind.__doc__, **fields)
    return made


def _default(field: msgspec.structs.FieldInfo, schema: dict[str, Any]) -> Any:
    if field.required:
        return Field(default_factory=list) if schema.get("type") == "array" else ...
    return field.default if field.default_factory is msgspec.NODEFAULT else Field(default_factory=field.default_factory)


def _shown(schema: dict[str, Any]) -> dict[str, Any]:
    return schema | {"items": {"type": "object"}} if schema.get("type") == "array" else schema
