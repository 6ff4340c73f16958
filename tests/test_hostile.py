"""Bundles from elsewhere: whatever they hold, they are refused with a message and end no process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightgbm
import numpy as np
import pytest

from fraud.checks import mutations
from fraud.checks.hostile import Tried, try_bundle
from fraud.detectors.calibration import UNCALIBRATED
from fraud.detectors.lightgbm.model import Model
from fraud.detectors.lightgbm.text import MalformedBooster, read_text, write_text
from fraud.detectors.trees.structure import Forest, MalformedTree, Split, Tree
from fraud.errors import BundleError, DataError
from fraud.models.bundle import read_bundle
from fraud.models.run_folder import read_run
from fraud.models.scorer import Scorer
from tests.test_treeshap import KINDS, hard_rows, resized, train
from tests.tiny import write_tiny_bundle
from tests.wandb_runs import make_run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("good") / "bundle", "features")


@pytest.mark.parametrize("kind", ["transaction", "features"])
def test_the_command_holds_for_300_mutations(kind: str, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", kind)  # type: ignore[arg-type]
    command = [sys.executable, "-c", "from fraud.cli.main import main; main()", "verify", "hostile", "--mutations"]
    arguments = ["150", "--jobs", "2", "--model", str(bundle)]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "made at random: 150 loads" in run.stdout
    assert f"made by hand: {len(mutations.hostile_bundles())} loads" in run.stdout


@pytest.mark.parametrize("case", mutations.hostile_bundles(), ids=lambda case: case.name)
def test_each_one_made_by_hand_is_refused_with_its_reason(case: mutations.Hostile, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(good, folder)
    case.change(folder)
    with pytest.raises(BundleError) as refused:
        Scorer.load(folder)
    assert len(refused.value.message) > 20


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def take_memory() -> None:
    bytearray(10**9)


def break_off() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("load", "outcome", "said"),
    [(end, "ended", "Killed"), (take_memory, "traceback", "MemoryError"), (break_off, "traceback", "'x'")],
)
def test_a_load_that_ends_the_process_would_be_seen(
    load: Callable[[], None], outcome: str, said: str, good: Path
) -> None:
    tried = try_bundle(good, lambda folder: load())
    assert (tried.outcome, said in tried.message) == (outcome, True), tried


def test_a_good_load_and_a_refusal_are_told_apart(good: Path, tmp_path: Path) -> None:
    def accept(folder: Path) -> None:
        read_bundle(folder)

    assert try_bundle(good, accept).outcome == "accepted"
    refused: Tried = try_bundle(tmp_path, accept)
    assert (refused.outcome, "is no bundle" in refused.message) == ("refused", True)


@pytest.mark.parametrize("params", KINDS.values(), ids=KINDS)
def test_what_is_written_again_is_the_same_model(params: dict[str, object]) -> None:
    """Scores and contributions bit for bit, by LightGBM itself; and reading it gives the same trees."""
    booster = train(params)
    forest = read_text(booster.model_to_string())
    written = write_text(forest)
    assert read_text(written) == forest
    again = lightgbm.Booster(model_str=written)
    shap_rows = hard_rows(Model(written, UNCALIBRATED)._shap)  # type: ignore[arg-type]
    for options in ({"raw_score": True}, {"pred_contrib": True}):
        expected = booster.predict(shap_rows, num_threads=1, **options)
        assert np.array_equal(again.predict(shap_rows, num_threads=1, **options), expected)


def test_nothing_of_the_text_that_came_is_handed_on() -> None:
    text = train().model_to_string()
    marked = text.replace("feature_names=Column_0", "feature_names=evil").replace("[boosting: gbdt]", "[evil: 1]")
    assert "evil" in marked
    assert "evil" not in write_text(read_text(marked))


@pytest.mark.parametrize("control", ["\r", "\0", "\t", "\x0b", "\x1f", "\x7f"])
def test_refuses_characters_at_which_readers_part(control: str) -> None:
    text = train().model_to_string()
    with pytest.raises(MalformedBooster, match="control character"):
        read_text(resized(text.replace("leaf_value=", f"leaf_value={control}", 1)))


def chain(depth: int, *, rows: int = 1) -> Tree:
    splits = [
        Split(0, float(i), ~i, i + 1 if i + 1 < depth else ~depth, rows, False, "none", None) for i in range(depth)
    ]
    return Tree(tuple(splits), (0.0,) * (depth + 1), (rows,) * (depth + 1))


def test_refuses_trees_that_would_take_the_stack_or_hours() -> None:
    assert chain(512).depth == 512
    with pytest.raises(MalformedTree, match="is 513 splits deep; at most 512"):
        chain(513)
    with pytest.raises(MalformedTree, match="add up to"):
        Forest(1, (chain(512),) * 2)
    with pytest.raises(MalformedTree, match="tree 0 splits on feature 0 of 0"):
        Forest(0, (chain(2),))
    with pytest.raises(MalformedTree, match="training rows"):
        chain(2, rows=2**31)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", b"[" * 100_000, "cannot be read"),
        ("run.json", b'{"bundle_digest": 1}', r"bundle_digest"),
        ("wandb-run-id", b"../../../evil", "holds '../../../evil'; a run id has"),
    ],
)
def test_a_run_folder_is_read_as_carefully(file: str, content: bytes, said: str, good: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", 1)
    (run / file).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_run(run)


def test_a_run_folder_with_a_link_is_refused(tmp_path: Path) -> None:
    """All of it is copied and sent to W&B, so a link would send what it leads to."""
    run = make_run(tmp_path / "runs", 1)
    (run / "plots" / "more.png").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match=r"more\.png is a link"):
        read_run(run)
