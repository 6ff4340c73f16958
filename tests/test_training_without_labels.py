"""Training an isolation forest: on a table without labels, and beside labels that only evaluate or calibrate."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from fraud.cli.commands import app
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.errors import DataError
from fraud.models.bundle import Golden, read_bundle
from fraud.models.gate import check
from fraud.models.registry import Version
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.serving.answers import encode_answer
from fraud.stores.sqlite import SqliteStore
from tests.conftest import EXAMPLES, TINY, trained
from training.backtest import backtest
from training.config import ForestOptions, SeverityOptions
from training.data import Mapping, load_table
from training.train import Run

UNLABELLED = {"seed_agreement", "score_psi", "review_rate"}
PROBABILITY = {"brier_score", "log_loss", "expected_calibration_error", "expected_to_observed"}


@pytest.fixture(scope="session")
def scorer(forest_run: Run) -> Scorer:
    return Scorer.load(forest_run.folder / "bundle")


def golden(scorer: Scorer) -> list[dict[str, Any]]:
    return [json.loads(bytes(g.instance)) for g in scorer.bundle.golden]


def test_a_table_without_labels_makes_a_bundle_that_verifies(forest_run: Run, scorer: Scorer) -> None:
    assert scorer.bundle.algorithm is ISOLATION_FOREST
    assert not scorer.detector.is_calibrated
    assert scorer.bundle.detector_files["calibrator.json"] == b"null\n"
    assert all(g.fraud_probability is None for g in scorer.bundle.golden)
    assert not any("fraud" in feature.name for feature in scorer.spec.features), "no label, no known frauds"
    reference = scorer.bundle.reference
    assert "fraud_probability" not in reference
    assert len(reference["anomaly_score"]["deciles"]) == 11


def test_a_training_without_labels_says_how_stable_its_scores_are(forest_run: Run) -> None:
    assert forest_run.metrics.keys() == UNLABELLED
    assert 0.3 < forest_run.metrics["seed_agreement"].value <= 1
    assert 0 <= forest_run.metrics["score_psi"].value < 0.25
    assert 0.002 < forest_run.metrics["review_rate"].value < 0.05, "about the share that the policy reviews"
    run = json.loads((forest_run.folder / "run.json").read_text())
    assert run["metrics"].keys() == UNLABELLED
    card = (forest_run.folder / "bundle" / "model_card.md").read_text()
    assert "| customer_seconds_since_last | low |" in card
    assert "there is no probability of fraud" in card
    assert "fraud rate" not in card
    report = (forest_run.folder / "report.html").read_text()
    assert "log2 of the anomaly score" in report
    for needed in ("299", "2,995", "29,956"):
        assert f"not offered: needs a sample of {needed}" in card
        assert f"not offered: needs a sample of {needed}" in report
    assert "Frauds" not in report
    plots = {path.stem for path in (forest_run.folder / "plots").iterdir()}
    assert plots == {"score_distribution", "feature_importance", "shap_summary", "shap_waterfall"}


def test_labels_evaluate_a_forest_and_do_not_change_it(simulated: Path, forest_run: Run, tmp_path: Path) -> None:
    run = trained(simulated, "simulated.yaml", "fraud-anomaly", tmp_path, algorithm=ISOLATION_FOREST)
    measured = run.metrics.keys()
    assert {"average_precision", "roc_auc", "alert_recall", "seed_agreement", "score_psi", "review_rate"} <= measured
    assert not measured & PROBABILITY
    scorer = Scorer.load(run.folder / "bundle")
    chance = scorer.bundle.metrics["no_skill"]["average_precision"]
    assert run.metrics["average_precision"].value > 1.5 * chance, "better than chance without a label"
    assert not scorer.detector.is_calibrated
    assert "Frauds" in (run.folder / "report.html").read_text()
    habits = [line for line in (run.folder / "bundle" / "model_card.md").read_text().splitlines() if "| high |" in line]
    assert len(habits) == 8


def test_a_training_counts_what_severity_sends_to_review(simulated_features: Path, tmp_path: Path) -> None:
    rates = {}
    for action in ("approve", "review"):
        severity = SeverityOptions(medium=0.2, high=0.1, critical=0.05, actions={"MEDIUM": action})
        config = TINY.model_copy(update={"severity": severity})
        run = trained(
            simulated_features,
            "features.yaml",
            "loans",
            tmp_path / action,
            config=config,
            algorithm=ISOLATION_FOREST,
            labelled=False,
        )
        rates[action] = run.metrics["review_rate"].value
    assert rates["approve"] < 0.05 < rates["review"] < 0.25


def test_labels_calibrate_a_probability_if_asked(simulated_features: Path, tmp_path: Path) -> None:
    config = TINY.model_copy(update={"forest": ForestOptions(trees=25, decides_on="fraud_probability")})
    run = trained(simulated_features, "features.yaml", "loans", tmp_path, config=config, algorithm=ISOLATION_FOREST)
    assert run.metrics.keys() >= PROBABILITY
    scorer = Scorer.load(run.folder / "bundle")
    assert scorer.detector.is_calibrated
    (score,) = scorer.score(np.full((1, len(scorer.spec.features)), np.nan)).rows()
    assert score.fraud_probability == score.decision_score
    assert score.anomaly is not None
    assert score.anomaly.score == pytest.approx(2**score.raw_margin)
    with pytest.raises(DataError, match=r"the calibration window, .*, has no fraud"):
        trained(
            simulated_features,
            "features.yaml",
            "loans",
            tmp_path,
            config=config,
            algorithm=ISOLATION_FOREST,
            labelled=False,
        )


def test_ready_features_without_labels(simulated_features: Path, tmp_path: Path) -> None:
    run = trained(simulated_features, "features.yaml", "loans", tmp_path, algorithm=ISOLATION_FOREST, labelled=False)
    assert run.metrics.keys() == UNLABELLED
    card = (run.folder / "bundle" / "model_card.md").read_text()
    assert "| both |" in card
    assert "| high |" not in card


def ask(scorer: Scorer, folder: Path, instances: list[dict[str, Any]], *, explain: bool) -> list[dict[str, Any]]:
    async def run() -> bytes:
        pipeline = Pipeline({scorer.name.name: scorer}, SqliteStore(folder / "history.db", durable=False))
        request = pipeline.read([json.dumps(i).encode() for i in instances], explain=explain)
        (outcomes,) = await pipeline.decide_requests([request])
        await pipeline.close()
        return await encode_answer(outcomes)

    answered: list[dict[str, Any]] = json.loads(asyncio.run(run()))["predictions"]
    return answered


def test_its_answers_have_an_anomaly_in_place_of_a_probability(scorer: Scorer, tmp_path: Path) -> None:
    rows = ask(scorer, tmp_path, golden(scorer), explain=True)
    plain = ask(scorer, tmp_path, golden(scorer), explain=False)
    seen: set[bool] = set()
    for row, again, told in zip(rows, plain, scorer.bundle.golden, strict=True):
        assert row["fraud_probability"] is None
        assert row["raw_margin"] == told.raw_margin
        assert row["anomaly"] == again["anomaly"]
        assert row["anomaly"]["score"] == pytest.approx(2**told.raw_margin, rel=1e-15)
        assert row["anomaly"]["severity"] is None, "150 customers are too few for any"
        is_usual = row["anomaly"]["score"] < 0.5
        expected = "Nothing about it is unusual." if is_usual else row["explanation"]
        assert row["anomaly"]["explanation"] == expected
        seen.add(is_usual)
        total = row["base_value"] + sum(row["contributions"].values())
        assert total == pytest.approx(row["raw_margin"], abs=1e-9)
        assert row["unit"] == "log2 of the anomaly score"
        assert (row["prediction"], row["decision"]) in ((False, "approve"), (True, "review"))
        assert {reason["text"].partition(", which ")[2] for reason in row["reasons"]} <= {
            "makes it more unusual",
            "makes it more usual",
        }
    assert seen == {True, False}


def test_a_bundle_of_another_forest_fails_its_golden_rows(forest_run: Run, scorer: Scorer) -> None:
    bundle = read_bundle(forest_run.folder / "bundle")
    first: Golden = bundle.golden[0]
    changed = msgspec.structs.replace(first, fraud_probability=0.5)
    object.__setattr__(bundle, "golden", (changed, *bundle.golden[1:]))
    with pytest.raises(Exception, match="gives another fraud_probability here than in training"):
        Scorer.of(bundle)


def test_a_detector_that_there_is_not_is_a_wrong_option(simulated: Path) -> None:
    mapping = Path(__file__).parent.parent / "examples" / "simulated.yaml"
    asked = ["train", "--data", str(simulated), "--mapping", str(mapping), "--detector", "magic"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert "allowed are lightgbm and isolation-forest" in " ".join(result.output.replace("│", " ").split())


def test_a_backtest_scores_later_days_without_any_label(simulated: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
    mapping = mapping.model_copy(update={"label": None, "label_time": None, "label_delay": None})
    table = load_table(simulated, mapping, labelled=False)
    times = table["processing_time_ms"]
    begin = int(times.quantile(0.8))
    test = begin, int(times.iloc[-1])
    scores, made = backtest(table, mapping, TINY, train_until=begin, test=test, algorithm=ISOLATION_FOREST)
    assert made.calibrator is None
    assert len(scores) == ((times >= test[0]) & (times < test[1])).sum()
    assert "fraud_probability" not in scores
    assert scores["anomaly_score"].between(0, 1).all()


def version(number: int, **metrics: tuple[float, float]) -> Version:
    """A version with measures of a value and the low end of its interval."""
    measured = {name: {"value": value, "low": low, "high": 1.0} for name, (value, low) in metrics.items()}
    return Version("m", number, f"sha256:{number}", "", "", None, measured, {"kind": "transaction"}, "", ())


def test_the_gate_compares_trainings_without_labels_by_how_stable_their_scores_are() -> None:
    serving = version(0, seed_agreement=(0.9, 0.8))
    assert check(version(1, seed_agreement=(0.85, 0.7)), serving, {}) == []
    (said,) = check(version(1, seed_agreement=(0.6, 0.5)), serving, {})
    assert said == "seed_agreement 0.6000 is worse than that of m:v0, 0.9000 [0.8000, 1.0000]"
    labelled = version(1, seed_agreement=(0.9, 0.8), average_precision=(0.7, 0.6))
    (said,) = check(labelled, serving, {})
    assert said.startswith("m:v0 has no metric 'average_precision' to compare")
    (said,) = check(version(1, seed_agreement=(0.9, 0.8)), serving, {}, "recall")
    assert said.startswith("m:v1 has no metric 'recall' to compare")
