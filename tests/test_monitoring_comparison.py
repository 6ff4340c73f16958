"""`fraud compare`: how often it is wrong about equals, what it finds, and that late labels change no past evidence."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from fraud.checks.comparison import compare_versions
from fraud.cli.commands import app
from fraud.decisions.labels import Label
from fraud.errors import DataError
from fraud.models.bundle import read_bundle
from fraud.models.scorer import Scorer
from fraud.monitoring.comparison import Comparison, Units, cap_of, compare, units_of
from fraud.monitoring.measures import DAY_MS
from fraud.monitoring.performance import MONDAY_MS, WEEK_MS
from fraud.pipeline.decide import Pipeline
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.tiny import START_MS, rfc3339, transactions, with_files

MONDAY = START_MS + 4 * DAY_MS
COSTS = {"review": 4.0, "review_recall": 0.95, "false_decline_rate": 0.15, "chargeback_fee": 20.0}


def drawn(rng: np.random.Generator, weeks: int, a_week: int, gain: float) -> Units:
    """Customers' weeks on whose fraud two models disagree; amounts are skewed; a gain of 0 is no difference."""
    n = weeks * a_week
    amount = rng.lognormal(5, 1.3, n) * rng.geometric(1 / 3, n)
    wins = rng.random(n) < 0.5 + gain / 2
    return Units(np.repeat(np.arange(weeks), a_week), amount * np.where(wins, 1.0, -1.0))


def test_equal_challengers_are_called_better_in_at_most_one_of_twenty() -> None:
    wrong = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        wrong += compare(drawn(rng, 17, 42, 0.0), 6400.0).verdict == "better"
    assert binomtest(wrong, 1000).proportion_ci(0.95).low <= 0.05
    assert wrong <= 50


def test_a_better_and_a_worse_challenger_are_found() -> None:
    for gain, verdict in ((0.3, "better"), (-0.3, "worse")):
        found = [compare(drawn(np.random.default_rng(s), 17, 42, gain), 6400.0) for s in range(40)]
        assert sum(one.verdict == verdict for one in found) >= 35
        assert all(one.since is not None for one in found if one.verdict == verdict)


def test_the_evidence_is_reproduced_by_hand() -> None:
    saved = np.array([10.0, -5.0, 40.0, 0.0])
    found = compare(Units(np.array([0, 0, 1, 1]), saved), 20.0)
    z = np.array([0.5, -0.25, 1.0, 0.0])
    stakes = (0.05, 0.1, 0.2, 0.4, 0.8)
    assert found.looks[0].better == pytest.approx(np.mean([np.prod(1 + f * z[:2]) for f in stakes]))
    assert found.looks[1].better == pytest.approx(np.mean([np.prod(1 + f * z) for f in stakes]))
    assert found.looks[1].worse == pytest.approx(np.mean([np.prod(1 - f * z) for f in stakes]))
    assert (found.units, found.differing, found.saved, found.saved_capped) == (4, 3, 45.0, 25.0)
    assert [look.units for look in found.looks] == [2, 4]


def test_a_customers_transactions_of_a_week_are_one_unit() -> None:
    time = MONDAY_MS + np.array([0, 1, WEEK_MS, 2])
    units = units_of(np.array([7, 7, 7, 3]), time, np.array([1.0, 2.0, 4.0, 8.0]))
    assert units.week.tolist() == [0, 0, 1]
    assert units.saved.tolist() == [8.0, 3.0, 4.0]


def test_a_cap_needs_enough_frauds_and_is_positive() -> None:
    with pytest.raises(DataError, match="2 customers' weeks with fraud lie before the comparison; 100 are needed"):
        cap_of(np.array([1, 2]), np.array([0, 0]), np.array([5.0, 6.0]))
    assert cap_of(np.arange(200), np.zeros(200, np.int64), np.arange(1.0, 201.0)) == pytest.approx(198.01)
    with pytest.raises(DataError, match="the cap is 0"):
        compare(Units(np.array([0]), np.array([1.0])), 0.0)


@pytest.fixture(scope="module")
def priced(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny model with costs, and the same model with a policy that approves nearly everything."""
    folder = tmp_path_factory.mktemp("priced")
    policy = json.loads((tiny_bundle / "policy.json").read_bytes())
    lenient = policy | {"review_threshold": 0.97, "decline_threshold": 0.98}
    lenient["risk_levels"] = {"medium": 0.5, "high": 0.97, "critical": 0.98}
    return tuple(  # type: ignore[return-value]
        with_files(tiny_bundle, folder / name, policy=some | {"costs": COSTS})
        for name, some in (("champion", policy), ("challenger", lenient))
    )


@pytest.fixture
def recorded(priced: tuple[Path, Path], tmp_path: Path) -> Path:
    """1,500 decisions of the champion over five weeks; every one above a score of 0.5 is labelled fraud, no other."""
    champion = Scorer.of(read_bundle(priced[0]))

    async def score() -> None:
        store = SqliteStore(tmp_path / "history.db", durable=False)
        pipeline = Pipeline({champion.name.name: champion}, store)
        instances = transactions(1500, 8, customers=300)
        for i, instance in enumerate(instances):
            instance["event_time"] = rfc3339(MONDAY + i * 2_000_000)
        rows = []
        for start in range(0, len(instances), 300):
            rows += await ask(pipeline, instances[start : start + 300])
        labels = [
            Label(instance["transaction_id"], row["fraud_probability"] > 0.5, MONDAY + 40 * DAY_MS, 1)
            for instance, row in zip(instances, rows, strict=True)
        ]
        await store.apply_labels(labels)
        await pipeline.close()

    asyncio.run(score())
    return tmp_path


def test_a_version_that_lets_fraud_through_is_worse_and_late_labels_change_no_past(
    recorded: Path, priced: tuple[Path, Path]
) -> None:
    champion, challenger = (Scorer.of(read_bundle(path)) for path in priced)

    def compared(a: Scorer, b: Scorer, as_of_ms: int = MONDAY + 400 * DAY_MS) -> Comparison:
        return compare_versions(
            SqliteLog(recorded / "history.db"),
            a,
            b,
            since_ms=MONDAY,
            as_of_ms=as_of_ms,
            settled_after_ms=45 * DAY_MS,
            cap=100.0,
        )

    found = compared(champion, challenger)
    assert found.verdict == "worse"
    assert found.saved < 0
    same = compared(champion, champion)
    assert (same.verdict, same.differing, same.saved) == ("open", 0, 0.0)
    early = compared(champion, challenger, MONDAY + (2 * 7 + 45) * DAY_MS)
    assert early.looks == found.looks[:2]

    async def relabel() -> None:
        store = SqliteStore(recorded / "history.db", durable=False)
        keys = [key for _, key in SqliteLog(recorded / "history.db").rows()]
        late = MONDAY + 300 * DAY_MS
        await store.apply_labels([Label(key, False, late, late) for key in keys])
        await store.close()

    asyncio.run(relabel())
    assert msgspec.json.encode(compared(champion, challenger)) == msgspec.json.encode(found)


def test_the_command(recorded: Path, priced: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(recorded))
    champion, challenger = map(str, priced)
    run = CliRunner().invoke
    options = ["--since", "2026-01-05", "--cap", "100", "--settled-after", "45", "--as-of", "2026-12-01"]
    file = recorded / "compared.json"
    done = run(app, ["compare", champion, challenger, *options, "--out", str(file)])
    assert done.exit_code == 4, done.output
    assert "verdict: worse since the week of" in done.output
    assert json.loads(file.read_bytes())["verdict"] == "worse"
    assert run(app, ["compare", champion, champion, *options]).exit_code == 3
    refused = run(app, ["compare", champion, challenger, "--since", "2026-11-01", "--cap", "100"])
    assert "begin earlier with --since, or wait" in str(refused.exception)
    refused = run(app, ["compare", champion, challenger, "--since", "2026-01-05"])
    assert "100 are needed to set the cap" in str(refused.exception)


def test_versions_without_costs_are_refused(
    recorded: Path, priced: tuple[Path, Path], tiny_bundle: Path, scorer: Scorer
) -> None:
    log, champion = SqliteLog(recorded / "history.db"), Scorer.of(read_bundle(priced[0]))
    when = {"since_ms": 0, "as_of_ms": 2**60, "settled_after_ms": DAY_MS}
    with pytest.raises(DataError, match="has no costs"):
        compare_versions(log, scorer, champion, **when)
