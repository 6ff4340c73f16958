"""The model card, and the report of a training with its plots and tables."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib.figure import Figure

from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.detectors.protocol import Algorithm
from fraud.detectors.severity import Level, SeverityScale
from fraud.schema import FeatureSpec, Kind
from training import plots, tables
from training.evaluate import Interval, Outcomes, Scored
from training.fit import HabitFact
from training.measures import FALSE_POSITIVE_RATES, TOP_CARDS
from training.policy import declines_too_many
from training.tables import ExplainedRows, Window, meaning


@dataclass(frozen=True)
class ModelFacts:
    """The facts of the model card; they must not depend on when or where the model was trained.

    Attributes
    ----------
    name : str
    spec : FeatureSpec
    data : mapping
        Facts of the data set by their titles: name, digest, rows, range of times, label delay.
    windows : sequence of Window
        In the order of time; the last one is the test window.
    config : mapping
        The training's flat configuration, with the seed.
    policy : mapping
        As policy.json.
    metrics, baseline, difference : mapping of str to Interval
        Of the model, of the plain baseline, and of the first minus the second on the same resamples.
    no_skill : mapping of str to float
    severity : SeverityScale or None
        The levels of the anomaly score.
    algorithm : Algorithm
        Of the detector.
    is_calibrated : bool
        Whether its decision score is a probability.
    is_labelled : bool
        Whether the measures are on labels.
    habits : sequence of HabitFact
        What a detector without labels judges by.
    """

    name: str
    spec: FeatureSpec
    data: Mapping[str, Any]
    windows: Sequence[Window]
    config: Mapping[str, Any]
    policy: Mapping[str, Any]
    metrics: Mapping[str, Interval]
    baseline: Mapping[str, Interval]
    difference: Mapping[str, Interval]
    no_skill: Mapping[str, float]
    severity: SeverityScale | None = None
    algorithm: Algorithm = LIGHTGBM
    is_calibrated: bool = True
    is_labelled: bool = True
    habits: Sequence[HabitFact] = ()

    @property
    def declines_too_many(self) -> str | None:
        """The warning about a policy that declines far more than there is fraud."""
        if not self.is_labelled:
            return None
        return declines_too_many(self.metrics["decline_rate"].value, self.no_skill["average_precision"])

    def beginning(self, level: Level) -> str:
        """Return the anomaly score that a severity begins above, or the sample that it would need."""
        assert self.severity is not None
        if level.above is not None:
            return f"{2.0**level.above:.4f}"
        return f"not offered: needs a sample of {level.rows_needed(self.severity.confidence):,}"


class Measure(NamedTuple):
    title: str
    meaning: str
    shown: str = "{:.4f}"
    better: int = 1
    """1 when more is better, -1 when less is, 0 for neither."""


def _measures() -> dict[str, Measure]:
    percent = "{:.2%}"
    measures = {
        "roc_auc": Measure("ROC AUC", "chance that a fraud scores above a legitimate transaction"),
        "average_precision": Measure("Average precision", "area under the precision-recall curve"),
        f"card_precision_at_{TOP_CARDS}": Measure(
            f"Card precision at {TOP_CARDS}",
            f"share of fraudulent customers among the {TOP_CARDS} highest-scored of a day, mean over days; "
            "a day's fraudulent customers limit it",
        ),
    }
    for rate in FALSE_POSITIVE_RATES:
        at = f"at {100 * rate:g} % false positives"
        measures[f"recall_at_fpr_{rate}"] = Measure(f"Recall {at}", "share of the frauds found", percent)
        measures[f"precision_at_fpr_{rate}"] = Measure(f"Precision {at}", "share of fraud among the alerts", percent)
    return measures | {
        "brier_score": Measure("Brier score", "mean squared error of the probability", "{:.5f}", -1),
        "log_loss": Measure("Log loss", "mean negative log-likelihood", "{:.5f}", -1),
        "expected_calibration_error": Measure(
            "Expected calibration error",
            "mean gap between probability and fraud rate, bins of equal mass; its interval leans up",
            "{:.5f}",
            -1,
        ),
        "expected_to_observed": Measure("Expected to observed frauds", "1 is right on the whole", "{:.3f}", 0),
        "review_rate": Measure("Reviewed", "share of the transactions", percent, 0),
        "decline_rate": Measure("Declined", "share of the transactions", percent, 0),
        "alert_recall": Measure("Frauds alerted", "share of the frauds reviewed or declined", percent),
        "alert_precision": Measure("Alert precision", "share of fraud among reviewed or declined", percent),
        "alert_amount_recall": Measure("Fraud money alerted", "share of the frauds' amount", percent),
        "cost_per_1000": Measure("Cost per 1,000", "of the policy's decisions, in the data's money", "{:,.2f}", -1),
        "savings": Measure("Savings", "share of the cost of approving everything", percent),
        "seed_agreement": Measure(
            "Agreement of seeds",
            "share of the 1 % most unusual that are so by another seed too",
            percent,
        ),
        "score_psi": Measure(
            "Score PSI", "how far the scores moved from the calibration window's; above 0.1 they did", "{:.4f}", -1
        ),
    }


MEASURES = _measures()
LEARNERS = {LIGHTGBM.name: "LightGBM", ISOLATION_FOREST.name: "an isolation forest"}

WITHOUT_LABELS = (
    "The test window has no labels of both kinds, so nobody knows how much fraud these scores find: the measures say "
    "only how stable they are."
)
UNUSUAL = (
    "The trees were grown without labels: a high score says that a transaction is unusual, not that it is fraud.",
    "A new customer has no habits to deviate from; much of what is scored then is the amount alone.",
    "Beside a model trained on labels this one does not raise precision: it is for the time before labels, and for "
    "frauds of a kind that no label has shown.",
)

CAPTIONS = {
    "roc": "Higher is better. The right panel is the part that a fraud team works in.",
    "precision_recall": "Higher is better. Marks are where each policy reviews and declines.",
    "calibration": "Points on the dotted line are right. Every bin expects equally many frauds.",
    "score_distribution": "Fraud should lie to the right. Lines are the policy's thresholds.",
    "daily": "A model that wears out finds fewer frauds towards the right, or alerts more.",
    "feature_importance": "How far a feature moves a typical score, and what training gained from it.",
    "shap_summary": "One point for each transaction. Grey is a missing value; categories are coloured by code.",
    "shap_waterfall": "From the average score at the bottom to the score of one transaction.",
}


TILES = (
    "average_precision",
    f"card_precision_at_{TOP_CARDS}",
    "recall_at_fpr_0.005",
    "savings",
    "expected_calibration_error",
)


def _number(name: str, value: float) -> str:
    """Return a value in its measure's format, with no negative zero."""
    text = MEASURES[name].shown.format(value)
    return text.lstrip("-") if not text.strip("-0.,%") else text


def _interval(name: str, interval: Interval) -> str:
    value, low, high = (_number(name, number) for number in interval)
    return f"{value} [{low}, {high}]"


def _plain(value: object) -> str:
    """Return a fact as text: floats with six digits, counts with thousands separators."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "none" if value is None else str(value)


def _verdict(name: str, difference: Interval) -> str:
    """Return `better` or `worse` than the baseline, or `` if the interval includes no difference."""
    better = MEASURES[name].better
    if better == 0 or difference.low <= 0 <= difference.high:
        return ""
    return "better" if (difference.low > 0) == (better > 0) else "worse"


def limits(facts: ModelFacts) -> list[str]:
    """Return the model's limits that follow from the facts."""
    if not facts.is_labelled:
        return [WITHOUT_LABELS, *UNUSUAL]
    test, found = facts.windows[-1], []
    few = " With so few, only large differences show." if test.frauds < 200 else ""
    found.append(f"The test window holds {test.frauds:,} frauds among {test.rows:,} transactions.{few}")
    worse = [MEASURES[name].title for name, gain in facts.difference.items() if _verdict(name, gain) == "worse"]
    if worse:
        found.append(f"The plain baseline is better in: {', '.join(worse)}.")
    expected = facts.metrics.get("expected_to_observed")
    if expected is not None and not expected.low <= 1 <= expected.high:
        found.append(
            f"On the test window the probabilities expect {expected.value:.2f} times the frauds that came "
            f"(95 % interval {expected.low:.2f} to {expected.high:.2f}): the calibration had drifted by then."
        )
    if (warning := facts.declines_too_many) is not None:
        found.insert(0, warning)
    review, decline = facts.policy["review_threshold"], facts.policy["decline_threshold"]
    if not facts.algorithm.reads_labels:
        found += UNUSUAL
    if not facts.is_calibrated:
        found.append("Nothing is declined: unusual is not fraudulent, so a person decides.")
    elif not facts.policy["costs"]:
        found.append("Nothing is declined: the money at stake is not known, so a person decides.")
    elif review == decline:
        found.append("The policy declines without any review; so the costs decided.")
    elif decline == 1.0:
        found.append("The policy reviews but never declines short of a probability of 1; so the costs decided.")
    return [
        *found,
        "The intervals show what other customers of the same time would change. They do not show what later "
        "months will change: fraud adapts.",
        "Frauds that nobody reported count as legitimate, in training and here.",
        *(
            [
                "A probability of 0 or 1 says that the calibration window held one kind alone at such scores; "
                "it is no certainty."
            ]
            if facts.is_calibrated
            else []
        ),
        "The costs of the policy are assumptions; with other costs, other thresholds are right."
        if facts.policy["costs"]
        else "The share to review is an assumption; with the stake and the costs known, other thresholds are right.",
    ]


def by_rate(facts: ModelFacts) -> str:
    """Return how the policy was chosen without known money, or nothing."""
    if facts.policy["costs"]:
        return ""
    if not facts.is_calibrated:
        return (
            f"The review threshold is the anomaly score above which {facts.policy['review_rate']:.1%} of the "
            "calibration window lie; ten times as many are of risk level medium. Nothing is declined."
        )
    return (
        f"The review threshold is the one at which about {facts.policy['review_rate']:.1%} of the calibration window "
        "are reviewed. Nothing is declined, since what a wrong decline costs is not known: the mapping names no stake."
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "meaning": meaning, "cell": lambda text: str(text).replace("|", "\\|")}
    environment.globals |= {"measures": MEASURES, "number": _number, "interval": _interval, "verdict": _verdict}
    return environment


def model_card(facts: ModelFacts) -> str:
    """Return the model card, Markdown; the same facts give the same text."""
    template = _environment().get_template("model_card.md.j2")
    definitions: dict[str, list[str]] = {}
    for name in facts.metrics:
        definitions.setdefault(MEASURES[name].meaning, []).append(MEASURES[name].title)
    return template.render(
        facts=facts,
        test=facts.windows[-1],
        plain=plain_fields(facts.spec.kind),
        learner=LEARNERS[facts.algorithm.name],
        limits=limits(facts),
        by_rate=by_rate(facts),
        definitions=definitions,
    )


def plain_fields(kind: Kind) -> str:
    """Return in words what the plain baseline is trained on."""
    return "the request's own fields" if kind == "transaction" else "the first feature"


def write_report(
    run_dir: Path,
    facts: ModelFacts,
    outcomes: Outcomes,
    model: Scored,
    baseline: Scored,
    explained: ExplainedRows,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write `report.html`, `plots/*.png` and `tables/*.csv` into a run's folder.

    Parameters
    ----------
    run_dir : Path
        Existing folder.
    facts : ModelFacts
    outcomes : Outcomes
    model, baseline : Scored
    explained : ExplainedRows
    run : mapping, optional
        Facts of this run by their titles, such as when it was made and what took how long; values are shown
        as they are.
    """
    scores = {"model": model, "plain baseline": baseline}
    written = {
        "metrics": tables.metrics(facts.metrics, facts.baseline, facts.difference, facts.no_skill),
        "windows": tables.windows(facts.windows),
        "features": tables.features(facts.spec.features, explained),
        "decisions": tables.decisions(outcomes, scores),
    }
    if facts.is_labelled and facts.is_calibrated:
        written["calibration"] = tables.calibration(outcomes, scores)
    if outcomes.event_time_ms is not None:
        written["daily"] = tables.daily(outcomes, scores)
    (run_dir / "tables").mkdir(exist_ok=True)
    for name, table in written.items():
        table.to_csv(run_dir / "tables" / f"{name}.csv", index=False, float_format="%.8g", lineterminator="\n")
    (run_dir / "plots").mkdir(exist_ok=True)
    images = {}
    for name, figure in _figures(facts, outcomes, scores, explained).items():
        path = run_dir / "plots" / f"{name}.png"
        plots.save(figure, path)
        images[name] = base64.b64encode(path.read_bytes()).decode("ascii")
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            facts=facts,
            test=facts.windows[-1],
            decisions=written["decisions"].to_dict("records"),
            features=written["features"].to_dict("records"),
            images=images,
            captions=CAPTIONS,
            plain=plain_fields(facts.spec.kind),
            learner=LEARNERS[facts.algorithm.name],
            limits=limits(facts),
            by_rate=by_rate(facts),
            tiles=[name for name in TILES if name in facts.metrics],
            run=run or {},
        )
    )
    (run_dir / "report.html").write_text(html, encoding="utf-8")


def _figures(
    facts: ModelFacts, outcomes: Outcomes, scores: plots.Scores, explained: ExplainedRows
) -> dict[str, Figure]:
    y, unit = outcomes.y_true, facts.algorithm.unit.name
    figures: dict[str, Figure] = {}
    if facts.is_labelled:
        figures |= {"roc": plots.roc(y, scores), "precision_recall": plots.precision_recall(y, scores)}
        if facts.is_calibrated:
            figures["calibration"] = plots.calibration(y, scores)
    figures["score_distribution"] = plots.score_distribution(y, scores, unit)
    if facts.is_labelled and outcomes.event_time_ms is not None:
        figures["daily"] = plots.daily(y, outcomes.event_time_ms, scores)
    explanation = plots.explanation(facts.spec.features, explained.X, explained.contributions)
    return figures | {
        "feature_importance": plots.feature_importance(explanation, explained.gain, unit),
        "shap_summary": plots.shap_summary(explanation, unit),
        "shap_waterfall": plots.shap_waterfall(explanation, unit),
    }
