"""From a trained model to its service under whatever name it has; and what a model may be called."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest

from fraud.cli.main import main
from fraud.errors import RegistryError
from fraud.models.names import BadName, checked_name, checked_tag
from fraud.models.registry import Registry
from fraud.models.served import Served
from fraud.settings import ModelSettings
from tests.servers import bentoml_serve
from tests.wandb_runs import golden, make_run

NAME = "loan-applications"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a model, a W&B key or a choice of models."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("FRAUD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("FRAUD_MODEL", raising=False)
    return tmp_path / "bentoml"


def promoted(name: str, folder: Path, seed: int = 1) -> Path:
    run = make_run(folder, seed, name=name)
    main_ends(["import", str(run)])
    main_ends(["promote", f"{name}:candidate", "--why", "the first model"])
    return run


def main_ends(arguments: list[str], code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code


def test_a_features_model_is_imported_promoted_and_served_under_its_own_name(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What docs and README say, word by word: import, promote, bentoml serve, fraud try."""
    run = promoted(NAME, tmp_path / "runs")
    rows = [row["instance"] for row in golden(run / "bundle")[:2]]
    main_ends(["models", "--production"])
    assert f"{NAME}:v0" in capfd.readouterr().out
    with bentoml_serve(dict(os.environ), tmp_path / "log") as url:
        body = json.dumps({"instances": rows}).encode()
        request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            predictions = json.loads(answer.read())["predictions"]
        main_ends(["try", "--url", url])
    assert [prediction["model"]["name"] for prediction in predictions] == [NAME, NAME]
    assert NAME in capfd.readouterr().out


def test_where_several_are_in_production_it_says_how_to_choose(home: Path, tmp_path: Path) -> None:
    promoted(NAME, tmp_path / "runs")
    running = Served(ModelSettings.read())
    assert list(running.names) == [NAME]
    promoted("fraud-features", tmp_path / "more", seed=2)
    said = f"2 models could be served: fraud-features, {NAME}; say which with FRAUD_MODEL=fraud-features, or all with "
    with pytest.raises(RegistryError, match=said):
        Served(ModelSettings.read()).champions()
    assert list(running.champions()) == [NAME], "a running service goes on"
    both = Served(ModelSettings(FRAUD_MODEL=f"{NAME}, fraud-features"))
    assert list(both.champions()) == [NAME, "fraud-features"]


def test_a_worker_that_is_started_again_serves_what_its_server_decided(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(NAME, tmp_path / "runs")
    monkeypatch.setenv("FRAUD_MODEL", "")  # so that it is put back
    Served(ModelSettings.read()).hand_down()
    promoted("fraud-features", tmp_path / "more", seed=2)
    assert list(Served(ModelSettings.read()).champions()) == [NAME]


def test_without_a_model_in_production_it_says_what_to_do(home: Path) -> None:
    with pytest.raises(RegistryError, match="no model is in production; train, import and promote one"):
        Served(ModelSettings.read()).champions()
    main_ends(["models", "--production"], 1)


@pytest.mark.parametrize("name", ["a", "fraud-transaction", "fraud_2", "7", "a" * 50])
def test_names_that_everything_can_hold(name: str) -> None:
    assert checked_name(name) == name
    assert checked_tag(f"{name}:0123456789abcdef") == (name, "0123456789abcdef")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FraudModel", "'fraud-model' would do"),
        ("acme.fraud", "'acme-fraud' would do"),
        ("../../../evil", "'evil' would do"),
        ("", "allowed are at most 50 lower-case letters"),
        ("a" * 51, "at most 50"),
        ("-fraud", "a letter or digit at either end"),
        ("fraud\n", "allowed are"),
        ("frau\u0064é", "allowed are"),
        ("fraud-preprocessor", "-preprocessor, -dataset and -rules at its end are kept"),
        ("fraud-dataset", "-preprocessor, -dataset and -rules at its end are kept"),
    ],
)
def test_names_that_something_cannot_hold(name: str, said: str, home: Path) -> None:
    with pytest.raises(BadName, match=said):
        checked_name(name)
    with pytest.raises(BadName):
        Registry(home / "registry.db").register(name, "sha256:" + "0" * 64, "sha256:" + "1" * 64, who="a test")
    if name and name == name.strip():
        with pytest.raises(BadName, match="FRAUD_MODEL: model name"):
            Served(ModelSettings(FRAUD_MODEL=f"{name},x")).champions()


@pytest.mark.parametrize("tag", ["fraud", "fraud:", "fraud:v3", "fraud:0123456789ABCDEF", "fraud:../../evil/0123456"])
def test_what_is_no_tag(tag: str) -> None:
    with pytest.raises(BadName, match="is no tag"):
        checked_tag(tag)


@pytest.mark.parametrize("command", ["rollback", "follow", "lineage", "promote", "pull", "models"])
def test_commands_refuse_a_bad_name_with_a_message(command: str, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = "../evil" if command in ("rollback", "follow", "lineage") else "../evil:production"
    main_ends([command, named], 1)
    assert "model name '../evil': allowed are" in capfd.readouterr().err


def test_train_checks_the_name_before_it_reads_the_data(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mapping = Path(__file__).parent.parent / "examples" / "features.yaml"
    main_ends(["train", "-d", str(tmp_path / "no.parquet"), "-m", str(mapping), "--name", "FraudModel"], 1)
    assert "model name 'FraudModel': allowed are" in capfd.readouterr().err
