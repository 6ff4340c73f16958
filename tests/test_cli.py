"""The `fraud` command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fraud.cli.main import main
from tests.conftest import EXAMPLES


def run(*arguments: object) -> int:
    """Run the command in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_a_table_of_ready_features_from_a_file_to_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bento"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    data, mapping, runs = tmp_path / "loans.csv", EXAMPLES / "features.yaml", tmp_path / "runs"
    config = tmp_path / "config.yaml"
    config.write_text("rounds: 20\nn_bootstrap: 20\nbooster: {num_leaves: 7}\n")
    assert run("simulate", "--kind", "features", "--rows", 3000, "--seed", 2, "--out", data) == 0
    given = ("--data", data, "--mapping", mapping)
    assert run("train", *given, "--kind", "features", "--config", config, "--runs", runs) == 0
    (folder,) = runs.iterdir()
    scores = tmp_path / "scores.csv"
    assert run("score", *given, "--model", folder, "--out", scores) == 0
    assert run("explain", *given, "--model", folder, "--transaction", "a00000007", "--top", 3) == 0
    table = pd.read_csv(scores)
    assert len(table) == 3000
    assert table["fraud_probability"].between(0, 1).all()
    shown = capsys.readouterr().out
    assert f"next     fraud import {folder}" in shown
    assert "transaction a00000007  probability" in shown
    assert "the first feature alone" in " ".join(shown.split())
    assert "= raw margin" in shown


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ("train", "--mapping", EXAMPLES / "simulated.yaml", "--kind", "features"),
            "error: the mapping is of kind transaction, features is needed; set 'kind: features' in it",
        ),
        (
            (
                *("backtest", "--mapping", EXAMPLES / "features.yaml", "--out", "scores.csv"),
                *("--train-until", "2025-03-01", "--test-from", "2025-03-01", "--test-until", "2025-03-02"),
            ),
            "error: the mapping is of kind features; a backtest walks histories, which only transactions have",
        ),
        (
            ("score", "--mapping", EXAMPLES / "simulated.yaml", "--model", "nobody", "--out", "scores.csv"),
            "error: no model 'nobody' in the registry; known: none",
        ),
        (
            (
                *("backtest", "--mapping", EXAMPLES / "simulated.yaml", "--out", "scores.csv"),
                *("--train-until", "soon", "--test-from", "2025-03-01", "--test-until", "2025-03-02"),
            ),
            "error: 'soon' is no moment; give 2025-08-01 (midnight UTC) or 2025-08-01T12:00:00+02:00",
        ),
        (
            ("backtest", "--mapping", EXAMPLES / "simulated.yaml", "--out", "scores.csv", "--skip-defrauded", "14d"),
            "error: --against and --skip-defrauded are for --weeks; add for example --weeks 4",
        ),
        (
            ("backtest", "--mapping", EXAMPLES / "simulated.yaml", "--out", "scores.csv", "--test-from", "2025-03-01"),
            "error: give --train-until, --test-from and --test-until, or --weeks such as --weeks 4",
        ),
        (
            (
                *("backtest", "--mapping", EXAMPLES / "simulated.yaml", "--out", "scores.csv"),
                *("--weeks", "2", "--train-until", "2025-03-01"),
            ),
            "error: --weeks trains as of the beginning of each week; leave out --train-until and --test-from",
        ),
        (
            ("backtest", "--mapping", EXAMPLES / "simulated.yaml", "--out", "scores.csv", "--weeks", "20"),
            "days with known labels lie before",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    command: tuple[object, ...],
    said: str,
    simulated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    assert run(*command, "--data", simulated) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def run_in_a_process(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, after a `script` has prepared it."""
    return subprocess.run(
        [sys.executable, "-c", f"{script}\nfrom fraud.cli.main import main\nmain()", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyError("x"), 70, "error: this is a defect of fraud, not of what you gave: KeyError: 'x'"),
        (ValueError("two\nlines"), 70, "ValueError: two lines"),
        (OSError(28, "No space left on device", "/full/runs"), 1, "error: /full/runs: No space left on device; free"),
        (PermissionError(13, "Permission denied", "/theirs"), 1, "error: /theirs: Permission denied; give the user"),
        (MemoryError(), 1, "error: there is not enough memory"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_no_traceback_reaches_the_user_of_a_command(
    raised: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The simulator fails in each way; an unforeseen error's traceback is in the file that the message names."""

    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("fraud.simulation.simulate.simulate_transactions", fails)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["fraud", "simulate", "--out", "x.csv"])
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, getattr(sys, stream))  # the parser puts others there when a pipe breaks
    assert run("simulate", "--out", tmp_path / "x.csv") == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err + shown.out
    kept = list(tmp_path.glob("fraud-*.log"))
    assert len(kept) == (code == 70)
    for log in kept:
        assert str(log) in shown.err
        assert "Traceback (most recent call last)" in log.read_text()
        assert "simulate --out" in log.read_text()


def test_a_defect_is_told_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("fraud.simulation.simulate.simulate_transactions", fails)
    monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    assert run("simulate", "--out", tmp_path / "x.csv") == 70
    shown = capsys.readouterr().err
    assert "its traceback could not be kept (No such file or directory)" in shown
    assert "Traceback" not in shown


def test_a_failed_import_is_one_message_too(tmp_path: Path) -> None:
    broken = "import sys\nsys.modules['typer'] = None"
    done = run_in_a_process(broken, "--help", TMPDIR=str(tmp_path))
    assert done.returncode == 70
    assert "import of typer halted" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    command = f"{sys.executable} -c 'from fraud.cli.main import main; main()' simulate --help | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for command in (
        "simulate",
        "train",
        "backtest",
        "score",
        "explain",
        "import",
        "models",
        "verify",
        "history",
        "try",
    ):
        assert f" {command} " in shown
    assert run("verify", "--help") == 0
    shown = capsys.readouterr().out
    for check in ("parity", "explain", "idempotency", "swap", "batching", "audit", "replay", "chaos"):
        assert f" {check} " in shown
