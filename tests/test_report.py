"""The report and the model card, written from a small model and read back."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightgbm as lgb
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fraud.decisions.costs import DEFAULT_COSTS
from fraud.schema import Feature, FeatureSpec
from training import plots, tables
from training.evaluate import Interval, Outcomes, Scored, measure, no_skill, reliability
from training.policy import choose_policy
from training.report import MEASURES, ModelFacts, limits, model_card, write_report
from training.tables import ExplainedRows, Window

Material = dict[str, Any]

HISTORY = ("amount", "customer_count_7d", "merchant_fraud_share_30d")
CATEGORIES = ("grocery", "travel|air", "<online>")


def make_material(kind: str, seed: int = 0, n: int = 3_000) -> Material:
    """Train a small model and a smaller one, and bring all that a report needs."""
    rng = np.random.default_rng(seed)
    spec = FeatureSpec(
        kind,  # type: ignore[arg-type]
        (
            *(Feature(name, "history" if kind == "transaction" else "request", missing=True) for name in HISTORY),
            Feature("category", "request", "categorical", CATEGORIES),
            Feature("is_foreign", "request", "boolean"),
            Feature("never_there", "request", missing=True, meaning="a column that is always empty"),
        ),
    )
    X = np.column_stack([rng.lognormal(3, 1, n), rng.poisson(4, n), rng.random(n), rng.integers(3, size=n)])
    X = np.column_stack([X, rng.random(n) < 0.1, np.full(n, np.nan)])
    X[rng.random(n) < 0.1, 2] = np.nan
    amount = X[:, 0].copy()
    risk = 0.04 * X[:, 0] + 2 * (X[:, 3] == 2) + 2 * X[:, 4] + rng.logistic(size=n)
    y = (risk > np.quantile(risk, 0.95)).astype(np.int64)
    parameters = {"objective": "binary", "num_leaves": 7, "verbosity": -1, "num_threads": 1, "seed": 0}
    half = n // 2
    scores, contributions, gain = [], np.empty(0), np.empty(0)
    for columns in (list(range(6)), [0]):
        booster = lgb.train(parameters, lgb.Dataset(X[:half, columns], y[:half]), 30)
        margin = np.asarray(booster.predict(X[:, columns], raw_score=True))
        probability = 1 / (1 + np.exp(-margin))
        policy = choose_policy(probability[:half], amount[:half], DEFAULT_COSTS)
        scores.append(Scored(margin[half:], probability[half:], policy))
        if len(columns) == 6:
            contributions = np.asarray(booster.predict(X[half : half + 200], pred_contrib=True))
            gain = booster.feature_importance("gain").astype(np.float64)
    time = 1_700_000_000_000 + np.sort(rng.integers(20 * 86_400_000, size=n))[half:]
    timed = kind == "transaction"
    outcomes = Outcomes(y[half:], time if timed else None, amount[half:] if timed else None)
    known: dict[str, Any] = {"amount": outcomes.amount, "event_time_ms": outcomes.event_time_ms}
    known["customer_codes"] = rng.integers(150, size=n - half) if timed else None
    samples = [
        measure(outcomes.y_true, s.y_prob, s.raw_margin, policy=s.policy, n_bootstrap=30, **known) for s in scores
    ]
    facts = ModelFacts(
        name="fraud-small",
        spec=spec,
        data={"data set": "a|b <c>.parquet", "digest": "sha256:12ab", "transactions": n},
        windows=[
            Window("train", "2023-11-01T00:00:00Z", "2023-11-10T00:00:00Z", half, int(y[:half].sum())),
            Window("test", "2023-11-14T22:13:20Z" if timed else None, None, n - half, int(outcomes.y_true.sum())),
        ],
        config={"seed": 7, "learning_rate": 0.1 + 0.2, "search": False, "windows": [1, 7, 30], "until": None},
        policy=scores[0].policy,
        metrics=samples[0].intervals(),
        baseline=samples[1].intervals(),
        difference=samples[0].minus(samples[1]).intervals(),
        no_skill=no_skill(outcomes.y_true, policy=scores[0].policy, **known),
    )
    explained = ExplainedRows(X[half : half + 200], contributions, gain)
    return {"facts": facts, "outcomes": outcomes, "model": scores[0], "baseline": scores[1], "explained": explained}


@pytest.fixture(scope="module")
def material() -> Material:
    return make_material("transaction")


@pytest.fixture(scope="module")
def run_dir(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_report(path, **material, run={"bundle digest": "sha256:77", "replay, s": 1.23456789})
    return path


class Reader(HTMLParser):
    """Collects what a page shows and where it points, and refuses tags that do not close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "img":
            self.images.append(found["src"] or "")
        self.links += [found[name] or "" for name in ("href", "src") if name in found]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def test_report_is_one_page_that_needs_nothing_else(run_dir: Path) -> None:
    page = Reader()
    page.feed((run_dir / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    written = sorted(path.read_bytes() for path in (run_dir / "plots").glob("*.png"))
    assert sorted(base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in page.images) == written
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)


def test_report_shows_every_measure_of_both_and_escapes_names(run_dir: Path, material: Material) -> None:
    facts: ModelFacts = material["facts"]
    source = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Reader()
    page.feed(source)
    for name, interval in facts.metrics.items():
        assert MEASURES[name].title in page.text
        for value in (*interval, *facts.baseline[name]):
            assert MEASURES[name].shown.format(value) in page.text
    assert "a|b <c>.parquet" in page.text
    assert "<c>" not in source
    assert "1.23457" in page.text


def test_plots_are_those_of_the_contract_and_no_figure_stays_open(run_dir: Path) -> None:
    names = ["calibration", "daily", "feature_importance", "precision_recall", "roc", "score_distribution"]
    assert sorted(path.stem for path in (run_dir / "plots").iterdir()) == [*names, "shap_summary", "shap_waterfall"]
    assert plt.get_fignums() == []
    for path in (run_dir / "plots").iterdir():
        image = plt.imread(path)
        assert min(image.shape[:2]) > 250
        assert image[..., :3].std() > 0.02, f"{path.name} is blank"


def test_tables_add_up(run_dir: Path, material: Material) -> None:
    y, amount = material["outcomes"].y_true, material["outcomes"].amount
    read = {path.stem: pd.read_csv(path) for path in (run_dir / "tables").glob("*.csv")}
    assert sorted(read) == ["calibration", "daily", "decisions", "features", "metrics", "windows"]
    for table in ("decisions", "daily"):
        sums = read[table].groupby("scores")[["transactions", "frauds"]].sum()
        assert sums.to_numpy().tolist() == [[len(y), y.sum()]] * 2
    model = read["decisions"].query("scores == 'model'")
    facts: ModelFacts = material["facts"]
    assert model["cost"].sum() / len(y) * 1000 == pytest.approx(facts.metrics["cost_per_1000"].value, rel=1e-6)
    assert model["fraud_amount"].sum() == pytest.approx((y * amount).sum(), rel=1e-6)
    found = read["daily"].query("scores == 'model'")["frauds_found"].sum()
    assert found / y.sum() == pytest.approx(facts.metrics["alert_recall"].value)
    features = read["features"].set_index("feature")
    assert features["gain_share"].sum() == pytest.approx(1)
    assert (features["effect"].diff().dropna() <= 0).all()
    assert features["missing_share"].to_dict()["never_there"] == 1
    assert features["effect"].to_dict()["never_there"] == 0
    assert features["meaning"].to_dict()["customer_count_7d"] == "customer's transactions in 7 days"
    assert read["metrics"]["metric"].tolist() == list(facts.metrics)
    assert read["calibration"].groupby("scores")["rows"].sum().tolist() == [len(y)] * 2


def test_feature_models_without_times_and_amounts_get_a_report(tmp_path: Path) -> None:
    material = make_material("features")
    write_report(tmp_path, **material)
    assert not (tmp_path / "plots" / "daily.png").exists()
    assert not (tmp_path / "tables" / "daily.csv").exists()
    assert "Card precision" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    card = model_card(material["facts"])
    assert "rows of 6 ready features" in card
    assert "on the first feature\nalone" in card
    assert "became known" not in card


def test_model_card_is_the_same_every_time_and_has_no_float_noise(material: Material) -> None:
    card = model_card(material["facts"])
    assert card == model_card(make_material("transaction")["facts"])
    assert "| learning_rate | 0.3 |" in card
    assert re.findall(r"\d\.\d{9,}", card) == []
    assert "-0.00%" not in card


def test_model_card_names_data_windows_features_measures_policy_and_limits(material: Material) -> None:
    facts: ModelFacts = material["facts"]
    card = model_card(facts)
    lines = card.splitlines()
    assert "| data set | a\\|b <c>.parquet |" in lines
    assert any(line.startswith("| train | 2023-11-01T00:00:00Z | 2023-11-10T00:00:00Z | 1,500 |") for line in lines)
    assert "| customer_count_7d | history | numeric | customer's transactions in 7 days |" in lines
    assert "| category | request | categorical | as the caller sends it |" in lines
    value, low, high = facts.metrics["roc_auc"]
    assert any(line.startswith(f"| ROC AUC | {value:.4f} [{low:.4f}, {high:.4f}] |") for line in lines)
    assert f"| {facts.policy['decline_threshold']:.6g} | decline |" in lines
    assert [f"- {limit}" in lines for limit in limits(facts)] == [True] * len(limits(facts))
    table_rows = [line for line in lines if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table_rows}
    assert widths <= {3, 5, 6, 7}


def test_limits_say_what_the_numbers_give_away(material: Material) -> None:
    facts: ModelFacts = material["facts"]
    changed = {
        "metrics": {**facts.metrics, "expected_to_observed": Interval(1.5, 1.25, 1.75)},
        "difference": {**facts.difference, "roc_auc": Interval(-0.2, -0.3, -0.1), "log_loss": Interval(1, 0.5, 2)},
        "policy": {**facts.policy, "review_threshold": 0.5, "decline_threshold": 0.5},
    }
    text = " ".join(limits(ModelFacts(**{**vars(facts), **changed})))
    assert "With so few, only large differences show." in text
    assert re.search(r"baseline is better in: ROC AUC,.*Log loss", text)
    assert "expect 1.50 times the frauds that came (95 % interval 1.25 to 1.75)" in text
    assert "declines without any review" in text
    never = {**facts.policy, "review_threshold": 0.5, "decline_threshold": 1.0}
    assert "never declines" in " ".join(limits(ModelFacts(**{**vars(facts), "policy": never})))


def test_explanation_shows_values_as_callers_know_them(material: Material) -> None:
    features = material["facts"].spec.features
    row = np.array([[12_345.6, 3.0, np.nan, 2.0, 1.0, np.nan]])
    explanation = plots.explanation(features, row, np.zeros((1, 7)))
    assert explanation.display_data.tolist() == [["12,346", "3", "missing", "<online>", "true", "missing"]]


@pytest.mark.parametrize("case", ["one score", "one day", "sure of everything", "all probabilities zero"])
def test_degenerate_scores_can_be_drawn(case: str) -> None:
    n = 40
    y = np.arange(n) % 4 == 0
    margin = np.zeros(n) if case == "one score" else np.linspace(-4, 4, n)
    probability = {"sure of everything": y * 1.0, "all probabilities zero": np.zeros(n)}.get(case, np.full(n, 0.25))
    policy = {"review_threshold": 0.3, "decline_threshold": 1.0, "costs": DEFAULT_COSTS}
    scores = {"model": Scored(margin, probability, policy), "plain baseline": Scored(margin, probability, policy)}
    days = np.full(n, 1_700_000_000_000) if case == "one day" else 1_700_000_000_000 + np.arange(n) * 40_000_000
    truth = y.astype(np.int64)
    for figure in (
        plots.roc(truth, scores),
        plots.precision_recall(truth, scores),
        plots.calibration(truth, scores),
        plots.score_distribution(truth, scores, "log-odds"),
        plots.daily(truth, days, scores),
    ):
        figure.canvas.draw()
        for axes in figure.axes:
            assert axes.get_title(loc="left")
            assert axes.get_legend() is not None or axes.get_xlabel()


def test_one_feature_can_be_explained() -> None:
    explanation = plots.explanation([Feature("amount", "history")], np.ones((5, 1)), np.ones((5, 2)))
    for figure in (
        plots.shap_summary(explanation, "log-odds"),
        plots.shap_waterfall(explanation, "log-odds"),
        plots.feature_importance(explanation, np.zeros(1), "log-odds"),
    ):
        figure.canvas.draw()


def test_reliability_bins_expect_equally_many_frauds_with_wilson_intervals() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 6, 20_000)
    table = reliability(rng.random(20_000) < p, p, n_bins=10)
    expected = table["rows"] * table["mean_probability"]
    assert expected == pytest.approx(np.full(10, p.sum() / 10), rel=0.02)
    inside = (table["low"] <= table["mean_probability"]) & (table["mean_probability"] <= table["high"])
    assert inside.sum() >= 8
    one = reliability([1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0.1] * 10)
    assert (one["low"][0], one["high"][0]) == pytest.approx((0.0178762, 0.4041500), abs=1e-6)


def test_daily_table_needs_times() -> None:
    with pytest.raises(ValueError, match="without event times"):
        tables.daily(Outcomes(np.array([0, 1])), {})
