"""Folders of unfinished things: kept while their process lives, gone when it was killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wandb_sync.scratch import held, scratch, was_abandoned


@contextmanager
def another_process(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run code that prints a line when it is where it should be, and then waits to be killed."""
    program = f"import sys; from pathlib import Path; from wandb_sync.scratch import held, scratch\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_folder_is_gone_after_its_block_and_each_has_its_own(tmp_path: Path) -> None:
    with scratch(tmp_path) as one, scratch(tmp_path) as other:
        assert one != other
        (one / "a").write_text("x")
        assert one.is_dir()
    assert [path for path in (tmp_path / "scratch").iterdir() if path.is_dir()] == []


def test_what_a_living_process_holds_stays_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    code = "with scratch(Path(sys.argv[1])) as folder:\n print(folder, flush=True); sys.stdin.read()"
    with another_process(code, tmp_path) as process:
        folder = Path(line_of(process))
        for _ in range(2):
            with scratch(tmp_path):
                assert folder.is_dir()
    with scratch(tmp_path):
        assert not folder.exists()


def test_a_held_folder_is_abandoned_only_when_its_process_was_killed(tmp_path: Path) -> None:
    with held(tmp_path):
        assert not was_abandoned(tmp_path)
    assert not was_abandoned(tmp_path)
    with another_process("with held(Path(sys.argv[1])):\n print(1, flush=True); sys.stdin.read()", tmp_path) as process:
        assert line_of(process) == "1"
        assert not was_abandoned(tmp_path)
    assert was_abandoned(tmp_path)
