"""Execute GraphQL documents without a schema, over plain dictionaries.

An object is a dict with ``__typename``; a value that is callable is a field with arguments. A field that an
object does not have is an error, as on a real server, so that a gap in the tests' server is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionSetNode,
    parse,
)
from graphql.language import DirectiveNode, ValueNode
from graphql.utilities import value_from_ast_untyped

INTERFACES = {
    "ArtifactCollection": {"ArtifactSequence", "ArtifactPortfolio"},
}


class QueryError(Exception):
    """A GraphQL error with its path of response keys."""

    def __init__(self, message: str, path: list[str | int]) -> None:
        super().__init__(message)
        self.path = path


class Execution:
    """One document with its variables, run against a root object."""

    def __init__(self, document: DocumentNode, operation_name: str | None, variables: Mapping[str, Any]) -> None:
        operations = [node for node in document.definitions if isinstance(node, OperationDefinitionNode)]
        named = [op for op in operations if op.name is not None and op.name.value == operation_name]
        self.operation = (named or operations)[0]
        self.fragments = {
            node.name.value: node for node in document.definitions if isinstance(node, FragmentDefinitionNode)
        }
        self.variables = dict(variables)
        for definition in self.operation.variable_definitions or ():
            name = definition.variable.name.value
            if name not in self.variables and definition.default_value is not None:
                self.variables[name] = value_from_ast_untyped(definition.default_value)

    def run(self, root: dict[str, Any]) -> dict[str, Any]:
        return self._object(root, [self.operation.selection_set], [])

    def _value(self, node: ValueNode) -> Any:
        return value_from_ast_untyped(node, self.variables)

    def _included(self, directives: tuple[DirectiveNode, ...] | None) -> bool:
        for directive in directives or ():
            condition = next(self._value(arg.value) for arg in directive.arguments or ())
            if directive.name.value == "include" and not condition:
                return False
            if directive.name.value == "skip" and condition:
                return False
        return True

    def _fields(self, typename: str, selections: list[SelectionSetNode]) -> dict[str, list[FieldNode]]:
        fields: dict[str, list[FieldNode]] = {}
        for selection_set in selections:
            for node in selection_set.selections:
                if not self._included(node.directives):
                    continue
                if isinstance(node, FieldNode):
                    key = node.alias.value if node.alias else node.name.value
                    fields.setdefault(key, []).append(node)
                    continue
                if isinstance(node, FragmentSpreadNode):
                    fragment: FragmentDefinitionNode | InlineFragmentNode = self.fragments[node.name.value]
                else:
                    assert isinstance(node, InlineFragmentNode)
                    fragment = node
                condition = fragment.type_condition.name.value if fragment.type_condition else typename
                if condition == typename or typename in INTERFACES.get(condition, ()):
                    for key, nodes in self._fields(typename, [fragment.selection_set]).items():
                        fields.setdefault(key, []).extend(nodes)
        return fields

    def _object(
        self, source: dict[str, Any], selections: list[SelectionSetNode], path: list[str | int]
    ) -> dict[str, Any]:
        typename = source["__typename"]
        result = {}
        for key, nodes in self._fields(typename, selections).items():
            name = nodes[0].name.value
            if name not in source:
                raise QueryError(f'Cannot query field "{name}" on type "{typename}".', [*path, key])
            value = source[name]
            if callable(value):
                value = value(**{arg.name.value: self._value(arg.value) for arg in nodes[0].arguments or ()})
            inner = [node.selection_set for node in nodes if node.selection_set]
            result[key] = self._complete(value, inner, [*path, key])
        return result

    def _complete(self, value: Any, selections: list[SelectionSetNode], path: list[str | int]) -> Any:
        if value is None or not selections:
            return value
        if isinstance(value, list):
            return [self._complete(item, selections, [*path, i]) for i, item in enumerate(value)]
        return self._object(value, selections, path)


def execute(query: str, operation_name: str | None, variables: Mapping[str, Any], root: dict[str, Any]) -> Any:
    """Run `query` against `root`; raises QueryError on an unknown field or a refused mutation."""
    return Execution(parse(query, no_location=True), operation_name, variables).run(root)
