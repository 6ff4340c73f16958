"""Hourly counts from a real decision log, and `fraud monitor drift` on them."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from fraud.cli.monitoring import _holidays, app
from fraud.decisions.record import DecisionRecord
from fraud.errors import DataError, StoreError
from fraud.models.bento_store import BentoStore
from fraud.models.bundle import canonical_json, read_bundle
from fraud.models.scorer import Scorer
from fraud.monitoring.counts import BINS, MISSING, count, keep_counting, layout_of
from fraud.monitoring.hours import HOUR_MS, WEEK
from fraud.pipeline.decide import Pipeline
from fraud.stores.hourly_counts import SqliteHourlyCounts
from fraud.stores.rows import decode_record
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.tiny import START_MS, transactions, with_files
from training.package import _reference

MODEL = "fraud-transaction"
MONDAY_HOUR = START_MS // HOUR_MS + 96
WEEKS = 8


def reference_of(scorer: Scorer, X: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(canonical_json(_reference(scorer.bundle.spec, X, scorer.score(X))))
    return found


@pytest.fixture(scope="module")
def sample(scorer: Scorer, tmp_path_factory: pytest.TempPathFactory) -> list[DecisionRecord]:
    """Records of 400 decisions by a real pipeline."""
    path = tmp_path_factory.mktemp("sample") / "history.db"

    async def score() -> None:
        pipeline = Pipeline({MODEL: scorer}, SqliteStore(path, durable=False))
        await ask(pipeline, transactions(400, 11))
        await pipeline.close()

    asyncio.run(score())
    return [decode_record(entry.logged.record) for entry in SqliteLog(path).rows()]


def at_hours(sample: list[DecisionRecord], hours: range, per_hour: int, seed: int) -> list[DecisionRecord]:
    rng = np.random.default_rng(seed)
    return [
        msgspec.structs.replace(
            sample[int(rng.integers(len(sample)))],
            transaction_id=f"{seed}-{hour}-{i}",
            processing_time_ms=hour * HOUR_MS + int(rng.integers(HOUR_MS)),
        )
        for hour in hours
        for i in range(int(rng.poisson(per_hour)))
    ]


def record(path: Path, records: list[DecisionRecord]) -> None:
    async def write() -> None:
        store = SqliteStore(path, durable=False)
        for start in range(0, len(records), 1000):
            await store.record(records[start : start + 1000], None)
        await store.close()

    asyncio.run(write())


def matrix(records: list[DecisionRecord]) -> np.ndarray:
    return np.frombuffer(b"".join(r.features for r in records), "<f8").reshape(len(records), -1)


def test_counts_are_those_of_a_plain_loop(scorer: Scorer, sample: list[DecisionRecord]) -> None:
    spec, X = scorer.bundle.spec, matrix(sample)
    layout = layout_of(MODEL, spec, reference_of(scorer, X))
    records = at_hours(sample, range(MONDAY_HOUR, MONDAY_HOUR + 3), 200, 1)
    found = count(layout, records)
    plain: Counter[tuple[int, str, int]] = Counter()
    for one, row in zip(records, matrix(records), strict=True):
        hour = one.processing_time_ms // HOUR_MS
        for j, feature in enumerate(spec.features):
            if math.isnan(row[j]):
                place = MISSING
            elif feature.type == "categorical":
                place = layout.categories[j].index(feature.categories[int(row[j])])
            else:
                place = sum(cut <= row[j] for cut in layout.cuts[j])
            plain[hour, feature.name, place] += 1
    assert {hour for hour, _, _ in plain} == found.keys()
    for hour, counts in found.items():
        for j, name in enumerate(layout.names[:-2]):
            assert counts[j].tolist() == [plain[hour, name, place] for place in range(BINS)]
        assert (counts.sum(axis=1) == sum(r.processing_time_ms // HOUR_MS == hour for r in records)).all()


def test_each_decision_is_counted_once_however_often_one_looks(
    scorer: Scorer, sample: list[DecisionRecord], tmp_path: Path
) -> None:
    layout = layout_of(MODEL, scorer.bundle.spec, reference_of(scorer, matrix(sample)))
    path, file = tmp_path / "history.db", tmp_path / "monitoring.db"
    first = at_hours(sample, range(MONDAY_HOUR, MONDAY_HOUR + 4), 50, 2)
    later = at_hours(sample, range(MONDAY_HOUR + 1, MONDAY_HOUR + 3), 50, 3)  # a clock set back
    shape = (len(layout.names), BINS)
    counted = []
    for some in (first, [], later):
        record(path, some)
        store = SqliteHourlyCounts(file, shape)
        counted.append(keep_counting(SqliteLog(path), store, layout, MODEL, lambda digest: True))
        store.close()
    assert counted == [len(first), 0, len(later)]
    store = SqliteHourlyCounts(file, shape)
    whole = count(layout, first + later)
    kept = store.read(layout.key)
    assert kept.keys() == whole.keys()
    assert all((kept[hour] == whole[hour]).all() for hour in whole)
    with pytest.raises(StoreError, match="counted up to row"):
        store.add(layout.key, 0, 5, {})
    store.close()


def test_a_bundle_without_reference_is_refused(scorer: Scorer) -> None:
    with pytest.raises(DataError, match=f"the bundle of {MODEL} has no reference"):
        layout_of(MODEL, scorer.bundle.spec, {})


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "monitoring.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"monitoring\.db cannot be used for hourly counts"):
        SqliteHourlyCounts(tmp_path / "monitoring.db", (2, BINS))


def test_the_command_finds_nulls_within_hours_and_is_quiet_before(
    scorer: Scorer,
    sample: list[DecisionRecord],
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a bundle whose reference is of the recorded traffic; 25% of a feature is missing from an hour on."""
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path))
    bundle = with_files(tiny_bundle, tmp_path / "bundle", reference=reference_of(scorer, matrix(sample)))
    digest = read_bundle(bundle).digest
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    BentoStore(tmp_path / "home").import_bundle(bundle, {})
    usual = [msgspec.structs.replace(r, model_digest=digest) for r in sample]
    broken_hour = MONDAY_HOUR + 6 * WEEK + 50
    records = at_hours(usual, range(MONDAY_HOUR, MONDAY_HOUR + 7 * WEEK), 40, 4)
    rng, names = np.random.default_rng(5), scorer.bundle.spec.names
    for i, one in enumerate(records):
        if one.processing_time_ms // HOUR_MS >= broken_hour and rng.random() < 0.25:
            row = np.frombuffer(one.features, "<f8").copy()
            row[names.index("basket_size")] = np.nan
            records[i] = msgspec.structs.replace(one, features=row.tobytes())
    record(tmp_path / "history.db", records)
    found = {}
    for title, hour in (("before", broken_hour), ("after", broken_hour + 12)):
        as_of = datetime.fromtimestamp(hour * 3600, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        options = ["--as-of", as_of, "--out", str(tmp_path / "drift.json")]
        done = CliRunner().invoke(app, ["drift", str(bundle), *options])
        found[title] = json.loads((tmp_path / "drift.json").read_text())
        assert done.exit_code == (3 if title == "after" else 0), done.output
        assert "no promise is made yet" in done.output
    assert found["before"]["events"] == []
    (event,) = found["after"]["events"]
    assert event["channels"][0] == "basket_size: missing"
    late = (datetime.fromisoformat(event["first"]).timestamp() - broken_hour * 3600) / 3600
    assert late <= 6


def test_too_little_is_told(
    sample: list[DecisionRecord], scorer: Scorer, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path))
    bundle = with_files(tiny_bundle, tmp_path / "bundle", reference=reference_of(scorer, matrix(sample)))
    record(tmp_path / "history.db", sample[:10])
    done = CliRunner().invoke(app, ["drift", str(bundle)])
    assert isinstance(done.exception, DataError)
    assert "at least 5 are needed" in done.exception.message
    days = tmp_path / "days.txt"
    days.write_text("2026-12-25  # Christmas\n25.12.2026\n")
    with pytest.raises(DataError, match=r"days\.txt:2: '25\.12\.2026' is no day"):
        _holidays(days)


def test_a_trained_bundle_has_the_reference_that_counting_needs(transaction_bundle: Path) -> None:
    bundle = read_bundle(transaction_bundle)
    layout = layout_of(bundle.manifest.name, bundle.spec, bundle.reference)
    assert layout.names == [*bundle.spec.names, "(score)", "(decision)"]
    rng = np.random.default_rng(1)
    rows = [msgspec.json.decode(golden.instance) for golden in bundle.golden]
    X = np.array([[np.nan if v is None else v for v in golden.features] for golden in bundle.golden])
    records = [
        DecisionRecord(
            f"t{i}", b"", bundle.manifest.name, bundle.digest, X[i % len(rows)].astype("<f8").tobytes(), 0.0,
            0.5, False, "low", "approve", [], 0, int(rng.integers(HOUR_MS)), "r",
        )
        for i in range(500)
    ]  # fmt: skip
    (found,) = count(layout, records).values()
    assert (found.sum(axis=1) == 500).all()
