"""The nowcast: exact where nothing is open, honest where much is, and its coverage in small."""

from __future__ import annotations

import numpy as np
import pytest

from fraud.checks.nowcast import AGES, WARM_UP_WEEKS, coverage, final, world
from fraud.monitoring.measures import DAY_MS
from fraud.monitoring.nowcast import LONGEST_DELAY, NOWCAST, Days, _counts, _shifted, nowcast, told_by
from fraud.monitoring.performance import MONDAY_MS, recent_nowcasts
from fraud.monitoring.traffic import Traffic


def test_delays_that_are_all_seen_give_the_empirical_curve() -> None:
    delay = np.random.default_rng(1).integers(0, LONGEST_DELAY + 1, 500)
    told = told_by(delay, np.full(500, 60))
    assert told == pytest.approx([(delay <= d).mean() for d in range(LONGEST_DELAY + 1)])


def test_truncated_delays_are_corrected() -> None:
    """Frauds of the last days show only their short delays; a plain share of those told would say they all are."""
    rng = np.random.default_rng(2)
    delay = np.minimum(rng.geometric(0.1, 200_000) - 1, LONGEST_DELAY)
    age = rng.integers(0, 70, len(delay))
    seen = delay <= age
    truth = np.array([(delay <= d).mean() for d in range(LONGEST_DELAY + 1)])
    assert np.abs(told_by(delay[seen], age[seen]) - truth).max() < 0.01
    plain = np.array([(delay[seen] <= d).mean() for d in range(LONGEST_DELAY + 1)])
    assert np.abs(plain - truth).max() > 0.05


def test_nothing_is_open_once_all_labels_are_in() -> None:
    rng = np.random.default_rng(3)
    days = world(rng, 40)
    first, last = 7 * 35, 7 * 36
    found = nowcast(days, first, last, last + LONGEST_DELAY + 1, rng)
    for name, truth in zip(NOWCAST, final(days, first, last), strict=True):
        value, low, high = found[name]
        assert (value, low, high) == pytest.approx((truth,) * 3)


def test_intervals_narrow_as_labels_come() -> None:
    rng = np.random.default_rng(4)
    days = world(rng, 45)
    week = 7 * 36
    widths = []
    for age in (7, 14, 28):
        _, low, high = nowcast(days, week, week + 7, week + age, rng)["precision"]
        assert low is not None
        assert high is not None
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * widths[2]


def test_labels_that_come_later_are_not_looked_at() -> None:
    days = world(np.random.default_rng(5), 45)
    week, today = 7 * 36, 7 * 36 + 7
    seen = days.fraud_day + days.fraud_delay < today
    past = Days(
        days.expected,
        days.flagged,
        days.fraud_day[seen],
        days.fraud_group[seen],
        days.fraud_delay[seen],
        days.fraud_amount[seen],
    )
    results = [nowcast(some, week, today, today, np.random.default_rng(1)) for some in (days, past)]
    assert results[0] == results[1]


def test_weeks_that_say_nothing_say_so() -> None:
    rng = np.random.default_rng(6)
    days = world(rng, 40)
    assert all(e.value is None for e in nowcast(days, 49, 56, 56, rng).values()), "only a week is complete"
    idle = days._replace(flagged=np.zeros_like(days.flagged))
    found = nowcast(idle, 7 * 36, 7 * 37, 7 * 37, rng)
    assert found["precision"].value is None
    assert found["recall"].value is not None
    empty = np.zeros(0, np.int64)
    silent = Days(days.expected, days.flagged, empty, empty, empty, np.zeros(0))
    found = nowcast(silent, 7 * 36, 7 * 37, 7 * 37, rng)
    assert all(v is None or np.isfinite(v) for e in found.values() for v in e)


def test_dispersed_counts_have_their_mean_and_variance() -> None:
    drawn = _counts(np.random.default_rng(7), np.full(400_000, 12.0), 2.5)
    assert drawn.mean() == pytest.approx(12.0, rel=0.01)
    assert drawn.var() == pytest.approx(30.0, rel=0.02)
    assert _shifted(np.array([0.0, 0.5, 1.0]), np.array([[1.0]])).tolist() == [[0.0, pytest.approx(0.7310586), 1.0]]


def test_a_few_worlds_are_covered() -> None:
    """`fraud verify nowcast` in small: 6 worlds of 20 weeks; the bounds are those of a run that small."""
    covered = np.mean([coverage(seed, 20) for seed in range(100, 106)], axis=0)
    assert covered.shape == (len(NOWCAST), len(AGES))
    assert covered.min() >= 0.83
    assert covered.mean() >= 0.90


def test_the_columns_of_recorded_traffic_give_the_same_days() -> None:
    """Recorded decisions of a world, one row a flagged transaction or a fraud, are nowcast as the world itself."""
    days = world(np.random.default_rng(8), 40)
    today = 7 * WARM_UP_WEEKS + 10
    rows = []
    for day in range(today):
        frauds = np.flatnonzero(days.fraud_day == day)
        for i in frauds:
            group, delay = int(days.fraud_group[i]), int(days.fraud_delay[i])
            known = day + delay < today
            rows.append((day, 0.0, days.fraud_amount[i], group, int(known) if known else -1, delay if known else -1))
        others = int(days.flagged[day]) - int((days.fraud_group[frauds] == 1).sum())
        rows += [(day, 0.0, 1.0, 1, -1, -1)] * others
        rows += [(day, days.expected[day, g], 1.0, g, -1, -1) for g in (0, 1)]
    day_, score, amount, group_, label, delay_ = (np.array(column) for column in zip(*rows, strict=True))
    n = len(rows)
    traffic = Traffic(
        MONDAY_MS + day_.astype(np.int64) * DAY_MS,
        np.zeros(n, np.int64),
        score.astype(float),
        amount.astype(float),
        np.ones(n, np.int64),
        group_.astype(np.int64),
        np.arange(n),
        label.astype(np.int64),
        np.where(delay_ >= 0, delay_ * DAY_MS, -1),
        {},
        {},
        ["v"],
        MONDAY_MS + today * DAY_MS,
    )
    found = recent_nowcasts(traffic)
    assert [one.days for one in found] == [7] * (len(found) - 1) + [3]
    assert len(found) >= 6
    last = found[-1].measures
    truth = final(days, today - 3, today)
    for name, value in zip(NOWCAST, truth, strict=True):
        estimate = last[name].value
        assert estimate is not None
        assert 0.3 * value < estimate < 3 * value
    uncalibrated = traffic._replace(is_calibrated=np.zeros(n, np.int64))
    assert recent_nowcasts(uncalibrated) == []
