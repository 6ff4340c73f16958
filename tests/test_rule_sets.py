"""Rule sets: read, checked, put in force, applied in the order of precedence, recorded, replayed."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from fraud.checks.audit import replay
from fraud.cli.rules import app
from fraud.decisions.rules.in_force import FEWEST, RulesInForce
from fraud.decisions.rules.lint import warnings_of
from fraud.decisions.rules.sets import Rules, RuleSet, read_rule_set
from fraud.decisions.verdict import verdict_of, with_odds
from fraud.errors import RegistryError, RuleError
from fraud.models.active import ActiveModels, Swap
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import read_manifest
from fraud.models.lifecycle import Lifecycle
from fraud.models.rule_sets import RuleSets
from fraud.models.scorer import Scorer
from fraud.models.served import Served
from fraud.pipeline.decide import Pipeline
from fraud.serving.front_door import FrontDoor
from fraud.serving.routes import Router
from fraud.serving.rules import rule_routes
from fraud.settings import ModelSettings, Settings
from fraud.stores.log import decode_record
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.conftest import EXAMPLES
from tests.test_profiles import Service, elsewhere
from tests.tiny import TRANSACTION_SPEC, ready_rows, transactions, write_tiny_bundle
from training.data import Mapping, load_table
from training.replay import transaction_spec

NAME = "fraud-transaction"


def rule_set(*rules: dict[str, Any], model: str = NAME) -> RuleSet:
    return read_rule_set(msgspec.json.encode({"model": model, "rules": rules}).decode())


def rule(name: str, when: str, outcome: str | None = "review", **more: Any) -> dict[str, Any]:
    return {"id": name, "when": when, **({} if outcome is None else {"outcome": outcome}), **more}


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> list[Scorer]:
    folder = tmp_path_factory.mktemp("bundles")
    return [Scorer.load(write_tiny_bundle(folder / kind, kind)) for kind in ("transaction", "features")]


def decided(
    scorer: Scorer, some: RuleSet, instances: Sequence[dict[str, Any]], path: Path, **limits: Any
) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        pipeline = Pipeline({scorer.name.name: scorer}, SqliteStore(path / "history.db", durable=False))
        pipeline.rules = {scorer.name.digest: RulesInForce(Rules(some, scorer.spec), **limits)}
        try:
            return await ask(pipeline, instances)
        finally:
            await pipeline.close()

    return asyncio.run(run())


YAML = """
model: fraud-transaction
description: The first rules.
rules:
  - id: night_big
    description: Large amounts at night.
    when: (hour < 6 || hour >= 23) && amount > 50
    outcome: review
    priority: 5
    owner: anna
    valid_from: 2026-01-01T00:00:00Z
  - id: fuel_odds
    when: category == "fuel"
    odds: 0.5
    enabled: false
"""


def test_a_file_is_read_and_its_digest_is_of_what_it_says() -> None:
    some = read_rule_set(YAML)
    assert [r.id for r in some.rules] == ["night_big", "fuel_odds"]
    assert read_rule_set(some.encode().decode()) == some
    assert read_rule_set(YAML.replace("odds: 0.5", "odds: 1e-3")).rules[1].odds == 0.001
    assert read_rule_set(YAML.replace("owner: anna", "owner:   'anna'  # hers")).digest == some.digest
    assert read_rule_set(YAML.replace("amount > 50", "amount > 51")).digest != some.digest


@pytest.mark.parametrize(
    ("change", "said", "path"),
    [
        (("outcome: review", "outcome: revue"), "'revue'", "$.rules[0].outcome"),
        (("outcome: review", "odds: 2\n    outcome: review"), "needs an outcome or odds, and not both", "$.rules[0]"),
        (("    odds: 0.5\n", ""), "rule fuel_odds needs an outcome or odds", "$.rules[1]"),
        (("odds: 0.5", "odds: 0"), "1e-06", "$.rules[1].odds"),
        (("fuel_odds", "night_big"), "the id night_big is given twice", "$.rules[1].id"),
        (("fuel_odds", "model"), "the id model is kept for decisions of the model", "$.rules[1].id"),
        (("fuel_odds", "Fuel odds"), "matching regex", "$.rules[1].id"),
        (("owner: anna", "onwer: anna"), "unknown field", "$.rules[0]"),
        (("00:00:00Z", "00:00:00"), "timezone", "$.rules[0].valid_from"),
        (("valid_from", "valid_until: 2025-01-01T00:00:00Z\n    valid_from"), "ends before it begins", None),
        (("owner: anna", "owner: anna\n    owner: bert"), "'owner' is given twice", None),
        (("owner: anna", "owner: &who anna\n    description: *who"), "an alias (*) is not taken here", None),
        (("model: fraud-transaction", "model: ["), "no rule set", None),
        (("enabled: false", "enabled: 3"), "bool", "$.rules[1].enabled"),
        (("rules:", "rules: !!python/object/apply:os.system ['true']\nmore:"), "no rule set", None),
    ],
)
def test_a_file_that_is_no_rule_set_is_refused(change: tuple[str, str], said: str, path: str | None) -> None:
    assert change[0] in YAML
    with pytest.raises(RuleError) as refused:
        read_rule_set(YAML.replace(*change, 1))
    assert said in refused.value.message
    assert path is None or refused.value.path == path


def test_a_set_names_every_rule_that_its_model_cannot_decide() -> None:
    some = rule_set(rule("a", "amuont > 1"), rule("b", "amount > 1"), rule("c", "category == 'pub'", enabled=False))
    with pytest.raises(RuleError) as refused:
        Rules(some, TRANSACTION_SPEC)
    assert refused.value.message == (
        "rule a: line 1, column 1: no name 'amuont'; did you mean 'amount'?; "
        "rule c: line 1, column 13: category has no category 'pub'; it has cafe, fuel, shop"
    )
    assert refused.value.path == "$.rules[0].when"


def test_odd_rules_are_warned_of() -> None:
    some = rule_set(
        rule("never", "basket_size < 0"),
        rule("always", "fraud_probability >= 0 || amount > 3"),
        rule("one", "amount > 3 && hour < 6"),
        rule("two", "amount > 3.0 && hour < 6"),
        rule("fine", "basket_size + 1 > 1"),
    )
    assert warnings_of(Rules(some, TRANSACTION_SPEC)) == [
        "rule never can never fire: the model's specification excludes it",
        "rule always fires on every transaction that has the values it reads",
        "rules one and two have the same condition",
    ]


def test_the_example_can_be_decided_by_a_model_of_the_simulated_table(simulated: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    some = read_rule_set((EXAMPLES / "rules.yaml").read_text())
    rules = Rules(some, transaction_spec(load_table(simulated, mapping), mapping, slice(None)))
    assert len(rules.rules) == 10
    assert warnings_of(rules) == []


def test_precedence(scorers: list[Scorer], tmp_path: Path) -> None:
    scorer = scorers[0]
    some = rule_set(
        rule("ask", "amount > 10", "challenge"),
        rule("look", "amount > 20", "review"),
        rule("no", "amount > 30", "decline"),
        rule("never", "amount > 40", "decline", priority=1),
        rule("yes", "amount > 50", "approve"),
        rule("silent", "amount > 0", "decline", shadow=True),
        rule("off", "amount > 0", "decline", enabled=False),
        rule("past", "amount > 0", "decline", valid_until="2020-01-01T00:00:00Z"),
        rule("raise", "amount < 5", None, odds=1e6),
    )
    instances = transactions(80, 3)
    rows = decided(scorer, some, instances, tmp_path)
    seen: set[str] = set()
    for instance, row in zip(instances, rows, strict=True):
        amount = instance["amount"]
        hits = [
            name
            for name, limit in (("yes", 50), ("never", 40), ("no", 30), ("look", 20), ("ask", 10))
            if amount > limit
        ] + ["raise"] * (amount < 5)
        by = hits[0] if hits and hits[0] != "raise" else "model"
        assert (row["decided_by"], row["rules_hit"]) == (by, hits)
        verdict = verdict_of(scorer.policy, row["fraud_probability"])
        assert (row["prediction"], row["risk_level"]) == verdict[:2]
        expected = {"yes": "approve", "never": "decline", "no": "decline", "look": "review", "ask": "challenge"}
        assert row["decision"] == ("decline" if hits == ["raise"] else expected.get(by, verdict.decision))
        seen.add(by)
    assert seen == {"yes", "never", "no", "look", "ask", "model"}
    records = [decode_record(logged.record) for logged, _ in SqliteLog(tmp_path / "history.db").rows()]
    assert all(r.ruling is not msgspec.UNSET and r.ruling.shadow_hits == ["silent"] for r in records)
    assert {r.model_decision for r in records} > {"approve"}


def test_odds_move_a_probability_as_bayes_says() -> None:
    assert with_odds(0.5, 3.0) == 0.75
    assert with_odds(0.0, 1e12) == 0.0
    assert with_odds(1.0, 1e-12) == 1.0
    many = rule_set(*(rule(f"r{i}", "true", None, odds=1e6) for i in range(100)), model="fraud-features")
    assert len(many.rules) == 100


def test_extreme_odds_still_decide(scorers: list[Scorer], tmp_path: Path) -> None:
    for odds, decision in ((1e6, "decline"), (1e-6, "approve")):
        some = rule_set(*(rule(f"r{i}", "true", None, odds=odds) for i in range(100)), model="fraud-features")
        rows = decided(scorers[1], some, ready_rows(20, 1), tmp_path)
        assert {row["decision"] for row in rows} == {decision}
        assert {row["decided_by"] for row in rows} == {"model"}


def test_plain_rows_and_bulk_are_decided_by_rules_too(scorers: list[Scorer], tmp_path: Path) -> None:
    some = rule_set(rule("free", 'email_domain == "free" && !has_phone', "challenge"), model="fraud-features")
    instances = ready_rows(200, 2)
    rows = decided(scorers[1], some, instances, tmp_path)
    named = [{**instance, "transaction_id": f"t{i}"} for i, instance in enumerate(instances)]
    for recorded in (rows, decided(scorers[1], some, named, tmp_path)):
        hits = [row["decided_by"] == "free" for row in recorded]
        assert hits == [i["email_domain"] == "free" and not i["has_phone"] for i in instances]
        assert all((row["decision"] == "challenge") == hit for row, hit in zip(recorded, hits, strict=True))


def test_a_rule_that_fires_on_everything_is_stopped(scorers: list[Scorer], tmp_path: Path) -> None:
    some = rule_set(
        rule("everything", "true", "decline"),
        rule("meant", "missing(velocity) || true", "challenge", max_share=1.0),
        model="fraud-features",
    )
    told: list[str] = []
    instances = [{**row, "transaction_id": f"t{i}"} for i, row in enumerate(ready_rows(2 * FEWEST, 3))]
    rows = decided(scorers[1], some, instances, tmp_path, max_share=0.5, on_stop=told.append)
    by = [row["decided_by"] for row in rows]
    assert by == ["everything"] * (FEWEST - 1) + ["meant"] * (FEWEST + 1)
    assert told == ["everything"]
    result = replay(SqliteLog(tmp_path / "history.db"), lambda name, digest: scorers[1], lambda digest: some)
    assert (result.rows, result.differences, result.failures) == ({scorers[1].name.digest: 400}, [], {})


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Bento store with two versions of a transaction model, the first in production."""
    home = tmp_path_factory.mktemp("home")
    lifecycle = Lifecycle(home)
    for seed in (0, 1):
        bundle = write_tiny_bundle(home / f"bundle{seed}", "transaction", seed=seed)
        lifecycle.store.import_bundle(bundle, {})
        digest, manifest = read_manifest(bundle)
        aliases = ("candidate",) if seed else ("production",)
        lifecycle.registry.register(NAME, digest, manifest.preprocessor_digest, who="test", aliases=aliases)
    return home


@pytest.fixture
def home(stocked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stocked, tmp_path / "home"))


def put_in_force(home: Path, some: RuleSet) -> None:
    sets = RuleSets(home)
    version = sets.save(some, who="anna")
    sets.promote(NAME, f"v{version.version}", who="bert", why="a test")


SETS = (
    rule_set(rule("dear", "amount > 25", "decline"), rule("near", 'merchant_id in ["m1", "m2"]', "review")),
    rule_set(rule("own", 'customer_id == "c3" || missing(device_id)', "approve"), rule("dear", "amount > 20")),
    rule_set(rule("early", "hour < 4 && customer_count_1d > 1", "challenge"), rule("up", "amount > 10", None, odds=4)),
)


def test_sets_change_under_a_running_worker_and_replay_bit_for_bit(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    swaps: list[Swap] = []

    async def serve() -> list[str]:
        models = ActiveModels(
            Settings(models=ModelSettings(FRAUD_MODEL=NAME, BENTOML_HOME=home, FRAUD_MODEL_POLL_S=30)),
            on_swap=swaps.append,
        )
        await models.load()
        pipeline = Pipeline(models.champions, SqliteStore(path, durable=False))

        def install(champions: Any, challengers: Any, beside: Any, rules: Any) -> None:
            pipeline.scorers, pipeline.challengers, pipeline.rules = champions, challengers, rules

        models.follow(install)
        by: list[str] = []
        instances = transactions(240, 9)
        for i, some in enumerate((None, *SETS)):
            if some is not None:
                put_in_force(home, some)
                await models.check()
            rows = await ask(pipeline, instances[60 * i : 60 * i + 60])
            by += [row["decided_by"] for row in rows]
        assert models.describe()["rules"] == {NAME: SETS[-1].digest}
        await models.close()
        await pipeline.close()
        return by

    by = asyncio.run(serve())
    assert set(by[:60]) == {"model"}
    assert set(by[60:120]) == {"dear", "near", "model"}
    assert set(by[120:180]) == {"own", "dear", "model"}
    assert set(by[180:]) == {"early", "model"}
    assert [swap.tag for swap in swaps if swap.role == "rules"] == [some.digest for some in SETS]
    scorer = Scorer.of(BentoStore(home).read(f"{NAME}:{swaps[0].tag.partition(':')[2]}"))
    result = replay(SqliteLog(path), lambda name, digest: scorer, RuleSets(home).read)
    assert (sum(result.rows.values()), result.differences, result.failures) == (240, [], {})
    others = {SETS[0].digest: SETS[1], SETS[1].digest: SETS[0], SETS[2].digest: SETS[2]}
    wrong = replay(SqliteLog(path), lambda name, digest: scorer, others.__getitem__)
    assert {difference.field for difference in wrong.differences} >= {"decision", "decided_by", "hits", "rules"}


def test_a_broken_set_is_refused_and_the_old_one_goes_on(home: Path) -> None:
    put_in_force(home, SETS[0])
    sets = RuleSets(home)

    async def serve() -> None:
        models = ActiveModels(Settings(models=ModelSettings(FRAUD_MODEL=NAME, BENTOML_HOME=home)))
        await models.load()
        version = sets.save(SETS[1], who="anna")
        (sets.folder / f"{version.digest.removeprefix('sha256:')}.json").write_bytes(SETS[2].encode())
        with pytest.raises(RegistryError, match="its file was changed"):
            sets.promote(NAME, version.digest, who="bert", why="")
        sets.registry.move(f"{NAME}-rules", version.digest, "production", who="bert", why="past the check")
        await models.check()
        state = models.describe()
        assert state["rules"] == {NAME: SETS[0].digest}
        assert [(failed["role"], failed["wanted"]) for failed in state["failed_swaps"]] == [("rules", version.digest)]
        sets.registry.rollback(f"{NAME}-rules", who="bert", why="")
        await models.check()
        assert models.describe()["failed_swaps"] == []
        assert len(models.rules.by_version(models.champions.values())) == 1
        await models.close()

    asyncio.run(serve())


def test_rows_that_a_replaced_version_read_are_decided_by_its_rules(home: Path) -> None:
    put_in_force(home, SETS[0])
    seen: list[set[str]] = []

    async def serve() -> list[str]:
        models = ActiveModels(Settings(models=ModelSettings(FRAUD_MODEL=NAME, BENTOML_HOME=home)))
        await models.load()
        models.follow(lambda champions, challengers, beside, rules: seen.append({*rules}))
        versions = [models.champions[NAME].name.digest]
        for reference in ("v1", "v0", "v1"):
            Lifecycle(home).registry.move(NAME, reference, "production", who="bert", why="")
            await models.check()
            versions.append(models.champions[NAME].name.digest)
        await models.close()
        return versions

    first, second, *_ = asyncio.run(serve())
    assert seen == [{first}, {first, second}, {first, second}, {first, second}]


def test_a_model_that_lacks_a_name_in_force_is_not_promoted(home: Path) -> None:
    put_in_force(home, rule_set(rule("fuel", 'category == "fuel"')))
    lifecycle = Lifecycle(home)
    bundle = write_tiny_bundle(home / "other", "features", name=NAME, seed=5)
    lifecycle.store.import_bundle(bundle, {})
    digest, manifest = read_manifest(bundle)
    lifecycle.registry.register(NAME, digest, manifest.preprocessor_digest, who="test")
    with pytest.raises(RegistryError, match=r"cannot decide the rules in force .* rule fuel: .* no name 'category'"):
        lifecycle.promote(NAME, "candidate", why="all the same", force=True)
    assert lifecycle.registry.resolve(NAME, "production").version == 0
    assert lifecycle.promote(NAME, "v1", why="its features are the same", force=True).version == 1
    assert lifecycle.registry.names_in_production() == [NAME]
    with pytest.raises(RegistryError, match="-rules at its end are kept for what stands beside a model"):
        Served(ModelSettings(FRAUD_MODEL=f"{NAME}-rules")).champions()
    assert {version.name for version in lifecycle.registry.versions()} == {NAME}


def test_the_commands(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(home))
    file = tmp_path / "rules.yaml"

    def fraud(*arguments: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, list(arguments))
        return ended.exit_code, ended.output + str(ended.exception or "")

    file.write_text(YAML)
    code, said = fraud("check", str(file))
    assert code == 0
    assert "night_big" in said
    assert "1 rules can serve, 1 are not enabled" in said
    assert fraud("save", str(file))[0] == 0
    assert fraud("promote", f"{NAME}:candidate", "--why", "first")[0] == 0
    file.write_text(YAML.replace("amount > 50", "amount > 60"))
    assert fraud("save", str(file))[0] == 0
    assert fraud("promote", f"{NAME}:v1")[0] == 0
    assert "amount > 60" in fraud("show", f"{NAME}:production")[1]
    assert fraud("rollback", NAME)[0] == 0
    assert "amount > 50" in fraud("show", f"{NAME}:production")[1]
    code, said = fraud("list", NAME)
    assert code == 0
    assert said.count("production") == 1
    assert "rollback" in said
    file.write_text(YAML.replace("amount > 50", "amuont > 50"))
    code, said = fraud("check", str(file))
    assert code == 1
    assert (
        f"{file}: $.rules[0].when: rule night_big: line 1, column 29: no name 'amuont'; did you mean 'amount'?" in said
    )
    assert fraud("check", str(file), "--bundle", str(home / "bundle0"))[0] == 1
    assert fraud("promote", NAME)[0] == 1


class RuleService(Service):
    """The routes of rule sets over a Bento store."""

    def __init__(self, home: Path) -> None:
        self.runner = asyncio.Runner()
        self.door = FrontDoor(Router(rule_routes(RuleSets(home))), elsewhere)

    def __exit__(self, *_: object) -> None:
        self.runner.close()


def test_the_routes_check_save_promote_and_roll_back(home: Path) -> None:
    first, second = (msgspec.json.decode(some.encode()) for some in SETS[:2])
    with RuleService(home) as service:
        assert service.call("GET", f"/v1/rulesets/{NAME}") == (200, {"digest": None, "rules": None})
        assert service.call("POST", "/v1/rulesets/check", first) == (200, {"digest": SETS[0].digest, "warnings": []})
        for i, some in enumerate((first, second)):
            status, saved = service.call("POST", "/v1/rulesets", some)
            assert (status, saved) == (200, {"version": f"v{i}", "digest": SETS[i].digest, "aliases": ["candidate"]})
            status, moved = service.call(
                "POST", f"/v1/rulesets/{NAME}/promote", {"reference": f"v{i}", "why": "a test"}
            )
            assert (status, moved["digest"]) == (200, SETS[i].digest)
        status, in_force = service.call("GET", f"/v1/rulesets/{NAME}")
        assert (status, in_force) == (200, {"digest": SETS[1].digest, "rules": second})
        assert service.call("POST", f"/v1/rulesets/{NAME}/rollback", {})[1]["digest"] == SETS[0].digest
        event = RuleSets(home).registry.events(f"{NAME}-rules")[0]
        assert (event.kind, event.who) == ("rollback", "key none")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/check", {"model": NAME, "rules": [rule("a", "amuont > 1")]}, "$.rules[0].when rule a: line 1, column 1"),
        ("/check", {"model": NAME, "rules": [rule("a", "amount > 1", "refuse")]}, "$.rules[0].outcome"),
        ("", {"model": NAME, "rules": [rule("a", "amount > 1", None)]}, "$.rules[0] rule a needs an outcome or odds"),
        ("", {"model": "unknown", "rules": []}, "no version of the model 'unknown' is registered here"),
        ("", {"model": "../x", "rules": []}, "model of the rule set '../x'"),
        (f"/{NAME}/promote", {"reference": "v9"}, "no model"),
        (f"/{NAME}/rollback", {}, "has no previous version to roll back to"),
    ],
)
def test_a_wrong_call_of_a_rule_route_is_refused(home: Path, path: str, body: Any, said: str) -> None:
    with RuleService(home) as service:
        status, answer = service.call("POST", f"/v1/rulesets{path}", body)
    assert status == 422
    assert said in f"{answer['error']['path']} {answer['error']['message']}"
