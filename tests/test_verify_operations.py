"""The checks that operators run, in small, on real servers; and that they see what they are there to see."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from fraud.checks import batching as verify_batching
from fraud.checks import cases as verify_cases
from fraud.checks import log as verify_log
from fraud.checks import rules as verify_rules
from fraud.checks.batching import Batched
from fraud.checks.log import Kept
from fraud.checks.sandbox import fresh, harsher, sandbox
from fraud.checks.swap import made_by, measure_swaps
from fraud.decisions.verdict import verdict_of
from fraud.detectors.registered import ALGORITHMS
from fraud.features.featurizer import Histories
from fraud.models.bundle import read_bundle, read_manifest
from fraud.models.scorer import Scorer
from tests.tiny import write_tiny_bundle


@pytest.fixture(scope="module", params=list(ALGORITHMS.values()), ids=list(ALGORITHMS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("verified") / "bundle"
    return str(write_tiny_bundle(folder, "transaction", algorithm=request.param))


def test_swap_under_load(bundle: str) -> None:
    """All but the ratio of latencies, which says nothing on a machine that runs tests."""
    with sandbox(bundle, environment={"FRAUD_MAX_WAIT_S": "10"}) as box:  # a busy machine is not what is tested
        result = asyncio.run(measure_swaps(box, 4, rate=40, connections=8))
        log = (box.folder / "server.log").read_text()
    assert result.without.failed == result.during.failed == []
    assert result.without.mixed == result.during.mixed == []
    assert result.refused_broken
    assert len(result.during.by_digest) == 2
    assert result.slowest_swap_s < 10
    assert f"{read_manifest(Path(bundle))[1].detector.files[0]} is changed or truncated" in log


@pytest.mark.parametrize(
    ("module", "arguments", "figures"),
    [
        (verify_batching, ["--users", "30", "--requests", "4"], r"answers other than alone 0, good rows refused 0"),
        (verify_log, ["audit", "--rows", "300", "--flips", "20"], r"300 decisions acknowledged, 300 in the log"),
        (verify_log, ["replay", "--rows", "400"], r"400 decisions scored again, by version \w+: 200, \w+: 200"),
        (
            verify_rules,
            ["--decisions", "5000", "--changes", "8"],
            r"(?s)one by one: differences 0.*failed 0, answered by two sets 0.*replayed: differences 0, .*found 0",
        ),
        (
            verify_cases,
            ["--cases", "200", "--clients", "6"],
            r"(?s)200 of 200 cases resolved .*worked twice 0, .*labels other than resolutions 0, trails incomplete 0",
        ),
        (verify_log, ["chaos", "--kills", "2"], r"missing 0, other than answered 0, twice 0;.*chain whole"),
    ],
)
def test_commands(bundle: str, module: Any, arguments: list[str], figures: str) -> None:
    result = CliRunner().invoke(module.app, [*arguments, "--model", bundle])
    assert result.exit_code == 0, result.output
    assert re.search(figures, result.output), result.output


def test_mixed_versions_would_be_seen(bundle: str) -> None:
    parsed = read_bundle(Path(bundle))
    one, other = Scorer(parsed), Scorer(harsher(parsed))
    instance = json.loads(bytes(parsed.golden[0].instance))
    row = explained(one, instance)
    assert made_by(one, row)
    assert not made_by(other, row)
    scores = {name: explained(other, instance)[name] for name in ("fraud_probability", "anomaly")}
    assert not made_by(one, {**row, **scores})
    assert not made_by(one, {**row, "decision": "decline" if row["decision"] != "decline" else "approve"})


def explained(scorer: Scorer, instance: dict[str, Any]) -> dict[str, Any]:
    """Return what /explain answers of one row without history."""
    rows = [scorer.decoder.decode(json.dumps(fresh(instance)).encode(), "$")]
    X = scorer.featurizer.advance(rows, Histories.new(rows))
    (score,) = scorer.score(X).rows()
    (explained_row,) = scorer.explainer.explained(X, scorer.contributions(X), rows)
    severity = None if score.anomaly is None else score.anomaly.severity
    prediction, risk_level, decision = verdict_of(scorer.policy, score.decision_score, severity)
    return {
        "raw_margin": score.raw_margin,
        "base_value": explained_row.base_value,
        "contributions": explained_row.contributions,
        "fraud_probability": score.fraud_probability,
        "anomaly": msgspec.to_builtins(score.anomaly),
        "prediction": prediction,
        "risk_level": risk_level,
        "decision": decision,
    }


def test_infection_and_loss_would_be_seen() -> None:
    result = Batched()
    good = {"transaction_id": "t1", "fraud_probability": 0.5}
    alone = {"fraud_probability": 0.5}
    rows = [{"transaction_id": "t1", "amount": 1.0}]

    def compare(status: int, answer: Any, is_bad: bool = False) -> None:
        verify_batching._compare(result, status, answer, rows, [is_bad], [alone], "amount")

    compare(200, {"predictions": [good]})
    assert result.holds
    compare(200, {"predictions": [{**good, "fraud_probability": 0.6}]})
    compare(200, {"predictions": [{**good, "transaction_id": "t2"}]})
    assert len(result.different) == 2
    compare(422, {"error": {}})
    compare(200, {"predictions": [{"error": {"path": "$.instances[0].amount"}}]})
    assert len(result.wrongly_refused) == 2
    compare(200, {"predictions": []})
    compare(422, {"errors": [{"path": "$.instances[1].amount"}]}, is_bad=True)
    assert len(result.wrongly_taken) == 2
    assert Kept().holds
    assert not Kept(missing=["t"]).holds
    assert not Kept(broken="row 3").holds
