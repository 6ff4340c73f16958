"""Checks of the decision log: verify its chain, export its decisions, replay them."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec
import numpy as np

from fraud.decisions.chain import Anchor, Break, Verifier
from fraud.decisions.record import DecisionRecord
from fraud.decisions.rules.names import outputs_of
from fraud.decisions.rules.sets import Rules, RuleSet
from fraud.decisions.verdict import Ruling, Verdict, ruled, verdict_of
from fraud.errors import FraudError
from fraud.models.beside import Beside, measure
from fraud.models.scorer import Score, Scorer
from fraud.schema import Row, Said
from fraud.stores.log import DecisionLog
from fraud.stores.rows import decode_label, decode_record

REPLAY_AT_ONCE = 1000


@dataclass
class Verified:
    """The result of a walk: `rows` valid rows, up to `head`."""

    rows: int
    head: Anchor
    broken: Break | None = None


def verify_chain(log: DecisionLog, key: bytes = b"", known: Anchor | None = None) -> Verified:
    """Walk the whole chain.

    Parameters
    ----------
    log : DecisionLog
    key : bytes
        What the service was started with; see `fraud.decisions.chain.audit_key_of`.
    known : Anchor, optional
        A place and link noted earlier, which the chain must contain: detects a log that was truncated, or rewritten by
        someone who has the key.
    """
    end, start = log.head(), log.anchor()
    verifier = Verifier(start, key)
    rows = 0

    def broken(sequence: int, reason: str) -> Verified:
        return Verified(rows, verifier.head, Break(sequence, reason))

    try:
        for logged, row_key in log.rows(until=end.sequence):
            wrong = verifier.check(logged)
            if wrong is not None:
                return Verified(rows, verifier.head, wrong)
            try:
                expected = decode_record(logged.record).key
            except (msgspec.DecodeError, ValueError) as error:
                return broken(logged.sequence, f"row {logged.sequence} cannot be read: {error}")
            if expected != row_key:
                return broken(logged.sequence, f"row {logged.sequence} is found under the key of another")
            if known is not None and logged.sequence == known.sequence and logged.link != known.link:
                return broken(logged.sequence, f"row {logged.sequence} has another link than the one noted down")
            rows += 1
    except sqlite3.DatabaseError as error:
        return broken(verifier.head.sequence + 1, f"the file is damaged after row {verifier.head.sequence}: {error}")
    if verifier.head != end:
        return broken(
            verifier.head.sequence + 1, f"the log ends at row {verifier.head.sequence} instead of {end.sequence}"
        )
    if known is not None and not start.sequence <= known.sequence <= end.sequence:
        return broken(known.sequence, f"row {known.sequence}, noted down before, is not in the log")
    misplaced = log.misplaced(key)
    if misplaced == "anchor":
        return broken(start.sequence, f"the service did not let the log begin after row {start.sequence}")
    if misplaced == "labels":
        return broken(end.sequence + 1, "the service did not let the labels end where they do: they were cut off")
    if misplaced is not None:
        return broken(end.sequence + 1, f"the service did not let the log end at row {end.sequence}: it was cut off")
    reason = log.beyond(key) or _broken_labels(log, key)
    if reason is not None:
        return broken(end.sequence + 1, reason)
    return Verified(rows, verifier.head)


def _broken_labels(log: DecisionLog, key: bytes) -> str | None:
    """Walk the chain of labels; return the first fault, or None."""
    end = log.place("labels").anchor
    verifier = Verifier(Anchor(), key)
    for logged, row_key in log.labels():
        if logged.sequence > end.sequence:
            break
        wrong = verifier.check(logged)
        if wrong is not None:
            return f"of the labels, {wrong.reason}"
        if decode_label(logged.record).key != row_key:
            return f"of the labels, row {logged.sequence} is found under the key of another"
    if verifier.head != end:
        return f"the labels end at row {verifier.head.sequence} instead of {end.sequence}"
    return None


def exported(log: DecisionLog, from_ms: int | None = None, until_ms: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield decisions as plain values, in the order of the chain, those made in [from, until) ms."""
    for logged, _ in log.rows():
        decided = decode_record(logged.record)
        if (from_ms or 0) <= decided.processing_time_ms and (until_ms is None or decided.processing_time_ms < until_ms):
            row = msgspec.to_builtins(decided)
            row["fingerprint"] = decided.fingerprint.hex()
            row["features"] = [None if math.isnan(x) else x for x in np.frombuffer(decided.features).tolist()]
            for name in ("event_time", "processing_time"):
                row[name] = datetime.fromtimestamp(row.pop(f"{name}_ms") / 1000, UTC).isoformat(timespec="milliseconds")
            yield {"sequence": logged.sequence, "link": logged.link.hex(), **row}


@dataclass
class Difference:
    """One field of one decision that the replay computed differently."""

    sequence: int
    transaction_id: str | None
    field: str
    recorded: Any
    replayed: Any


@dataclass
class Replayed:
    """The result of a replay by model digest, with the reasons for decisions that could not be replayed."""

    rows: dict[str, int] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def replay(
    log: DecisionLog,
    scorer_of: Callable[[str, str], Scorer],
    rules_of: Callable[[str], RuleSet],
    last: int | None = None,
    at_most: int = 100,
) -> Replayed:
    """Score recorded decisions again, each by the version that made it, and compare every bit.

    Parameters
    ----------
    log : DecisionLog
    scorer_of : callable
        Returns the scorer of (name, digest), or raises a `FraudError` that says why it cannot.
    rules_of : callable
        Returns the rule set of a digest, or raises in the same way.
    last : int, optional
        Replay only this many of the latest decisions.
    at_most : int
        Differences that are kept.
    """
    result = Replayed()
    scorers: dict[str, Scorer] = {}
    rules: dict[tuple[str, str], Rules] = {}
    after = 0 if last is None else max(0, log.head().sequence - last)
    rows = ((logged.sequence, decode_record(logged.record)) for logged, _ in log.rows(after))
    while some := list(islice(rows, REPLAY_AT_ONCE)):
        for by in sorted({_made_by(decided) for _, decided in some}):
            group = [(sequence, decided) for sequence, decided in some if _made_by(decided) == by]
            for name, digest in by:
                if digest not in scorers and digest not in result.failures:
                    try:
                        scorers[digest] = scorer_of(name, digest)
                    except FraudError as error:
                        result.failures[digest] = error.message
            versions = [scorers[digest] for _, digest in by if digest in scorers]
            if len(versions) == len(by):
                digest = versions[0].name.digest
                result.rows[digest] = result.rows.get(digest, 0) + len(group)
                for rule_set in sorted({r.ruling.rules for _, r in group if r.ruling is not msgspec.UNSET}):
                    if (digest, rule_set) not in rules and rule_set not in result.failures:
                        try:
                            rules[digest, rule_set] = Rules(rules_of(rule_set), versions[0].spec)
                        except FraudError as error:
                            result.failures[rule_set] = error.message
                known = {rule_set: made for (model, rule_set), made in rules.items() if model == digest}
                beside = Beside(versions[1]) if len(by) > 1 else None
                found = _differences(versions[0], beside, known, group)
                result.differences += islice(found, max(0, at_most - len(result.differences)))
    return result


def _made_by(decided: DecisionRecord) -> tuple[tuple[str, str], ...]:
    """Return name and digest of the version that decided, and of the anomaly model that was beside it."""
    own = (decided.model_name, decided.model_digest)
    return (own,) if decided.anomaly_model is msgspec.UNSET else (own, decided.anomaly_model)


def _differences(
    scorer: Scorer,
    beside: Beside | None,
    rules: Mapping[str, Rules],
    group: Iterable[tuple[int, DecisionRecord]],
) -> Iterator[Difference]:
    group = list(group)
    width = len(scorer.spec.features)
    for sequence, decided in group:
        if len(decided.features) != 8 * width:
            yield Difference(sequence, decided.transaction_id, "features", len(decided.features) // 8, width)
    whole = [(sequence, decided) for sequence, decided in group if len(decided.features) == 8 * width]
    if not whole:
        return
    X = np.array([np.frombuffer(decided.features) for _, decided in whole])
    scores, rows = scorer.score(X), [_row_of(decided) for _, decided in whole]
    measured = measure(scorer, beside, X, scores, rows)
    for (sequence, then), x, score in zip(whole, X.tolist(), measured.rows(scores), strict=True):
        if then.ruling is msgspec.UNSET:
            verdict, ruling = verdict_of(scorer.policy, score.decision_score, score.severity), None
        elif then.ruling.rules in rules:
            verdict, ruling = _ruled_again(scorer, rules[then.ruling.rules], then, then.ruling, x, score)
        else:
            continue
        now: dict[str, Any] = {
            "raw_margin": score.raw_margin,
            "fraud_probability": score.fraud_probability,
            "anomaly": msgspec.UNSET if score.anomaly is None else score.anomaly,
            **verdict._asdict(),
        }
        for name, value in now.items():
            if getattr(then, name) != value:
                yield Difference(sequence, then.transaction_id, name, getattr(then, name), value)
        for name in Ruling.__struct_fields__ if ruling is not None else ():
            before, value = getattr(then.ruling, name), getattr(ruling, name)
            if name != "facts" and before != value:  # facts are what is read, not what comes out
                yield Difference(sequence, then.transaction_id, name, before, value)


def _ruled_again(
    scorer: Scorer, rules: Rules, then: DecisionRecord, said: Ruling, x: list[float], score: Score
) -> tuple[Verdict, Ruling]:
    """Decide again from the record alone: its features, its facts, and which rules were stopped then."""
    outputs = outputs_of(score.fraud_probability, score.anomaly)
    facts = said.facts if len(said.facts) == rules.n_facts else [math.nan] * rules.n_facts  # shows as a difference
    columns = [*x, *outputs, *facts]
    fired = rules.valid(rules.fired(columns), then.processing_time_ms)
    return ruled(
        scorer.policy,
        score.decision_score,
        rules,
        columns,
        fired,
        said.stopped_hits,
        said.snoozed_hits,
        said.lists_revision,
        score.severity,
    )


def _row_of(decided: DecisionRecord) -> Row:
    """Return what words say of a recorded transaction: its time, and its amount in its currency."""
    said: dict[str, Said] = msgspec.json.decode(decided.transaction) if decided.transaction else {}
    roles = {"currency": said["currency"]} if "currency" in said else {}
    return Row(None, (), b"", decided.event_time_ms, decided.customer_id, decided.amount, roles)
