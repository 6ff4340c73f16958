"""`fraud verify hostile`: no bundle can end the process that loads it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.console import Console

from fraud.checks.mutations import hostile_bundles, mutate
from fraud.detectors.lightgbm.algorithm import BOOSTER, LIGHTGBM
from fraud.detectors.lightgbm.text import read_text
from fraud.detectors.trees.treeshap import TreeShap
from fraud.errors import BundleError, FraudError, SettingsError
from fraud.features.featurizer import Featurizer, Histories
from fraud.models.bundle import read_bundle
from fraud.models.find import bundle_folders
from fraud.models.scorer import Scorer
from fraud.schema import RowDecoder

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S, LIMIT_BYTES = 2.0, 300 * 1024 * 1024
PATIENCE_S = 60.0
"""Longest wait for one load on a busy machine; the limit that is checked is on its processor time."""

LoadOutcome = Literal["refused", "accepted", "traceback", "ended", "slow", "large"]
Load = Callable[[Path], object]

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Tried:
    """The result of one load in a child process."""

    outcome: LoadOutcome
    message: str
    seconds: float
    peak_bytes: int


@dataclass
class Tally:
    """The results of all loads."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    largest_bytes: int = 0

    def add(self, what: str, tried: Tried, allowed: tuple[LoadOutcome, ...]) -> None:
        """Count one load; an outcome that is not `allowed` is kept with the change that caused it."""
        self.outcomes[tried.outcome] += 1
        self.slowest_s = max(self.slowest_s, tried.seconds)
        self.largest_bytes = max(self.largest_bytes, tried.peak_bytes)
        if tried.outcome not in allowed:
            self.wrong.append(f"{what}: {tried.outcome}: {tried.message}")


@app.command()
def hostile(
    mutations: Annotated[int, typer.Option(min=0, help="Random changes of a good bundle.")] = 5000,
    model: Annotated[
        str | None, typer.Option(help="The good bundle, a run folder or NAME[:REF]; a quickly trained one if none.")
    ] = None,
    bundles: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="A folder of further hostile bundles to try.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Loads at a time.")] = min(4, os.cpu_count() or 1),
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Load hostile bundles, each in a process of its own, and see that each is refused with a message.

    Made by hand and at random, most of them with digests that fit. A load may take two seconds of processor time and
    300 MB more than it starts with. A random change may leave a bundle that is good: it is accepted if its golden rows
    score as they say.
    """
    if sys.platform != "linux":
        raise SettingsError("fraud verify hostile measures and bounds its loads as only Linux lets it")
    with tempfile.TemporaryDirectory() as made:
        good = _whole(bundle_folders(model) if model else (_trained(Path(made), seed), None), Path(made) / "good")
        _warm_up(good)
        by_hand, at_random = Tally(), Tally()
        further = sorted(bundles.iterdir()) if bundles else []
        names = [case.name for case in hostile_bundles()]
        with multiprocessing.get_context("fork").Pool(jobs) as pool:  # one thread each, which may fork
            for name, tried in pool.imap(partial(_made_by_hand, good), names):
                by_hand.add(name, tried, ("refused",))
            for name, tried in pool.imap(_as_it_is, further):
                by_hand.add(name, tried, ("refused",))
            for name, tried in pool.imap(partial(_made_at_random, good), [f"{seed}-{i}" for i in range(mutations)]):
                at_random.add(name, tried, ("refused", "accepted"))
    for what, tally in (("made by hand", by_hand), ("made at random", at_random)):
        counts = ", ".join(
            f"{tally.outcomes[o]} {o}" for o in ("refused", "accepted", "traceback", "ended", "slow", "large")
        )
        out.print(
            f"{what}: {tally.outcomes.total()} loads, {counts}; slowest {tally.slowest_s:.2f} s, "
            f"largest {tally.largest_bytes / 1e6:.0f} MB"
        )
    wrong = by_hand.wrong + at_random.wrong
    for line in wrong[:20]:
        out.print(line, markup=False)
    if wrong or not by_hand.outcomes:
        raise typer.Exit(1)


def try_bundle(folder: Path, load: Load = Scorer.load) -> Tried:
    """Load a bundle in a child process and return the result.

    The child may take `LIMIT_BYTES` more than it starts with, of address space and of memory: it starts with the
    pages of this process.
    """
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(folder, load, writing)
    os.close(writing)
    ended = _wait(pid, started + PATIENCE_S)
    with open(reading, "rb") as answer:
        said = answer.read()
    status, used = ended
    seconds, peak = used.ru_utime + used.ru_stime, max(0, used.ru_maxrss * 1024 - resident)
    if not os.WIFEXITED(status) or not said:
        how = signal.strsignal(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return Tried("ended", str(how), seconds, peak)
    outcome, message = json.loads(said)
    if outcome in ("refused", "accepted"):
        if seconds >= LIMIT_S:
            outcome = "slow"
        elif peak > LIMIT_BYTES:
            outcome = "large"
    return Tried(outcome, message, seconds, peak)


def _child(folder: Path, load: Load, writing: int) -> None:
    """Load, report and end; never returns into the code that forked."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            load(folder)
            said = ["accepted", ""]
        except FraudError as error:
            said = ["refused", error.message] if error.message.strip() else ["traceback", "an error without a message"]
        except BaseException as error:
            said = ["traceback", f"{type(error).__name__}: {error}"[:500]]
        os.write(writing, json.dumps([said[0], said[1][:2000]]).encode())
    finally:
        os._exit(0)


def _wait(pid: int, deadline: float) -> tuple[int, resource.struct_rusage]:
    while time.monotonic() < deadline:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return status, used
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return status, used


def _made_by_hand(good: Path, name: str) -> tuple[str, Tried]:
    (change,) = (case.change for case in hostile_bundles() if case.name == name)
    with _copied(good) as folder:
        change(folder)
        return name, try_bundle(folder)


def _made_at_random(good: Path, seed: str) -> tuple[str, Tried]:
    with _copied(good) as folder:
        done = mutate(folder, random.Random(seed))
        return f"seed {seed}, {done}", try_bundle(folder)


def _as_it_is(folder: Path) -> tuple[str, Tried]:
    return str(folder), try_bundle(folder)


@contextmanager
def _copied(good: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own) / "bundle"
        shutil.copytree(good, folder)
        yield folder


def _whole(folders: tuple[Path, Path | None], into: Path) -> Path:
    """Copy a bundle, whose parts may lie in two folders, into one."""
    into.mkdir()
    for folder in filter(None, folders):
        for path in folder.iterdir():
            if path.name != "model.yaml":
                shutil.copyfile(path, into / path.name)
    return into


def _trained(folder: Path, seed: int) -> Path:
    """Train a small features model, in a process of its own: what training imports would count as memory here."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(folder, seed))
    process.start()
    process.join()
    (bundle,) = (folder / "runs").glob("*/bundle")
    return bundle


def _train(folder: Path, seed: int) -> None:
    from fraud.simulation.simulate import simulate_features
    from training.config import BoosterOptions, Config
    from training.data import Mapping, dataset_digest, load_table
    from training.train import train

    data = folder / "features.parquet"
    simulate_features(4000, seed, out=data)
    mapping = Mapping.from_yaml(EXAMPLES / "features.yaml")
    config = Config(rounds=20, n_bootstrap=20, booster=BoosterOptions(num_leaves=15, min_data_in_leaf=20))
    dataset = {"name": data.name, "digest": dataset_digest(data)}
    train(load_table(data, mapping), mapping, config, name="fraud-hostile", dataset=dataset, runs=folder / "runs")


def _warm_up(good: Path) -> None:
    """Import and compile in this process what its forks share, and see that the good bundle is accepted.

    LightGBM runs in the forks alone: a fork of a process whose OpenMP threads have started waits for them for ever.
    """
    bundle = read_bundle(good)
    rows = [RowDecoder(bundle.spec).decode(golden.instance, "$") for golden in bundle.golden]
    if bundle.spec.kind != "features":
        Featurizer(bundle.spec, bundle.preprocessor.amount_quantiles).advance(rows, Histories.new(rows))
    if bundle.algorithm is LIGHTGBM:
        X = np.zeros((9, len(bundle.spec.features)))
        for X.flags.writeable in (True, False):
            TreeShap(read_text(bundle.detector_files[BOOSTER].decode())).contributions(X)
    tried = try_bundle(good)
    if tried.outcome != "accepted":
        raise BundleError(f"the good bundle is not accepted itself: {tried.outcome}: {tried.message}")
