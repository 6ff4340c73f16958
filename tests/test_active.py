"""Swaps of models in one worker: verified before they serve, at once, without a trace of the old one left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import gc
import re
import shutil
import socket
import sqlite3
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.models import ModelStore

from fraud.decisions.rules.in_force import RulesInForce
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.errors import BundleError, RegistryError
from fraud.models.active import ActiveModels, Swap
from fraud.models.bento_store import BentoStore
from fraud.models.beside import Beside
from fraud.models.bundle import read_files, read_manifest, short, write_bundle
from fraud.models.following import AliasFollower
from fraud.models.registry import Registry
from fraud.models.scorer import Scorer
from fraud.models.served import Packed, Served
from fraud.models.turns import set_usual_turns, short_turns
from fraud.schema import Kind
from fraud.settings import ModelSettings, Settings
from tests.tiny import write_tiny_bundle

NAME = "fraud-features"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@dataclass
class Home:
    """A BENTOML_HOME with two versions of one model, the first in production."""

    path: Path
    registry: Registry
    tags: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def settings(self, **more: Any) -> Settings:
        return Settings(models=ModelSettings(FRAUD_MODEL=NAME, BENTOML_HOME=self.path, FRAUD_MODEL_POLL_S=0.05, **more))

    def promote(self, version: int) -> None:
        self.registry.move(NAME, self.digests[version], "production", who="test", why="")


@pytest.fixture(
    scope="module",
    params=[(LIGHTGBM, ISOLATION_FOREST, LIGHTGBM), (ISOLATION_FOREST,) * 3],
    ids=["both algorithms", "isolation forests alone"],
)
def stocked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("home")
    home = Home(path, Registry(path / "fraud" / "registry.db"))
    for seed, algorithm in enumerate(request.param, start=1):
        bundle = write_tiny_bundle(path / f"bundle{seed}", "features", seed=seed, algorithm=algorithm)
        digest, manifest = read_manifest(bundle)
        home.tags.append(BentoStore(path).import_bundle(bundle, {}))
        home.digests.append(digest)
        home.registry.register(NAME, digest, manifest.preprocessor_digest, who="test")
    home.promote(0)
    return home


@pytest.fixture
def home(stocked: Home, tmp_path: Path) -> Iterator[Home]:
    path = tmp_path / "home"
    shutil.copytree(stocked.path, path)
    BentoMLContainer.model_store.set(ModelStore(path / "models"))
    yield Home(path, Registry(path / "fraud" / "registry.db"), stocked.tags, stocked.digests)
    BentoMLContainer.model_store.reset()


@dataclass
class Worker:
    """What a worker serves, and what it was told of swaps."""

    models: ActiveModels
    champions: dict[str, Scorer] = field(default_factory=dict)
    challengers: dict[str, Scorer] = field(default_factory=dict)
    swaps: list[Swap] = field(default_factory=list)
    rules: Mapping[str, RulesInForce] = field(default_factory=dict)
    beside: Beside | None = None

    def install(
        self,
        champions: dict[str, Scorer],
        challengers: dict[str, Scorer],
        beside: Beside | None,
        rules: Mapping[str, RulesInForce],
    ) -> None:
        self.champions, self.challengers, self.beside, self.rules = champions, challengers, beside, rules

    @property
    def served(self) -> str:
        return self.champions[NAME].name.digest


async def start(settings: Settings, *, poll: bool = False) -> Worker:
    swaps: list[Swap] = []
    worker = Worker(ActiveModels(settings, on_swap=swaps.append), swaps=swaps)
    await worker.models.load()
    worker.models.follow(worker.install)
    if not poll:
        assert worker.models._task is not None
        worker.models._task.cancel()
    return worker


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


@in_loop
async def test_worker_follows_the_alias_there_and_back(home: Home) -> None:
    worker = await start(home.settings(), poll=True)
    assert worker.served == home.digests[0]
    home.promote(1)
    await until(lambda: worker.served == home.digests[1])
    home.registry.rollback(NAME, who="test", why="worse")
    await until(lambda: worker.served == home.digests[0])
    assert [swap.tag for swap in worker.swaps] == [home.tags[0], home.tags[1], home.tags[0]]
    assert all(swap.error is None for swap in worker.swaps)
    await worker.models.close()


@in_loop
async def test_worker_follows_the_first_alias_that_names_a_version(home: Home) -> None:
    worker = await start(home.settings(FRAUD_MODEL_ALIASES="champion,production"))
    registry = Registry(home.path / "fraud" / "registry.db", ("champion", "production"))
    assert (worker.served, worker.models.describe()["aliases"]) == (home.digests[0], {NAME: "production"})
    registry.move(NAME, home.digests[1], "champion", who="test", why="")
    home.promote(2)
    await worker.models.check()
    assert (worker.served, worker.models.describe()["aliases"]) == (home.digests[1], {NAME: "champion"})
    registry.rollback(NAME, who="test", why="worse")
    await worker.models.check()
    assert (worker.served, worker.models.describe()["aliases"]) == (home.digests[0], {NAME: "champion"})
    await worker.models.close()


@in_loop
async def test_version_in_use_outlives_its_swap_and_is_then_freed(home: Home) -> None:
    worker = await start(home.settings())
    in_flight = worker.champions[NAME]
    old = weakref.ref(in_flight)
    home.promote(1)
    await worker.models.check()
    assert worker.served == home.digests[1]
    assert in_flight.name.digest == home.digests[0]
    gc.disable()  # the service freezes what it starts with, so no collector may be needed
    try:
        del in_flight
        assert old() is None
    finally:
        gc.enable()
    await worker.models.close()


@in_loop
async def test_broken_bundle_leaves_the_old_one_and_is_not_tried_all_the_time(home: Home) -> None:
    worker = await start(home.settings())
    trees = home.path / "models" / NAME / short(home.digests[1]) / "forest.txt"
    whole = trees.read_bytes()
    trees.write_bytes(whole[:-100] + b"x" + whole[-99:])
    home.promote(1)
    for _ in range(5):
        await worker.models.check()
    assert worker.served == home.digests[0]
    assert [type(swap.error) for swap in worker.swaps[1:]] == [BundleError]
    (failed,) = worker.models.describe()["failed_swaps"]
    assert failed["wanted"] == home.tags[1]
    assert failed["code"] == "bundle"
    trees.write_bytes(whole)
    await worker.models.check(now=True)
    assert worker.served == home.digests[1]
    assert worker.models.describe()["failed_swaps"] == []
    await worker.models.close()


@in_loop
async def test_a_model_that_scores_otherwise_is_refused_with_the_libraries_that_differ(
    home: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, manifest, files = read_files(write_tiny_bundle(tmp_path / "features", "features"))
    del files["manifest.json"]
    before = {"lightgbm": "4.5.0", "numpy": manifest.libraries["numpy"]}

    def imported(folder: str, **changed: bytes) -> Settings:
        write_bundle(
            tmp_path / folder,
            {**files, **changed},
            algorithm=LIGHTGBM,
            name=NAME,
            kind="features",
            libraries=before,
            data={},
            seed=0,
            git_commit="",
        )
        tag = BentoStore(home.path).import_bundle(tmp_path / folder, {})
        return Settings(models=ModelSettings(FRAUD_MODEL=tag, BENTOML_HOME=home.path))

    models = ActiveModels(imported("the-same"))
    await models.load()
    said = r"lightgbm 4\.5\.0 in training, \S+ here; its golden rows come out the same"
    assert [record.levelname for record in caplog.records if re.search(said, record.message)] == ["WARNING"]
    await models.close()

    first, *rest = files["golden.jsonl"].splitlines()
    margin = msgspec.json.decode(first)["raw_margin"]
    bent = first.replace(str(margin).encode(), str(margin + 1e-9).encode())
    models = ActiveModels(imported("another", **{"golden.jsonl": b"\n".join([bent, *rest]) + b"\n"}))
    said = r"golden request 0 .* another raw_margin .* these libraries differ: lightgbm 4\.5\.0 in training, "
    with pytest.raises(BundleError, match=said):
        await models.load()
    await models.close()


@in_loop
async def test_readiness_says_how_the_last_look_at_wandb_went(home: Home) -> None:
    worker = await start(home.settings())
    registry = Registry(home.path / "fraud" / "registry.db")
    assert worker.models.describe()["wandb"] == {}
    registry.note_following(NAME, "")
    await worker.models.check()
    assert worker.models.describe()["wandb"][NAME]["failed"] is False
    registry.note_following(NAME, "W&B does not answer")
    await worker.models.check()
    look = worker.models.describe()["wandb"][NAME]
    assert look["failed"] is True
    assert "answer" not in str(look)
    await worker.models.close()


@in_loop
async def test_what_is_served_waits_for_wandb_once_whatever_the_workers_and_restarts(home: Home) -> None:
    for item in home.registry.pending():
        home.registry.delivered(item.id)

    def told() -> list[dict[str, Any]]:
        return [item.payload for item in home.registry.pending() if item.kind == "use"]

    workers = [await start(home.settings(), poll=True) for _ in "ab"]
    await until(lambda: len(told()) == 1)
    home.promote(1)
    await until(lambda: {use["digest"] for use in told()} == set(home.digests[:2]))
    home.registry.rollback(NAME, who="test", why="worse")
    await until(lambda: all(worker.served == home.digests[0] for worker in workers))
    for worker in workers:
        await worker.models.close()
    for item in home.registry.pending():
        home.registry.delivered(item.id)
    again = await start(home.settings())
    again.models.following.record_served({NAME: again.served})
    assert told() == []
    await again.models.close()
    (first, *_) = [event for event in reversed(home.registry.events()) if event.kind == "use"]
    assert first.who == socket.gethostname()


@in_loop
async def test_a_registry_that_takes_no_notes_is_logged_once_and_does_not_stop_serving(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(sqlite3.connect(home.registry.path)) as db:
        db.execute("create trigger full before insert on events begin select raise(abort, 'the disk is full'); end")
    worker = await start(home.settings(), poll=True)
    await until(lambda: "will not be told" in caplog.text)
    worker.models.following.record_served({NAME: worker.served})
    assert caplog.text.count("will not be told") == caplog.text.count("the disk is full") == 1
    assert worker.models.describe()["registry_readable"] is True
    await worker.models.close()


@in_loop
async def test_version_missing_from_the_store_leaves_the_old_one(home: Home) -> None:
    worker = await start(home.settings())
    shutil.rmtree(home.path / "models" / NAME / short(home.digests[1]))
    home.promote(1)
    await worker.models.check()
    assert worker.served == home.digests[0]
    assert isinstance(worker.swaps[-1].error, RegistryError)
    home.promote(2)
    await worker.models.check()
    assert worker.served == home.digests[2]
    assert worker.models.describe()["failed_swaps"] == []
    await worker.models.close()


@in_loop
async def test_unreadable_registry_leaves_everything(home: Home) -> None:
    worker = await start(home.settings())
    home.registry.path.write_bytes(b"no database at all" * 100)
    await worker.models.check()
    assert worker.served == home.digests[0]
    assert worker.models.describe()["registry_readable"] is False
    await worker.models.close()


def rewrite(home: Home, version: int, by: int) -> None:
    """Put another consistent bundle in the place of a version: all its files, and the preprocessor that it names."""
    folder = home.path / "models" / NAME / short(home.digests[version])
    shutil.rmtree(folder)
    shutil.copytree(home.path / "models" / NAME / short(home.digests[by]), folder)


@in_loop
@pytest.mark.parametrize("pinned", [False, True])
async def test_a_rewritten_store_is_not_served_under_another_digest(home: Home, pinned: bool) -> None:
    rewrite(home, 0, by=1)
    pin = Settings(models=ModelSettings(FRAUD_MODEL=home.tags[0], BENTOML_HOME=home.path))
    settings = pin if pinned else home.settings()
    with pytest.raises(BundleError, match=rf"should be {home.tags[0]}; it holds {NAME}, bundle {home.digests[1]}"):
        await start(settings)


@in_loop
async def test_a_rewritten_version_is_not_swapped_in_nor_explains_what_it_did_not_decide(home: Home) -> None:
    worker = await start(home.settings())
    rewrite(home, 1, by=2)
    home.promote(1)
    await worker.models.check()
    assert worker.served == home.digests[0]
    assert [swap["code"] for swap in worker.models.describe()["failed_swaps"]] == ["bundle"]
    await worker.models.load_past(NAME, home.digests[1])
    assert worker.models.past == {}
    await worker.models.load_past(NAME, home.digests[2])
    assert list(worker.models.past) == [home.digests[2]]
    await worker.models.close()


def test_a_tag_and_the_registry_both_say_which_bundle_it_is(home: Home) -> None:
    served = Served(home.settings().models)
    assert served.read(home.tags[0]).digest == home.digests[0]
    forged = home.digests[0][:-1] + ("0" if home.digests[0][-1] != "0" else "1")
    with contextlib.closing(sqlite3.connect(home.registry.path)) as db, db:
        db.execute("update versions set digest = ? where digest = ?", (forged, home.digests[0]))
    with pytest.raises(BundleError, match=f"should be bundle {forged} by the registry; it holds {home.digests[0]}"):
        served.read(home.tags[0])


def test_a_bundle_of_another_name_or_preprocessor_is_refused(home: Home) -> None:
    store = BentoStore(home.path)
    model, preprocessor = store.bundle_paths(home.tags[0])
    shutil.copytree(model, home.path / "models" / "other" / model.name)
    shutil.copytree(preprocessor, home.path / "models" / "other-preprocessor" / preprocessor.name)
    with pytest.raises(BundleError, match=f"should be other:{model.name}; it holds {NAME}"):
        store.read(f"other:{model.name}")
    (preprocessor / "features.json").write_text("{}")
    with pytest.raises(BundleError, match=r"features\.json is changed"):
        store.read(home.tags[0])


@in_loop
async def test_a_packed_version_must_be_its_tags_bundle_too(home: Home, tmp_path: Path) -> None:
    """A Bento's own store is looked at first, and there is no registry in it."""
    shutil.copytree(home.path / "models", tmp_path / "bento" / "models")
    home.registry.path.unlink()
    packed = Packed({NAME: short(home.digests[1])}, tmp_path / "bento" / "models")
    served = Served(ModelSettings(BENTOML_HOME=home.path), packed)
    assert served.champions() == {NAME: home.tags[1]}
    assert served.folders(home.tags[1])[0].is_relative_to(tmp_path / "bento")
    moved = Home(tmp_path / "bento", home.registry, home.tags, home.digests)
    rewrite(moved, 1, by=2)
    with pytest.raises(BundleError, match=f"should be {home.tags[1]}"):
        await ActiveModels(Settings(models=ModelSettings(BENTOML_HOME=home.path)), packed).load()


@in_loop
async def test_start_fails_on_a_broken_bundle(home: Home) -> None:
    (home.path / "models" / NAME / short(home.digests[0]) / "calibrator.json").unlink()
    with pytest.raises(BundleError, match=r"calibrator\.json is missing"):
        await start(home.settings())


@in_loop
async def test_pinned_version_does_not_follow(home: Home) -> None:
    settings = Settings(models=ModelSettings(FRAUD_MODEL=home.tags[0], BENTOML_HOME=home.path))
    worker = await start(settings)
    home.promote(1)
    assert await worker.models.refresh() == "not asked: every model here is pinned or packed"
    assert worker.served == home.digests[0]
    await worker.models.close()


@in_loop
async def test_where_wandb_is_not_installed_the_registry_is_followed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    worker = await start(home.settings())
    home.promote(1)
    assert await worker.models.refresh() == "not asked: wandb is not installed here"
    assert worker.served == home.digests[1]
    assert worker.models.describe()["wandb"] == {}
    await worker.models.close()


@pytest.fixture
def held_up(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every look waits for another one, which does not end."""
    for name, value in {
        "BENTOML_HOME": str(home.path),
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "k" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
    }.items():
        monkeypatch.setenv(name, value)
    with (home.path / "fraud" / "look.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def looking() -> list[int]:
    """Processes started by this one that look at W&B."""
    return [child.pid for child in psutil.Process().children() if "wandb_sync.look" in child.cmdline()]


@in_loop
async def test_a_look_that_takes_too_long_is_ended_and_noted_and_all_who_ask_share_it(
    home: Home, held_up: None
) -> None:
    following = AliasFollower(home.registry, [NAME], limit_s=1.0)
    asked = asyncio.gather(following.look(), following.look())
    await until(lambda: len(looking()) == 1)
    assert list(await asked) == ["failed: the look took more than 1 s"] * 2
    assert looking() == []
    following.read([NAME])
    assert following.looks[NAME].error == "the look took more than 1 s"
    await following.close()


@in_loop
async def test_a_look_that_breaks_says_why_and_is_noted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_WANDB_RETRIES", "soon")
    following = AliasFollower(home.registry, [NAME])
    said = await following.look()
    assert said.startswith("failed: the look ended with exit code 1: ")
    assert said.endswith("FRAUD_WANDB_RETRIES='soon': allowed is a number above 0")
    following.read([NAME])
    assert said == f"failed: {following.looks[NAME].error}"


@in_loop
async def test_a_look_under_way_does_not_keep_a_worker_from_ending(home: Home, held_up: None) -> None:
    following = AliasFollower(home.registry, [NAME])
    asked = asyncio.create_task(following.look())
    await until(lambda: len(looking()) == 1)
    await following.close()
    assert looking() == []
    with pytest.raises(asyncio.CancelledError):
        await asked


@in_loop
async def test_challenger_comes_and_goes_with_its_alias(home: Home) -> None:
    home.registry.move(NAME, home.digests[1], "challenger", who="test", why="")
    worker = await start(home.settings(shadow=True))
    assert worker.challengers[NAME].name.digest == home.digests[1]
    home.promote(1)  # it won: what it is loaded for already is not loaded again
    challenger = worker.challengers[NAME]
    await worker.models.check()
    assert worker.champions[NAME] is challenger
    assert worker.challengers == {}
    await worker.models.close()


ANOMALY = "unusual"


def stock_anomaly(home: Home, seed: int, kind: Kind = "features") -> str:
    """Add a version of an anomaly model to the store and the registry; return its digest."""
    bundle = write_tiny_bundle(home.path / f"a{seed}-{kind}", kind, name=ANOMALY, seed=seed, algorithm=ISOLATION_FOREST)
    digest, manifest = read_manifest(bundle)
    BentoStore(home.path).import_bundle(bundle, {})
    home.registry.register(ANOMALY, digest, manifest.preprocessor_digest, who="test")
    return digest


@in_loop
async def test_the_anomaly_model_follows_its_own_alias_and_one_that_cannot_be_beside_is_not_taken(home: Home) -> None:
    first, second = stock_anomaly(home, 1), stock_anomaly(home, 2)
    misfit = stock_anomaly(home, 3, "transaction")
    home.registry.move(ANOMALY, first, "production", who="test", why="")
    worker = await start(home.settings(anomaly_model=ANOMALY))
    assert worker.beside is not None
    assert worker.beside.scorer.name.digest == first
    shown = worker.models.describe()["anomaly_model"]
    assert (shown["name"], shown["digest"], shown["beside"]) == (ANOMALY, first, [NAME])
    assert worker.models.following._names == [NAME, ANOMALY]
    home.registry.move(ANOMALY, second, "production", who="test", why="")
    await worker.models.check()
    assert worker.beside.scorer.name.digest == second
    home.registry.move(ANOMALY, misfit, "production", who="test", why="")
    await worker.models.check()
    assert worker.beside.scorer.name.digest == second
    (failed,) = worker.models.describe()["failed_swaps"]
    assert (failed["name"], failed["role"], failed["code"]) == (ANOMALY, "anomaly", "bundle")
    assert [(swap.role, swap.error is None) for swap in worker.swaps] == [
        ("champion", True),
        ("anomaly", True),
        ("anomaly", True),
        ("anomaly", False),
    ]
    home.promote(1)  # a champion is swapped under it
    await worker.models.check()
    assert worker.served == home.digests[1]
    assert worker.beside.misfit(worker.champions[NAME]) is None
    await worker.models.close()


@in_loop
async def test_a_service_does_not_start_without_the_anomaly_model_that_it_is_to_have(home: Home) -> None:
    models = ActiveModels(home.settings(anomaly_model=ANOMALY))
    with pytest.raises(RegistryError, match="no version of 'unusual'"):
        await models.load()
    await models.close()
    boosted = BentoStore(home.path).import_bundle(write_tiny_bundle(home.path / "boosted", "features", seed=4), {})
    pinned = ActiveModels(home.settings(anomaly_model=boosted))
    with pytest.raises(BundleError, match="measures no anomaly"):
        await pinned.load()
    await pinned.close()


@in_loop
async def test_challenger_is_not_loaded_where_nobody_asks_for_it(home: Home) -> None:
    home.registry.move(NAME, home.digests[1], "challenger", who="test", why="")
    worker = await start(home.settings())
    assert worker.challengers == {}
    await worker.models.close()


@in_loop
async def test_broken_challenger_does_not_keep_the_service_from_starting(home: Home) -> None:
    home.registry.move(NAME, home.digests[1], "challenger", who="test", why="")
    (home.path / "models" / NAME / short(home.digests[1]) / "policy.json").unlink()
    worker = await start(home.settings(canary_share=0.5))
    assert worker.served == home.digests[0]
    assert worker.challengers == {}
    assert worker.models.describe()["failed_swaps"][0]["role"] == "challenger"
    await worker.models.close()


@in_loop
async def test_versions_loaded_at_once_leave_the_switch_interval_as_it_was(home: Home) -> None:
    worker = await start(home.settings())
    usual = sys.getswitchinterval()
    past = list(zip([NAME] * 3, [home.digests[1], home.digests[2], home.digests[1]], strict=True))
    for _ in range(3):
        await asyncio.gather(*[worker.models.load_past(name, digest) for name, digest in past])
        assert sys.getswitchinterval() == usual
        assert list(worker.models.past) == home.digests[1:]
        worker.models.past.clear()
    await worker.models.close()


def test_who_asks_for_short_turns_may_overlap_in_any_order() -> None:
    usual = sys.getswitchinterval()
    first, second = short_turns(), short_turns()
    first.__enter__()
    short = sys.getswitchinterval()
    second.__enter__()
    assert sys.getswitchinterval() == short == pytest.approx(usual / 50)
    first.__exit__(None, None, None)  # not the last one to begin
    assert sys.getswitchinterval() == short
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == usual
    with short_turns():
        set_usual_turns(usual / 2)  # as an engine does that starts
        assert sys.getswitchinterval() == pytest.approx(usual / 100)
    assert sys.getswitchinterval() == pytest.approx(usual / 2)
    set_usual_turns(usual)
