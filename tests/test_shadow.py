"""A challenger beside the champion, and a store that sees no personal id."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fraud.checks.sandbox import answered_score
from fraud.detectors.isolation_forest.algorithm import ISOLATION_FOREST
from fraud.detectors.lightgbm.algorithm import LIGHTGBM
from fraud.errors import SettingsError
from fraud.models.scorer import Scorer
from fraud.pipeline.canary import in_canary
from fraud.pipeline.decide import Pipeline
from fraud.pipeline.shadow import MAX_WAITING, Shadow
from fraud.stores.log import decode_record
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.personal import Pseudonymous
from fraud.stores.protocol import Store
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog
from tests.asking import ask
from tests.tiny import transactions, write_tiny_bundle

NAME = "fraud-transaction"


@pytest.fixture(
    scope="module",
    params=[(LIGHTGBM, ISOLATION_FOREST), (ISOLATION_FOREST, ISOLATION_FOREST)],
    ids=["both algorithms", "isolation forests alone"],
)
def scorers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Scorer]:
    """A champion and a challenger, of two algorithms or of one."""
    folder = tmp_path_factory.mktemp("bundles")
    return [
        Scorer.load(write_tiny_bundle(folder / str(seed), "transaction", algorithm=algorithm, seed=seed))
        for seed, algorithm in enumerate(request.param)
    ]


async def ask_one_by_one(
    scorer: Scorer, store: Store, instances: list[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    pipeline = Pipeline({NAME: scorer}, store, **options)
    answers = [(await ask(pipeline, [instance]))[0] for instance in instances]
    await pipeline.close()
    return answers


def test_canary_share_is_of_customers_and_the_same_ones() -> None:
    customers = [f"c{n}" for n in range(20_000)]
    chosen = {share: {c for c in customers if in_canary(c, share)} for share in (0.0, 0.05, 0.3, 1.0)}
    assert chosen[0.0] == set()
    assert chosen[1.0] == set(customers)
    assert chosen[0.05] < chosen[0.3]
    assert len(chosen[0.05]) == pytest.approx(1000, rel=0.15)


def test_canary_answers_whole_requests_of_its_customers(scorers: list[Scorer], tmp_path: Path) -> None:
    champion, challenger = scorers

    async def run() -> None:
        pipeline = Pipeline({NAME: champion}, SqliteStore(tmp_path / "history.db"), canary_share=0.5)
        pipeline.challengers = {NAME: challenger}
        instances = transactions(120, 9)
        for i in range(0, 100, 2):
            first, second = instances[i], {**instances[i + 1], "customer_id": instances[i]["customer_id"]}
            digests = {row["model"]["digest"] for row in await ask(pipeline, [first, second])}
            expected = challenger if in_canary(first["customer_id"], 0.5) else champion
            assert digests == {expected.name.digest}
        mixed = await ask(pipeline, instances[100:])
        assert {row["model"]["digest"] for row in mixed} == {champion.name.digest}
        await pipeline.close()

    asyncio.run(run())


def test_shadow_records_what_the_challenger_would_have_said(scorers: list[Scorer], tmp_path: Path) -> None:
    champion, challenger = scorers
    told: list[tuple[str, int, int]] = []
    dropped: list[int] = []
    instances = transactions(60, 5)

    async def run() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        alone = await ask_one_by_one(challenger, SqliteStore(tmp_path / "alone.db"), instances)
        shadow = Shadow(tmp_path / "shadow.db", lambda *counts: told.append(counts), dropped.append)
        pipeline = Pipeline({NAME: champion}, SqliteStore(tmp_path / "history.db"), shadow=shadow)
        pipeline.challengers = {NAME: challenger}
        answers = [row for i in range(0, 60, 6) for row in await ask(pipeline, instances[i : i + 6])]
        shadow.close()
        await pipeline.close()
        return alone, answers

    alone, answers = asyncio.run(run())
    with closing(sqlite3.connect(tmp_path / "shadow.db")) as db, db:
        rows = db.execute(
            "SELECT transaction_id, champion, champion_score, challenger, decision_score, decision FROM shadows"
        ).fetchall()
    assert {row["model"]["digest"] for row in answers} == {champion.name.digest}
    assert [row[0] for row in rows] == [row["transaction_id"] for row in answers]
    assert [row[2] for row in rows] == [answered_score(row) for row in answers]
    assert [row[4] for row in rows] == [answered_score(row) for row in alone]
    assert {(row[1], row[3]) for row in rows} == {(champion.name.digest, challenger.name.digest)}
    agreed = sum(a["decision"] == row[5] for a, row in zip(answers, rows, strict=True))
    assert (sum(t[1] for t in told), sum(t[2] for t in told)) == (agreed, 60 - agreed)
    assert dropped == []


def test_shadow_that_is_behind_leaves_out_and_counts(scorers: list[Scorer], tmp_path: Path) -> None:
    champion, challenger = scorers
    dropped: list[int] = []

    async def run() -> None:
        shadow = Shadow(tmp_path / "shadow.db", lambda *_: None, dropped.append)
        pipeline = Pipeline({NAME: champion}, SqliteStore(tmp_path / "history.db", durable=False), shadow=shadow)
        pipeline.challengers = {NAME: challenger}
        with closing(sqlite3.connect(tmp_path / "shadow.db", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")  # the shadow waits for this writer
            for instance in transactions(MAX_WAITING + 20, 6):
                await ask(pipeline, [instance])
            db.execute("ROLLBACK")
        shadow.close()
        await pipeline.close()

    asyncio.run(run())
    assert sum(dropped) in (18, 19, 20)


def test_recorded_reasons_are_the_strongest_contributions(scorers: list[Scorer], tmp_path: Path) -> None:
    scorer = scorers[0]
    asyncio.run(ask_one_by_one(scorer, SqliteStore(tmp_path / "h.db"), transactions(20, 3), record_reasons=True))
    for logged, _ in SqliteLog(tmp_path / "h.db").rows():
        decided = decode_record(logged.record)
        contributions = scorer.contributions(np.frombuffer(decided.features)[None])[0]
        by_name = dict(zip(scorer.spec.names, contributions.tolist(), strict=False))
        assert decided.reasons == sorted(by_name.items(), key=lambda item: -abs(item[1]))[:5]


def test_personal_ids_are_not_stored_and_change_no_score(scorers: list[Scorer], tmp_path: Path) -> None:
    instances = transactions(80, 4)
    again = [instances[i] for i in (0, 40, 79)]
    fields = ("customer_id", "merchant_id")
    options = StoreOptions(state_dir=tmp_path / "hidden", personal_fields=fields, personal_key="pepper")

    async def run() -> None:
        open_answers = await ask_one_by_one(scorers[0], SqliteStore(tmp_path / "open.db"), instances + again)
        store = open_store("sqlite:", options)
        assert await ask_one_by_one(scorers[0], store, instances + again) == open_answers
        store = open_store("sqlite:", options)
        known = await store.profile("c1")
        assert known is not None
        assert known.customer_id == "c1"
        assert await store.reset("c1")
        assert await store.profile("c1") is None
        await store.close()

    asyncio.run(run())
    stored = b"".join(path.read_bytes() for path in (tmp_path / "hidden").iterdir())
    rows = [decode_record(logged.record) for logged, _ in SqliteLog(tmp_path / "hidden" / "history.db").rows()]
    assert len(rows) == 80
    names = {instance["customer_id"] for instance in instances}
    assert {row.customer_id for row in rows}.isdisjoint(names)
    assert len({row.customer_id for row in rows}) == len(names)
    with closing(sqlite3.connect(tmp_path / "hidden" / "history.db")) as db, db:
        for table in ("customers", "merchants"):
            assert all(len(name) == 32 for (name,) in db.execute(f"SELECT id FROM {table}"))
    assert msgspec.msgpack.encode("c1") + msgspec.msgpack.encode("merchant_id") not in stored


def test_personal_fields_ask_for_a_key(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="FRAUD_PERSONAL_KEY"):
        open_store("sqlite:", StoreOptions(state_dir=tmp_path, personal_fields=("customer_id",)))
    first, second = (Pseudonymous(SqliteStore(tmp_path / key), ["customer_id"], key) for key in "ab")
    assert first.hashed("c1") != second.hashed("c1")
    for store in (first, second):
        asyncio.run(store.close())


def test_a_file_of_an_earlier_release_is_carried_on(tmp_path: Path) -> None:
    path = tmp_path / "shadow.db"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "CREATE TABLE shadows ("
            "processing_time_ms INTEGER NOT NULL, transaction_id TEXT, request_id TEXT NOT NULL, "
            "champion TEXT NOT NULL, champion_probability REAL NOT NULL, champion_decision TEXT NOT NULL, "
            "challenger TEXT NOT NULL, raw_margin REAL NOT NULL, fraud_probability REAL NOT NULL, "
            "decision TEXT NOT NULL) STRICT"
        )
        db.execute("INSERT INTO shadows VALUES (1, 't', 'r', 'a', 0.25, 'approve', 'b', -1.5, 0.5, 'review')")
    for _ in range(2):
        Shadow(path, lambda *_: None, lambda _: None).close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT champion_score, decision_score, decision FROM shadows").fetchall() == [
            (0.25, 0.5, "review")
        ]
