"""docs/operations.md says what the code says. Run this file as a script to write its tables anew."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import SecretStr
from starlette.applications import Starlette

from fraud.old_variables import ALTERNATIVES, REFUSED
from fraud.serving.api_pages import api_pages
from fraud.serving.app import document_route, service_routes
from fraud.serving.bento_pages import bento_routes
from fraud.serving.contracts.registered import contracts_of
from fraud.serving.engine import Engine
from fraud.serving.scopes import SCOPES
from fraud.settings import Settings, variables
from fraud.telemetry.metrics import METRICS

ROUTES = [
    *service_routes(Engine(), Settings(), contracts_of(Engine(), Settings())),
    *api_pages(),
    *bento_routes(Starlette()),
    document_route([], "", "", ""),
]
PAGE = Path(__file__).parent.parent / "docs" / "operations.md"


def settings_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, field in variables().items():
        default = field.default
        shown = default.get_secret_value() if isinstance(default, SecretStr) else default
        shown = "" if shown is None else str(shown).replace(str(Path.home()), "~")
        shown = shown.lower() if isinstance(default, bool) else shown
        lines.append(f"| `{variable}` | {f'`{shown}`' if shown else 'none'} | {field.description} |")
    return "\n".join(lines)


def alternatives_table() -> str:
    lines = ["| variable | read as | how |", "|---|---|---|"]
    lines += [f"| `{name}` | `{a.own}` | {a.meaning} |" for name, a in ALTERNATIVES.items()]
    lines += [f"| `{name}` | refused | {advice} |" for name, advice in REFUSED.items()]
    return "\n".join(lines)


def metrics_table() -> str:
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(metric.labels) or ("pid" if metric.mode == "liveall" else "")
        lines.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.meaning} |")
    return "\n".join(lines)


def scopes_table() -> str:
    lines = ["| scope | for whom to | opens |", "|---|---|---|"]
    for scope, meaning in SCOPES.items():
        opened = ", ".join(f"`{route.method} {route.path}`" for route in ROUTES if route.scope == scope)
        lines.append(f"| {scope} | {meaning} | {opened} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    for name, table in (
        ("settings", settings_table()),
        ("alternatives", alternatives_table()),
        ("metrics", metrics_table()),
        ("scopes", scopes_table()),
    ):
        begin = page.index(f"<!-- {name} -->\n") + len(f"<!-- {name} -->\n")
        end = page.index("<!-- end -->", begin)
        page = page[:begin] + table + "\n" + page[end:]
    return page


def test_tables_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page), "run: python -m tests.test_operations_doc"


def test_every_setting_and_metric_has_a_meaning() -> None:
    assert [name for name, field in variables().items() if not (field.description or "").endswith(".")] == []
    assert [metric.name for metric in METRICS if not metric.meaning.endswith(".")] == []


def test_variables_and_metrics_in_the_text_exist() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"\bFRAUD_[A-Z_]+\b", text))
    assert {name.removesuffix("_FILE") for name in named} <= set(variables())
    assert set(re.findall(r"\bfraud_[a-z_]+\b", text)) <= {metric.name for metric in METRICS}
    assert all(f"`{route.path}`" in text for route in ROUTES if route.scope is None)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
