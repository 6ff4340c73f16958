"""Back-tests over several weeks: each week as a backtest of its own, with means, spreads and paired differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fraud.errors import DataError
from tests.conftest import EXAMPLES, TINY
from training.backtest import backtest
from training.data import Mapping, load_transactions
from training.splits import MS_PER_DAY
from training.weeks import WEEK_MS, Week, backtest_weeks, table_of

MAPPING = Mapping.from_yaml(EXAMPLES / "simulated.yaml")
OTHER = TINY.model_copy(update={"booster": TINY.booster.model_copy(update={"num_leaves": 4})})
WITHIN_MS = 14 * MS_PER_DAY


@pytest.fixture(scope="module")
def table(simulated: Path) -> pd.DataFrame:
    return load_transactions(simulated, MAPPING)


@pytest.fixture(scope="module")
def found(table: pd.DataFrame) -> tuple[list[Week], pd.DataFrame]:
    configs = {"model": TINY, "same": TINY, "against": OTHER}
    until = (int(table["event_time_ms"].iloc[0]) // MS_PER_DAY + 70) * MS_PER_DAY
    return backtest_weeks(table, MAPPING, configs, n_weeks=2, until=until, defrauded_within_ms=WITHIN_MS)


def test_each_week_is_scored_as_a_backtest_of_its_own(
    table: pd.DataFrame, found: tuple[list[Week], pd.DataFrame]
) -> None:
    weeks, scores = found
    assert weeks[1].begin_ms == weeks[0].begin_ms + WEEK_MS
    for week in weeks:
        test = (week.begin_ms, week.begin_ms + WEEK_MS)
        alone, _ = backtest(table, MAPPING, TINY, train_until=week.begin_ms, test=test)
        day = str(pd.Timestamp(week.begin_ms, unit="ms"))[:10]
        mine = scores[scores["week"] == day].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine[alone.columns], alone, check_exact=True)
        pd.testing.assert_series_equal(mine["same_raw_margin"], alone["raw_margin"], check_names=False)
        assert (mine["against_raw_margin"] != mine["raw_margin"]).any()
        assert week.rows == mine["measured"].sum() < len(mine)
        assert week.frauds == mine.loc[mine["measured"], "label"].sum() > 0


def test_customers_known_as_defrauded_are_left_out(table: pd.DataFrame, found: tuple[list[Week], pd.DataFrame]) -> None:
    """Against a naive loop over the frauds of each transaction's customer."""
    weeks, scores = found
    frauds = table[table["label"] == 1]
    begins = {str(pd.Timestamp(week.begin_ms, unit="ms"))[:10]: week.begin_ms for week in weeks}
    left_out = 0
    for row in scores.to_dict("records"):
        midnight = row["event_time"].normalize().timestamp() * 1000
        own = frauds[frauds["customer_id"] == row["customer_id"]]
        since = begins[row["week"]] - WITHIN_MS
        known = own[(own["label_time_ms"] <= midnight) & (own["event_time_ms"] >= since)]
        assert row["measured"] == known.empty
        left_out += not row["measured"]
    assert left_out > 10


def test_the_table_has_means_spreads_and_paired_differences(found: tuple[list[Week], pd.DataFrame]) -> None:
    rows = table_of(found[0])
    means = {(row["model"], row["measure"]): row for row in rows[rows["week"] == "mean"].to_dict("records")}
    for (model, measure), values in rows[rows["week"] != "mean"].groupby(["model", "measure"])["value"]:
        mean = means.pop((model, measure))
        assert len(values) == 2
        assert mean["value"] == pytest.approx(np.mean(values), rel=1e-12)
        assert mean["spread"] == pytest.approx(np.std(values, ddof=1), rel=1e-9, abs=1e-15)
        if model == "model minus same":
            assert (mean["value"], mean["low"], mean["high"]) == (0.0, 0.0, 0.0)
        if (model, measure) == ("model minus plain", "average_precision"):
            assert 0 < mean["low"] < mean["value"] < mean["high"]
    assert not means


def test_the_last_week_ends_with_the_data_and_needs_a_fraud(table: pd.DataFrame) -> None:
    """The simulation's last week has none."""
    last = pd.Timestamp(int(table["processing_time_ms"].iloc[-1]), unit="ms").normalize()
    begin = f"{last - pd.Timedelta(days=6):%Y-%m-%d}"
    with pytest.raises(DataError, match=rf"the week from {begin}T.* of which 0 are fraud; both kinds are needed"):
        backtest_weeks(table, MAPPING, {"model": TINY}, n_weeks=1)
