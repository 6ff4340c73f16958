"""Windows, labels as they were known, replay against the service's rows, and a training from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import average_precision_score

from fraud.errors import BundleError, DataError, InvalidRequest
from fraud.features.featurizer import Featurizer, Histories
from fraud.models.bundle import read_bundle
from fraud.models.scorer import Scorer
from fraud.schema import RowDecoder
from tests.conftest import EXAMPLES, TINY
from training.backtest import backtest
from training.calibrate import fit_calibrator
from training.config import Config
from training.data import Mapping, load_features, load_transactions
from training.fit import Fitted, fit_booster
from training.prepare import prepare_features
from training.replay import instances_of, replay, transaction_spec
from training.splits import MS_PER_DAY, known_labels, split_by_order, split_by_time
from training.train import Run, train

MAPPING = Mapping.from_yaml(EXAMPLES / "simulated.yaml")


@pytest.fixture(scope="module")
def table(simulated: Path) -> pd.DataFrame:
    return load_transactions(simulated, MAPPING)


def test_windows_follow_each_other_apart_by_the_gap_and_end_before_labels_are_missing() -> None:
    times = np.arange(0, 200 * MS_PER_DAY, 3_600_000)
    as_of, delay = 160 * MS_PER_DAY, 5 * MS_PER_DAY
    windows = split_by_time(times, delay, as_of, (as_of, 200 * MS_PER_DAY), (0.1, 0.1))
    in_order = [windows.train, windows.validation, windows.calibration]
    for before, after in pairwise(in_order):
        assert times[after.start] - times[before.stop - 1] >= delay
    assert times[windows.calibration.stop - 1] < as_of - delay <= times[windows.calibration.stop]
    assert times[windows.test.start] >= as_of
    assert windows.test.stop == len(times)
    assert windows.refit == slice(windows.train.start, windows.validation.stop)


@pytest.mark.parametrize(
    ("days", "test", "said"),
    [
        (
            18,
            (17, 18),
            "10.0 days with known labels lie before 1970-01-18T00:00:00Z; at least 14 are needed; "
            "give more data, a later moment or a shorter label delay",
        ),
        (
            100,
            (200, 210),
            "the test window holds no transaction; the data goes from 1970-01-01T00:00:00Z to 1970-04-10T23:00:00Z",
        ),
    ],
)
def test_too_little_data_is_said_with_figures(days: int, test: tuple[int, int], said: str) -> None:
    times = np.arange(0, days * MS_PER_DAY, 3_600_000)
    begin, end = (moment * MS_PER_DAY for moment in test)
    with pytest.raises(DataError) as refused:
        split_by_time(
            times, 7 * MS_PER_DAY, min(begin, int(times[-1])) if days > 50 else begin, (begin, end), (0.1, 0.1)
        )
    assert refused.value.message == said


def test_rows_without_times_are_split_in_their_order() -> None:
    windows = split_by_order(1000, (0.1, 0.2, 0.3))
    assert windows.train == slice(0, 400)
    assert windows.test == slice(700, 1000)
    with pytest.raises(DataError, match="3 rows are too few"):
        split_by_order(3, (0.1, 0.2, 0.3))


def test_a_label_counts_only_from_when_it_was_known() -> None:
    label = np.array([1, 1, 0, 0, -1], np.int8)
    event = np.array([0, 0, 0, 90, 0])
    known_at = np.array([50, 150, 20, 110, 20])
    assert known_labels(label, event, known_at, 20, as_of=100).tolist() == [1, 0, 0, -1, -1]


def test_replay_is_what_the_featurizer_gives_one_row_at_a_time(table: pd.DataFrame) -> None:
    some = table.iloc[:1500].assign(label=np.int8(0))  # no labels: the featurizer is told of none here
    spec = transaction_spec(table, MAPPING, slice(0, 1500))
    featurizer = Featurizer(spec, np.quantile(table["amount"], np.linspace(0, 0.99, 100)).tolist())
    offline = replay(some, featurizer, slice(500, 1500))
    decoder = RowDecoder(spec)
    rows = [decoder.decode(raw, "$") for raw in instances_of(some, spec)]
    histories = Histories.new(rows)
    online = np.concatenate([featurizer.advance([row], histories) for row in rows])
    np.testing.assert_array_equal(offline, online[500:])


COUNTED = """
event_time: {column: at, unit: ms}
transaction_id: id
customer_id: card
merchant_id: shop
amount: paid
category: mcc
channel: entry
device_id: device
label: fraud
label_delay: 7d
boolean: [contactless]
numeric: [age, tries]
categorical: [region]
"""
"""Of a table of numbers alone: ids, codes and flags are integers or floats."""


ROLE_OF = {
    "at": "event_time",
    "id": "transaction_id",
    "card": "customer_id",
    "shop": "merchant_id",
    "paid": "amount",
    "mcc": "category",
    "entry": "channel",
    "device": "device_id",
}


def table_of_numbers(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "at": 1_767_225_600_000 + np.cumsum(rng.integers(1, 200_000, n)),
            "id": np.arange(n) + 7_000_000,
            "card": 4_532_021_234_567_000 + rng.integers(0, 30, n),
            "shop": rng.integers(0, 20, n).astype(float),
            "paid": rng.integers(1, 500, n),
            "mcc": rng.choice([5411, 5812, 4111], n),
            "entry": rng.choice([1.0, 2.0], n),
            "device": rng.integers(0, 40, n),
            "fraud": (rng.random(n) < 0.1).astype(int),
            "contactless": rng.integers(0, 2, n),
            "age": rng.integers(18, 90, n),
            "tries": rng.random(n) < 0.3,
            "region": rng.integers(1, 6, n).astype(float),
        }
    )


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_row_of_the_table_in_its_own_values_is_the_row_that_was_trained(tmp_path: Path, kind: str) -> None:
    (tmp_path / "numbers.yaml").write_text(COUNTED)
    mapping = Mapping.from_yaml(tmp_path / "numbers.yaml")
    raw = table_of_numbers(400, 3)
    if kind == "csv":
        raw["tries"] = raw["tries"].astype(int)  # a column of True and False is text there
    path = tmp_path / f"numbers.{kind}"
    raw.to_parquet(path) if kind == "parquet" else raw.to_csv(path, index=False)
    table = load_transactions(path, mapping).assign(label=np.int8(0))
    spec = transaction_spec(table, mapping, slice(0, 300))
    featurizer = Featurizer(spec, np.quantile(table["amount"], np.linspace(0, 0.99, 100)).tolist())
    offline = replay(table, featurizer, slice(0, 400))

    role_of = {column: column for column in raw.columns} | ROLE_OF
    decoder, online = RowDecoder(spec), []
    for record in json.loads(raw.drop(columns="fraud").to_json(orient="records")):
        instance = {role_of[column]: value for column, value in record.items()}
        at = datetime.fromtimestamp(instance["event_time"] / 1000, UTC)
        instance["event_time"] = at.isoformat(timespec="milliseconds")
        online.append(decoder.decode(json.dumps(instance).encode(), "$"))
    histories = Histories.new(online)
    np.testing.assert_array_equal(offline, np.concatenate([featurizer.advance([row], histories) for row in online]))


def test_a_request_may_lack_what_strict_does_not_name(tmp_path: Path) -> None:
    def decoder_of(strict: str) -> RowDecoder:
        (tmp_path / "numbers.yaml").write_text(COUNTED + strict)
        mapping = Mapping.from_yaml(tmp_path / "numbers.yaml")
        table_of_numbers(200, 1).to_parquet(tmp_path / "numbers.parquet")
        return RowDecoder(
            transaction_spec(load_transactions(tmp_path / "numbers.parquet", mapping), mapping, slice(200))
        )

    least = {
        "transaction_id": "t",
        "event_time": "2026-01-31T12:30Z",
        "customer_id": 1,
        "amount": 3,
        "contactless": 1,
        "age": 40,
        "tries": 2,
        "region": 9,
    }
    lenient = decoder_of("")
    row = lenient.decode(json.dumps(least).encode(), "$")
    assert row.roles == {"merchant_id": None, "category": None, "channel": None, "device_id": None}
    new = lenient.decode(json.dumps(least | {"category": "crypto"}).encode(), "$")
    assert new.roles["category"] == "crypto"
    assert np.isnan(new.values[0])
    with pytest.raises(InvalidRequest, match=r"^missing merchant_id, category, channel, device_id$"):
        decoder_of("strict: true").decode(json.dumps(least).encode(), "$")
    strict = decoder_of("strict: [category]")
    with pytest.raises(InvalidRequest, match=r"^missing category$"):
        strict.decode(json.dumps(least).encode(), "$")
    with pytest.raises(InvalidRequest, match=r"^unknown category 'crypto'; allowed: 4111, 5411, 5812$"):
        strict.decode(json.dumps(least | {"category": "crypto"}).encode(), "$")


def test_the_same_data_seed_and_configuration_give_the_same_bundle(
    table: pd.DataFrame, transaction_run: Run, tmp_path: Path
) -> None:
    dataset = {
        "name": "transactions.parquet",
        "digest": json.loads((transaction_run.folder / "run.json").read_text())["dataset"]["digest"],
    }
    again = train(table, MAPPING, TINY, name="fraud-transaction", dataset=dataset, runs=tmp_path)
    assert again.digest == transaction_run.digest


def test_a_run_folder_holds_all_that_a_person_and_wandb_read(transaction_run: Run) -> None:
    folder = transaction_run.folder
    run = json.loads((folder / "run.json").read_text())
    assert run["bundle_digest"] == transaction_run.digest
    assert set(run["metrics"]["average_precision"]) == {"value", "low", "high"}
    assert "<html" in (folder / "report.html").read_text()
    assert {p.stem for p in (folder / "plots").iterdir()} >= {
        "roc",
        "precision_recall",
        "calibration",
        "shap_summary",
        "shap_waterfall",
    }
    assert list((folder / "tables").glob("*.csv"))


@pytest.mark.parametrize("kind", ["transaction", "features"])
def test_a_trained_bundle_passes_its_golden_rows(kind: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(f"{kind}_run")
    scorer = Scorer.load(run.folder / "bundle")
    assert scorer.spec.kind == kind
    assert len(scorer.bundle.golden) >= 32
    margins = [golden.raw_margin for golden in scorer.bundle.golden]
    assert max(margins) - min(margins) > 1.0


def test_history_beats_the_fields_of_the_request_alone(transaction_run: Run) -> None:
    assert transaction_run.metrics["average_precision"].value > transaction_run.baseline["average_precision"].high


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("booster.txt", b" ", "is changed or truncated"),
        ("golden.jsonl", b"", "is changed or truncated"),
        ("manifest.json", b"{", "cannot be read"),
    ],
)
def test_a_changed_byte_is_refused(bundle_dir: Path, tmp_path: Path, file: str, damage: bytes, said: str) -> None:
    for path in bundle_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-1] + damage)
    with pytest.raises(BundleError, match=said):
        read_bundle(tmp_path)


def test_a_foreign_file_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    for path in bundle_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(BundleError, match=r"files that are not in its manifest: model\.pkl"):
        read_bundle(tmp_path)


def test_a_backtest_knows_nothing_of_the_future(table: pd.DataFrame) -> None:
    """Whatever happens after the test days, and labels that come after training, change no score."""
    start = int(table["event_time_ms"].iloc[0])
    until, end = start + 60 * MS_PER_DAY, start + 70 * MS_PER_DAY
    scores, _ = backtest(table, MAPPING, TINY, train_until=until, test=(until, end))
    cut = table[table["processing_time_ms"] < end].copy()
    late = (cut["label"] == 1) & (cut["label_time_ms"] >= end)
    assert late.any()
    cut.loc[late, "label"] = 0  # frauds that nobody had reported by the end of the test days
    same, _ = backtest(cut, MAPPING, TINY, train_until=until, test=(until, end), label_delay_ms=7 * MS_PER_DAY)
    pd.testing.assert_series_equal(scores["raw_margin"], same["raw_margin"], check_exact=True)
    assert list(scores.columns) == [
        "transaction_id", "event_time", "customer_id", "label", "raw_margin", "fraud_probability",
    ]  # fmt: skip
    assert (
        scores["event_time"]
        .between(pd.Timestamp(until, unit="ms", tz="UTC"), pd.Timestamp(end, unit="ms", tz="UTC"))
        .mean()
        > 0.98
    )
    assert scores["fraud_probability"].between(0, 1).all()
    assert scores["fraud_probability"].nunique() == scores["raw_margin"].nunique() > 100
    ranks = scores[["fraud_probability", "raw_margin"]].rank()
    assert (ranks["fraud_probability"] == ranks["raw_margin"]).all()


def test_calibration_needs_both_labels() -> None:
    with pytest.raises(DataError, match="needs frauds and legitimate transactions"):
        fit_calibrator(np.arange(4.0), np.zeros(4, np.int8))


def window_of(n: int, n_frauds: int) -> tuple[NDArray[np.float64], NDArray[np.int8]]:
    """Margins and labels of a window."""
    y = np.zeros(n, np.int8)
    y[:n_frauds] = 1
    return np.random.default_rng(n_frauds).normal(-6.0, 1.5, n) + 3.0 * y, y


@pytest.mark.parametrize("n_frauds", [1, 40, 2_000])
def test_the_calibrator_ranks_as_margins_do(n_frauds: int) -> None:
    margin, y = window_of(20_000, n_frauds)
    knots = fit_calibrator(margin, y)
    beyond = np.linspace(margin.min() - 5, margin.max() + 5, 1001)
    asked = np.unique(np.concatenate([margin, beyond]))
    assert (np.diff(np.interp(asked, knots.x, knots.y)) > 0).all()
    assert average_precision_score(y, np.interp(margin, knots.x, knots.y)) == average_precision_score(y, margin)
    assert 0 < min(knots.y) < max(knots.y) < 1


@pytest.mark.parametrize("n_frauds", [1, 40, 2_000])
def test_the_calibrator_is_scikit_learns_within_two_percent(n_frauds: int) -> None:
    margin, y = window_of(20_000, n_frauds)
    knots = fit_calibrator(margin, y)
    oracle = IsotonicRegression(y_min=1 / 20_002, y_max=1 - 1 / 20_002, out_of_bounds="clip").fit(margin, y)
    asked = np.linspace(margin.min(), margin.max(), 1001)
    odds = [p / (1 - p) for p in (np.interp(asked, knots.x, knots.y), oracle.predict(asked))]
    np.testing.assert_allclose(odds[0], odds[1], rtol=0.021)


@pytest.mark.parametrize(
    ("margin", "y"),
    [
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0]),
        ([1.0, 2.0, 3.0, 4.0], [1, 1, 0, 0]),
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1]),
        ([1.0, np.nextafter(1.0, 2.0)], [0, 1]),
        ([-1e6, 1e6, 2e6], [0, 1, 1]),
    ],
    ids=["one margin", "the wrong order", "separable", "neighbours", "far apart"],
)
def test_calibration_of_hard_windows_rises_strictly(margin: list[float], y: list[int]) -> None:
    x, probability = fit_calibrator(np.array(margin), np.array(y, np.int8)).knots()
    assert len(x) >= 3
    assert (np.diff(probability) > 0).all()


def test_the_boosters_of_several_seeds_are_averaged_into_one(simulated_features: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "features.yaml")
    prepared = prepare_features(load_features(simulated_features, mapping), mapping, TINY)

    def fitted(**changed: int) -> Fitted:
        config = TINY.model_copy(update={"rounds": 1} | changed)  # each stops early after as many trees
        return fit_booster(prepared.X, prepared.y, prepared.windows, prepared.spec, config)

    def margins(of: Fitted) -> NDArray[np.float64]:
        return np.asarray(lgb.Booster(model_str=of.text).predict(prepared.X, raw_score=True))

    whole = fitted(seeds=3)
    refits = [fitted(seed=TINY.seed + i) for i in range(3)]
    assert whole.n_trees == 3
    assert all((margins(a) != margins(b)).any() for a, b in pairwise(refits))
    np.testing.assert_allclose(margins(whole), np.mean([margins(one) for one in refits], axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(whole.gain(), np.sum([one.gain() for one in refits], axis=0))


def test_a_search_tries_as_often_as_it_may(simulated_features: Path) -> None:
    mapping = Mapping.from_yaml(EXAMPLES / "features.yaml")
    config = TINY.model_copy(update={"search_trials": 2, "rounds": 8})
    prepared = prepare_features(load_features(simulated_features, mapping), mapping, config)
    fitted = fit_booster(prepared.X, prepared.y, prepared.windows, prepared.spec, config)
    assert len(fitted.trials) == 2
    best = max(fitted.trials, key=lambda trial: trial["average_precision"])
    assert fitted.parameters.num_leaves == best["num_leaves"]
    assert (
        fit_booster(prepared.X, prepared.y, prepared.windows, prepared.spec, config.model_copy(update={"seed": 9})).text
        != fitted.text
    )


def test_a_configuration_names_its_wrong_keys(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rounds: 0\nbooster: {leaves: 3}\n")
    with pytest.raises(DataError) as refused:
        Config.from_yaml(path)
    assert "config.yaml: rounds: Input should be greater than or equal to 1" in refused.value.message
    assert "config.yaml: booster.leaves: Extra inputs are not permitted" in refused.value.message


def test_the_command_trains_with_threads_that_do_not_spin() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    loaded = subprocess.run(
        [sys.executable, "-c", "import fraud.cli.main, training.fit"],
        env=environment | {"OMP_DISPLAY_ENV": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in loaded.stderr


FIT = """
import hashlib, numpy as np
from fraud.schema import Feature, FeatureSpec
from training.config import Config
from training.fit import fit_booster
from training.splits import split_by_order
X = np.random.default_rng(1).normal(size=(2000, 3))
y = (X[:, 0] + X[:, 1] > 1.5).astype(np.int8)
spec = FeatureSpec("features", tuple(Feature(name, "request") for name in "abc"))
fitted = fit_booster(X, y, split_by_order(2000, (0.2, 0.2, 0.2)), spec, Config(rounds=5))
print(hashlib.sha256(fitted.text.encode()).hexdigest())
"""


def test_the_number_of_threads_changes_no_model_and_may_be_a_list() -> None:
    """OpenMP takes one number for each level of nesting, such as 4,2; a number that is none is as good as not set."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", FIT],
            env=os.environ | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "4,2", "all")
    }
    assert len(digests) == 1
