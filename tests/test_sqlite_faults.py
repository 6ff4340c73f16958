"""A SQLite file that is locked, full, removed or replaced: callers are told soon, and readiness says it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fraud.checks.servers import free_port
from fraud.errors import StoreDown, StoreError
from fraud.models.registry import Registry
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.shadow import Shadow
from fraud.stores.protocol import described
from fraud.stores.sqlite import WAIT_S, SqliteStore
from tests.servers import bentoml_serve
from tests.test_stores import score
from tests.tiny import store_of_tiny_models, transactions

ROOT = Path(__file__).parent.parent


@contextmanager
def flocked(path: Path) -> Iterator[None]:
    """As another worker would that was stopped in the middle of a write."""
    with open(f"{path}-lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def in_transaction(path: Path) -> Iterator[None]:
    """As another program would that opened the file."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


@contextmanager
def full(path: Path) -> Iterator[None]:
    """No file of this process may grow past the log of the database."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(f"{path}-wal"), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def group_may_write() -> Iterator[None]:
    """The umask of the image, whose user id may be another one at the next start."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("group_may_write")
def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path, scorer: Scorer) -> None:
    """SQLite alone takes 0644: another user of the group could not go on with the store."""

    async def write() -> set[str]:
        store = SqliteStore(tmp_path / "history.db", durable=False)
        pipeline = Pipeline({"fraud-transaction": scorer}, store)
        await score(pipeline, transactions(2, 1))
        found = {path.name: stat.filemode(path.stat().st_mode) for path in tmp_path.iterdir()}
        await pipeline.close()
        assert set(found.values()) == {"-rw-rw-r--"}, found
        return set(found)

    assert asyncio.run(write()) == {"history.db", "history.db-lock", "history.db-wal", "history.db-shm"}
    Registry(tmp_path / "registry.db").note_following("fraud", "")
    Shadow(tmp_path / "shadow.db", lambda *_: None, lambda _: None).close()
    for name in ("registry.db", "shadow.db"):
        assert stat.filemode((tmp_path / name).stat().st_mode) == "-rw-rw-r--", name


async def until_back(store: SqliteStore) -> None:
    async with asyncio.timeout(20):
        while store.breaker.is_down:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("fault", "reason"), [(flocked, "locked|within"), (in_transaction, "locked|within"), (full, "disk")]
)
def test_a_file_that_cannot_be_written_refuses_soon_and_comes_back(
    fault: Callable[[Path], AbstractContextManager[None]], reason: str, scorer: Scorer, tmp_path: Path
) -> None:
    async def run() -> None:
        store = SqliteStore(tmp_path / "history.db", durable=False)
        pipeline = Pipeline({"m": scorer}, store)
        before, refused, after = ([t] for t in transactions(3, 81, customers=1, merchants=1))
        await score(pipeline, before)
        with fault(store.path):
            started = time.monotonic()
            with pytest.raises(StoreDown, match=reason):
                await score(pipeline, refused)
            assert time.monotonic() - started < WAIT_S + 1
            started = time.monotonic()
            for _ in range(5):  # nobody waits for what is known to be off
                with pytest.raises(StoreDown):
                    await score(pipeline, refused)
            assert time.monotonic() - started < 0.5
            shown = described(store.health())
            assert shown["status"] == "refusing"
            assert shown["stores"][0]["store"] == "sqlite"
            assert store.stats().off == {"sqlite": 1}
        await until_back(store)
        assert described(store.health())["status"] == "ready"
        assert (await store.recall([refused[0]["transaction_id"]], [], [])).decided == {}  # nor later
        (row,) = await score(pipeline, after)
        assert row["degraded"] == []
        profile = await store.profile(before[0]["customer_id"])
        assert profile is not None
        assert profile.state["count"].tolist() == [2]
        await pipeline.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_gone_takes_nothing(is_replaced: bool, scorer: Scorer, tmp_path: Path) -> None:
    async def run() -> None:
        store = SqliteStore(tmp_path / "state" / "history.db", durable=False)
        pipeline = Pipeline({"m": scorer}, store)
        first, second = ([t] for t in transactions(2, 82))
        await score(pipeline, first)
        shutil.rmtree(tmp_path / "state")
        if is_replaced:
            await SqliteStore(tmp_path / "state" / "history.db").close()
        shown = described(store.health())  # nobody has sent anything since
        assert shown["status"] == "refusing"
        assert shown["stores"][0]["needs_operator"]
        with pytest.raises(StoreDown, match="was removed or replaced while it was open; put it back and restart"):
            await score(pipeline, second)
        assert described(store.health())["status"] == "refusing"
        await pipeline.close()

    asyncio.run(run())


def test_a_lock_that_is_kept_at_the_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraud.stores.sqlite_file.START_WAIT_S", 0.2)
    asyncio.run(SqliteStore(tmp_path / "history.db").close())
    with (
        flocked(tmp_path / "history.db"),
        pytest.raises(StoreError, match=r"another process keeps the lock .*history\.db-lock; end it"),
    ):
        SqliteStore(tmp_path / "history.db")


def serve_until_it_ends(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [
        Path(sys.executable).parent / "bentoml",
        "serve",
        "service:FraudBento",
        "--port",
        str(free_port()),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return store_of_tiny_models(tmp_path_factory.mktemp("startup"))


def test_a_state_folder_that_cannot_be_used_ends_the_start_with_one_message(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    done = serve_until_it_ends({**environment, "FRAUD_STATE_DIR": str(tmp_path / "file" / "state")})
    assert done.returncode == 1
    assert "error: the store" in done.stderr
    assert "cannot be opened" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_service_none_of_whose_workers_starts_ends(environment: dict[str, str], tmp_path: Path) -> None:
    """What a worker alone opens: the challenger's own file, where a folder stands."""
    (tmp_path / "shadow.db").mkdir()
    done = serve_until_it_ends({**environment, "FRAUD_STATE_DIR": str(tmp_path), "FRAUD_SHADOW": "true"})
    assert done.returncode == 1
    assert "this worker cannot start: " in done.stderr + done.stdout
    assert "error: no worker could start in 3 tries; the log says why" in done.stderr


def test_readiness_says_that_the_state_folder_is_gone(environment: dict[str, str], tmp_path: Path) -> None:
    with bentoml_serve({**environment, "FRAUD_STATE_DIR": str(tmp_path / "state")}, tmp_path / "log") as url:
        assert asked(f"{url}/readyz")[1]["status"] == "ready"
        shutil.rmtree(tmp_path / "state")
        status, answer = asked(f"{url}/readyz")
        assert status == 503
        assert answer["error"]["code"] == "not_ready"
        assert "was removed or replaced" in answer["error"]["message"]
        body = json.dumps({"instances": transactions(1, 83)}).encode()
        assert asked(f"{url}/predict", body)[0] == 503


def asked(url: str, body: bytes | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
