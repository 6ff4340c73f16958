"""The local registry: versions, aliases, rollback, and what several processes and a kill leave behind."""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from fraud.errors import RegistryError
from fraud.models.registry import Registry, Version
from fraud.models.registry_rows import FORMATS

NAME = "fraud-features"


def digest(n: int) -> str:
    return f"sha256:{n:064x}"


def register(registry: Registry, n: int, **more: object) -> Version:
    return registry.register(NAME, digest(n), digest(99), who="ann@desk", **more)  # type: ignore[arg-type]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "fraud" / "registry.db")


@pytest.fixture
def three(registry: Registry) -> Registry:
    for n in range(3):
        register(registry, n)
        registry.move(NAME, f"v{n}", "production", who="ann@desk", why=f"version {n}")
    return registry


def aliases(registry: Registry) -> dict[str, int]:
    return {alias: version.version for version in registry.versions(NAME) for alias in version.aliases}


def test_an_unchanged_bundle_makes_no_new_version(registry: Registry) -> None:
    assert register(registry, 1).version == 0
    assert register(registry, 2).version == 1
    again = register(registry, 1)
    assert again.version == 0
    assert aliases(registry) == {"candidate": 0}
    assert [v.version for v in registry.versions()] == [1, 0]


def test_an_alias_names_one_version_and_promotion_keeps_the_previous(three: Registry) -> None:
    assert aliases(three) == {"candidate": 2, "production": 2, "previous": 1}
    assert three.digest_of(NAME, "production") == digest(2)


def test_rollback_walks_back_through_what_was_in_production(three: Registry) -> None:
    assert three.rollback(NAME, who="ann", why="alerts doubled").version == 1
    assert aliases(three) == {"candidate": 2, "production": 1, "previous": 0}
    assert three.rollback(NAME, who="ann", why="still").version == 0
    assert aliases(three) == {"candidate": 2, "production": 0}
    with pytest.raises(RegistryError, match="fraud-features has no previous version to roll back to"):
        three.rollback(NAME, who="ann", why="again")


def test_promoting_after_a_rollback_goes_back_to_what_was_rolled_back_to(three: Registry) -> None:
    three.rollback(NAME, who="ann", why="bad")
    three.move(NAME, "v2", "production", who="ann", why="was not to blame")
    assert aliases(three) == {"candidate": 2, "production": 2, "previous": 1}
    three.rollback(NAME, who="ann", why="it was")
    assert aliases(three) == {"candidate": 2, "production": 1, "previous": 0}


def test_history_says_who_when_why_and_whether_forced(three: Registry) -> None:
    three.move(NAME, "v0", "production", who="bob@desk", why="demo", forced=True)
    newest = three.events(NAME)[0]
    assert (newest.kind, newest.version, newest.before) == ("promote", 0, 2)
    assert (newest.who, newest.why, newest.forced) == ("bob@desk", "demo", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", newest.at)


def test_moving_an_alias_to_where_it_is_records_nothing(three: Registry) -> None:
    events, pending = len(three.events()), len(three.pending())
    three.move(NAME, "candidate", "production", who="ann", why="again")
    assert (len(three.events()), len(three.pending())) == (events, pending)


@pytest.mark.parametrize(
    ("reference", "version"), [("candidate", 2), ("v1", 1), (digest(1), 1), (f"{1:064x}", 1), (digest(0)[:40], None)]
)
def test_references(three: Registry, reference: str, version: int | None) -> None:
    if version is None:
        with pytest.raises(RegistryError, match=r"could be any of v0, v1, v2; give more digits"):
            three.resolve(NAME, reference)
    else:
        assert three.resolve(NAME, reference).version == version


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("other", "v0", r"no model 'other' in the registry; known: fraud-features"),
        (NAME, "v7", r"fraud-features has no version 'v7'; its aliases: candidate, previous, production"),
    ],
)
def test_unknown_references(three: Registry, name: str, reference: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        three.resolve(name, reference)


def test_an_empty_registry_answers_without_being_made(registry: Registry) -> None:
    assert not registry.versions()
    assert not registry.events()
    assert not registry.pending()
    assert registry.digest_of(NAME, "production") is None
    with pytest.raises(RegistryError, match="no model 'fraud-features' in the registry; known: none"):
        registry.resolve(NAME, "v0")
    assert not registry.path.exists()


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 65])
def test_names_that_could_leave_the_store_are_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="allowed are at most 50 lower-case letters, digits, - and _"):
        registry.register(name, digest(1), digest(2), who="ann")


def test_previous_is_not_set_by_hand(three: Registry) -> None:
    with pytest.raises(RegistryError, match="alias 'previous' cannot be set"):
        three.move(NAME, "v0", "previous", who="ann", why="")


def test_each_move_waits_for_wandb_in_order(three: Registry) -> None:
    three.rollback(NAME, who="ann", why="bad")
    waiting = three.pending()
    assert [item.payload["kind"] for item in waiting] == ["promote", "promote", "promote", "rollback"]
    assert waiting[1].payload["aliases"] == {"production": digest(1), "previous": digest(0)}
    assert waiting[3].payload["aliases"] == {"production": digest(1), "previous": digest(0)}
    three.failed(waiting[0].id, "no answer")
    assert (three.pending()[0].attempts, three.pending()[0].last_error) == (1, "no answer")
    three.delivered(waiting[0].id)
    assert [item.id for item in three.pending()] == [item.id for item in waiting[1:]]


def test_a_run_waits_once(registry: Registry) -> None:
    first = registry.pend_run(NAME, {"key": "abc"})
    assert registry.pend_run(NAME, {"key": "abc", "aliases": ["candidate"]}) == first
    assert [item.payload["aliases"] for item in registry.pending()] == [["candidate"]]


def test_a_use_is_recorded_once_by_its_key_and_each_time_without_one(registry: Registry) -> None:
    register(registry, 1)
    use = functools.partial(registry.record_use, NAME, "v0", "production", {"host": "h"}, who="h", key="abc")
    assert use()
    assert not use()
    (waiting,) = registry.pending()
    assert waiting.payload == {"key": "abc", "kind": "production", "digest": digest(1), "facts": {"host": "h"}}
    registry.delivered(waiting.id)
    assert not use()
    assert registry.pending() == []
    for _ in range(2):
        assert registry.record_use(NAME, "v0", "backtest", {}, who="h")
    assert len({item.payload["key"] for item in registry.pending()}) == 2


def test_the_use_of_a_version_that_is_not_known_makes_no_registry(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=f"no model '{NAME}' in the registry; known: none"):
        registry.record_use(NAME, digest(1), "production", {}, who="h", key="abc")
    assert not registry.path.exists()


def test_what_wandb_says_is_taken_over_unless_a_local_change_waits(three: Registry) -> None:
    targets: dict[str, str | None] = {"production": digest(0), "previous": None}
    assert not three.adopt(NAME, targets, who="W&B", why="moved there")
    for item in three.pending():
        three.delivered(item.id)
    assert three.adopt(NAME, targets, who="W&B", why="moved there")
    assert aliases(three) == {"candidate": 2, "production": 0}
    assert three.events(NAME)[0].kind == "follow"
    assert not three.adopt(NAME, targets, who="W&B", why="moved there")


def test_a_registry_of_the_first_format_is_read_and_brought_up(registry: Registry) -> None:
    registry.path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(registry.path)) as db, db:
        for statement in FORMATS[0].split(";\n"):
            db.execute(statement)
        db.execute("pragma user_version = 1")
    db.close()
    assert registry.following(NAME) is None
    register(registry, 1)
    registry.note_following(NAME, "no answer")
    following = registry.following(NAME)
    assert following is not None
    assert following.error == "no answer"
    assert [v.version for v in registry.versions()] == [0]


def test_a_registry_of_another_format_is_refused(registry: Registry) -> None:
    register(registry, 1)
    with closing(sqlite3.connect(registry.path)) as db, db:
        db.execute("pragma user_version = 9")
    db.close()
    with pytest.raises(RegistryError, match="has format 9, this release reads 2"):
        register(registry, 2)


WRITER = """
import sys
from pathlib import Path
from fraud.models.registry import Registry
registry, start = Registry(Path(sys.argv[1])), int(sys.argv[2])
for n in range(start, start + int(sys.argv[3])):
    registry.register("fraud-features", f"sha256:{n:064x}", "sha256:0", who="x")
    registry.move("fraud-features", f"{n:064x}", "production", who="x", why="")
    print(n, flush=True)
"""


def start_writer(registry: Registry, start: int, n: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(registry.path), str(start), str(n)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_write_at_once_and_lose_nothing(registry: Registry) -> None:
    writers = [start_writer(registry, start, 20) for start in (0, 100, 200)]
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0
    assert sorted(v.version for v in registry.versions()) == list(range(60))
    promotions = [event for event in registry.events() if event.kind == "promote"]
    assert len(promotions) == len(registry.pending()) == 60
    for later, earlier in itertools.pairwise(promotions):
        assert later.before == earlier.version


def test_a_killed_writer_leaves_a_whole_registry(registry: Registry) -> None:
    with start_writer(registry, 0, 100_000) as writer:
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    done = registry.versions()
    assert len(done) >= 5
    promotions = [event for event in registry.events() if event.kind == "promote"]
    assert len(promotions) == len(registry.pending())
    production = registry.digest_of(NAME, "production")
    assert production == registry.resolve(NAME, f"v{promotions[0].version}").digest
    register(registry, 999_999)


def test_reading_the_alias_is_cheap(three: Registry) -> None:
    started = time.perf_counter()
    for _ in range(200):
        three.digest_of(NAME, "production")
    assert (time.perf_counter() - started) / 200 < 0.005
