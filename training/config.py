"""How a model is trained; every value may be set in a YAML file, `fraud train --config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fraud.decisions.anomaly import Severity
from fraud.decisions.costs import DEFAULT_COSTS, check_costs
from fraud.decisions.policy import SEVERITY_ACTIONS, PolicyAction
from fraud.errors import DataError


class BoosterOptions(BaseModel):
    """LightGBM's parameters by its own names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(0.1, gt=0, le=1)
    num_leaves: int = Field(31, ge=2, le=255)
    min_data_in_leaf: int = Field(100, ge=1, le=10**9)
    feature_fraction: float = Field(0.5, gt=0, le=1)
    pos_bagging_fraction: float = Field(1.0, gt=0, le=1)
    neg_bagging_fraction: float = Field(0.25, gt=0, le=1)
    bagging_freq: int = Field(1, ge=0, le=10_000)
    lambda_l2: float = Field(10.0, ge=0, le=1e6)
    max_bin: int = Field(255, ge=15, le=255)
    cat_smooth: float = Field(20.0, ge=0, le=1e6)


Odd = Literal["high", "low", "both"]
"""Which values of a feature are odd: those far above the median, far below it, or both."""


class ForestOptions(BaseModel):
    """How an isolation forest is fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trees: int = Field(100, ge=1, le=1000)
    samples: int = Field(256, ge=2, le=65_536, description="Rows that each tree is grown on.")
    features: dict[str, Odd] | None = Field(None, description="With the odd side of each; by default behaviour.")
    decides_on: Literal["anomaly_score", "fraud_probability"] = Field(
        "anomaly_score", description="What the policy is on; a probability needs labels to calibrate by."
    )


class SeverityOptions(BaseModel):
    """How rare each severity of an anomaly is, and what is done about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    medium: float = Field(0.01, gt=0, lt=1, description="Most of the transactions that are MEDIUM or above.")
    high: float = Field(0.001, gt=0, lt=1, description="Most that are HIGH or above.")
    critical: float = Field(0.0001, gt=0, lt=1, description="Most that are CRITICAL.")
    confidence: float = Field(0.95, ge=0.5, lt=1, description="With which these rates hold.")
    actions: dict[Severity, PolicyAction] = Field(dict(SEVERITY_ACTIONS), description="The least that is done.")

    @model_validator(mode="after")
    def _falling(self) -> Self:
        if not self.medium > self.high > self.critical:
            raise ValueError(f"rates must fall: medium {self.medium}, high {self.high}, critical {self.critical}")
        return self

    @property
    def rates(self) -> dict[Severity, float]:
        """The rate of each severity that has one."""
        return {"MEDIUM": self.medium, "HIGH": self.high, "CRITICAL": self.critical}


class Config(BaseModel):
    """One training's configuration.

    Frauds are neither resampled nor weighted: the log loss of all transactions already gives margins that
    rank as well, and probabilities that need little correction; the policy's costs carry the imbalance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(7, ge=0, le=2**31 - 1)
    rounds: int = Field(600, ge=1, le=100_000, description="Most boosting rounds; early stopping decides.")
    early_stopping_rounds: int = Field(40, ge=1, le=100_000)
    validation_share: float = Field(0.12, gt=0, lt=0.5)
    calibration_share: float = Field(0.12, gt=0, lt=0.5)
    test_share: float = Field(0.2, gt=0, lt=0.5, description="Of the whole time, for the last window.")
    seeds: int = Field(1, ge=1, le=20, description="Boosters of so many seeds, averaged into one.")
    search_trials: int = Field(0, ge=0, le=200, description="Trials of the hyperparameter search; 0 for none.")
    n_bootstrap: int = Field(200, ge=20, le=10_000)
    review_capacity: float = Field(0.05, ge=0, le=1, description="Most of the transactions that people can review.")
    review_rate: float = Field(0.01, gt=0, lt=1, description="Share to review where the mapping names no stake.")
    booster: BoosterOptions = BoosterOptions()
    forest: ForestOptions = ForestOptions()
    severity: SeverityOptions = SeverityOptions()
    costs: dict[str, float] = DEFAULT_COSTS

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, content: Any) -> Any:
        """Refuse truth values: YAML reads a bare yes, no, on or off as one, and each is a number for pydantic."""
        for name, value in _flat(content).items():
            if isinstance(value, bool):
                raise ValueError(f"{name} is {value}, as YAML reads a bare yes, no, on or off; a number is needed")
        return content

    @field_validator("costs")
    @classmethod
    def _complete(cls, given: dict[str, float]) -> dict[str, float]:
        """Fill in the default of each cost that is not given."""
        costs = DEFAULT_COSTS | given
        try:
            check_costs(costs)
        except DataError as error:
            raise ValueError(error.message) from None
        return costs

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read and check a configuration file; `DataError` names every key that is unknown or wrong."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"{path.name}: the configuration cannot be read: {' '.join(str(error).split())}") from None
        return cls.of({} if content is None else content, path.name)

    @classmethod
    def of(cls, content: Any, source: str) -> Self:
        """Check the keys and values of a configuration; `DataError` names every one that is unknown or wrong."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            lines = [f"{source}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise DataError("\n".join(lines)) from None

    @property
    def shares(self) -> dict[str, float]:
        """The share of each window that has one, by the window's name."""
        return {"validation": self.validation_share, "calibration": self.calibration_share, "test": self.test_share}

    def flat(self) -> dict[str, Any]:
        """Return every value under one name, nested ones as `booster.num_leaves`."""
        return _flat(self.model_dump())


def _flat(content: Any) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
