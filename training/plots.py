"""The report's plots, each a function from arrays to a matplotlib Figure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from fraud.detectors.words import readable
from fraud.schema import Feature
from training.evaluate import Scored, reliability
from training.measures import DAY_MS, FALSE_POSITIVE_RATES

mpl.use("Agg")  # shap draws through pyplot, which must not look for a screen
with warnings.catch_warnings():  # shap 0.51 makes its colours in a way that matplotlib 3.11 will retire
    warnings.filterwarnings("ignore", "The set_(bad|over|under) function", PendingDeprecationWarning)
    import shap
    from matplotlib import pyplot as plt

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Scores = Mapping[str, Scored]
"""Sets of scores of the same transactions by name; the model comes first."""

COLOURS = ("#1b5e9e", "#c77c11")
FRAUD, LEGITIMATE, QUIET = "#b3261e", "#5b8c5a", "#8a8f98"
KINDS_OF_ROWS = ((-1, QUIET, "unlabelled"), (0, LEGITIMATE, "legitimate"), (1, FRAUD, "fraud"))
STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9aa0a6",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 10,
    "grid.color": "#e6e8eb",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the file holds no date and no program version."""
    cut = "tight" if figure.get_layout_engine() is None else None  # which draws a figure twice; a layout needs no cut
    figure.savefig(path, format="png", bbox_inches=cut, metadata={"Software": None})


@mpl.rc_context(STYLE)
def weeks(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Each measure of `names` by week, with intervals; `table` is that of `training.weeks.table_of`."""
    figure, panels = _figure(3.8 * len(names), 4.0, columns=len(names))
    found = table[(table["week"] != "mean") & ~table["model"].str.contains(" minus ")]
    begins = sorted(found["week"].unique())
    for axes, name in zip(panels, names, strict=True):
        axes.set(title=name.replace("_", " "), xlabel="week from", xticks=range(len(begins)), xticklabels=begins)
        axes.tick_params(axis="x", rotation=30)
        for i, (model, rows) in enumerate(found[found["measure"] == name].groupby("model", sort=False)):
            at = rows["week"].map(begins.index).to_numpy() + 0.08 * i
            reach = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            colour = (*COLOURS, QUIET)[i % 3]
            axes.errorbar(at, rows["value"], np.abs(reach), fmt="o-", color=colour, capsize=3, label=str(model))
    panels[-1].legend()
    return figure


@mpl.rc_context(STYLE)
def roc(y_true: Ints, scores: Scores) -> Figure:
    """The whole ROC curve, and its low false-positive range on a logarithmic axis."""
    figure, (whole, edge) = _figure(11, 4.6, columns=2)
    for colour, (name, (margin, *_)) in zip(COLOURS, scores.items(), strict=False):
        fpr, tpr, _ = roc_curve(y_true, margin)
        whole.plot(fpr, tpr, color=colour, label=name)
        edge.step(fpr, tpr, where="post", color=colour, label=name)
    whole.plot([0, 1], [0, 1], color=QUIET, linestyle=":", label="no skill")
    whole.set(title="ROC curve", xlim=(0, 1), ylim=(0, 1.01))
    grid = np.geomspace(1e-4, 1e-1, 50)
    edge.plot(grid, grid, color=QUIET, linestyle=":", label="no skill")
    for rate in FALSE_POSITIVE_RATES:
        edge.axvline(rate, color=QUIET, linewidth=0.8, linestyle="--")
        edge.text(rate, 0.02, f" {100 * rate:g} %", ha="right", va="bottom", rotation=90, fontsize=9, color="#555")
    edge.set(title="At low false-positive rates", xscale="log", xlim=(1e-4, 1e-1), ylim=(0, 1))
    edge.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
    for axes in (whole, edge):
        axes.set(xlabel="False-positive rate (share of legitimate transactions)", ylabel="Recall (share of frauds)")
    whole.legend(loc="lower right")
    return figure


@mpl.rc_context(STYLE)
def precision_recall(y_true: Ints, scores: Scores) -> Figure:
    """Precision against recall, with the operating points of each policy."""
    figure, (axes,) = _figure(10, 5)
    for colour, (name, (margin, probability, policy, _)) in zip(COLOURS, scores.items(), strict=False):
        precision, recall, _ = precision_recall_curve(y_true, margin, drop_intermediate=True)
        axes.step(recall, precision, where="pre", color=colour, label=name)
        for threshold, marker in (("decline_threshold", "s"), ("review_threshold", "o")):
            alert = probability >= policy[threshold]
            if alert.any():
                point = (y_true[alert].sum() / y_true.sum(), y_true[alert].mean())
                label = f"{name}: {threshold.split('_')[0]} at {policy[threshold]:.3g}"
                axes.plot(*point, marker, color=colour, markeredgecolor="white", markersize=9, label=label, ls="none")
    rate = float(y_true.mean())
    axes.axhline(rate, color=QUIET, linestyle=":", label=f"no skill: fraud rate {rate:.2%}")
    axes.set(
        title="Precision and recall",
        xlabel="Recall (share of frauds)",
        ylabel="Precision (share of fraud among alerts)",
        xlim=(0, 1.01),
        ylim=(0, 1.02),
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


@mpl.rc_context(STYLE)
def calibration(y_true: Ints, scores: Scores) -> Figure:
    """Observed fraud rate against probability, on logarithmic axes since most probabilities are small."""
    figure, (axes,) = _figure(7.5, 5.5)
    floor = 1.0
    for colour, (name, (_, probability, *_)) in zip(COLOURS, scores.items(), strict=False):
        table = reliability(y_true, probability)
        shown = np.maximum(table["fraud_rate"], 1e-6)
        low, high = shown - np.maximum(table["low"], 1e-6), table["high"] - shown
        axes.errorbar(
            np.maximum(table["mean_probability"], 1e-6),
            shown,
            yerr=np.maximum([low, high], 0.0),
            fmt="o-",
            color=colour,
            capsize=3,
            linewidth=1.2,
            label=name,
        )
        floor = min(floor, float(shown.min()), float(table["mean_probability"].min()))
    limits = (max(floor, 1e-6) / 2, 1.3)
    axes.plot(limits, limits, color=QUIET, linestyle=":", label="perfectly calibrated")
    axes.set(
        title="Calibration",
        xscale="log",
        yscale="log",
        xlim=limits,
        ylim=limits,
        xlabel="Mean fraud probability in the bin",
        ylabel="Observed fraud rate (95 % Wilson interval)",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:.4g}")
    axes.legend(loc="upper left")
    return figure


@mpl.rc_context(STYLE)
def score_distribution(y_true: Ints, scores: Scores, unit: str) -> Figure:
    """Numbers of transactions by raw margin, fraud and legitimate, with the policy's thresholds."""
    figure, panels = _figure(11, 4.4, columns=len(scores), sharey=True)
    for axes, (name, (margin, probability, policy, _)) in zip(panels, scores.items(), strict=True):
        bins = np.linspace(margin.min(), max(margin.max(), margin.min() + 1e-6), 61).tolist()
        for kind, colour, text in KINDS_OF_ROWS:
            if not (y_true == kind).any():
                continue
            axes.hist(margin[y_true == kind], bins, color=colour, alpha=0.35)
            axes.hist(margin[y_true == kind], bins, color=colour, histtype="step", linewidth=1.4, label=text)
        for threshold, line in (("review_threshold", "--"), ("decline_threshold", "-")):
            alert = probability >= policy[threshold]
            if alert.any():
                label = f"{threshold.split('_')[0]} at {policy[threshold]:.3g}"
                axes.axvline(margin[alert].min(), color="#333", linestyle=line, linewidth=1.1, label=label)
        axes.set(title=f"Scores: {name}", yscale="log", xlabel=f"Raw margin ({unit})")
        axes.legend(fontsize=9, loc="upper right", frameon=True, framealpha=0.9, edgecolor="white")
    panels[0].set_ylabel("Transactions (logarithmic)")
    return figure


@mpl.rc_context(STYLE)
def daily(y_true: Ints, event_time_ms: Ints, scores: Scores) -> Figure:
    """Day by day: frauds found and missed by the model, and the alerts of all sets of scores."""
    days, place = np.unique(event_time_ms // DAY_MS, return_inverse=True)
    dates = days.astype("datetime64[D]")
    figure, (frauds, alerts) = _figure(11, 5.6, rows=2, sharex=True)
    total = np.bincount(place, weights=y_true)
    busiest: list[float] = []
    for i, (name, scored) in enumerate(scores.items()):
        taken = scored.taken
        found = np.bincount(place, weights=y_true * (taken > 0))
        if i == 0:
            frauds.bar(dates, found, color=COLOURS[0], width=0.85, label=f"found by {name}")
            frauds.bar(dates, total - found, bottom=found, color=FRAUD, alpha=0.55, width=0.85, label="missed")
            reviews = np.bincount(place, weights=taken == 1)
            alerts.bar(dates, reviews, color=COLOURS[0], alpha=0.3, width=0.85, label=f"reviews: {name}")
        else:
            frauds.step(dates, found, where="mid", color=COLOURS[i], label=f"found by {name}")
        alerted = np.bincount(place, weights=taken > 0)
        alerts.plot(dates, alerted, "o-", ms=3, color=COLOURS[i], label=f"alerts: {name}")
        busiest.append(alerted.max())
    frauds.set(title="Frauds a day", ylabel="Frauds")
    alerts.set(title="Alerts a day (reviewed or declined)", ylabel="Transactions", xlabel="Day of the event (UTC)")
    locator: Any = AutoDateLocator()  # type: ignore[no-untyped-call]
    alerts.xaxis.set_major_locator(locator)
    alerts.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    frauds.set_ylim(bottom=0)
    if max(busiest) > 10 * min(busiest):
        alerts.set_yscale("symlog", linthresh=10)
        alerts.yaxis.set_major_formatter("{x:g}")
    alerts.set_ylim(bottom=0)
    for axes in (frauds, alerts):
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def explanation(features: Sequence[Feature], X: Floats, contributions: Floats) -> shap.Explanation:
    """Return rows and their contributions as the shap package takes them.

    Parameters
    ----------
    features : sequence of Feature
    X : ndarray, shape (n_rows, n_features), float64
    contributions : ndarray, shape (n_rows, n_features + 1), float64
        In the detector's unit, the base value last.
    """
    shown = [[_shown(readable(f, number)) for f, number in zip(features, row, strict=True)] for row in X.tolist()]
    return shap.Explanation(
        values=contributions[:, :-1],
        base_values=contributions[:, -1],
        data=X,
        display_data=np.array(shown, dtype=object),
        feature_names=[feature.name for feature in features],
    )


def _shown(value: float | bool | str | None) -> str:
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value).lower() if isinstance(value, bool) else value


@mpl.rc_context(STYLE)
def feature_importance(explanation: shap.Explanation, gain: Floats, unit: str, n_features: int = 20) -> Figure:
    """The features that move the scores most, and their shares of the fit's gain."""
    names = list(explanation.feature_names)
    share = gain / (gain.sum() or 1.0)
    effect = np.abs(explanation.values).mean(axis=0)
    top = np.argsort(-effect, kind="stable")[:n_features][::-1]
    figure, (left, right) = _figure(11, 1.2 + 0.26 * len(top), columns=2, sharey=True)
    left.barh([names[i] for i in top], effect[top], color=COLOURS[0])
    left.set(title="Mean absolute contribution", xlabel=f"SHAP value ({unit})")
    right.barh([names[i] for i in top], share[top], color=COLOURS[0], alpha=0.55)
    right.set(title="Share of the fit's gain", xlabel="Share of the total gain")
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
    return figure


def shap_summary(explanation: shap.Explanation, unit: str, max_display: int = 20) -> Figure:
    """shap's beeswarm: one point for each transaction and feature, coloured by the feature's value."""
    n_shown = min(max_display, len(explanation.feature_names))
    figure = Figure(figsize=(10, 1.8 + 0.32 * n_shown), dpi=110, layout="constrained")
    axes = figure.subplots()
    never_there = np.isnan(explanation.data).all(axis=0)  # shap needs a value to colour by
    shown = shap.Explanation(
        values=explanation.values,
        base_values=explanation.base_values,
        data=np.where(never_there, 0.0, explanation.data),
        feature_names=explanation.feature_names,
    )
    shap.plots.beeswarm(shown, max_display=max_display, ax=axes, show=False, plot_size=None)
    axes.set_title("What raises and lowers the scores", loc="left", fontweight="bold")
    axes.set_xlabel(f"Contribution to the raw margin ({unit}; right raises the score)", fontsize=11)
    axes.tick_params(axis="y", labelsize=10)
    return figure


def shap_waterfall(explanation: shap.Explanation, unit: str, max_display: int = 12) -> Figure:
    """shap's waterfall of the transaction with the highest score among the explained ones."""
    row = int(np.argmax(explanation.values.sum(axis=1)))
    with mpl.rc_context({"figure.dpi": 110}):
        figure = plt.figure()
        try:
            shap.plots.waterfall(explanation[row], max_display=max_display, show=False)
            figure.axes[0].set_title("The highest score explained", loc="left", fontweight="bold", pad=34)
            figure.axes[0].set_xlabel(f"Raw margin ({unit})", labelpad=20)
        finally:
            plt.close(figure)
    return figure
