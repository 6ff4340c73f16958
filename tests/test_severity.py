"""The severity scale: its exact bounds, its sample, its guarantee in simulation, and the scales that are refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import beta

from fraud.decisions.anomaly import SEVERITIES
from fraud.detectors.severity import LEVELS, Level, SeverityScale, read_scale, write_scale
from fraud.errors import BundleError
from training.config import SeverityOptions
from training.severity import fit_severity, one_a_customer, rank_for

OPTIONS = SeverityOptions()
CONFIDENCE = OPTIONS.confidence


def scale_of(rows: int, seed: int = 0) -> SeverityScale:
    return fit_severity(np.random.default_rng(seed).normal(size=rows), None, OPTIONS, seed)


@pytest.mark.parametrize(("rate", "rows"), [(0.01, 299), (0.001, 2995), (0.0001, 29956)])
def test_a_level_needs_as_many_rows_as_the_exact_bound_says(rate: float, rows: int) -> None:
    assert (rank_for(rate, rows - 1, CONFIDENCE), rank_for(rate, rows, CONFIDENCE)) == (0, 1)
    assert Level("HIGH", rate, 0, None).rows_needed(CONFIDENCE) == rows
    assert beta.cdf(rate, 1, rows) >= CONFIDENCE > beta.cdf(rate, 1, rows - 1)


@pytest.mark.parametrize("rows", [299, 500, 4321, 50_000])
@pytest.mark.parametrize("rate", [0.2, 0.01, 0.001])
def test_the_rank_is_the_largest_that_keeps_the_rate(rows: int, rate: float) -> None:
    naive = [k for k in range(1, rows + 1) if beta.cdf(rate, k, rows + 1 - k) >= CONFIDENCE] if rows < 5000 else []
    found = rank_for(rate, rows, CONFIDENCE)
    if naive:
        assert found == naive[-1]
    if found:
        assert beta.cdf(rate, found, rows + 1 - found) >= CONFIDENCE
    assert beta.cdf(rate, found + 1, rows - found) < CONFIDENCE


def test_a_level_whose_sample_is_too_small_is_not_offered() -> None:
    scale = scale_of(3_000)
    assert scale.not_offered == ("CRITICAL",)
    assert scale.of(np.array([1e9])) == ["HIGH"]
    none = scale_of(298)
    assert none.not_offered == LEVELS
    assert none.of(np.array([0.0, 1e9])) == [None, None]


def test_a_score_has_the_severity_that_it_is_above() -> None:
    raw = np.arange(30_000.0)
    scale = fit_severity(raw, None, OPTIONS, 0)
    medium, high, critical = (level.above for level in scale.levels)
    assert medium is not None
    assert high is not None
    assert critical == 29_999.0
    scores = np.array([0.0, medium, math.nextafter(medium, math.inf), high, high + 1, critical, critical + 1, math.inf])
    assert scale.of(scores) == ["LOW", "LOW", "MEDIUM", "MEDIUM", "HIGH", "HIGH", "CRITICAL", "CRITICAL"]
    assert scale.of(scores[:0]) == []
    assert read_scale(write_scale(scale)) == scale


def test_equal_scores_do_not_raise_the_rate() -> None:
    scale = fit_severity(np.ones(40_000), None, OPTIONS, 0)
    assert set(scale.of(np.ones(10))) == {"LOW"}


# The sample


def test_the_sample_has_one_row_a_customer_and_every_row_is_equally_likely() -> None:
    customers = np.repeat(np.arange(6), [1, 2, 2, 5, 10, 10])
    drawn = np.zeros(len(customers))
    trials = 8_000
    for seed in range(trials):
        sample = one_a_customer(customers, seed)
        assert len(set(customers[sample])) == len(sample)
        drawn[sample] += 1
    assert np.abs(drawn / trials - 0.1).max() < 0.1 / 5, "a row is in one of ten samples, the largest customer's size"
    assert np.array_equal(one_a_customer(customers, 5), one_a_customer(customers, 5))
    assert len(one_a_customer(customers[:0], 0)) == 0


def population(rng: np.random.Generator, n: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scores and customers: customers differ in their scores, and the odd ones make other numbers of transactions."""
    effect = rng.normal(size=n)
    counts = rng.poisson(np.exp(1.0 + 0.5 * effect)) + 1
    customers = np.repeat(np.arange(n), counts)
    return effect[customers] + 0.3 * rng.normal(size=len(customers)), customers


def test_the_guarantee_holds_for_a_sample_of_one_row_a_customer_and_not_for_all_rows() -> None:
    """Of 300 calibrations 5% may exceed the rate: 15, give or take. With all rows of each customer far more do."""
    options = SeverityOptions(medium=0.02)
    rng = np.random.default_rng(7)
    truth = np.sort(population(rng, 400_000)[0])
    exceeded = {"one a customer": 0, "all rows": 0, "one of every customer": 0}
    trials = 300
    for seed in range(trials):
        scores, customers = population(rng, 3_000)
        every = np.unique(rng.permutation(len(customers)), return_index=True)[1]
        _, first = np.unique(customers[every], return_index=True)
        for name, drawn in (
            ("one a customer", fit_severity(scores, customers, options, seed)),
            ("all rows", fit_severity(scores, None, options, seed)),
            ("one of every customer", fit_severity(scores[every[first]], None, options, seed)),
        ):
            above = drawn.levels[0].above
            assert above is not None
            share = (len(truth) - int(np.searchsorted(truth, above, side="right"))) / len(truth)
            exceeded[name] += share > options.medium
    assert exceeded["one a customer"] <= 27, "more than 27 of 300 has probability 0.001 if 5% is right"
    assert exceeded["all rows"] > 60
    assert exceeded["one of every customer"] > 250, "frequent customers are the unusual ones here"


# What a bundle may not hold

GOOD = scale_of(3_000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"customers": 2_999}, "one row a customer"),
        ({"confidence": 0.2}, "a confidence"),
        ({"levels": GOOD.levels[:2]}, "the levels MEDIUM, HIGH, CRITICAL"),
        ({"levels": GOOD.levels[::-1]}, "the levels"),
        ({"rows": 250, "customers": 250}, "more rows for a level"),
        ({"levels": (msgspec.structs.replace(GOOD.levels[0], rate=2.0), *GOOD.levels[1:])}, "rates between 0 and 1"),
        ({"levels": (msgspec.structs.replace(GOOD.levels[0], rate=1e-5), *GOOD.levels[1:])}, "rates that fall"),
        ({"levels": (msgspec.structs.replace(GOOD.levels[0], above=1e9), *GOOD.levels[1:])}, "do not fall"),
        ({"levels": (msgspec.structs.replace(GOOD.levels[0], above=None), *GOOD.levels[1:])}, "a rank where"),
        ({"levels": (msgspec.structs.replace(GOOD.levels[0], rank=9_999), *GOOD.levels[1:])}, "within the sample"),
    ],
)
def test_a_scale_that_does_not_hold_together_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError, match=said):
        read_scale(write_scale(msgspec.structs.replace(GOOD, **change)))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"confidence": 0.95}', b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_scale_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"severity\.json cannot be read"):
        read_scale(content)
    assert read_scale(b"null") is None


def test_the_severities_are_in_the_order_of_rarity() -> None:
    assert ("LOW", *LEVELS) == SEVERITIES
