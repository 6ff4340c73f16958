"""The syntax of rule expressions: text into a tree whose nodes know their place.

The grammar is a subset of CEL, the Common Expression Language::

    expression  = unary { operator unary }          operators by precedence, all from left to right:
                                                    ||   &&   == != < <= > >= in   + -   * /
    unary       = ( "!" | "-" ) unary | operand
    operand     = number | "text" | 'text' | true | false | name | `any name`
                | function "(" expression { "," expression } ")" | "(" expression ")" | "[" constants "]"

Python's own parser never sees the text. Length, depth and the number of parts are bounded, so the work on it is too.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from fraud.errors import RuleError

MAX_LENGTH = 2000
"""Characters of one expression."""
MAX_DEPTH = 32
"""How deep parentheses, functions and operators may be nested."""
MAX_PARTS = 200
"""Names, constants, operators and functions of one expression."""
FUNCTIONS = {"missing": 1, "default": 2, "abs": 1, "min": 2, "max": 2}
"""Every function, with the number of its arguments."""

_COMPARISON, _UNARY = 3, 6
PRECEDENCE = {"||": 1, "&&": 2, "+": 4, "-": 4, "*": 5, "/": 5} | dict.fromkeys(
    ("==", "!=", "<", "<=", ">", ">=", "in"), _COMPARISON
)
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<text>"(?:[^"\\\n]|\\["'\\])*"|'(?:[^'\\\n]|\\["'\\])*')
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*|`[^`\n]+`)
    |(?P<mark>\|\||&&|[=!<>]=|[-+*/<>!(),\[\]])
    |(?P<end>$)
    )""",
    re.VERBOSE,
)
_ESCAPED = re.compile(r"\\(.)")


class Node(NamedTuple):
    """A part of an expression.

    Attributes
    ----------
    op : str
        ``number``, ``text``, ``flag``, ``name``, ``list``, the name of a function, or an operator; ``negative`` for a
        minus before one operand.
    at : int
        Where in the text it stands: the first character of an operand, the operator itself.
    value : float, str, bool or None
        Of a constant, or a name.
    parts : tuple of Node
        The operands.
    """

    op: str
    at: int
    value: float | str | bool | None = None
    parts: tuple[Node, ...] = ()


class _Token(NamedTuple):
    kind: str
    text: str
    at: int


def parse(text: str) -> Node:
    """Return the tree of an expression.

    Raises
    ------
    RuleError
        Says what is wrong, and in which line and column.

    Examples
    --------
    >>> parse("amount > 100").op
    '>'
    """
    if len(text) > MAX_LENGTH:
        raise RuleError(f"an expression of {len(text)} characters; at most {MAX_LENGTH} are allowed")
    return _Parser(text).whole()


def refuse(text: str, at: int, message: str) -> RuleError:
    """Return the error of a place in an expression."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return RuleError(f"line {line}, column {column}: {message}")


class _Parser:
    """Precedence climbing; `_expression` is the only recursion, so the only place to bound the depth."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._next = 0
        self._parts = 0
        self._token = self._read()

    def whole(self) -> Node:
        node = self._expression(1, 0)
        if self._token.kind != "end":
            raise self._unexpected("an operator or the end")
        return node

    def _expression(self, level: int, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._refuse(f"nested more than {MAX_DEPTH} deep")
        left = self._operand(depth)
        while PRECEDENCE.get(self._token.text, 0) >= level and self._token.kind != "text":
            operator = self._take()
            right = self._expression(PRECEDENCE[operator.text] + 1, depth + 1)
            if PRECEDENCE[operator.text] == _COMPARISON == PRECEDENCE.get(self._token.text):
                raise self._refuse("comparisons do not chain: join two of them by &&")
            left = self._node(operator.text, operator.at, None, (left, right))
        return left

    def _operand(self, depth: int) -> Node:
        token = self._take()
        match token.kind, token.text:
            case "number", digits:
                number = float(digits)
                if not math.isfinite(number):
                    raise refuse(self._text, token.at, f"number {digits[:40]} is too large")
                return self._node("number", token.at, number)
            case "text", quoted:
                return self._node("text", token.at, _ESCAPED.sub(r"\1", quoted[1:-1]))
            case "name", "true" | "false":
                return self._node("flag", token.at, token.text == "true")
            case "name", name:
                if self._token.text == "(" and self._token.kind == "mark":
                    return self._call(token, depth)
                return self._node("name", token.at, name.strip("`"))
            case "mark", "!" | "-":
                inner = self._expression(_UNARY, depth + 1)
                return self._node("negative" if token.text == "-" else "!", token.at, None, (inner,))
            case "mark", "(":
                inner = self._expression(1, depth + 1)
                self._expect(")")
                return inner
            case "mark", "[":
                return self._node("list", token.at, None, self._several("]", depth))
        self._token = token
        raise self._unexpected("a name, a number, a text or (")

    def _call(self, name: _Token, depth: int) -> Node:
        self._expect("(")
        wanted = FUNCTIONS.get(name.text)
        if wanted is None:
            raise refuse(
                self._text, name.at, f"no function {name.text[:40]!r}; there are {', '.join(sorted(FUNCTIONS))}"
            )
        arguments = self._several(")", depth)
        if len(arguments) != wanted:
            raise refuse(self._text, name.at, f"{name.text} takes {wanted} argument(s), {len(arguments)} arrived")
        return self._node(name.text, name.at, None, arguments)

    def _several(self, end: str, depth: int) -> tuple[Node, ...]:
        parts: list[Node] = []
        while self._token.text != end or self._token.kind != "mark":
            if parts:
                self._expect(",")
            parts.append(self._expression(1, depth + 1))
        self._take()
        return tuple(parts)

    def _node(self, op: str, at: int, value: float | str | bool | None = None, parts: tuple[Node, ...] = ()) -> Node:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise refuse(self._text, at, f"more than {MAX_PARTS} parts; split the rule, or use a list")
        return Node(op, at, value, parts)

    def _take(self) -> _Token:
        token = self._token
        if token.kind == "end":
            return token
        self._token = self._read()
        return token

    def _expect(self, mark: str) -> None:
        if self._token.text != mark or self._token.kind != "mark":
            raise self._unexpected(repr(mark))
        self._take()

    def _read(self) -> _Token:
        found = _TOKEN.match(self._text, self._next)
        if found is None:
            at = self._next + len(self._text[self._next :]) - len(self._text[self._next :].lstrip())
            raise refuse(self._text, at, f"{self._text[at]!r} does not begin {_EXPECTED}")
        self._next = found.end()
        kind = found.lastgroup or "end"
        word = found[kind]
        return _Token("mark" if word == "in" else kind, word, found.start(kind))

    def _refuse(self, message: str) -> RuleError:
        return refuse(self._text, self._token.at, message)

    def _unexpected(self, wanted: str) -> RuleError:
        found = "the end" if self._token.kind == "end" else repr(self._token.text[:40])
        return self._refuse(f"{found} arrived where {wanted} is expected")


_EXPECTED = "a number, a text in quotes, a name or an operator (there is no ? : and no . here)"
