"""Types of rule expressions: every name, operand and literal is checked before a set serves."""

from __future__ import annotations

from typing import NamedTuple, cast

from fraud.decisions.rules.names import Fact, Facts, Name, Type
from fraud.decisions.rules.syntax import Node, parse, refuse
from fraud.decisions.rules.tree import (
    Among,
    Arithmetic,
    Column,
    Comparator,
    Comparison,
    Condition,
    Constant,
    Default,
    DefaultFlag,
    Join,
    Missing,
    Not,
    Number,
    Operator,
    Sign,
    Truth,
)
from fraud.errors import RuleError
from fraud.refusals import closest, listed, shown

KINDS: dict[Type, str] = {"number": "a number", "flag": "true or false", "category": "a category", "text": "a text"}


class _Value(NamedTuple):
    """A checked number, category or text, the last two by their codes; `name` is the name that has the codes."""

    type: Type
    tree: Number
    name: Name | None = None


class _Flag(NamedTuple):
    """A checked condition; `column` is set where it is a flag of the model alone."""

    tree: Condition
    column: Column | None = None
    name: Name | None = None


class _Literal(NamedTuple):
    text: str


_Part = _Value | _Flag | _Literal


def check(text: str, facts: Facts) -> Condition:
    """Return the checked tree of an expression, and note in `facts` what it asks of a request.

    Raises
    ------
    RuleError
        An unknown name, a wrong type, a category that does not exist, a division by zero: with line and column.
    """
    return _Checker(text, facts).flag(parse(text))


class _Checker:
    def __init__(self, text: str, facts: Facts) -> None:
        self._text = text
        self._facts = facts

    def flag(self, node: Node) -> Condition:
        part = self._part(node)
        if not isinstance(part, _Flag):
            raise self._refuse(node, f"{_said(part)} stands where a condition is expected")
        return part.tree

    def _number(self, node: Node) -> Number:
        part = self._part(node)
        if not isinstance(part, _Value) or part.type != "number":
            raise self._refuse(node, f"{_said(part)} stands where a number is expected")
        return part.tree

    def _part(self, node: Node) -> _Part:
        match node.op:
            case "number":
                return _Value("number", Constant(cast(float, node.value)))
            case "flag":
                return _Flag(Truth(bool(node.value)))
            case "text":
                return _Literal(str(node.value))
            case "name":
                return self._name(node)
            case "list":
                raise self._refuse(node, "a list stands only to the right of in")
            case "!":
                return _Flag(Not(self.flag(node.parts[0])))
            case "&&" | "||":
                left, right = (self.flag(part) for part in node.parts)
                return _Flag(Join("&&" if node.op == "&&" else "||", left, right))
            case "in":
                return self._among(node)
            case "missing":
                return self._missing(node)
            case "default":
                return self._default(node)
            case "==" | "!=" | "<" | "<=" | ">" | ">=":
                return self._comparison(node)
            case "negative" | "abs":
                inner = self._number(node.parts[0])
                if node.op == "negative" and isinstance(inner, Constant):
                    return _Value("number", Constant(-inner.value))
                return _Value("number", Sign("abs" if node.op == "abs" else "negative", inner))
            case _:
                first, second = (self._number(part) for part in node.parts)
                if node.op == "/" and second == Constant(0.0):
                    raise self._refuse(node, "a division by zero")
                return _Value("number", Arithmetic(cast(Operator, node.op), first, second))

    def _name(self, node: Node) -> _Part:
        wanted = str(node.value)
        name = self._facts.names.find(wanted)
        if name is None:
            known = [name.text for name in self._facts.names.all]
            near = closest(wanted, known)
            hint = f"did you mean {near!r}?" if near else f"the model has {listed(known)}"
            raise self._refuse(node, f"no name {shown(wanted)!r}; {hint}")
        at = name.column
        if at is None:
            at = self._facts.column(Fact("number" if name.type == "number" else "text", name.text))
        column = Column(at)
        if name.type == "flag":
            return _Flag(Comparison("==", column, Constant(1.0)), column, name)
        return _Value(name.type, column, name)

    def _comparison(self, node: Node) -> _Part:
        if node.op not in ("==", "!="):
            left, right = (self._number(part) for part in node.parts)
            return _Flag(Comparison(cast(Comparator, node.op), left, right))
        equal = self._equal(node, self._part(node.parts[0]), self._part(node.parts[1]))
        return _Flag(equal if node.op == "==" else Not(equal))

    def _equal(self, node: Node, left: _Part, right: _Part) -> Condition:
        match left, right:
            case _Value("number", a), _Value("number", b):
                return Comparison("==", a, b)
            case _Value("category" | "text"), _Literal(text):
                return Comparison("==", left.tree, Constant(self._code(node.parts[1], left, text)))
            case _Literal(text), _Value("category" | "text"):
                return Comparison("==", right.tree, Constant(self._code(node.parts[0], right, text)))
            case _Value("category" | "text"), _Value("category" | "text"):
                return self._same(node, left, right)
            case _Flag(), _Flag():
                return self._same_flag(node, left, right)
        raise self._refuse(node, f"{_said(left)} is compared with {_said(right)}")

    def _same(self, node: Node, left: _Value, right: _Value) -> Condition:
        """Return whether two names of texts say the same."""
        assert left.name is not None
        assert right.name is not None
        if left.type == right.type == "category" and left.name.categories == right.name.categories:
            return Comparison("==", left.tree, right.tree)
        if not self._is_of_request(left) or not self._is_of_request(right):
            raise self._refuse(node, "only names of the request are compared with each other, and without default")
        fact = Fact("same", left.name.text, right.name.text)
        return Comparison("==", Column(self._facts.column(fact)), Constant(1.0))

    def _is_of_request(self, value: _Value) -> bool:
        """Whether a category or text is read from the request as it is: no default, no output of the model."""
        column = None if value.name is None else value.name.column
        return isinstance(value.tree, Column) and (column is None or column < self._facts.names.n_features)

    def _same_flag(self, node: Node, left: _Flag, right: _Flag) -> Condition:
        for one, other in ((left, right), (right, left)):
            if isinstance(one.tree, Truth):
                return other.tree if one.tree.value else Not(other.tree)
        if left.column is None or right.column is None:
            raise self._refuse(node, "conditions are joined by && and ||, not compared")
        return Comparison("==", left.column, right.column)

    def _among(self, node: Node) -> _Part:
        left = self._part(node.parts[0])
        if not isinstance(left, _Value):
            raise self._refuse(node.parts[0], f"in looks for a number, a category or a text, not {_said(left)}")
        members = node.parts[1]
        if members.op == "name":
            return self._on_list(node, left, members)
        if members.op != "list" or not members.parts:
            raise self._refuse(members, 'in takes a list of constants, such as ["a", "b"], or the name of a list')
        codes: dict[float, None] = {}
        for part in members.parts:
            constant = self._part(part)
            if left.type == "number" and isinstance(constant, _Value) and isinstance(constant.tree, Constant):
                codes[constant.tree.value] = None
            elif left.type != "number" and isinstance(constant, _Literal):
                codes[self._code(part, left, constant.text)] = None
            else:
                wanted = "a constant number" if left.type == "number" else "a text in quotes"
                raise self._refuse(part, f"{wanted} is expected in this list, not {_said(constant)}")
        return _Flag(Among(left.tree, tuple(codes)))

    def _on_list(self, node: Node, left: _Value, members: Node) -> _Part:
        wanted, known = str(members.value), self._facts.names.lists
        if wanted not in known:
            near = closest(wanted, known)
            hint = f"did you mean {near!r}?" if near else f"the set names {listed(known) or 'none under lists'}"
            raise self._refuse(members, f"no list {shown(wanted)!r}; {hint}")
        if left.name is None or left.type == "number" or not self._is_of_request(left):
            raise self._refuse(node.parts[0], f"a list holds texts; this is {_said(left)}")
        fact = Fact("member", left.name.text, wanted)
        return _Flag(Comparison("==", Column(self._facts.column(fact)), Constant(1.0)))

    def _missing(self, node: Node) -> _Part:
        match self._part(node.parts[0]):
            case _Value(_, tree):
                return _Flag(Missing(tree))
            case _Flag(_, Column() as column):
                return _Flag(Missing(column))
            case part:
                raise self._refuse(node.parts[0], f"missing takes a name or a number, not {_said(part)}")

    def _default(self, node: Node) -> _Part:
        match self._part(node.parts[0]), self._part(node.parts[1]):
            case _Value("number", tree), _Value("number", Constant(value)):
                return _Value("number", Default(tree, value))
            case _Flag(condition), _Flag(Truth(truth)):
                return _Flag(DefaultFlag(condition, truth))
            case _Value("category" | "text") as inner, _Literal(text):
                code = self._code(node.parts[1], inner, text)
                return _Value(inner.type, Default(inner.tree, code), inner.name)
            case inner, constant:
                raise self._refuse(
                    node.parts[1], f"default takes a constant of the same kind as {_said(inner)}, not {_said(constant)}"
                )

    def _code(self, node: Node, left: _Value, literal: str) -> float:
        """Return the number that stands for a literal beside a category or a text."""
        assert left.name is not None
        if left.type == "text":
            return self._facts.code(left.name.text, literal)
        categories = left.name.categories
        if literal not in categories:
            near = closest(literal, categories)
            hint = f"did you mean {near!r}?" if near else f"it has {listed(categories)}"
            raise self._refuse(node, f"{left.name.text} has no category {shown(literal)!r}; {hint}")
        return float(categories.index(literal))

    def _refuse(self, node: Node, message: str) -> RuleError:
        return refuse(self._text, node.at, message)


def _said(part: _Part) -> str:
    match part:
        case _Literal(text):
            return f"the text {shown(text)!r}"
        case _Value(kind, _, name):
            return KINDS[kind] if name is None else f"{name.text} ({KINDS[kind]})"
        case _Flag(_, _, name):
            return "a condition" if name is None else f"{name.text} (true or false)"
