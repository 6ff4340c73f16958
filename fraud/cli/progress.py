"""Progress bars of long work, one for each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar a stage; yields a function of the stage, the amount done and the total."""
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            most = next(task.total for task in bars.tasks if task.id == tasks[stage])
            if most is not None and total < most:
                bars.update(tasks[stage], description=f"{stage}, stopped early at {done} of at most {most:.0f}")
            bars.update(tasks[stage], completed=done, total=total)

        yield progress
