"""The tables of the SQLite store, and the steps that bring an older file to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from fraud.decisions.chain import Anchor, Logged, extend
from fraud.decisions.labels import Label
from fraud.decisions.marks import place_mark
from fraud.stores.migrations import check_adopted, first_label, steps_after
from fraud.stores.rows import decode_record, encode_label, row_key, search_row

Step = Callable[[sqlite3.Connection, bytes], None]


def _first(db: sqlite3.Connection, audit_key: bytes) -> None:
    _run(
        db,
        """
        CREATE TABLE customers (key INTEGER PRIMARY KEY, id TEXT NOT NULL, state BLOB NOT NULL);
        CREATE TABLE merchants (key INTEGER PRIMARY KEY, id TEXT NOT NULL, state BLOB NOT NULL);
        CREATE TABLE decisions (
            seq INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL, link BLOB NOT NULL
        );
        CREATE TABLE chain (place TEXT PRIMARY KEY, seq INTEGER NOT NULL, link BLOB NOT NULL) WITHOUT ROWID;
        INSERT INTO chain VALUES ('anchor', 0, zeroblob(32)), ('head', 0, zeroblob(32));
        CREATE TABLE frauds (key TEXT PRIMARY KEY, label_time_ms INTEGER NOT NULL) WITHOUT ROWID;
        """,
    )


def _marks(db: sqlite3.Connection, audit_key: bytes) -> None:
    """Mark where the chain begins and ends."""
    _run(db, "ALTER TABLE chain ADD COLUMN mark BLOB")
    places = {
        place: Anchor(sequence, bytes(link))
        for place, sequence, link in db.execute("SELECT place, seq, link FROM chain")
    }
    rows = db.execute("SELECT seq, record, link FROM decisions ORDER BY seq DESC LIMIT 2")
    last = [Logged(sequence, bytes(record), bytes(link)) for sequence, record, link in rows]
    check_adopted(places["anchor"], places["head"], last, audit_key, "SQLite")
    for place, anchor in places.items():
        db.execute("UPDATE chain SET mark = ? WHERE place = ?", (place_mark(place, anchor, audit_key), place))


def _labels(db: sqlite3.Connection, audit_key: bytes) -> None:
    """Keep labels one by one, each with a link, and the frauds that the states contain; make decisions searchable.

    Reads every decision.
    """
    _run(
        db,
        """
        CREATE TABLE labels (seq INTEGER PRIMARY KEY, key TEXT NOT NULL, label BLOB NOT NULL, link BLOB NOT NULL);
        CREATE INDEX labels_by_key ON labels (key);
        INSERT INTO chain (place, seq, link) VALUES ('labels', 0, zeroblob(32));
        CREATE TABLE known_frauds (
            id INTEGER PRIMARY KEY, key TEXT UNIQUE, customer INTEGER, merchant INTEGER,
            event_time_ms INTEGER NOT NULL, amount REAL NOT NULL, known_ms INTEGER NOT NULL
        );
        CREATE INDEX known_frauds_by_customer ON known_frauds (customer) WHERE customer IS NOT NULL;
        CREATE INDEX known_frauds_by_merchant ON known_frauds (merchant) WHERE merchant IS NOT NULL;
        CREATE TABLE models (id INTEGER PRIMARY KEY, name TEXT NOT NULL, digest TEXT NOT NULL, UNIQUE (name, digest));
        CREATE TABLE search (
            seq INTEGER PRIMARY KEY, time_ms INTEGER NOT NULL, customer INTEGER, merchant INTEGER,
            decision INTEGER NOT NULL, model INTEGER NOT NULL, label INTEGER NOT NULL
        );
        CREATE INDEX search_by_time ON search (time_ms);
        CREATE INDEX search_by_customer ON search (customer, time_ms) WHERE customer IS NOT NULL;
        CREATE INDEX search_by_merchant ON search (merchant, time_ms) WHERE merchant IS NOT NULL;
        CREATE INDEX search_by_decision ON search (decision, time_ms) WHERE decision > 0;
        CREATE INDEX search_by_model ON search (model, time_ms);
        CREATE INDEX search_by_label ON search (label, time_ms) WHERE label > 0;
        """,
    )
    told = dict(db.execute("SELECT key, label_time_ms FROM frauds"))
    labels: list[Label] = []
    models: dict[tuple[str, str], int] = {}
    cursor = db.execute("SELECT seq, key, record FROM decisions ORDER BY seq")
    while rows := cursor.fetchmany(1000):
        found = []
        for sequence, key, blob in rows:
            record = decode_record(blob)
            if key in told:
                labels.append(first_label(record, told[key]))
                event, known = record.event_time_ms, max(record.event_time_ms, told[key])
                owners = row_key(record.customer_id), record.merchant_id and row_key(record.merchant_id)
                db.execute(
                    "INSERT INTO known_frauds (key, customer, merchant, event_time_ms, amount, known_ms) "
                    "VALUES (?, ?, ?, ?, ?, ?)",
                    (key, *owners, event, record.history_amount, known),
                )
            version = record.model_name, record.model_digest
            if version not in models:
                models[version] = len(models) + 1
                db.execute("INSERT INTO models VALUES (?, ?, ?)", (models[version], *version))
            found.append((sequence, *search_row(record, models[version], int(key in told))))
        db.executemany("INSERT INTO search VALUES (?, ?, ?, ?, ?, ?, ?)", found)
    rows = list(extend(Anchor(), map(encode_label, labels), audit_key))
    db.executemany(
        "INSERT INTO labels VALUES (?, ?, ?, ?)",
        [(row.sequence, label.key, row.record, row.link) for label, row in zip(labels, rows, strict=True)],
    )
    end = Anchor(rows[-1].sequence, rows[-1].link) if rows else Anchor()
    mark = place_mark("labels", end, audit_key)
    db.execute("UPDATE chain SET seq = ?, link = ?, mark = ? WHERE place = 'labels'", (*end, mark))
    db.execute("DROP TABLE frauds")


def _recent(db: sqlite3.Connection, audit_key: bytes) -> None:
    """Keep transactions that are not in the states yet. Search rows may be missing from here on as well."""
    _run(db, "CREATE TABLE recent (seq INTEGER PRIMARY KEY, transactions BLOB NOT NULL)")


STEPS: tuple[Step, ...] = (_first, _marks, _labels, _recent)


def migrate(db: sqlite3.Connection, where: str, audit_key: bytes) -> None:
    """Bring a file to this release's schema, in one transaction.

    The caller holds the file's lock, and `db` is in no transaction.

    Raises
    ------
    StoreError
        A later release wrote the file, or its decision log is not what it says.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    missing = steps_after(version, STEPS, where)
    if not missing:
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        for number, step in missing:
            step(db, audit_key)
            db.execute(f"PRAGMA user_version = {number}")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _run(db: sqlite3.Connection, statements: str) -> None:
    """Run statements inside the transaction that is open, which `executescript` would end."""
    for statement in filter(None, map(str.strip, statements.split(";"))):
        db.execute(statement)
