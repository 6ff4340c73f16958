"""What fails after the work fails before it: each mistake is told before anything is replayed, with the next step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from fraud.cli.main import main
from fraud.errors import DataError
from tests.conftest import EXAMPLES, TINY
from training import preflight
from training.config import Config
from training.data import Mapping, load_table
from training.preflight import check_folder
from training.train import Run, train

MAPPING: dict[str, Any] = yaml.safe_load((EXAMPLES / "simulated.yaml").read_text())


@pytest.fixture(scope="module")
def table(simulated: Path) -> pd.DataFrame:
    """The file as it is, in the order of arrival."""
    return pd.read_parquet(simulated).sort_values("arrival_time", kind="stable", ignore_index=True)


def refused(table: pd.DataFrame, tmp_path: Path, config: Config = TINY, **mapping: Any) -> str:
    """Return how a training of this table is refused, which must be before its replay and before any boosting."""
    stages: list[str] = []
    with pytest.raises(DataError) as error:
        trained(table, tmp_path, config, stages, **mapping)
    assert stages == []
    return error.value.message


def trained(table: pd.DataFrame, tmp_path: Path, config: Config, stages: list[str], **mapping: Any) -> Run:
    path = tmp_path / "t.parquet"
    table.to_parquet(path)
    mapped = Mapping.model_validate({**MAPPING, **mapping})
    dataset = {"name": path.name, "digest": "sha256:0"}

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    loaded = load_table(path, mapped)
    return train(loaded, mapped, config, name="fraud-t", dataset=dataset, runs=tmp_path / "runs", progress=progress)


def without_frauds(table: pd.DataFrame, begin: float, end: float) -> pd.DataFrame:
    here = (table.index >= begin * len(table)) & (table.index < end * len(table))
    return table.assign(
        is_fraud=table["is_fraud"].where(~here, 0).astype("int8"), label_time=table["label_time"].where(~here)
    )


@pytest.mark.parametrize(
    ("begin", "end", "window", "step"),
    [
        (0.78, 1.0, "test", "raise test_share, or test on later days that have labels (now 0.2)"),
        (0.5, 0.82, "calibration", "raise calibration_share (now 0.12)"),
        (0.0, 0.5, "train", "give more data, or lower validation_share, calibration_share or test_share"),
    ],
)
def test_a_window_without_a_fraud_is_told_with_its_dates_and_the_option(
    table: pd.DataFrame, tmp_path: Path, begin: float, end: float, window: str, step: str
) -> None:
    said = refused(without_frauds(table, begin, end), tmp_path)
    (line,) = (line for line in said.splitlines() if line.startswith(f"the {window} window"))
    time = r"2025-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.search(rf"{time} to {time} \([\d,]+ rows\), has no fraud that is ", line)
    assert re.search(rf"the file has [\d,]+ from {time} to {time}; ", line)
    assert line.endswith(step)


def test_features_without_times_name_their_rows(simulated_features: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(simulated_features)
    table["is_fraud"] = np.where(np.arange(len(table)) < 3000, table["is_fraud"], 0)
    mapping = yaml.safe_load((EXAMPLES / "features.yaml").read_text())
    for role in ("event_time", "label_time", "label_delay"):
        del mapping[role]
    path = tmp_path / "loans.parquet"
    table.to_parquet(path)
    mapped = Mapping.model_validate(mapping)
    with pytest.raises(DataError, match=r"the test window, rows 3,201 to 4,000 of the file, has no fraud"):
        train(load_table(path, mapped), mapped, TINY, name="a", dataset={}, runs=tmp_path / "runs")


def test_a_category_for_each_row_can_have_no_golden_row(table: pd.DataFrame, tmp_path: Path) -> None:
    every = table.assign(ip=[f"10.0.{i // 256}.{i % 256}" for i in range(len(table))])
    said = refused(every, tmp_path, categorical={"ip": {"unknown": "refuse"}})
    assert "no row of the test window has only categories that the train window knows" in said
    assert f"categorical 'ip' has {len(table):,} different values, of which 200 are learnt" in said
    assert "leave it out, or read what is unknown as missing: ip: {unknown: missing, missing: allowed}" in said


def test_an_iso_week_can_have_no_golden_row(table: pd.DataFrame, tmp_path: Path) -> None:
    weekly = table.assign(week=pd.to_datetime(table["event_time"]).dt.strftime("%G-W%V"))
    said = refused(weekly, tmp_path, categorical={"week": {"unknown": "refuse"}})
    assert "and 100.0% of the test rows have one that is not" in said


def test_a_column_first_filled_in_the_last_third_is_told(table: pd.DataFrame, tmp_path: Path) -> None:
    late = table.assign(late=pd.Series("a", table.index).where(table.index > len(table) * 2 / 3))
    said = refused(late, tmp_path, categorical={"late": {"missing": "allowed"}})
    assert "categorical 'late' is empty in the whole train window, 2025-" in said


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_a_name_that_no_request_can_carry_is_told(table: pd.DataFrame, tmp_path: Path, name: str) -> None:
    said = refused(table.assign(**{name: 1.0}), tmp_path, numeric=[name])
    assert f"give it another in the mapping, such as my_feature: {{column: {name!r}}}" in said


def test_odd_and_empty_columns_names_and_one_customer_train(table: pd.DataFrame, tmp_path: Path) -> None:
    """A constant, an empty column, signs of LaTeX in a name, one customer alone: useless, and no error."""
    odd = table.assign(customer_id="me", same=1.0, none=np.nan, word="x", **{"c$d_e^{f}%": table["amount"]})
    run = trained(
        odd,
        tmp_path,
        TINY.model_copy(update={"rounds": 3}),
        [],
        numeric={"same": {}, "none": {"missing": "allowed"}, "c$d_e^{f}%": {}},
        categorical=["word"],
    )
    assert (run.folder / "report.html").is_file()


def test_a_share_of_rows_that_the_service_would_refuse_is_warned_of(table: pd.DataFrame, tmp_path: Path) -> None:
    late = table.index > len(table) * 0.9
    odd = table.assign(kind=np.where(late & (table.index % 2 == 0), "new", "old"))
    run = trained(odd, tmp_path, TINY.model_copy(update={"rounds": 3}), [], categorical={"kind": {"unknown": "refuse"}})
    (warning,) = run.warnings
    assert re.match(
        r"The service would refuse 2\d\.\d% of the test window: categorical 'kind' has 2 different", warning
    )


def test_a_folder_is_checked_for_access_and_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        check_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        check_folder(tmp_path / "file" / "runs")
    monkeypatch.setattr(preflight, "FOLDER_BYTES", 2**62)
    with pytest.raises(OSError, match="MiB are free"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "--name", "Fraud Model"), "error: model name 'Fraud Model': allowed are at most 50"),
        (("train", "--runs", "/dev/null/runs"), "error: /dev/null/runs: Not a directory"),
        (("train", "--seed", "-1"), "error: options: seed: Input should be greater than or equal to 0"),
        (("train", "--search", "1000"), "error: options: search_trials: Input should be less than or equal to 200"),
        (("score", "--model", "nobody", "--out", "scores.txt"), "error: scores.txt: scores are written as .parquet or"),
        (
            (
                *("backtest", "--out", "scores.txt", "--train-until", "2025-03-01"),
                *("--test-from", "2025-03-01", "--test-until", "2025-03-02"),
            ),
            "error: scores.txt: scores are written as .parquet or .csv",
        ),
        (
            (
                *("backtest", "--out", "scores.csv", "--train-until", "nat"),
                *("--test-from", "2025-03-01", "--test-until", "2025-03-02"),
            ),
            "error: 'nat' is no moment",
        ),
    ],
)
def test_a_mistake_is_told_before_the_file_is_read(
    command: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    given = ["--data", "none.parquet", "--mapping", str(EXAMPLES / "simulated.yaml")]
    with pytest.raises(SystemExit) as ended:
        main([*command, *given])
    assert ended.value.code == 1
    assert said in capsys.readouterr().err


def test_yaml_words_are_no_numbers_of_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rounds: 5\ncosts: {review: no}\n")
    with pytest.raises(DataError, match=r"costs\.review is False, as YAML reads a bare yes, no, on or off"):
        Config.from_yaml(path)
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match=r"config\.yaml: "):
        Config.from_yaml(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        Config.from_yaml(path)
