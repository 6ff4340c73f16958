"""Opens the store or the decision log that a URL names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fraud.decisions.chain import audit_key_of
from fraud.errors import SettingsError, StoreError
from fraud.settings import Settings
from fraud.stores.labelling import compile_kernels
from fraud.stores.log import DecisionLog
from fraud.stores.protocol import Store
from fraud.stores.urls import POSTGRESQL, REDIS, scheme_of

if TYPE_CHECKING:
    from fraud.stores.resilient import Resilient


@dataclass(frozen=True)
class StoreOptions:
    """The options of a store, described in `Settings`."""

    state_dir: Path = Path(".fraud")
    cold_store: str | None = field(default=None, repr=False)
    budget_ms: float = 5.0
    cold_budget_ms: float = 100.0
    queue: int = 20_000
    durable: bool = True
    audit_key: bytes = field(default=b"", repr=False)
    personal_fields: tuple[str, ...] = ()
    personal_key: str = field(default="", repr=False)
    history_ttl_days: float = 90.0
    decision_ttl_days: float = 7.0

    @classmethod
    def of(cls, settings: Settings) -> StoreOptions:
        return cls(
            state_dir=settings.process.state_dir,
            cold_store=settings.store.cold_url,
            budget_ms=settings.store.budget_ms,
            cold_budget_ms=settings.store.cold_budget_ms,
            queue=settings.store.queue,
            durable=settings.store.durable,
            audit_key=audit_key_of(settings.privacy.audit_key.get_secret_value()),
            personal_fields=tuple(filter(None, settings.privacy.personal_fields.split(","))),
            personal_key=settings.privacy.personal_key.get_secret_value(),
            history_ttl_days=settings.store.history_ttl_days,
            decision_ttl_days=settings.store.decision_ttl_days,
        )


def open_store(url: str, options: StoreOptions | None = None) -> Store:
    """Return the store that a URL names.

    Parameters
    ----------
    url : str
        ``sqlite:`` (the file ``history.db`` in the state folder), ``sqlite:path``, ``redis://host:port/db`` or
        ``postgresql://user@host/db``. With Redis, `options.cold_store` may name a PostgreSQL behind it.

    Raises
    ------
    SettingsError
        The URL names no store, or personal fields are to be hidden without a key.
    StoreError
        The store cannot be opened.
    """
    options = options or StoreOptions()
    store = _open(url, options)
    compile_kernels()
    if options.personal_fields:
        from fraud.stores.personal import Pseudonymous

        return Pseudonymous(store, options.personal_fields, options.personal_key)
    return store


def _open(url: str, options: StoreOptions) -> Store:
    if options.personal_fields and not options.personal_key:
        raise SettingsError("FRAUD_PERSONAL_FIELDS asks for a key: set FRAUD_PERSONAL_KEY or FRAUD_PERSONAL_KEY_FILE")
    scheme, _, rest = url.partition(":")
    if options.cold_store is not None and scheme_of(options.cold_store) not in POSTGRESQL:
        raise SettingsError(f"cold store {scheme_of(options.cold_store)}:…; allowed: postgresql://user@host/db")
    if scheme == "sqlite":
        from fraud.stores.sqlite import SqliteStore

        path = Path(rest.removeprefix("//")) if rest else options.state_dir / "history.db"
        return SqliteStore(path, durable=options.durable, audit_key=options.audit_key)
    if scheme in REDIS:
        from fraud.stores.redis import RedisStore
        from fraud.stores.resilient import Resilient
        from fraud.stores.tiered import Tiered

        hot = RedisStore(url, history_ttl_days=options.history_ttl_days, decision_ttl_days=options.decision_ttl_days)
        if options.cold_store is None:
            return Resilient(hot, options.budget_ms / 1000, options.queue)
        return Tiered(hot, _postgres(options.cold_store, options), options.budget_ms / 1000)
    if scheme in POSTGRESQL:
        return _postgres(url, options)
    raise SettingsError(f"store {scheme}:…; allowed: sqlite:, sqlite:path, redis://…, postgresql://…")


def _postgres(url: str, options: StoreOptions) -> Resilient:
    from fraud.stores.postgres import PostgresStore
    from fraud.stores.resilient import Resilient

    return Resilient(
        PostgresStore(url, durable=options.durable, audit_key=options.audit_key),
        options.cold_budget_ms / 1000,
        options.queue,
    )


async def check_store(url: str, options: StoreOptions) -> None:
    """Open a store once and close it, to report permanent faults before anything depends on it.

    Raises
    ------
    SettingsError
        The URL names no store that can be used, or its server refuses the password, the database or a right.
    StoreError
        The file cannot be opened or written.
    """
    store = _open(url, options)  # nothing is computed with it, so no kernel is compiled
    try:
        await store.open()
        health = store.health()
    finally:
        await store.close()
    for outage in health.outages:
        if outage.is_permanent:
            raise SettingsError(f"store {outage.store}: {outage.reason}")


def open_log(url: str, state_dir: Path, audit_key: bytes = b"") -> DecisionLog:
    """Return the log of the store that a URL names, as for `open_store`.

    Parameters
    ----------
    audit_key : bytes
        Key of its chain, without which nothing can be removed from it.

    Raises
    ------
    StoreError
        That store keeps no log, or cannot be reached.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        from fraud.stores.sqlite_log import SqliteLog

        return SqliteLog(Path(rest.removeprefix("//")) if rest else state_dir / "history.db", audit_key)
    if scheme in POSTGRESQL:
        from fraud.stores.postgres_log import PostgresLog

        return PostgresLog(url, audit_key)
    raise StoreError(f"{scheme}: keeps no chain of decisions; decisions are kept by sqlite: and postgresql: stores")
