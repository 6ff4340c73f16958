"""The monitoring report: one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fraud.monitoring.measures import MEASURES, Estimate
from fraud.monitoring.nowcast import NOWCAST
from fraud.monitoring.performance import ALL, Nowcast, Performance

PLOTTED = (
    "precision",
    "recall",
    "f1",
    "false_positive_rate",
    "auc",
    "average_precision",
    "expected_calibration_error",
    "cost_per_1000",
)
WIDTH, HEIGHT, LEFT, FOOT = 460, 170, 56, 22
STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;font-size:13px;margin:.6rem 0 1.6rem}
th,td{border-bottom:1px solid #d8dee4;padding:.25rem .55rem;text-align:right;vertical-align:top}
th:first-child,td:first-child,.t{text-align:left}small{color:#57606a}.wide{overflow-x:auto}
.plots{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}figcaption{font-weight:600}
svg{background:#f6f8fa;border-radius:6px}
"""


def report_page(
    model: str, made: str, performance: Sequence[Performance], nowcasts: Sequence[Nowcast], rules: Sequence[str]
) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    model : str
    made : str
        As of when, ISO 8601.
    performance : sequence of Performance
        By week, as `weekly_performance` returns them.
    nowcasts : sequence of Nowcast
    rules : sequence of str
        Sentences on how labels were counted.
    """
    whole = [one for one in performance if one.version == ALL and one.segment == ALL]
    versions = [one for one in performance if one.version != ALL]
    segments = [one for one in performance if one.segment != ALL]
    parts = [
        f"<h1>Monitoring of {escape(model)}</h1><p>As of {escape(made)}.</p>",
        "".join(f"<p><small>{escape(rule)}</small></p>" for rule in rules),
        "<h2>Performance by week</h2><div class=plots>",
        *(_plot(name, whole) for name in PLOTTED),
        f"</div>{_table(whole)}",
        "<h2>Nowcast</h2>",
        _nowcasts(nowcasts),
        f"<h2>By version</h2>{_table(versions)}",
        f"<h2>By segment</h2>{_table(segments)}" if segments else "",
    ]
    head = f"<meta charset=utf-8><title>Monitoring of {escape(model)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _table(performance: Sequence[Performance]) -> str:
    heads = ("week", "version", "segment", "decisions", "flagged", "frauds", "labels in", *MEASURES)
    rows = ["<tr>" + "".join(f"<th>{escape(head.replace('_', ' '))}</th>" for head in heads) + "<th>remarks</th></tr>"]
    for one in performance:
        cells = (
            one.week,
            one.version.removeprefix("sha256:")[:16],
            escape(one.segment),
            f"{one.decisions:,}",
            f"{one.flagged:,}",
            f"{one.frauds:,}",
            f"{one.labelled_share:.1%}",
            *(_cell(one.measures[name]) for name in MEASURES),
        )
        remarks = escape("; ".join(one.remarks))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + f"<td class=t>{remarks}</td></tr>")
    return f"<div class=wide><table>{''.join(rows)}</table></div>"


def _nowcasts(nowcasts: Sequence[Nowcast]) -> str:
    if not nowcasts:
        return "<p>None: it needs probabilities, and eight weeks whose labels are in.</p>"
    heads = ("week", "days over", *(f"{name.replace('_', ' ')}, once labels are in" for name in NOWCAST))
    rows = ["<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>"]
    for one in nowcasts:
        cells = one.week, str(one.days), *(_cell(one.measures[name]) for name in NOWCAST)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _cell(estimate: Estimate) -> str:
    if estimate.value is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g}<br><small>{estimate.low:.4g} to {estimate.high:.4g}</small>"


def _plot(name: str, weeks: Sequence[Performance]) -> str:
    """Return a line over the weeks with its intervals; a week whose labels still come has an open circle."""
    known = [(i, one.measures[name], one.is_complete) for i, one in enumerate(weeks)]
    known = [(i, estimate, complete) for i, estimate, complete in known if estimate.value is not None]
    title = f"<figcaption>{escape(name.replace('_', ' '))}</figcaption>"
    if not known:
        return f"<figure>{title}<p>no week has enough labels</p></figure>"
    ends = [end for _, estimate, _ in known for end in estimate if end is not None]
    low, high = min(ends), max(ends)
    span = (high - low) or abs(high) or 1.0

    def x(i: int) -> float:
        return LEFT + (WIDTH - LEFT - 14) * (i + 0.5) / len(weeks)

    def y(value: float) -> float:
        return 12 + (HEIGHT - FOOT - 24) * (1 - (value - low) / span)

    drawn = [
        f'<text x="4" y="{y(value) + 4:.1f}" font-size="11">{value:.3g}</text>' for value in dict.fromkeys((low, high))
    ]
    step = max(1, len(weeks) // 5)
    drawn += [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 6}" font-size="10" text-anchor="middle">{weeks[i].week[5:]}</text>'
        for i in range(0, len(weeks), step)
    ]
    points = " ".join(f"{x(i):.1f},{y(estimate.value or 0.0):.1f}" for i, estimate, _ in known)
    drawn.append(f'<polyline points="{points}" fill="none" stroke="#0969da" stroke-width="1.5"/>')
    for i, estimate, complete in known:
        if estimate.low is not None and estimate.high is not None:
            drawn.append(
                f'<line x1="{x(i):.1f}" x2="{x(i):.1f}" y1="{y(estimate.low):.1f}" y2="{y(estimate.high):.1f}" '
                'stroke="#54aeff"/>'
            )
        fill = "#0969da" if complete else "#fff"
        drawn.append(
            f'<circle cx="{x(i):.1f}" cy="{y(estimate.value or 0.0):.1f}" r="3.5" fill="{fill}" stroke="#0969da"/>'
        )
    return f'<figure>{title}<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(drawn)}</svg></figure>'
