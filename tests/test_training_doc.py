"""docs/training.md names every key of the configuration with its default."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from fraud.decisions.costs import DEFAULT_COSTS
from training.config import BoosterOptions, Config, ForestOptions, SeverityOptions

TEXT = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def test_every_key_is_documented_with_its_default() -> None:
    models: tuple[type[BaseModel], ...] = (Config, BoosterOptions, ForestOptions, SeverityOptions)
    for model in models:
        for name, field in model.model_fields.items():
            shown = (
                "" if name in {"booster", "forest", "severity", "costs", "features", "actions"} else str(field.default)
            )
            assert f"| `{name}` | {shown} |".replace("  ", " ") in TEXT, name
    for name, value in DEFAULT_COSTS.items():
        assert f"`{name}` {value:g}" in TEXT, name
