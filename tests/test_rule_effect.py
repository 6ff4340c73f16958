"""The past effect of a rule set: equal to deciding one by one, and counted as a person would."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from fraud.checks.rule_effect import Effect, rule_effect
from fraud.cli.rules import app
from fraud.decisions.anomaly import SEVERITIES
from fraud.decisions.labels import Label
from fraud.decisions.policy import Policy, RiskLevels
from fraud.decisions.rules.effect import redecide, wilson
from fraud.decisions.rules.in_force import RulesInForce
from fraud.decisions.rules.lists import ListEntry, Lists
from fraud.decisions.rules.sets import Rules, RuleSet
from fraud.decisions.verdict import ACTIONS, ruled
from fraud.errors import DataError, RegistryError
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.test_lists import with_lists
from tests.test_rule_sets import NAME, home, rule, rule_set, stocked  # noqa: F401
from tests.test_rules import SPEC, Writer, random_columns
from tests.tiny import START_MS, transactions

POLICY = Policy(
    0.3,
    0.7,
    RiskLevels(0.2, 0.5, 0.8),
    {"review": 4.0, "review_recall": 0.95, "false_decline_rate": 0.15, "chargeback_fee": 20.0},
)


def test_many_rows_are_decided_as_one_by_one() -> None:
    writer = Writer(21, own=True)
    outcomes = [*ACTIONS, None]
    some = rule_set(
        *(
            rule(
                f"r{i}",
                " && ".join(writer.condition(1) for _ in range(3)),
                outcome := outcomes[i % 5],
                priority=i % 3,
                shadow=i % 7 == 0,
                **({} if outcome else {"odds": [0.01, 3.0, 1e6][i % 3]}),
            )
            for i in range(25)
        )
    )
    rules = Rules(some, SPEC)
    columns = random_columns(500, rules.width, 22)
    rng = np.random.default_rng(23)
    score = rng.random(500)
    columns[:, rules.width - 1] = rng.choice([0.0, 1.0, 2.0, 3.0, np.nan], 500)
    severities = [None if np.isnan(code) else SEVERITIES[int(code)] for code in columns[:, rules.width - 1]]
    now = redecide(rules, POLICY, columns, score)
    seen = set()
    for i, row in enumerate(columns.tolist()):
        verdict, ruling = ruled(POLICY, float(score[i]), rules, row, rules.fired(row), severity=severities[i])
        assert ACTIONS[now.action[i]] == verdict.decision
        assert ACTIONS[now.model[i]] == ruling.model_decision
        assert (rules.rules[now.first[i]].id if now.first[i] >= 0 else "model") == ruling.decided_by
        without = RuleSet(model=some.model, rules=tuple(r for r in some.rules if r.id != ruling.decided_by))
        if i % 25 == 0 and ruling.decided_by != "model":
            fewer = Rules(without, SPEC)
            again, _ = ruled(POLICY, float(score[i]), fewer, row, fewer.fired(row), severity=severities[i])
            second = now.second[i]
            action = now.policy[i] if second < 0 else ACTIONS.index(rules.rules[second].outcome or "approve")
            assert ACTIONS[action] == again.decision
        seen.add((verdict.decision, ruling.decided_by == "model"))
    assert len(seen) > 4


def test_wilsons_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178))
    assert wilson(0, 0) == (None, None)
    assert wilson(0, 5)[0] == 0.0


@pytest.fixture
def recorded(scorer: Scorer, tmp_path: Path) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """A log of 300 decisions without rules, every second of them labelled, by customer c1 fraud."""
    path = tmp_path / "history.db"
    instances = transactions(300, 51, customers=5, merchants=4)

    async def score() -> list[dict[str, Any]]:
        store = SqliteStore(path, durable=False)
        pipeline = Pipeline({scorer.name.name: scorer}, store)
        rows = await ask(pipeline, instances)
        labels = [
            Label(instance["transaction_id"], instance["customer_id"] == "c1", START_MS + 10**9, source="file")
            for instance in instances[::2]
        ]
        assert set(await store.apply_labels(labels)) == {"applied"}
        await pipeline.close()
        return rows

    rows = asyncio.run(score())
    return path, instances, [row["decision"] for row in rows]


def effect_of(path: Path, some: RuleSet, scorer: Scorer, lists: Lists | None = None, **more: Any) -> Effect:
    return rule_effect(
        SqliteLog(path),
        some,
        lambda name, digest: scorer.bundle,
        more.pop("rules_of", no_rules),
        lists or Lists(),
        **more,
    )


def no_rules(digest: str) -> RuleSet:
    raise RegistryError("there is none")


def test_each_rule_is_counted_as_a_person_would(
    recorded: tuple[Path, list[dict[str, Any]], list[str]], scorer: Scorer
) -> None:
    path, instances, before = recorded
    some = rule_set(
        rule("one", 'customer_id == "c1"', "decline"),
        rule("dear", "amount > 40", "review"),
        rule("quiet", 'device_id == "d2"', "approve", shadow=True),
        rule("never", "amount < 0", "decline"),
        rule("likelier", 'category == "fuel"', None, odds=5),
    )
    effect = effect_of(path, some, scorer)
    assert (effect.transactions, effect.labelled) == (300, 150)
    labelled = instances[::2]
    assert effect.frauds == sum(i["customer_id"] == "c1" for i in labelled)
    by_id = {rule.id: rule for rule in effect.rules}
    mine = [i for i in labelled if i["customer_id"] == "c1"]
    one = by_id["one"]
    assert (one.hits, one.frauds, one.legitimate) == (sum(i["customer_id"] == "c1" for i in instances), len(mine), 0)
    assert one.fraud_amount == pytest.approx(sum(i["amount"] for i in mine))
    assert (one.precision, one.precision_high) == (1.0, 1.0)
    dear = [i for i in labelled if i["amount"] > 40]
    assert by_id["dear"].frauds == sum(i["customer_id"] == "c1" for i in dear)
    assert by_id["dear"].legitimate == len(dear) - by_id["dear"].frauds
    assert by_id["dear"].decided == sum(i["amount"] > 40 and i["customer_id"] != "c1" for i in instances)
    assert by_id["quiet"].hits == by_id["quiet"].decided == sum(i.get("device_id") == "d2" for i in instances)
    assert by_id["never"].earns_nothing
    assert by_id["likelier"].saving is None
    assert effect.before.actions == {name: before.count(name) for name in ACTIONS}
    assert sum(effect.after.actions.values()) == 300
    assert sum(change.count for change in effect.changes) >= abs(
        effect.after.actions["decline"] - effect.before.actions["decline"]
    )
    ids = {i["transaction_id"] for i in instances}
    assert all({*change.examples} <= ids for change in effect.changes)


def test_the_saving_of_a_rule_is_by_the_costs_of_the_policy(
    recorded: tuple[Path, list[dict[str, Any]], list[str]], scorer: Scorer
) -> None:
    path, instances, before = recorded
    some = rule_set(rule("one", 'customer_id == "c1"', "decline"))
    bundle = replace(scorer.bundle, policy=POLICY)
    effect = rule_effect(SqliteLog(path), some, lambda name, digest: bundle, no_rules, Lists())
    expected = 0.0
    for instance, action in list(zip(instances, before, strict=True))[::2]:
        if instance["customer_id"] == "c1":
            paid_out = instance["amount"] + 20.0
            expected += {"approve": paid_out, "review": 4.0 + 0.05 * paid_out, "decline": 0.0}[action]
    (one,) = effect.rules
    assert one.saving == pytest.approx(expected)
    assert effect.before.cost is not None
    assert effect.after.cost is not None
    assert effect.before.cost - effect.after.cost == pytest.approx(expected)


def test_memberships_are_those_of_the_record_and_else_of_today(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    some, lists = with_lists(rule("listed", "customer_id in blocked", "decline")), Lists()
    lists.apply([ListEntry("blocked", "c1", revision=1)])
    instances = transactions(60, 52, customers=3)

    async def score() -> None:
        pipeline = Pipeline({scorer.name.name: scorer}, SqliteStore(path, durable=False))
        pipeline.rules = {scorer.name.digest: RulesInForce(Rules(some, scorer.spec), lists=lists)}
        await ask(pipeline, instances[:30])
        pipeline.rules = {}
        await ask(pipeline, instances[30:])
        await pipeline.close()

    asyncio.run(score())
    today = Lists()
    today.apply([ListEntry("blocked", "c2", revision=2)])
    changed = with_lists(rule("other", "customer_id in blocked", "review"), rule("dear", "amount > 1e9"))
    effect = effect_of(path, changed, scorer, today, rules_of={some.digest: some}.__getitem__)
    then = sum(i["customer_id"] == "c1" for i in instances[:30])
    now = sum(i["customer_id"] == "c2" for i in instances[30:])
    assert effect.rules[0].hits == then + now
    assert then
    assert now


def test_nothing_to_decide_again_is_told(
    recorded: tuple[Path, list[dict[str, Any]], list[str]], scorer: Scorer
) -> None:
    some = rule_set(rule("one", "amount > 1"))
    with pytest.raises(DataError, match="there is no decision of fraud-transaction to decide again"):
        effect_of(recorded[0], some, scorer, since_ms=2**60)

    def gone(name: str, digest: str) -> Any:
        raise RegistryError("the model is gone")

    with pytest.raises(DataError, match="the model is gone"):
        rule_effect(SqliteLog(recorded[0]), some, gone, no_rules, Lists())


def test_the_command_prints_and_writes(
    recorded: tuple[Path, list[dict[str, Any]], list[str]],
    home: Path,  # noqa: F811
    scorer: Scorer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(recorded[0].parent))
    monkeypatch.setenv("BENTOML_HOME", str(home))
    file, out = tmp_path / "rules.json", tmp_path / "effect.json"
    file.write_bytes(rule_set(rule("one", 'customer_id == "c1"', "decline"), rule("never", "amount < 0")).encode())
    ended = CliRunner().invoke(app, ["test", str(file), "--since", "2020-01-01", "--out", str(out)])
    assert ended.exit_code == 0, ended.output + str(ended.exception)
    assert "300 decisions" in ended.output
    assert "rule never has earned nothing: it never fires" in ended.output
    written = msgspec.json.decode(out.read_bytes(), type=Effect)
    assert written.transactions == 300
    assert written.after.actions["decline"] >= written.rules[0].hits
    assert CliRunner().invoke(app, ["test", str(file), "--since", "yesterday"]).exit_code == 2
