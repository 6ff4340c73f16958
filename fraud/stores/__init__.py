"""Where histories and decisions live: one protocol, and the store that a URL names.

A store keeps three things: the states of customers and merchants, the decisions, and which transactions
were told as fraud. `record` writes a decision and tells the two states of its transaction in one atomic
step, so that a transaction id counts once, whoever sends it how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fraud.chain import key_of
from fraud.errors import SettingsError
from fraud.events import Decided
from fraud.features import Histories, Records
from fraud.settings import Settings

if TYPE_CHECKING:
    from fraud.stores.resilient import Resilient


Base = tuple[dict[str, bytes | None], dict[str, bytes | None]]


@dataclass
class Recalled:
    """What a store knew before a batch; `degraded` names what it could not say within its budget.

    `base` is what it had stored, by customer and by merchant, for it to build on when the batch is recorded.
    """

    decided: dict[str, Decided]
    histories: Histories
    degraded: tuple[str, ...] = ()
    base: Base | None = None


@dataclass
class Recorded:
    """What now stands for each decision: itself, or the one that another worker recorded first.

    `written` are the encoded states of customers and of merchants after it, where they changed.
    """

    decided: list[Decided]
    degraded: tuple[str, ...] = ()
    written: tuple[dict[str, bytes], dict[str, bytes]] = field(default_factory=lambda: ({}, {}))


@dataclass(frozen=True)
class Fraud:
    """The news that a transaction was fraud, known from `label_time_ms` on."""

    transaction_id: str
    label_time_ms: int


Told = Literal["told", "known", "unknown"]
"""What became of a `Fraud`: told to the states now, told before, or of no recorded transaction."""


@dataclass
class Profile:
    """All that is kept of one customer."""

    customer_id: str
    state: Records
    """One record of `fraud.history.CUSTOMER`."""


@dataclass
class States:
    """States to be written as they are, for a backfill."""

    customer_ids: Sequence[str]
    merchant_ids: Sequence[str]
    customers: Records
    merchants: Records


@dataclass
class Figures:
    """How a store is doing: decisions that wait for it, and since the start, by the name of each server,
    the times it was taken off and the calls that took longer than their budget."""

    waiting: int = 0
    outages: dict[str, int] = field(default_factory=dict)
    late_calls: dict[str, int] = field(default_factory=dict)


class Store(Protocol):
    """What the service asks of a store. All methods are safe to call concurrently on one event loop."""

    def figures(self) -> Figures:
        """Return how the store is doing."""

    async def open(self) -> None:
        """Make the connections ahead of the first call; those that fail are tried again, in the background."""

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        """Return the decisions known by `keys` (`Decided.key`) and the states of customers and merchants."""

    async def record(
        self, decided: Sequence[Decided], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        """Record decisions, each with its own key, and tell the states.

        Parameters
        ----------
        decided : sequence of Decided, n of them
        transactions : (n,) records of `fraud.history.TRANSACTION`, or None
            What the states are told of each; None where the decisions have no history.
        recalled : Recalled, optional
            What `recall` returned for them: saves a look at the states if nobody changed them since.
        """

    async def tell_frauds(self, frauds: Sequence[Fraud]) -> list[Told]:
        """Tell the states of frauds among the recorded transactions, each once."""

    async def profile(self, customer_id: str) -> Profile | None:
        """Return what is kept of a customer, or None."""

    async def reset(self, customer_id: str) -> bool:
        """Forget a customer's history; return whether there was one. Decisions stay."""

    async def backfill(self, states: States) -> None:
        """Write states as they are, in place of what stood there."""

    async def expire(self, before_ms: int) -> int:
        """Forget customers and merchants of whom nothing was heard since; return how many. Works in small steps."""

    async def close(self) -> None:
        """Write what is waiting and let go of files and connections."""


@dataclass(frozen=True)
class StoreOptions:
    """How a store is to work; `Settings` says what each means."""

    state_dir: Path = Path(".fraud")
    cold_store: str | None = None
    budget_ms: float = 5.0
    cold_budget_ms: float = 100.0
    queue: int = 20_000
    durable: bool = True
    audit_key: bytes = b""
    personal_fields: tuple[str, ...] = ()
    personal_key: str = ""
    history_ttl_days: float = 90.0
    decision_ttl_days: float = 7.0

    @classmethod
    def of(cls, settings: Settings) -> StoreOptions:
        return cls(
            state_dir=settings.state_dir,
            cold_store=settings.cold_store,
            budget_ms=settings.store_budget_ms,
            cold_budget_ms=settings.cold_budget_ms,
            queue=settings.store_queue,
            durable=settings.durable,
            audit_key=key_of(settings.audit_key.get_secret_value()),
            personal_fields=tuple(filter(None, settings.personal_fields.split(","))),
            personal_key=settings.personal_key.get_secret_value(),
            history_ttl_days=settings.history_ttl_days,
            decision_ttl_days=settings.decision_ttl_days,
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
    if options.personal_fields and not options.personal_key:
        raise SettingsError("FRAUD_PERSONAL_FIELDS asks for a key: set FRAUD_PERSONAL_KEY or FRAUD_PERSONAL_KEY_FILE")
    store = _open(url, options)
    if options.personal_fields:
        from fraud.stores.personal import Pseudonymous

        return Pseudonymous(store, options.personal_fields, options.personal_key)
    return store


def _open(url: str, options: StoreOptions) -> Store:
    scheme, _, rest = url.partition(":")
    if scheme == "sqlite":
        from fraud.stores.sqlite import SqliteStore

        path = Path(rest.removeprefix("//")) if rest else options.state_dir / "history.db"
        return SqliteStore(path, durable=options.durable, audit_key=options.audit_key)
    if scheme in ("redis", "rediss", "unix"):
        from fraud.stores.redis import RedisStore
        from fraud.stores.resilient import Resilient
        from fraud.stores.tiered import Tiered

        hot = RedisStore(url, history_ttl_days=options.history_ttl_days, decision_ttl_days=options.decision_ttl_days)
        if options.cold_store is None:
            return Resilient(hot, options.budget_ms / 1000, options.queue)
        return Tiered(hot, _postgres(options.cold_store, options), options.budget_ms / 1000)
    if scheme in ("postgresql", "postgres"):
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


def distinct(values: Iterable[str | None]) -> list[str]:
    """Return the values that are not None, each once, in the order they come."""
    return [value for value in dict.fromkeys(values) if value is not None]
