"""Where cases are kept: PostgreSQL beside the decisions, or for SQLite in a file of their own.

Cases are derived from the decision log in its order and exactly once: the place up to which the log is read is
committed in the same transaction as what is derived of it. Changes of cases take turns, so none is lost. Calls block:
they are made in a thread, or by a command.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import cast

import msgspec

from fraud.cases import case as steps
from fraud.cases.case import (
    DERIVED,
    Case,
    CaseRules,
    CaseTransaction,
    Resolution,
    Status,
    Step,
    TrailEntry,
    labels_of_case,
    subject_of,
)
from fraud.decisions.labels import Label
from fraud.errors import StoreError, UnknownCase
from fraud.settings import Settings
from fraud.stores.case_tables import CaseTables, Execute, PostgresCases, SqliteCases
from fraud.stores.log import DecisionLog, Entry, decode_record
from fraud.stores.opening import StoreOptions, open_log
from fraud.stores.urls import POSTGRESQL, REDIS

AT_ONCE = 500
"""Decisions that are read in one transaction, and cases whose labels are written in one turn."""
NO_CASES = "Redis alone keeps no cases: set FRAUD_COLD_STORE to a PostgreSQL behind it, or FRAUD_STORE to one"

_encode = msgspec.msgpack.Encoder().encode
_case = msgspec.msgpack.Decoder(Case).decode
_transaction = msgspec.msgpack.Decoder(CaseTransaction).decode


def keeps_cases(url: str, options: StoreOptions) -> bool:
    """Return whether the store that a URL names keeps a decision log, from which cases can be derived."""
    return options.cold_store is not None or url.partition(":")[0] not in REDIS


def open_cases(settings: Settings) -> CaseStore:
    """Return the cases of the store that settings name, as for `fraud.stores.opening.open_store`.

    Raises
    ------
    StoreError
        It is a Redis alone.
    """
    options, url = StoreOptions.of(settings), settings.store.url
    if not keeps_cases(url, options):
        raise StoreError(NO_CASES)
    cold = options.cold_store or url
    scheme, _, rest = cold.partition(":")
    tables: CaseTables
    if scheme in POSTGRESQL:
        tables = PostgresCases(cold)
    else:
        folder = Path(rest.removeprefix("//")).parent if rest else options.state_dir
        tables = SqliteCases(folder / "cases.db")
    cases = settings.cases
    rules = CaseRules(round(cases.window_h * 3.6e6), round(cases.claim_minutes * 6e4), round(cases.undo_s * 1000))
    return CaseStore(tables, lambda: open_log(cold, options.state_dir), rules)


class CaseStore:
    """Cases in one store, safe to use from several threads, processes and machines.

    Parameters
    ----------
    tables : CaseTables
    log : callable
        Returns the decision log that cases are derived from; raises `StoreError` if there is none yet.
    rules : CaseRules
    now_ms : callable
        The clock, ms since the epoch.
    """

    def __init__(
        self,
        tables: CaseTables,
        log: Callable[[], DecisionLog],
        rules: CaseRules | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._tables = tables
        self._log = log
        self._rules = rules or CaseRules()
        self._now_ms = now_ms

    def derive(self) -> int:
        """Derive cases from decisions not read so far; return how many were read, at most `AT_ONCE`.

        Raises
        ------
        StoreError
            The log cannot be read, or ends before the place up to which it was read.
        """
        log = self._log()
        with self._tables.writing() as do:
            ((cursor,),) = do("SELECT seq FROM {case_cursor}", ())
            with closing(cast("Generator[Entry]", log.rows(cursor))) as rows:  # whose connection ends with it
                entries = list(islice(rows, AT_ONCE))
            if not entries:
                end = log.head().sequence
                if end < cursor:
                    raise StoreError(
                        f"cases were derived up to row {cursor} of a decision log that ends at row {end}: it is "
                        "another one, or was cut off; put the log back, or begin with new cases"
                    )
                return 0
            for logged, _ in entries:
                record = decode_record(logged.record)
                if record.decision == "review":
                    self._take(
                        do, subject_of(record), record.customer_id or None, CaseTransaction.of(record), logged.sequence
                    )
            do("UPDATE {case_cursor} SET seq = ?", (entries[-1].logged.sequence,))
        return len(entries)

    def _take(self, do: Execute, subject: str, customer_id: str | None, of: CaseTransaction, sequence: int) -> None:
        now = of.processing_time_ms
        found = do(
            "SELECT body FROM {cases} WHERE subject = ? AND status IN ('open', 'claimed') ORDER BY id DESC LIMIT 1",
            (subject,),
        )
        case = _case(found[0][0]) if found else None
        if case is None or now > case.opened_ms + self._rules.window_ms:
            ((last,),) = do("SELECT coalesce(max(id), 0) FROM {cases}", ())
            case = Case(last + 1, customer_id, now, now)
        step = steps.join(case, of)
        do(
            "INSERT INTO {case_transactions} (seq, case_id, transaction_id, body) VALUES (?, ?, ?, ?)",
            (sequence, case.id, of.transaction_id, _encode(of)),
        )
        self._save(do, case, now, DERIVED, step, of.transaction_id, subject)

    def get(self, case_id: int) -> Case:
        """Return a case; raises `UnknownCase`."""
        with self._tables.reading() as do:
            return _get(do, case_id)

    def whole(self, case_id: int) -> tuple[Case, list[CaseTransaction], list[TrailEntry]]:
        """Return a case, its transactions in the order of the log, and every change; raises `UnknownCase`."""
        query = "SELECT number, time_ms, actor, step, detail FROM {case_trail} WHERE case_id = ? ORDER BY number"
        with self._tables.reading() as do:
            trail = [msgspec.convert(_as_entry(row), TrailEntry) for row in do(query, (case_id,))]
            return _get(do, case_id), _transactions(do, case_id), trail

    def find(self, status: Status | None = None, limit: int = 50) -> list[Case]:
        """Return cases of a status, or of all, the greatest expected loss first.

        A case whose claim has ended still counts as claimed here.
        """
        where = "" if status is None else "WHERE status = ?"
        query = f"SELECT body FROM {{cases}} {where} ORDER BY expected_loss DESC, id LIMIT ?"
        with self._tables.reading() as do:
            return [_case(body) for (body,) in do(query, (limit,) if status is None else (status, limit))]

    def of_transaction(self, transaction_id: str) -> list[Case]:
        """Return the cases that a transaction is in; of several models it may be in several."""
        query = "SELECT DISTINCT case_id FROM {case_transactions} WHERE transaction_id = ?"
        with self._tables.reading() as do:
            return [_get(do, case_id) for (case_id,) in sorted(do(query, (transaction_id,)))]

    def claim(self, case_id: int, actor: str) -> Case:
        """Claim a case; raises `UnknownCase` or `CaseConflict`."""
        return self._change(case_id, actor, "claimed", "", lambda case, now: steps.claim(case, actor, now, self._rules))

    def claim_next(self, actor: str) -> Case | None:
        """Claim the open case with the greatest expected loss; None if all are taken."""
        now = self._now_ms()
        order = "ORDER BY expected_loss DESC, id LIMIT 1"
        with self._tables.writing() as do:
            found = do(f"SELECT body FROM {{cases}} WHERE status = 'open' {order}", ())
            found += do(f"SELECT body FROM {{cases}} WHERE status = 'claimed' AND until_ms <= ? {order}", (now,))
            if not found:
                return None
            case = min((_case(body) for (body,) in found), key=lambda case: (-case.expected_loss, case.id))
            steps.claim(case, actor, now, self._rules)
            return self._save(do, case, now, actor, "claimed")

    def release(self, case_id: int, actor: str) -> Case:
        """Give up a claim; raises `UnknownCase` or `CaseConflict`."""
        return self._change(case_id, actor, "released", "", lambda case, now: steps.release(case, actor, now))

    def note(self, case_id: int, actor: str, text: str) -> Case:
        """Add a note to the trail; raises `UnknownCase`."""
        return self._change(case_id, actor, "noted", text, lambda case, now: None)

    def resolve(self, case_id: int, actor: str, resolution: Resolution, revision: int) -> Case:
        """Resolve a claimed case as it was seen at a revision; raises `UnknownCase` or `CaseConflict`."""
        return self._change(
            case_id,
            actor,
            "resolved",
            resolution,
            lambda case, now: steps.resolve(case, actor, resolution, revision, now, self._rules),
        )

    def undo(self, case_id: int, actor: str) -> Case:
        """Take a resolution back before its labels are written; raises `UnknownCase` or `CaseConflict`."""
        return self._change(case_id, actor, "undone", "", lambda case, now: steps.undo(case, actor, now, self._rules))

    def reopen(self, case_id: int, actor: str) -> Case:
        """Open a resolved case again; raises `UnknownCase` or `CaseConflict`."""
        return self._change(case_id, actor, "reopened", "", lambda case, now: steps.reopen(case, now))

    def due(self) -> list[tuple[Case, list[Label]]]:
        """Return the cases whose time to undo is over, and the labels of each; none of them can be undone any more.

        A case is returned until `settled` is told of it: whoever ends before that writes the same labels again.
        """
        order = "ORDER BY until_ms LIMIT ?"
        with self._tables.writing() as do:
            for (body,) in do(
                f"SELECT body FROM {{cases}} WHERE status = 'resolving' AND until_ms <= ? {order}",
                (self._now_ms(), AT_ONCE),
            ):
                case = _case(body)
                case.status = "settling"
                self._write(do, case)
            found = do(f"SELECT body FROM {{cases}} WHERE status = 'settling' {order}", (AT_ONCE,))
            cases = [_case(body) for (body,) in found]
            return [(case, labels_of_case(case, _transactions(do, case.id))) for case in cases]

    def settled(self, case_id: int, detail: str) -> None:
        """Say that the labels of a resolution are written."""
        now = self._now_ms()
        with self._tables.writing() as do:
            case = _get(do, case_id)
            if case.status == "settling":  # else another process was faster
                case.status = "resolved"
                case.labels_written |= case.resolution != "unsure"
                self._save(do, case, now, case.resolved_by, "labelled", detail)

    def close(self) -> None:
        """Let go of connections."""
        self._tables.close()

    def _change(self, case_id: int, actor: str, step: Step, detail: str, apply: Callable[[Case, int], None]) -> Case:
        now = self._now_ms()
        with self._tables.writing() as do:
            case = _get(do, case_id)
            apply(case, now)
            return self._save(do, case, now, actor, step, detail)

    def _save(
        self, do: Execute, case: Case, now_ms: int, actor: str, step: Step, detail: str = "", subject: str | None = None
    ) -> Case:
        """Write a case and what the trail says of its change, in the transaction that is open."""
        case.revision += 1
        case.changed_ms = now_ms
        if case.revision == 1:
            row = (case.id, subject, case.status, _until(case), case.expected_loss, _encode(case))
            do(
                "INSERT INTO {cases} (id, subject, status, until_ms, expected_loss, body) VALUES (?, ?, ?, ?, ?, ?)",
                row,
            )
        else:
            self._write(do, case)
        do(
            "INSERT INTO {case_trail} (case_id, number, time_ms, actor, step, detail) VALUES (?, ?, ?, ?, ?, ?)",
            (case.id, case.revision, now_ms, actor, step, detail),
        )
        return case

    @staticmethod
    def _write(do: Execute, case: Case) -> None:
        do(
            "UPDATE {cases} SET status = ?, until_ms = ?, expected_loss = ?, body = ? WHERE id = ?",
            (case.status, _until(case), case.expected_loss, _encode(case), case.id),
        )


def _until(case: Case) -> int:
    """When the status ends by itself: a claim, or the time to undo a resolution."""
    return case.claimed_until_ms if case.status == "claimed" else case.due_ms


def _get(do: Execute, case_id: int) -> Case:
    found = do("SELECT body FROM {cases} WHERE id = ?", (case_id,))
    if not found:
        raise UnknownCase(case_id)
    return _case(found[0][0])


def _transactions(do: Execute, case_id: int) -> list[CaseTransaction]:
    found = do("SELECT body FROM {case_transactions} WHERE case_id = ? ORDER BY seq", (case_id,))
    return [_transaction(body) for (body,) in found]


def _as_entry(row: Sequence[object]) -> dict[str, object]:
    return dict(zip(TrailEntry.__struct_fields__, row, strict=True))
