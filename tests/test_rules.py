"""The rule language: what is refused and where, and three evaluations that agree bit for bit with a naive one."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Sequence

import numpy as np
import pytest
from cel_expr_python import cel

from fraud.decisions.anomaly import Anomaly
from fraud.decisions.rules.blocks import fired
from fraud.decisions.rules.checker import check
from fraud.decisions.rules.lists import Lists
from fraud.decisions.rules.names import Facts, Names, outputs_of
from fraud.decisions.rules.rowwise import row_function
from fraud.decisions.rules.syntax import MAX_DEPTH, MAX_LENGTH, MAX_PARTS
from fraud.decisions.rules.tree import (
    Among,
    Arithmetic,
    Column,
    Comparison,
    Condition,
    Constant,
    Default,
    DefaultFlag,
    Join,
    Missing,
    Not,
    Number,
    Sign,
    Truth,
    definitely,
)
from fraud.errors import RuleError
from fraud.schema import Feature, FeatureSpec, Row
from tests.tiny import TRANSACTION_SPEC

SPEC = FeatureSpec(
    "features",
    (
        *(Feature(name, "request", missing=True) for name in ("amount", "speed", "count")),
        Feature("is_new", "request", "boolean", missing=True),
        Feature("has_phone", "request", "boolean", missing=True),
        Feature("channel", "request", "categorical", ("web", "shop", "phone"), missing=True),
        Feature("home", "request", "categorical", ("web", "shop", "phone"), missing=True),
        Feature("odd name!", "request", missing=True),
    ),
)
NUMBERS, FLAGS, CATEGORIES = ("amount", "speed", "count"), ("is_new", "has_phone"), ("channel", "home")


def facts(spec: FeatureSpec = SPEC) -> Facts:
    return Facts(Names(spec))


# the naive evaluation: None is missing


def number(tree: Number, columns: Sequence[float]) -> float | None:
    match tree:
        case Column(at):
            return None if math.isnan(columns[at]) else columns[at]
        case Constant(value):
            return value
        case Default(inner, value):
            known = number(inner, columns)
            return value if known is None else known
        case Sign(op, inner):
            known = number(inner, columns)
            return None if known is None else abs(known) if op == "abs" else -known
        case Arithmetic(op, left, right):
            a, b = number(left, columns), number(right, columns)
            if a is None or b is None or (op == "/" and b == 0):
                return None
            value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}.get(
                op, lambda: min(a, b) if op == "min" else max(a, b)
            )()
            return None if math.isnan(value) else value


def truth(tree: Condition, columns: Sequence[float]) -> bool | None:
    match tree:
        case Truth(value):
            return value
        case Not(inner):
            known = truth(inner, columns)
            return None if known is None else not known
        case Join(op, left, right):
            sides = truth(left, columns), truth(right, columns)
            decisive = op == "||"
            return decisive if decisive in sides else None if None in sides else not decisive
        case DefaultFlag(inner, value):
            known = truth(inner, columns)
            return value if known is None else known
        case Missing(inner):
            return number(inner, columns) is None
        case Among(inner, values):
            looked_for = number(inner, columns)
            return None if looked_for is None else looked_for in values
        case Comparison(op, left, right):
            a, b = number(left, columns), number(right, columns)
            if a is None or b is None:
                return None
            return {"==": a == b, "!=": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op]


class Writer:
    """Random expressions; without `own`, only what CEL has as well."""

    def __init__(self, seed: int, *, own: bool) -> None:
        self.random = random.Random(seed)
        self.own = own

    def condition(self, depth: int) -> str:
        pick = self.random.choice
        kinds = ["compare", "compare", "flag", "category", "among"]
        if depth:
            kinds += ["join", "join", "join", "not"] + ["missing", "default"] * self.own
        match pick(kinds):
            case "join":
                return f"({self.condition(depth - 1)} {pick(['&&', '||'])} {self.condition(depth - 1)})"
            case "not":
                return f"!({self.condition(depth - 1)})"
            case "missing":
                return f"missing({self.number(depth - 1)})"
            case "default":
                return f"default({self.condition(depth - 1)}, {pick(['true', 'false'])})"
            case "flag":
                flag = pick(FLAGS)
                return pick([flag, f"!{flag}", f"{flag} == {pick(['true', 'false'])}", "is_new != has_phone"])
            case "category":
                other = pick(["'web'", '"shop"', '"phone"', "home"])
                return f"channel {pick(['==', '!='])} {other}"
            case "among":
                return pick(['channel in ["web", "phone"]', "count in [0.0, 1.0, 3.0]", 'home in ["shop"]'])
        return f"{self.number(depth)} {pick(['<', '<=', '>', '>=', '==', '!='])} {self.number(depth)}"

    def number(self, depth: int) -> str:
        pick = self.random.choice
        if depth <= 0 or self.random.random() < 0.5:
            return pick([*NUMBERS, *NUMBERS, f"{self.random.choice([0.0, 1.0, 2.5, 1e300, 3.0])!r}"])
        left, right = self.number(depth - 1), self.number(depth - 1)
        if self.own and self.random.random() < 0.4:
            return pick([f"min({left}, {right})", f"max({left}, {right})", f"abs({left})", f"default({left}, 2)"])
        if self.own and self.random.random() < 0.3:
            return f"({left} / {pick(NUMBERS)})"  # a division by a constant zero is refused
        return f"({left} {pick(['+', '-', '*'])} {right})"


def random_columns(n: int, width: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rng = np.random.default_rng(seed)
    columns = rng.choice([0.0, 1.0, 2.0, 2.5, 3.0, -1.0, 1e308, 1e-310], (n, width))
    columns[:, 3:5] = rng.integers(0, 2, (n, 2))
    columns[:, 5:7] = rng.integers(0, 3, (n, 2))
    columns[rng.random((n, width)) < 0.25] = np.nan
    return columns


def test_rows_and_blocks_decide_as_the_naive_evaluation() -> None:
    some, writer = facts(), Writer(7, own=True)
    conditions = [check(writer.condition(4), some) for _ in range(400)]
    columns = random_columns(150, some.names.width, 8)
    rules = [definitely(condition) for condition in conditions] + [definitely(c, False) for c in conditions]
    function, blocks = row_function(rules), fired(rules, columns)
    outcomes = set()
    for i, row in enumerate(columns.tolist()):
        known = [truth(condition, row) for condition in conditions]
        outcomes |= {*known}
        expected = [value is True for value in known] + [value is False for value in known]
        assert function(row) == [j for j, fires in enumerate(expected) if fires]
        assert blocks[:, i].tolist() == expected
    assert outcomes == {True, False, None}


def test_blocks_longer_than_one_are_joined() -> None:
    some = facts()
    rules = [definitely(check("amount > 1 && true", some)), definitely(check("true", some))]
    columns = random_columns(20_000, some.names.width, 9)
    assert fired(rules, columns)[0].tolist() == (columns[:, 0] > 1).tolist()
    assert fired(rules, columns)[1].all()


def test_googles_cel_decides_alike() -> None:
    kinds = {
        **dict.fromkeys(NUMBERS, cel.Type.DOUBLE),
        **dict.fromkeys(FLAGS, cel.Type.BOOL),
        **dict.fromkeys(CATEGORIES, cel.Type.STRING),
    }
    oracle = cel.NewEnv(variables=kinds)
    some, writer = facts(), Writer(11, own=False)
    columns = random_columns(40, some.names.width, 12)
    columns[np.abs(columns) > 1e6] = 2.5  # infinity minus infinity is missing here, and a number in CEL
    texts = [writer.condition(3).replace("1e+300", "7.0") for _ in range(300)]
    function = row_function([definitely(check(text, some)) for text in texts])
    compiled = [oracle.compile(text) for text in texts]
    n_fired = 0
    for row in columns.tolist():
        values: dict[str, object] = {}
        for name, value in zip(SPEC.names, row, strict=False):
            if not math.isnan(value):
                values[name] = bool(value) if name in FLAGS else value
                if name in CATEGORIES:
                    values[name] = ("web", "shop", "phone")[int(value)]
        expected = [i for i, expression in enumerate(compiled) if expression.eval(data=values).value() is True]
        assert function(row) == expected
        n_fired += len(expected)
    assert 1000 < n_fired < 10_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1, column 1: the end arrived where a name, a number, a text or ( is expected"),
        ("amuont > 3", "line 1, column 1: no name 'amuont'; did you mean 'amount'?"),
        ("amount > 1\n  && speeed > 2", "line 2, column 6: no name 'speeed'; did you mean 'speed'?"),
        ('amount == "x"', "line 1, column 8: amount (a number) is compared with the text 'x'"),
        ('channel == "wep"', "line 1, column 12: channel has no category 'wep'; did you mean 'web'?"),
        ("channel < 3", "line 1, column 1: channel (a category) stands where a number is expected"),
        ("amount && is_new", "line 1, column 1: amount (a number) stands where a condition is expected"),
        ("is_new > 1", "line 1, column 1: is_new (true or false) stands where a number is expected"),
        ("amount", "line 1, column 1: amount (a number) stands where a condition is expected"),
        ("amount > 1 ? true : false", "line 1, column 12: '?' does not begin"),
        ("amount.real > 1", "line 1, column 7: '.' does not begin"),
        ("1 < amount < 3", "line 1, column 12: comparisons do not chain: join two of them by &&"),
        ("amount / 0 > 1", "line 1, column 8: a division by zero"),
        ("amount > 1e999", "line 1, column 10: number 1e999 is too large"),
        ('"a" == "a"', "line 1, column 5: the text 'a' is compared with the text 'a'"),
        ("channel in []", 'line 1, column 12: in takes a list of constants, such as ["a", "b"], or the name of a list'),
        ("channel in home", "line 1, column 12: no list 'home'; the set names none under lists"),
        ("count in [1, speed]", "line 1, column 14: a constant number is expected in this list, not speed (a number)"),
        ("missing(amount > 3)", "line 1, column 16: missing takes a name or a number, not a condition"),
        ("default(amount, speed) > 1", "line 1, column 17: default takes a constant of the same kind as amount"),
        ("exec(amount)", "line 1, column 1: no function 'exec'; there are abs, default, max, min, missing"),
        ("min(amount) > 1", "line 1, column 1: min takes 2 argument(s), 1 arrived"),
        ("amount > 1 amount", "line 1, column 12: 'amount' arrived where an operator or the end is expected"),
        ("(amount > 1", "line 1, column 12: the end arrived where ')' is expected"),
        ("(amount > 1) == (speed > 1)", "line 1, column 14: conditions are joined by && and ||, not compared"),
        ("severity == channel", "column 10: only names of the request are compared with each other"),
        ("severity > 1", "line 1, column 1: severity (a category) stands where a number is expected"),
        ("__import__('os')", "line 1, column 1: no function '__import__'"),
        ("x" * (MAX_LENGTH + 1), f"an expression of {MAX_LENGTH + 1} characters; at most {MAX_LENGTH} are allowed"),
        ("!" * 100 + "is_new", f"nested more than {MAX_DEPTH} deep"),
        ("(" * 900 + "is_new" + ")" * 900, f"nested more than {MAX_DEPTH} deep"),
        (" || ".join(["is_new"] * 150), f"more than {MAX_PARTS} parts"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(RuleError) as refused:
        check(text, facts())
    assert said in refused.value.message


def test_the_longest_expressions_are_decided() -> None:
    some = facts()
    sums = check(" + ".join(["1"] * 98) + " + amount == 99", some)
    deep = check("(" * 30 + "amount > 0" + ")" * 30, some)
    ladder = check("is_new || (" * 15 + "amount > 0" + ")" * 15, some)
    nested = check("min(1, " * 31 + "amount" + ")" * 31 + " == 1", some)
    row = [1.0] * some.names.width
    assert row_function([definitely(rule) for rule in (sums, deep, ladder, nested)])(row) == [0, 1, 2, 3]


def test_missing_is_neither_true_nor_false() -> None:
    some = facts()
    texts = {
        "amount > 5": False,
        "!(amount > 5)": False,
        "amount != 5": False,
        "!(amount in [1])": False,
        "missing(amount)": True,
        "default(amount, 7) > 5": True,
        "amount > 5 || true": True,
        "amount / 0.5 > 1 || missing(speed / count)": True,
        'channel != "web"': False,
        'default(channel, "shop") != "web"': True,
        "`odd name!` > 1 || missing(`odd name!`)": True,
        "is_new == false": False,
        "default(is_new, true)": True,
    }
    row = [math.nan] * some.names.width
    function = row_function([definitely(check(text, some)) for text in texts])
    assert function(row) == [i for i, fires in enumerate(texts.values()) if fires]


def test_a_division_by_zero_is_missing() -> None:
    some = facts()
    row = [1.0, 0.0, 0.0] + [math.nan] * (some.names.width - 3)
    rules = [definitely(check(text, some)) for text in ("amount / speed > 0", "missing(amount / speed)")]
    assert row_function(rules)(row) == [1]
    assert fired(rules, np.array([row])).tolist() == [[False], [True]]


def test_fields_of_a_request_are_facts() -> None:
    some = facts(TRANSACTION_SPEC)
    texts = (
        'customer_id == "c1"',
        'merchant_id in ["m1", "m2"]',
        "customer_id == merchant_id",
        'category == "fuel"',
        "latitude > 10",
        "hour >= 3 && hour < 4",
        "weekday == 3",
        'device_id != "d9"',
        "missing(longitude)",
        'severity in ["HIGH", "CRITICAL"] && anomaly_score > 0.8',
        'severity == "LOW"',
    )
    rules = [definitely(check(text, some)) for text in texts]
    row = Row(
        "t1",
        (),
        b"",
        12_600_000,
        "c1",
        5.0,
        {"merchant_id": "m2", "category": "fuel", "latitude": 11.0, "device_id": None},
    )
    x = [math.nan] * len(TRANSACTION_SPEC.features)
    for name, value in (("hour", 3.5), ("weekday", 3.0), ("category", 1.0)):
        x[TRANSACTION_SPEC.names.index(name)] = value
    columns = [*x, *outputs_of(0.5, Anomaly(0.9, "HIGH")), *some.reader()(row, x, Lists())]
    assert row_function(rules)(columns) == [0, 1, 3, 4, 5, 6, 8, 9]


def test_ten_thousand_hostile_expressions_are_refused_or_decided() -> None:
    """Pieces of valid and invalid text in any order: each is refused with its place, or decides rows."""
    rng = random.Random(5)
    pieces = [
        *("amount", "speed", "is_new", "channel", "home", "fraud_probability", "`odd name!`", "nobody", "__class__"),
        *("&&", "||", "!", "==", "!=", "<", ">=", " in ", "+", "-", "*", "/", "(", ")", "[", "]", ",", "?", ":", "."),
        *("0", "1e308", "1e-320", "1e999", "99999999999999999999", "0.1", "NaN", "inf", "true", "false", "null"),
        *('"web"', "'phone'", '"', "'", "\\", "`", "\n", "\x00", "é", "🙂", "(a+)+$", "min(", "default(", "missing("),
    ]
    valid = Writer(6, own=True)
    columns = random_columns(8, facts().names.width, 6)
    columns[0, :3] = [np.inf, -np.inf, np.inf]
    n_decided, refusals, started = 0, list[str](), time.process_time()
    for i in range(10_000):
        if i % 3 == 0:
            text = valid.condition(rng.randint(0, 6))
        else:
            text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        if i % 3 == 2:
            spoilt = list(valid.condition(3))
            spoilt[rng.randrange(len(spoilt))] = rng.choice(pieces)
            text = "".join(spoilt)
        try:
            rule = definitely(check(text, facts()))
        except RuleError as error:
            refusals.append(error.message)
            continue
        n_decided += 1
        if i % 4 == 0:
            by_row = [bool(row_function([rule])(row)) for row in columns.tolist()]
            assert fired([rule], columns)[0].tolist() == by_row, text
    assert 3000 < n_decided < 7000
    assert all(re.match(r"line \d+, column \d+: .{5,400}$", refusal, re.DOTALL) for refusal in refusals)
    assert time.process_time() - started < 60
