"""`fraud verify severity`: it measures a sound calibration as sound, and fails on one that is not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from fraud.checks.severity import (
    LEGITIMATE,
    Again,
    Traffic,
    World,
    app,
    check,
    drawn_anew,
    found_by_kind,
    fresh_traffic,
    rate_of,
    train_on,
)
from fraud.detectors.severity import Level, SeverityScale
from fraud.errors import BundleError
from training import severity as calibrating
from training.config import Config, ForestOptions, SeverityOptions
from training.prepare import PreparedData
from training.train import Trained, fit_model

WORLD = World(900, 18)
OFTEN = Config(
    forest=ForestOptions(trees=30),
    calibration_share=0.3,
    severity=SeverityOptions(medium=0.1, high=0.04, critical=0.03),
)


@pytest.fixture(scope="module")
def trained() -> tuple[PreparedData, Trained]:
    return train_on(WORLD, OFTEN, 1)


@pytest.fixture(scope="module")
def traffic(trained: tuple[PreparedData, Trained]) -> Traffic:
    return Traffic.joined([fresh_traffic(*trained, WORLD, seed) for seed in (2, 3)])


@pytest.fixture(scope="module")
def again(trained: tuple[PreparedData, Trained]) -> list[SeverityScale]:
    return drawn_anew(*trained, OFTEN, 100)


def scale_of(trained: tuple[PreparedData, Trained]) -> SeverityScale:
    scale = trained[1].detector.severity
    assert scale is not None
    return scale


def test_a_sound_calibration_holds_on_fresh_traffic(
    trained: tuple[PreparedData, Trained], traffic: Traffic, again: list[SeverityScale]
) -> None:
    result = check(scale_of(trained), traffic, again)
    assert result.holds
    assert [m.level.severity for m in result.measured] == ["MEDIUM", "HIGH", "CRITICAL"]
    for m in result.measured:
        assert 0 < m.least < m.all.value
        assert m.least < m.level.rate < m.most
        assert m.again.calibrations == 100
        assert m.all.low < m.all.value < m.all.high
        assert m.legitimate.value < m.all.value, "frauds are unusual more often"
    kinds = found_by_kind(scale_of(trained), traffic)
    assert kinds.index[-1] == LEGITIMATE
    assert {"account_takeover", "card_testing", "stolen_card_burst"} < {*kinds.index}
    assert kinds["transactions"].sum() == len(traffic.raw_margins)
    assert (kinds["MEDIUM"] >= kinds["HIGH"]).all()
    assert len(np.unique(traffic.customers)) > WORLD.customers, "customers of two worlds are others"


@pytest.mark.parametrize("shift", [-0.15, 0.3])
def test_thresholds_that_are_wrong_do_not_hold(
    trained: tuple[PreparedData, Trained], traffic: Traffic, again: list[SeverityScale], shift: float
) -> None:
    """Lower ones alarm too often; higher ones alarm less often than their own sample makes likely."""
    scale = scale_of(trained)
    moved = [msgspec.structs.replace(level, above=(level.above or 0.0) + shift) for level in scale.levels]
    wrong = msgspec.structs.replace(scale, levels=tuple(moved))
    result = check(wrong, traffic, again)
    assert not result.holds
    assert not all(m.holds for m in result.measured)


def test_calibrations_that_are_above_more_often_than_promised_do_not_hold(
    trained: tuple[PreparedData, Trained], traffic: Traffic, again: list[SeverityScale]
) -> None:
    """A model's own calibration may be lucky; of 100 others 5 may be above, and not 30."""
    bold = [msgspec.structs.replace(scale, levels=tuple(map(_lower, scale.levels))) for scale in again]
    assert check(scale_of(trained), traffic, again[:95] + bold[95:]).holds
    assert not check(scale_of(trained), traffic, again[:70] + bold[70:]).holds
    assert Again(100, 11).keeps(0.95)
    assert not Again(100, 13).keeps(0.95)


def _lower(level: Level) -> Level:
    return msgspec.structs.replace(level, above=(level.above or 0.0) - 0.3)


def test_a_sample_with_several_rows_of_a_customer_does_not_hold(
    trained: tuple[PreparedData, Trained],
    traffic: Traffic,
    again: list[SeverityScale],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scale = scale_of(trained)
    assert not check(msgspec.structs.replace(scale, customers=scale.customers - 1), traffic, again).holds
    monkeypatch.setattr(calibrating, "one_a_customer", lambda customers, seed: np.arange(len(customers)))
    with pytest.raises(BundleError, match="one row a customer in the sample"):
        fit_model(trained[0], OFTEN, algorithm=trained[1].algorithm)


def test_without_any_level_there_is_nothing_that_holds(traffic: Traffic) -> None:
    none = calibrating.fit_severity(np.zeros(20), None, SeverityOptions(), 1)
    assert not check(none, traffic, []).holds


def test_an_interval_allows_for_customers_whose_transactions_resemble_each_other() -> None:
    reached = np.zeros(10_000, np.bool_)
    reached[:100] = True
    alone = rate_of(reached, np.arange(10_000))
    exact = binomtest(100, 10_000).proportion_ci(0.99, "exact")
    assert (alone.low, alone.high) == pytest.approx((exact.low, exact.high), rel=1e-3)
    together = rate_of(reached, np.arange(10_000) // 100)
    assert together.value == 0.01
    assert together.low < 0.002
    assert together.high > 0.05
    assert rate_of(np.zeros(1000, np.bool_), np.arange(1000)).low == 0.0
    assert rate_of(np.ones(1000, np.bool_), np.arange(1000)).high == 1.0


def test_the_command_prints_rates_bounds_and_typologies(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("severity: {medium: 0.1, high: 0.04, critical: 0.0001}\nforest: {trees: 20}\n")
    asked = ["--customers", "900", "--days", "18", "--rows", "3000", "--config", str(config)]
    asked += ["--calibrations", "20"]
    result = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "MEDIUM    10.0000%" in result.output
    assert "of 20" in result.output
    assert "CRITICAL is not offered: it needs a sample of 29,956" in result.output
    assert "account_takeover" in result.output
