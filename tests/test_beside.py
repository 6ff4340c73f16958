"""An anomaly model beside a champion: what it reads, what it says and does, its records, and their replay."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fraud.checks.audit import replay
from fraud.currencies import Currency
from fraud.decisions.anomaly import SEVERITIES, Severity
from fraud.decisions.policy import Action, Policy
from fraud.decisions.rules.sets import RuleSet
from fraud.decisions.verdict import POLICY_ACTIONS as ACTIONS
from fraud.decisions.verdict import verdict_of
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.severity import SEVERITY, read_scale, write_scale
from fraud.errors import BundleError
from fraud.features.featurizer import Featurizer, Histories, Matrix
from fraud.models.beside import Beside, measure
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.rows import Decision
from fraud.schema import Feature, FeatureSpec, Kind, Row
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.tiny import KINDS, ready_rows, transactions, write_tiny_bundle

Pair = tuple[Scorer, Scorer]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Pair]:
    """A champion of each kind, and an anomaly model of the same features."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        kind: (
            Scorer.load(write_tiny_bundle(folder / kind, kind)),
            Scorer.load(
                write_tiny_bundle(folder / f"{kind}-anomaly", kind, name="anomaly", algorithm=ISOLATION_FOREST)
            ),
        )
        for kind in KINDS
    }


def asked(champion: Scorer, n: int, seed: int = 5) -> list[dict[str, Any]]:
    """Rows to decide, every eighth of them far from the others."""
    if champion.spec.kind == "transaction":
        rows = transactions(n, seed)
        return [row | ({"amount": 9_000.0 + i} if i % 8 == 7 else {}) for i, row in enumerate(rows)]
    odd = {"income": 9e6, "velocity": 9.0}
    return [
        {"transaction_id": f"r{i}", **row, **(odd if i % 8 == 7 else {})} for i, row in enumerate(ready_rows(n, seed))
    ]


def decided(
    folder: Path, champion: Scorer, beside: Scorer | None, instances: list[dict[str, Any]], **options: Any
) -> list[Decision]:
    """Decide one by one, so that each transaction has the earlier ones as its history."""

    async def run() -> list[Decision]:
        pipeline = Pipeline({champion.name.name: champion}, SqliteStore(folder / "history.db"), **options)
        pipeline.beside = None if beside is None else Beside(beside)
        outcomes = []
        for instance in instances:
            request = pipeline.read([json.dumps(instance).encode()], explain=bool(options.get("record_reasons")))
            outcomes += (await pipeline.decide_requests([request]))[0]
        await pipeline.close()
        assert all(isinstance(outcome, Decision) for outcome in outcomes)
        return [outcome for outcome in outcomes if isinstance(outcome, Decision)]

    return asyncio.run(run())


def no_rules(digest: str) -> RuleSet:
    raise AssertionError("no rule set is in force")


def features(scorer: Scorer, rows: list[Row]) -> Matrix:
    """A model's own features of rows in order."""
    if scorer.spec.kind == "features":
        return scorer.featurizer.ready(rows)
    return scorer.featurizer.advance(rows, Histories.new(rows))


def read(scorer: Scorer, instances: list[dict[str, Any]]) -> list[Row]:
    return [scorer.decoder.decode(json.dumps(instance).encode(), "$") for instance in instances]


@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_beside_is_the_one_that_the_model_gives_alone(
    pairs: dict[Kind, Pair], kind: Kind, tmp_path: Path
) -> None:
    champion, anomaly = pairs[kind]
    instances = asked(champion, 60)
    beside = decided(tmp_path, champion, anomaly, instances)
    rows = read(anomaly, instances)
    X = features(anomaly, rows)
    alone = anomaly.anomalies(X, anomaly.score(X), rows)
    assert [decision.anomaly for decision in beside] == alone
    assert {decision.anomaly_model for decision in beside} == {anomaly.name}
    assert {decision.model for decision in beside} == {champion.name}
    assert {a.severity for a in alone or []} == {*SEVERITIES}
    (tmp_path / "other").mkdir()
    without = decided(tmp_path / "other", champion, None, instances)
    assert [d.fraud_probability for d in without] == [d.fraud_probability for d in beside]
    assert {d.anomaly for d in without} == {None}


def test_rare_rows_are_explained_and_usual_ones_are_said_to_be_usual(pairs: dict[Kind, Pair], tmp_path: Path) -> None:
    champion, anomaly = pairs["transaction"]
    for decision in decided(tmp_path, champion, anomaly, asked(champion, 40)):
        found = decision.anomaly
        assert found is not None
        assert isinstance(found.explanation, str)
        assert (found.explanation == "As usual as 50% of transactions.") == (found.severity == "LOW")


@pytest.mark.parametrize("kind", KINDS)
def test_a_critical_transaction_is_reviewed_and_no_decision_is_made_milder(
    pairs: dict[Kind, Pair], kind: Kind, tmp_path: Path
) -> None:
    champion, anomaly = pairs[kind]
    decisions = decided(tmp_path, champion, anomaly, asked(champion, 80))
    changed = 0
    for decision in decisions:
        own = verdict_of(champion.policy, decision.decision_score)
        assert decision.anomaly is not None
        assert decision.verdict == verdict_of(champion.policy, decision.decision_score, decision.anomaly.severity)
        assert ACTIONS.index(decision.verdict.decision) >= ACTIONS.index(own.decision)
        assert decision.verdict.risk_level == own.risk_level
        if decision.verdict != own:
            changed += 1
            assert decision.anomaly.severity == "CRITICAL"
            assert (own.decision, decision.verdict.decision, decision.verdict.prediction) == ("approve", "review", True)
    assert changed


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("severity", [*SEVERITIES, None])
@pytest.mark.parametrize("score", [0.0, 0.5, 0.9])
def test_the_policy_says_what_a_severity_does(
    pairs: dict[Kind, Pair], action: Action, severity: Severity | None, score: float
) -> None:
    policy = msgspec.structs.replace(pairs["features"][0].policy, severity_actions={"HIGH": action})
    own, found = verdict_of(policy, score), verdict_of(policy, score, severity)
    expected = max(own.decision, action, key=ACTIONS.index) if severity == "HIGH" else own.decision
    assert found == (expected != "approve", own.risk_level, expected)


def test_a_policy_of_before_reviews_what_is_critical() -> None:
    levels = b'{"medium": 1, "high": 1, "critical": 1}'
    content = b'{"review_threshold": 0.3, "decline_threshold": 0.7, "risk_levels": %s}' % levels
    policy = msgspec.json.decode(content, type=Policy)
    assert verdict_of(policy, 0.0, "CRITICAL").decision == "review"
    assert verdict_of(policy, 0.0, "HIGH").decision == "approve"


@pytest.mark.parametrize("kind", KINDS)
def test_records_carry_the_verdict_and_are_replayed_from_the_bundles_they_name(
    pairs: dict[Kind, Pair], kind: Kind, tmp_path: Path
) -> None:
    champion, anomaly = pairs[kind]
    instances = asked(champion, 50)
    first = decided(tmp_path, champion, anomaly, instances, record_reasons=True)
    again = decided(tmp_path, champion, None, instances)
    assert [d.anomaly for d in again] == [d.anomaly for d in first], "a repeat has the recorded verdict"
    assert {d.anomaly_model for d in again} == {anomaly.name}
    versions = {scorer.name.digest: scorer for scorer in (champion, anomaly)}
    log = SqliteLog(tmp_path / "history.db")
    result = replay(log, lambda name, digest: versions[digest], no_rules)
    assert (result.rows, result.differences, result.failures) == ({champion.name.digest: 50}, [], {})
    scale = anomaly.detector.severity
    assert scale is not None
    lower = tuple(msgspec.structs.replace(level, above=-9.0) for level in scale.levels)
    files = {**anomaly.bundle.detector_files, SEVERITY: write_scale(msgspec.structs.replace(scale, levels=lower))}
    other = Scorer(replace(anomaly.bundle, detector_files=files))
    changed = replay(log, lambda name, digest: other if digest == anomaly.name.digest else champion, no_rules)
    assert {d.field for d in changed.differences} >= {"anomaly", "decision"}

    def missing(name: str, digest: str) -> Scorer:
        if digest != anomaly.name.digest:
            return champion
        raise BundleError("it is gone")

    gone = replay(log, missing, no_rules)
    assert (gone.rows, gone.failures) == ({}, {anomaly.name.digest: "it is gone"})


def test_the_anomaly_model_reads_a_champion_with_other_columns_ranks_and_categories(
    pairs: dict[Kind, Pair],
) -> None:
    """The champion has its columns in another order, more of them, other amount quantiles, other categories."""
    champion, anomaly = (Scorer(scorer.bundle) for scorer in pairs["transaction"])
    spec = champion.spec
    category = Feature("category", "request", "categorical", ("bar", "shop", "cafe", "fuel"), missing=True)
    history = tuple(feature for feature in spec.features if feature.source == "history")[::-1]
    more = (Feature("basket_weight", "request", missing=True), category, spec.features[-1])
    champion.spec = FeatureSpec("transaction", (*history, *more), spec.roles)
    champion.featurizer = Featurizer(champion.spec, np.linspace(1.0, 80.0, 100).tolist())
    champion.decoder = type(champion.decoder)(champion.spec)
    instances = transactions(120, 8)
    rows, own_rows = read(champion, instances), read(anomaly, instances)
    X, own = features(champion, rows), features(anomaly, own_rows)
    beside = Beside(anomaly)
    assert beside.misfit(champion) is None
    assert np.array_equal(beside.features(champion, X), own, equal_nan=True)
    assert list(measure(champion, beside, X, champion.score(own), rows).anomalies) == anomaly.anomalies(
        own, anomaly.score(own), own_rows
    )


def test_the_same_features_are_not_copied(pairs: dict[Kind, Pair]) -> None:
    champion, anomaly = pairs["transaction"]
    X = np.zeros((3, len(champion.spec.features)))
    assert Beside(anomaly).features(champion, X) is X


def with_spec(scorer: Scorer, spec: FeatureSpec) -> Scorer:
    changed = Scorer(scorer.bundle)
    changed.spec = spec
    return changed


def test_a_champion_that_lacks_features_is_answered_without_an_anomaly_and_says_so(
    pairs: dict[Kind, Pair], tmp_path: Path
) -> None:
    champion, anomaly = pairs["transaction"]
    features_champion = pairs["features"][0]
    fewer = FeatureSpec("transaction", champion.spec.features[3:], champion.spec.roles)
    scaled = msgspec.structs.replace(champion.spec, currencies={"EUR": Currency(2, 4000)})
    said = Beside(anomaly).misfit(with_spec(champion, fewer))
    assert said is not None
    assert said.endswith("that has no amount, amount_log, amount_global_percentile; train both with the same mapping")
    assert "other scales" in (Beside(anomaly).misfit(with_spec(champion, scaled)) or "")
    assert "not features" in (Beside(anomaly).misfit(features_champion) or "")
    with pytest.raises(BundleError, match="cannot be beside"):
        Beside(anomaly).features(features_champion, np.zeros((1, 4)))
    for decision in decided(tmp_path, features_champion, anomaly, asked(features_champion, 5)):
        assert (decision.anomaly, decision.anomaly_model, decision.degraded) == (None, None, ("anomaly",))


def test_only_a_model_that_measures_anomalies_can_be_beside(pairs: dict[Kind, Pair]) -> None:
    with pytest.raises(BundleError, match="measures no anomaly, as FRAUD_ANOMALY_MODEL must"):
        Beside(pairs["features"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_alone_it_answers_with_its_own_severity(pairs: dict[Kind, Pair], kind: Kind, tmp_path: Path) -> None:
    _, anomaly = pairs[kind]
    for decision in decided(tmp_path, anomaly, anomaly, asked(anomaly, 30)):
        assert decision.anomaly is not None
        assert decision.anomaly_model is None
        severity = decision.anomaly.severity
        assert decision.verdict == verdict_of(anomaly.policy, decision.decision_score, severity)
    assert replay(SqliteLog(tmp_path / "history.db"), lambda name, digest: anomaly, no_rules).differences == []


def test_plain_rows_have_a_verdict_beside_too(pairs: dict[Kind, Pair], tmp_path: Path) -> None:
    champion, anomaly = pairs["features"]
    instances = ready_rows(40, 9)
    plain = decided(tmp_path, champion, anomaly, instances)
    rows = read(anomaly, instances)
    X = features(anomaly, rows)
    assert [decision.anomaly for decision in plain] == anomaly.anomalies(X, anomaly.score(X), rows)
    assert {decision.anomaly_model for decision in plain} == {anomaly.name}


def test_the_scale_travels_with_the_bundle(pairs: dict[Kind, Pair]) -> None:
    anomaly = pairs["features"][1]
    assert read_scale(anomaly.bundle.detector_files["severity.json"]) == anomaly.detector.severity
