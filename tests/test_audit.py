"""The decision log: nothing acknowledged is lost, nothing can change unseen, all of it comes out the same again."""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fraud.checks.audit import exported, replay, verify_chain
from fraud.cli.audit import app
from fraud.decisions.chain import GENESIS, Anchor, Logged, Verifier, audit_key_of, extend, link_of
from fraud.decisions.marks import place_mark
from fraud.decisions.record import DecisionRecord
from fraud.decisions.rules.sets import RuleSet
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.errors import RegistryError, StoreError
from fraud.models.scorer import Scorer
from fraud.pipeline.decide import Pipeline
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.processes import KEY, decided
from tests.servers import wait_until
from tests.tiny import transactions, write_tiny_bundle

ROOT = Path(__file__).parent.parent


def write(path: Path, records: list[DecisionRecord], key: bytes = KEY) -> SqliteLog:
    async def record() -> None:
        store = SqliteStore(path, durable=False, audit_key=key)
        for some in (records[i : i + 7] for i in range(0, len(records), 7)):
            await store.record(some, None)
        await store.close()

    asyncio.run(record())
    return SqliteLog(path, key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


@pytest.fixture
def log(path: Path) -> SqliteLog:
    return write(path, [decided(n, made_ms=n * 1000) for n in range(1, 31)])


def tamper(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        assert db.execute(statement, values).rowcount == 1


def test_untouched_log_is_whole(log: SqliteLog) -> None:
    verified = verify_chain(log, KEY)
    assert verified.broken is None
    assert verified.rows == 30
    assert verified.head == log.head()
    link = GENESIS
    for logged, _ in log.rows():
        link = link_of(link, logged.record, KEY)
    assert verified.head == Anchor(30, link)


@given(place=st.integers(0), bit=st.integers(0, 7))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_any_record_names_its_row(log: SqliteLog, path: Path, place: int, bit: int) -> None:
    rows = [logged for logged, _ in log.rows()]
    row = rows[place % len(rows)]
    at = place // len(rows) % len(row.record)
    changed = row.record[:at] + bytes([row.record[at] ^ (1 << bit)]) + row.record[at + 1 :]
    tamper(path, "UPDATE decisions SET record = ? WHERE seq = ?", changed, row.sequence)
    try:
        broken = verify_chain(log, KEY).broken
        assert broken is not None
        assert broken.sequence == row.sequence
        assert broken.reason == f"row {row.sequence} is not what was recorded, or the key is another one"
    finally:
        tamper(path, "UPDATE decisions SET record = ? WHERE seq = ?", row.record, row.sequence)


@pytest.mark.parametrize(
    ("statement", "row", "reason"),
    [
        ("DELETE FROM decisions WHERE seq = 12", 12, "row 12 is missing: row 13 follows 11"),
        ("DELETE FROM decisions WHERE seq = 1", 1, "row 1 is missing: row 2 follows 0"),
        ("DELETE FROM decisions WHERE seq = 30", 30, "the log ends at row 29 instead of 30"),
        ("UPDATE decisions SET seq = 99 WHERE seq = 30", 30, "the log ends at row 29 instead of 30"),
        ("UPDATE decisions SET link = zeroblob(32) WHERE seq = 5", 5, "row 5 is not what was recorded"),
        ("UPDATE decisions SET key = 'stranger' WHERE seq = 8", 8, "row 8 is found under the key of another"),
    ],
)
def test_tampering_names_the_row(log: SqliteLog, path: Path, statement: str, row: int, reason: str) -> None:
    tamper(path, statement)
    broken = verify_chain(log, KEY).broken
    assert broken is not None
    assert broken.sequence == row
    assert reason in broken.reason


def test_swapped_rows_show(log: SqliteLog, path: Path) -> None:
    tamper(path, "UPDATE decisions SET seq = -1 WHERE seq = 3")
    tamper(path, "UPDATE decisions SET seq = 3 WHERE seq = 4")
    tamper(path, "UPDATE decisions SET seq = 4 WHERE seq = -1")
    broken = verify_chain(log, KEY).broken
    assert broken is not None
    assert broken.sequence == 3


def test_chain_written_anew_without_the_key_shows_at_its_first_row(log: SqliteLog, path: Path) -> None:
    rows = [logged.record for logged, _ in log.rows()]
    with closing(sqlite3.connect(path)) as db, db:
        for row in extend(Anchor(), rows, audit_key_of("a guess")):
            db.execute("UPDATE decisions SET link = ? WHERE seq = ?", (row.link, row.sequence))
    broken = verify_chain(log, KEY).broken
    assert broken is not None
    assert broken.sequence == 1


def cut_off(path: Path, log: SqliteLog, at: int, mark: bytes | None) -> None:
    """Remove the rows after one and let the log end there."""
    last = next(logged for logged, _ in log.rows(at - 1))
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM decisions WHERE seq > ?", (at,))
        db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'head'", (at, last.link, mark))


def test_log_cut_off_with_its_head_shows(log: SqliteLog, path: Path) -> None:
    noted, mark = log.head(), log.place("head").mark
    for forged in (None, mark, bytes(32)):
        cut_off(path, log, 20, forged)
        broken = verify_chain(log, KEY).broken
        assert broken == (21, "the service did not let the log end at row 20: it was cut off")
        broken = verify_chain(log, KEY, noted).broken
        assert broken is not None
        assert broken.reason == "row 30, noted down before, is not in the log"


def test_a_log_put_back_as_a_whole_shows_by_a_head_noted_before(path: Path) -> None:
    log = write(path, [decided(n) for n in range(20)])
    mark = log.place("head").mark
    noted = write(path, [decided(n) for n in range(20, 30)]).head()
    cut_off(path, log, 20, mark)
    assert verify_chain(log, KEY).broken is None
    broken = verify_chain(log, KEY, noted).broken
    assert broken is not None
    assert broken.reason == "row 30, noted down before, is not in the log"


def test_nothing_is_recorded_behind_a_log_that_was_set_back(log: SqliteLog, path: Path) -> None:
    mark = log.place("head").mark

    async def record(store: SqliteStore, n: int) -> None:
        await store.record([decided(n)], None)

    async def run() -> None:
        store = SqliteStore(path, durable=False, audit_key=KEY)
        await store.open()
        await record(store, 31)  # has seen row 31
        cut_off(path, log, 20, None)
        with pytest.raises(StoreError, match="was changed at its end, row 20, or FRAUD_AUDIT_KEY is another one"):
            await record(store, 32)
        cut_off(path, log, 20, place_mark("head", Anchor(20, next(log.rows(19)).logged.link), KEY))  # one of its past
        with pytest.raises(StoreError, match="went back from row 31 to row 20"):
            await record(store, 32)
        await store.close()
        for key in (audit_key_of("another"), b""):
            other = SqliteStore(path, durable=False, audit_key=key)
            with pytest.raises(StoreError, match="FRAUD_AUDIT_KEY is another one"):
                await other.open()
            await other.close()

    assert mark is not None
    asyncio.run(run())


def test_a_beginning_that_was_moved_shows_and_retention_does_not_hide_it(log: SqliteLog, path: Path) -> None:
    link = next(log.rows(5)).logged.link
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM decisions WHERE seq <= 6")
        db.execute("UPDATE chain SET seq = 6, link = ? WHERE place = 'anchor'", (link,))
    assert verify_chain(log, KEY).broken == (6, "the service did not let the log begin after row 6")
    with pytest.raises(StoreError, match="the decision log was changed where it begins or ends"):
        log.forget(11_000)


def test_retention_keeps_what_was_changed_to_be_looked_at(log: SqliteLog, path: Path) -> None:
    tamper(path, "UPDATE decisions SET record = zeroblob(9) WHERE seq = 4")
    with pytest.raises(StoreError, match="row 4 is not what was recorded"):
        log.forget(11_000)
    with pytest.raises(StoreError, match="FRAUD_AUDIT_KEY is not the service's; nothing was removed"):
        SqliteLog(path).forget(11_000)
    assert log.anchor().sequence == 0


def test_rows_behind_the_end_show(log: SqliteLog, path: Path) -> None:
    tamper(path, "INSERT INTO decisions SELECT 40, 'x', record, link FROM decisions WHERE seq = 3")
    assert verify_chain(log, KEY).broken == (31, "row 40 stands behind the end of the log, row 30")


def test_damaged_file_is_reported_not_raised(log: SqliteLog, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'decisions'").fetchone()
        (size,) = db.execute("PRAGMA page_size").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * size : (root - 1) * size + 100] = b"\xff" * 100
    path.write_bytes(content)
    assert "the file is damaged" in verify_chain(log, KEY).broken.reason  # type: ignore[union-attr]


@given(
    records=st.lists(st.binary(max_size=50), max_size=20), key=st.binary(max_size=64), cuts=st.lists(st.integers(0, 20))
)
def test_chain_does_not_depend_on_how_it_was_batched(records: list[bytes], key: bytes, cuts: list[int]) -> None:
    whole = list(extend(Anchor(), records, key))
    pieces: list[Logged] = []
    bounds = sorted({0, len(records), *(cut for cut in cuts if cut <= len(records))})
    for begin, end in pairwise(bounds):
        head = Anchor(pieces[-1].sequence, pieces[-1].link) if pieces else Anchor()
        pieces += extend(head, records[begin:end], key)
    assert pieces == whole
    verifier = Verifier(Anchor(), key)
    assert [verifier.check(row) for row in whole] == [None] * len(whole)


def test_retention_moves_the_beginning_and_keeps_the_chain(log: SqliteLog, path: Path) -> None:
    assert log.forget(11_000) == 10
    assert log.anchor().sequence == 10
    assert [logged.sequence for logged, _ in log.rows()] == list(range(11, 31))
    assert verify_chain(log, KEY).broken is None
    write(path, [decided(31)])
    assert verify_chain(log, KEY).rows == 21
    assert log.forget(10**15) == 21
    write(path, [decided(32)])
    verified = verify_chain(log, KEY)
    assert (verified.rows, verified.head.sequence, verified.broken) == (1, 32, None)


def test_retention_while_a_service_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraud.stores.log.FORGET_AT_ONCE", 20)

    async def both() -> None:
        store = SqliteStore(path, durable=False, audit_key=KEY)
        await store.record([decided(n) for n in range(200)], None)
        removal = asyncio.create_task(asyncio.to_thread(SqliteLog(path, KEY).forget, 5_000))
        for n in range(200, 260):
            await store.record([decided(n, made_ms=9_000)], None)
        assert await removal == 200
        await store.close()

    asyncio.run(both())
    verified = verify_chain(SqliteLog(path), KEY)
    assert (verified.rows, verified.broken) == (60, None)


def test_export_says_all(log: SqliteLog) -> None:
    rows = list(exported(log, from_ms=5_000, until_ms=8_000))
    assert [row["sequence"] for row in rows] == [5, 6, 7]
    assert rows[0]["features"] == [1.0, None]
    assert rows[0]["processing_time"] == "1970-01-01T00:00:05.000+00:00"
    assert rows[0]["transaction_id"] == "t5"
    orjson.dumps(rows)


@pytest.fixture(
    scope="module",
    params=[(LIGHTGBM, ISOLATION_FOREST), (ISOLATION_FOREST, ISOLATION_FOREST)],
    ids=["both algorithms", "isolation forests alone"],
)
def scorers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Scorer]:
    """Versions of two algorithms, or of one."""
    folder = tmp_path_factory.mktemp("bundles")
    return [
        Scorer.load(write_tiny_bundle(folder / str(seed), "transaction", algorithm=algorithm, seed=seed))
        for seed, algorithm in enumerate(request.param)
    ]


@pytest.fixture(scope="module")
def recorded(scorers: list[Scorer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 400 scores by two versions, swapped in the middle."""
    path = tmp_path_factory.mktemp("state") / "history.db"

    async def score() -> None:
        pipeline = Pipeline({"fraud-transaction": scorers[0]}, SqliteStore(path, durable=False))
        for i in range(0, 400, 20):
            if i == 200:
                pipeline.scorers = {"fraud-transaction": scorers[1]}
            await ask(pipeline, transactions(400, 5)[i : i + 20])
        await pipeline.close()

    asyncio.run(score())
    return path


def no_rules(digest: str) -> RuleSet:
    raise AssertionError(f"no decision was made under rules, yet {digest} is asked for")


def test_replay_gives_the_same_bits_under_both_versions(scorers: list[Scorer], recorded: Path) -> None:
    by_digest = {scorer.name.digest: scorer for scorer in scorers}
    result = replay(SqliteLog(recorded), lambda _, digest: by_digest[digest], no_rules)
    assert result.rows == dict.fromkeys(by_digest, 200)
    assert result.differences == []
    assert result.failures == {}


def test_replay_says_which_field_differs(scorers: list[Scorer], recorded: Path) -> None:
    """Scored again by the other version, which stands for a library that computes otherwise."""
    first, second = scorers
    scores = {"anomaly"} if first.measures_anomaly else {"fraud_probability"}
    wrong = {first.name.digest: second, second.name.digest: first}
    result = replay(SqliteLog(recorded), lambda _, digest: wrong[digest], no_rules)
    assert {d.field for d in result.differences} >= {"raw_margin", *scores}
    assert len(result.differences) == 100
    assert result.differences[0].transaction_id is not None


def test_replay_names_the_version_it_cannot_find(scorers: list[Scorer], recorded: Path) -> None:
    def scorer_of(name: str, digest: str) -> Scorer:
        if digest == scorers[0].name.digest:
            return scorers[0]
        raise RegistryError(f"the Bento store has no {name}")

    result = replay(SqliteLog(recorded), scorer_of, no_rules, last=250)
    assert result.failures == {scorers[1].name.digest: "the Bento store has no fraud-transaction"}
    assert result.rows == {scorers[0].name.digest: 50}


def test_commands_exit_by_what_they_find(log: SqliteLog, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAUD_STATE_DIR", str(path.parent))
    monkeypatch.setenv("FRAUD_AUDIT_KEY", "a secret")
    whole = CliRunner().invoke(app, ["verify"])
    assert whole.exit_code == 0, whole.output
    noted = whole.output.split("head: ")[1].strip()
    assert CliRunner().invoke(app, ["verify", "--noted", noted]).exit_code == 0
    exports = CliRunner().invoke(app, ["export", "--out", str(path.parent / "x.jsonl")])
    assert exports.exit_code == 0, exports.output
    assert len((path.parent / "x.jsonl").read_bytes().splitlines()) == 30
    assert CliRunner().invoke(app, ["retain", "--days", "1"]).exit_code == 0
    assert log.anchor().sequence == 0
    assert CliRunner().invoke(app, ["retain", "--days", "1", "--yes"]).exit_code == 0
    assert log.anchor().sequence == 30
    write(path, [decided(77)])
    tamper(path, "UPDATE decisions SET record = zeroblob(9) WHERE seq = 31")
    broken = CliRunner().invoke(app, ["verify"])
    assert broken.exit_code == 1
    assert "broken at row 31" in broken.output


def test_kill_of_writers_loses_and_doubles_nothing(path: Path, tmp_path: Path) -> None:
    """Three processes write at once and are killed one after another; the whole of them at the end."""
    write(path, [decided(0)])
    rng = random.Random(4)
    outputs = [tmp_path / f"acknowledged{i}" for i in range(6)]
    processes = []
    for i, output in enumerate(outputs):
        with output.open("wb") as to:
            command = [sys.executable, "-m", "tests.processes", str(path), f"w{i}"]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=to, cwd=ROOT))

    def begin(process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()

    def kill(process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    try:
        for process in processes[:3]:
            begin(process)
        for i in range(3):
            wait_until(lambda: outputs[i].stat().st_size > 400)  # noqa: B023
            time.sleep(rng.uniform(0.05, 0.3))
            kill(processes[i])
            begin(processes[i + 3])
        wait_until(lambda: all(output.stat().st_size > 400 for output in outputs[3:]))
    finally:
        for process in processes:
            kill(process)
            if process.stdin is not None:
                process.stdin.close()
    acknowledged = [key for output in outputs for line in output.read_text().split("\n")[:-1] for key in line.split()]
    in_log = [key.rpartition("\x1f")[2] for _, key in SqliteLog(path).rows()]
    assert len(acknowledged) > 100
    assert len(in_log) == len(set(in_log))
    assert set(acknowledged) <= set(in_log)
    verified = verify_chain(SqliteLog(path), KEY)
    assert (verified.broken, verified.rows) == (None, len(in_log))
