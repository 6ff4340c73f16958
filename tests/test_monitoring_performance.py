"""Weekly performance: equal to scikit-learn's on what is exported, and plain about weeks that say nothing."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics
from typer.testing import CliRunner

from fraud.cli.decisions import app as decisions_app
from fraud.cli.monitoring import app
from fraud.decisions.labels import Label
from fraud.errors import DataError
from fraud.models.scorer import Scorer
from fraud.monitoring.measures import DAY_MS, Labelled, measure
from fraud.monitoring.performance import ALL, Performance, weekly_performance
from fraud.monitoring.traffic import read_traffic
from fraud.pipeline.decide import Pipeline
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.tiny import START_MS, rfc3339, transactions

MODEL = "fraud-transaction"
MONDAY = START_MS + 4 * DAY_MS  # 2026-01-05
MONTH_MS = 30 * DAY_MS


@pytest.fixture(scope="module")
def recorded(scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decisions of weeks 0, 1, 3 and 4 in a real store; two of three labelled in week 0, none in week 3, half in 4."""
    path = tmp_path_factory.mktemp("log") / "history.db"
    rng = np.random.default_rng(1)

    async def score() -> None:
        store = SqliteStore(path)
        pipeline = Pipeline({MODEL: scorer}, store)
        instances = transactions(1200, 5)
        for i, instance in enumerate(instances):
            week = (0, 1, 3, 4)[i // 300]
            instance["event_time"] = rfc3339(MONDAY + week * 7 * DAY_MS + int(i % 300) * 1_900_000)
        rows = []
        for start in range(0, len(instances), 300):
            rows += await ask(pipeline, instances[start : start + 300])
        labels = []
        for i, (instance, row) in enumerate(zip(instances, rows, strict=True)):
            week, time = i // 300, int(datetime.fromisoformat(instance["event_time"]).timestamp() * 1000)
            says = (rng.random() < 0.75, i % 3 > 0, False, i % 2 == 0)[week]
            if says or (week == 0 and i % 3 == 0):
                is_fraud = bool(rng.random() < row["fraud_probability"]) if week != 1 else False
                labels.append(Label(instance["transaction_id"], is_fraud, time + 3 * DAY_MS, time + 4 * DAY_MS))
        assert set(await store.apply_labels(labels)) <= {"applied"}
        await pipeline.close()

    asyncio.run(score())
    return path


def performance(path: Path, as_of_ms: int, after_ms: int = MONTH_MS) -> list[Performance]:
    traffic = read_traffic(
        SqliteLog(path), MODEL, since_ms=0, as_of_ms=as_of_ms, legitimate_after_ms=after_ms, segment_fields=["category"]
    )
    return weekly_performance(traffic, {}, after_ms, n_bootstrap=50)


def test_weekly_measures_equal_scikit_learn_on_the_export_to_the_last_digit(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(recorded.parent))
    file = tmp_path / "decisions.jsonl"
    assert CliRunner().invoke(decisions_app, ["list", "--out", str(file)]).exit_code == 0
    exported = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(exported) == 1200
    weeks = [w for w in performance(recorded, MONDAY + 40 * 7 * DAY_MS, 10**15) if (w.version, w.segment) == (ALL, ALL)]
    compared = 0
    for number, week in enumerate(weeks):
        start = MONDAY + number * 7 * DAY_MS
        rows = [
            row for row in exported if row["label"] != "none" and start <= _ms(row["event_time"]) < start + 7 * DAY_MS
        ]
        y = np.array([row["label"] == "fraud" for row in rows], int)
        if len(set(y)) < 2:
            continue
        p = np.array([row["fraud_probability"] for row in rows])
        flagged = np.array([row["decision"] != "approve" for row in rows], int)
        tn, fp, fn, tp = metrics.confusion_matrix(y, flagged).ravel()
        expected = {
            "precision": metrics.precision_score(y, flagged),
            "recall": metrics.recall_score(y, flagged),
            "f1": metrics.f1_score(y, flagged),
            "accuracy": metrics.accuracy_score(y, flagged),
            "auc": metrics.roc_auc_score(y, p),
            "average_precision": metrics.average_precision_score(y, p),
            "false_positive_rate": fp / (fp + tn),
            "false_negative_rate": fn / (fn + tp),
        }
        got = {name: week.measures[name].value for name in expected}
        assert got == {name: float(value) for name, value in expected.items()}
        assert week.measures["brier_score"].value == pytest.approx(metrics.brier_score_loss(y, p), abs=1e-15)
        compared += 1
    assert compared == 2


def test_curves_equal_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(3)
    for n in (2, 3, 10, 1000, 20_000):
        y = np.r_[True, False, rng.random(n - 2) < 0.1]
        score = np.round(rng.random(n) * (1 + y), 2)
        nothing = np.full(n, np.nan)
        rows = Labelled(y, score > 0.9, score, np.ones(n), np.arange(n) % 7, np.arange(n) * 3_600_000, nothing, nothing)
        got = measure(rows, False, n_bootstrap=1)
        assert got["auc"].value == metrics.roc_auc_score(y, score)
        assert got["average_precision"].value == metrics.average_precision_score(y, score)
        assert got["brier_score"].value is None
        assert got["cost"].value is None


def test_an_interval_covers_the_truth_where_customers_repeat_themselves() -> None:
    """Each customer's outcome is one: an interval that counted rows alone would be far too narrow."""
    covered, runs = 0, 120
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        customer = np.repeat(np.arange(100), 20)
        y = (rng.random(100) < 0.4)[customer]
        n, nothing = len(y), np.full(2000, np.nan)
        rows = Labelled(y, np.ones(n, bool), np.ones(n), np.ones(n), customer, np.zeros(n, np.int64), nothing, nothing)
        _, low, high = measure(rows, False, n_bootstrap=200, seed=seed)["precision"]
        assert low is not None
        assert high is not None
        covered += low <= 0.4 <= high
    assert covered / runs >= 0.88  # 95% promised; 0.88 lies 3.5 standard deviations below


def test_weeks_that_say_nothing_say_so(recorded: Path) -> None:
    whole = [w for w in performance(recorded, MONDAY + 36 * DAY_MS) if (w.version, w.segment) == (ALL, ALL)]
    assert [w.week for w in whole] == ["2026-01-05", "2026-01-12", "2026-01-19", "2026-01-26", "2026-02-02"]
    first, second, third, fourth, fifth = whole
    assert first.measures["auc"].value is not None
    assert "one class: no fraud among the labels" in second.remarks
    assert second.measures["auc"].value is None
    assert second.measures["accuracy"].value is not None
    assert third.remarks == [
        "no traffic",
        "labels are still coming: frauds told late are missing",
    ] or third.remarks == ["no traffic"]
    assert third.decisions == 0
    assert "no labels yet" in fourth.remarks
    assert fourth.labelled_share == 0
    assert all(estimate.value is None for estimate in fourth.measures.values())
    assert not fifth.is_complete
    assert 0 < fifth.labelled_share < 1


def test_a_declined_transaction_nobody_saw_never_becomes_legitimate(recorded: Path) -> None:
    late = MONDAY + 365 * DAY_MS
    traffic = read_traffic(SqliteLog(recorded), MODEL, since_ms=0, as_of_ms=late, legitimate_after_ms=MONTH_MS)
    declined = traffic.action == 2
    assert (traffic.label[declined] == -1).any()
    assert (traffic.label[~declined] >= 0).all()
    (week,) = (w for w in weekly_performance(traffic, {}, MONTH_MS, 0) if w.week == "2026-01-26" and w.version == ALL)
    assert week.declined_unobserved > 0
    assert any("declined without a label" in remark for remark in week.remarks)
    assert week.is_complete


def test_labels_are_those_known_at_the_time(recorded: Path) -> None:
    before = read_traffic(
        SqliteLog(recorded), MODEL, since_ms=0, as_of_ms=MONDAY + 3 * DAY_MS, legitimate_after_ms=MONTH_MS
    )
    assert (before.label == -1).all()
    assert before.event_time_ms.max() < MONDAY + 3 * DAY_MS


def test_segments_add_up(recorded: Path) -> None:
    weeks = performance(recorded, MONDAY + 60 * DAY_MS)
    for week in {w.week for w in weeks}:
        of_week = [w for w in weeks if w.week == week]
        (whole,) = (w for w in of_week if (w.version, w.segment) == (ALL, ALL))
        assert sum(w.decisions for w in of_week if w.segment != ALL) == whole.decisions
        assert sum(w.decisions for w in of_week if w.version != ALL) == whole.decisions


def test_the_report_command(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(recorded.parent))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    page, figures = tmp_path / "m.html", tmp_path / "m.json"
    for file in (page, figures):
        options = ["--as-of", "2026-03-01", "--out", str(file), "--segment", "category"]
        done = CliRunner().invoke(app, ["report", MODEL, *options])
        assert done.exit_code == 0, done.output
    assert "no costs of" in done.output
    html = page.read_text()
    assert html.count("<svg") >= 5
    assert "category=fuel" in html
    assert "http" not in html
    made: list[dict[str, Any]] = json.loads(figures.read_text())["weeks"]
    assert {"week", "version", "segment", "measures", "remarks"} <= made[0].keys()
    assert all(math.isfinite(v) for w in made for e in w["measures"].values() for v in e if v is not None)


def test_what_cannot_be_reported_is_refused_in_words(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(recorded.parent))
    for options, message in (
        (["--last", "90"], "--last '90'; allowed"),
        (["--legitimate-after", "0d"], "--legitimate-after '0d'"),
        (["--out", "x.pdf"], "allowed: a name that ends with .html or .json"),
    ):
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["report", MODEL, *options])
        assert done.exit_code == 2
        assert message in done.output
    with pytest.raises(DataError, match="no decision of nobody"):
        read_traffic(SqliteLog(recorded), "nobody", since_ms=0, as_of_ms=2**60, legitimate_after_ms=1)


def _ms(text: str) -> int:
    time = datetime.fromisoformat(text)
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
