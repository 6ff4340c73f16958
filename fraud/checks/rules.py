"""`fraud verify rules`: past decisions decided again in time, sets and lists changed under load, replay over sets."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console

from fraud.checks.audit import Replayed, replay
from fraud.checks.rule_effect import PastDecisions
from fraud.checks.sandbox import Sandbox, connected, fresh, sandbox
from fraud.decisions.record import DecisionRecord
from fraud.decisions.rules.effect import NONE
from fraud.decisions.rules.lists import ListEntry, Lists
from fraud.decisions.rules.names import outputs_of
from fraud.decisions.rules.sets import MODEL, Rule, Rules, RuleSet
from fraud.decisions.verdict import ACTIONS, ruled, verdict_of
from fraud.models.bundle import short
from fraud.models.find import IN_PRODUCTION
from fraud.models.rule_sets import RuleSets
from fraud.models.scorer import Scorer
from fraud.stores.lists import SqliteLists
from fraud.stores.log import decode_record
from fraud.stores.sqlite import SqliteStore
from fraud.stores.sqlite_log import SqliteLog

RULES = 100
LIMIT_S = 10.0
"""For a million decisions under a changed set, reading included."""
LEAST_S = 2.0
"""Allowed for any number: rules are compiled once, however few the decisions are."""
AT_ONCE = 2000
DAY_MS = 86_400_000
COMPARED = 50_000
ROWS = 3

app = typer.Typer(no_args_is_help=True)
out = Console(soft_wrap=True, highlight=False)


@dataclass
class Changed:
    """The answers under sets and lists that changed all the time."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    by_set: Counter[str] = field(default_factory=Counter)


@app.command()
def rules(
    decisions: Annotated[int, typer.Option(min=1000, help="Recorded decisions to decide again.")] = 1_000_000,
    changes: Annotated[int, typer.Option(min=6, help="Changes of sets and lists under load, half of each.")] = 200,
    model: Annotated[
        str, typer.Option(help="A bundle folder, or NAME[:REF]; what is in production if none.")
    ] = IN_PRODUCTION,
    workers: Annotated[int, typer.Option(min=1)] = 2,
    users: Annotated[int, typer.Option(min=1, help="Callers that ask without a pause.")] = 4,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Decide recorded transactions again under 100 rules, change sets and lists under load, replay over all sets.

    A million decisions are decided again in 10 s of two cores, reading the store included, as one by one; no request
    fails and none is answered by two sets; the replay finds no difference.
    """
    with sandbox(model, workers) as box:
        in_time = again(box, decisions, seed)
        changed = asyncio.run(changing(box, changes, users, seed))
        box.kill()
        replayed = replay_of(box)
    out.print(
        f"{changes} changes of sets and lists under {changed.requests} requests in {workers} workers: failed "
        f"{len(changed.failed)}, answered by two sets {len(changed.mixed)}, by set {dict(changed.by_set)}"
    )
    for what in [*changed.failed, *changed.mixed][:5]:
        out.print(what, style="red", markup=False)
    out.print(
        f"{sum(replayed.rows.values())} decisions replayed: differences {len(replayed.differences)}, sets or versions "
        f"not found {len(replayed.failures)}"
    )
    whole = not (changed.failed or changed.mixed or replayed.differences or replayed.failures)
    if not (in_time and whole and len(changed.by_set) == 3):
        raise typer.Exit(1)


def again(box: Sandbox, decisions: int, seed: int) -> bool:
    """Record decisions, decide them again under another set, and compare a part with deciding one by one."""
    digest = box.digests[0]
    scorer = Scorer.of(box.store.read(f"{box.name}:{short(digest)}", digest))
    path = box.folder / "past.db"
    asyncio.run(recorded(path, scorer, decisions, seed))
    some = random_set(scorer, seed)
    log = SqliteLog(path)
    started, cpu = time.perf_counter(), time.process_time()
    past = PastDecisions(some, lambda name, digest: scorer.bundle, RuleSets(box.folder).read, Lists())
    past.read(log)
    effect = past.effect()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    differences, compared = different(log, past, Rules(some, scorer.spec), scorer)
    limit_s = max(LIMIT_S * decisions / 1e6, LEAST_S)
    out.print(
        f"{effect.transactions} recorded decisions decided again under {len(effect.rules)} rules in {seconds:.1f} s "
        f"({cpu_s:.1f} s of CPU), allowed {limit_s:.1f} s of two cores; {compared} compared with one by one: "
        f"differences {differences}"
    )
    return effect.transactions == decisions and differences == 0 and seconds <= limit_s and compared > 0


async def recorded(path: Path, scorer: Scorer, decisions: int, seed: int) -> None:
    """Fill a log with decisions on rows like the golden ones, made over 90 days."""
    rng = np.random.default_rng(seed)
    golden = np.array([[np.nan if v is None else v for v in g.features] for g in scorer.bundle.golden])
    categorical = [feature.type != "numeric" for feature in scorer.spec.features]
    store = SqliteStore(path, durable=False)
    has_history = scorer.spec.kind == "transaction"
    for start in range(0, decisions, AT_ONCE):
        n = min(AT_ONCE, decisions - start)
        X = golden[rng.integers(0, len(golden), n)]
        X[:, ~np.array(categorical)] *= rng.lognormal(0.0, 0.5, (n, len(categorical) - sum(categorical)))
        records = []
        for i, (x, score) in enumerate(zip(X, scorer.score(X).rows(), strict=True), start):
            verdict = verdict_of(scorer.policy, score.decision_score, score.severity)
            time_ms = 1_767_225_600_000 + 90 * DAY_MS * i // decisions
            records.append(
                DecisionRecord(
                    f"t{i}",
                    b"",
                    scorer.name.name,
                    scorer.name.digest,
                    x.tobytes(),
                    score.raw_margin,
                    score.fraud_probability,
                    *verdict,
                    degraded=[],
                    event_time_ms=time_ms,
                    processing_time_ms=time_ms,
                    request_id="",
                    customer_id=f"c{i % 9973}" * has_history,
                    merchant_id=f"m{i % 997}" if has_history else None,
                    amount=float(i % 500 + 1),
                    anomaly=msgspec.UNSET if score.anomaly is None else score.anomaly,
                )
            )
        await store.record(records, None)
    await store.close()


def random_set(scorer: Scorer, seed: int) -> RuleSet:
    """Return 100 rules of two to four conditions on the columns of a model."""
    rng = random.Random(seed)
    numeric = [feature.name for feature in scorer.spec.features if feature.type == "numeric"]
    limits = np.array([[np.nan if v is None else v for v in g.features] for g in scorer.bundle.golden])
    at = {feature.name: i for i, feature in enumerate(scorer.spec.features)}

    def condition() -> str:
        name = rng.choice(numeric)
        values = limits[:, at[name]]
        value = float(rng.choice(values[~np.isnan(values)].tolist() or [1.0])) * rng.uniform(0.7, 1.5)
        return f"`{name}` {rng.choice(['>', '<', '>=', '<='])} {value:.6f}"

    made = [
        Rule(
            id=f"r{i}",
            when=f"({condition()} || missing(`{rng.choice(numeric)}`)) && "
            + " && ".join(condition() for _ in range(rng.randint(1, 3))),
            outcome=None if i % 10 == 0 else rng.choice(ACTIONS),
            odds=rng.uniform(0.2, 5.0) if i % 10 == 0 else None,
            shadow=i % 8 == 1,
            priority=rng.randint(0, 3),
        )
        for i in range(RULES)
    ]
    return RuleSet(model=scorer.name.name, rules=tuple(made))


def different(log: SqliteLog, past: PastDecisions, checked: Rules, scorer: Scorer) -> tuple[int, int]:
    """Decide some of the decisions one by one; return how many come out otherwise, and of how many."""
    now = past.redecided()
    step = max(1, len(past.ids) // COMPARED)
    differences = compared = 0
    for i, (logged, _) in enumerate(log.rows()):
        if i % step:
            continue
        record = decode_record(logged.record)
        x = np.frombuffer(record.features).tolist()
        columns = [*x, *outputs_of(record.fraud_probability, record.anomaly)]
        fired = checked.fired(columns)
        verdict, ruling = ruled(scorer.policy, record.decision_score, checked, columns, fired, severity=record.severity)
        decided_by = MODEL if now.first[i] == NONE else checked.rules[now.first[i]].id
        compared += 1
        differences += (verdict.decision, ruling.decided_by) != (ACTIONS[now.action[i]], decided_by)
    return differences, compared


async def changing(box: Sandbox, changes: int, users: int, seed: int) -> Changed:
    """Change sets and lists in turn while callers ask without a pause."""
    sets, lists = RuleSets(box.folder), SqliteLists(box.folder / "state" / "lists.db")
    digests = []
    for name in ("a", "b", "c"):
        both = (
            Rule(id=f"{name}_first", when="true", outcome="review", max_share=1.0),
            Rule(id=f"{name}_second", when="true", outcome="challenge", max_share=1.0),
        )
        digests.append(sets.save(RuleSet(model=box.name, rules=both), who="fraud verify").digest)
    sets.promote(box.name, digests[0], who="fraud verify", why="")
    await box.start()
    changed, done = Changed(), asyncio.Event()

    async def ask_without_pause() -> None:
        async with connected(box.port) as client:
            while not done.is_set():
                rows = [fresh(box.instances[(changed.requests + i) % len(box.instances)]) for i in range(ROWS)]
                changed.requests += 1
                status, body = await client.ask("POST", "/predict", json.dumps({"instances": rows}).encode())
                _note(changed, status, body)

    callers = [asyncio.create_task(ask_without_pause()) for _ in range(users)]
    rng = random.Random(seed)
    for i in range(changes):
        if i % 2:
            entry = ListEntry("blocked", f"c{i}", author="fraud verify", changed_ms=i)
            await asyncio.to_thread(lists.change, [entry])
        else:
            await asyncio.to_thread(sets.promote, box.name, digests[(i // 2 + 1) % 3], who="fraud verify", why="")
        await asyncio.sleep(rng.uniform(0.1, 0.4))
    done.set()
    for result in await asyncio.gather(*callers, return_exceptions=True):
        if isinstance(result, BaseException):
            changed.failed.append(f"connection failed: {result!r}")
    return changed


def _note(changed: Changed, status: int, body: bytes) -> None:
    if status != 200:
        changed.failed.append(f"{status} {body[:300]!r}")
        return
    predictions: list[dict[str, Any]] = json.loads(body)["predictions"]
    seen = {tuple(row["rules_hit"]) for row in predictions} | {(row["decided_by"],) for row in predictions}
    names = {hit.partition("_")[0] for hits in seen for hit in hits}
    if len(names) == 1:
        changed.by_set[names.pop()] += 1
    else:
        changed.mixed.append(json.dumps(predictions)[:500])


def replay_of(box: Sandbox) -> Replayed:
    """Replay all decisions of the server's log, each by its version and its set."""
    return replay(
        SqliteLog(box.log),
        lambda name, digest: Scorer.of(box.store.read(f"{name}:{short(digest)}", digest)),
        RuleSets(box.folder).read,
    )
