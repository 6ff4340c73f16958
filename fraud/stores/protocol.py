"""Where histories and decisions live: the protocol that every store keeps to, and its types.

A store keeps three things: the states of customers and merchants, the decisions, and the labels of these.
`record` writes a decision and updates the two states of its transaction in one atomic
step, so that a transaction id counts once, whoever sends it how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple, NotRequired, Protocol, TypedDict

from fraud.decisions.labels import Label, LabelOutcome
from fraud.decisions.queries import DecisionQuery, Page
from fraud.decisions.record import DecisionRecord
from fraud.features.featurizer import Histories, Records
from fraud.history.profile import Profile

RECORD = "record"
"""In `degraded`: the decision is not on record yet."""

Unread = tuple[frozenset[int], frozenset[int]]
"""Places among the customers, and among the merchants, whose states a later release wrote."""
Base = tuple[dict[str, bytes | None], dict[str, bytes | None]]


@dataclass
class Recalled:
    """What a store knew before a batch; `degraded` names what it could not say within its budget.

    `base` is what it had stored, by customer and by merchant, for it to build on when the batch is recorded.
    `unrecorded` are the keys of those in `decided` that are not on record yet, as a store was off when they were
    made: whoever answers with one of them has it recorded as well. `unread` are states that a later release wrote.
    `end` is the number of the last decision on record, where decisions are numbered at once.
    """

    decided: dict[str, DecisionRecord]
    histories: Histories
    degraded: tuple[str, ...] = ()
    base: Base | None = None
    unrecorded: frozenset[str] = frozenset()
    unread: Unread = (frozenset(), frozenset())
    end: int | None = None

    def is_unread(self, customer_id: str, merchant_id: str | None) -> bool:
        """Tell whether a later release wrote the state of a customer or merchant, which is as nobody's here."""
        customers, merchants = self.unread
        if not customers and not merchants:
            return False
        histories = self.histories
        return any(histories.customer_ids[i] == customer_id for i in customers) or any(
            histories.merchant_ids[i] == merchant_id for i in merchants
        )


@dataclass
class Recorded:
    """What now stands for each decision: itself, or the one that another worker recorded first.

    `degraded` names what could not be done within the budget: ``record``, where none of them is on record yet.
    `written` are the encoded states of customers and of merchants after it, where they changed.
    """

    decided: list[DecisionRecord]
    degraded: tuple[str, ...] = ()
    written: tuple[dict[str, bytes], dict[str, bytes]] = field(default_factory=lambda: ({}, {}))


class KnownFraud(NamedTuple):
    """A fraud that the states of its customer and its merchant contain, for the day it has to be taken back.

    `known_ms` is since when it is known, at the earliest its event.
    """

    event_time_ms: int
    amount: float
    known_ms: int
    customer_id: str
    merchant_id: str | None


@dataclass
class States:
    """States to be written as they are, for a backfill, and the frauds that they contain."""

    customer_ids: Sequence[str]
    merchant_ids: Sequence[str]
    customers: Records
    merchants: Records
    frauds: Sequence[KnownFraud] = ()


@dataclass
class StoreStats:
    """How a store is doing: decisions that wait for it, and by the name of each server, 1 where it is off now, and
    since the start the times it was taken off and the calls that took longer than their budget."""

    waiting: int = 0
    off: dict[str, int] = field(default_factory=dict)
    outages: dict[str, int] = field(default_factory=dict)
    late_calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outage:
    """A server, or a file, that cannot be used now.

    `since_ms` is in ms since the epoch; `reason` has no secrets; `is_permanent` tells whether an operator has to
    change something before it can be used.
    """

    store: str
    since_ms: int
    reason: str
    is_permanent: bool = False

    @property
    def since(self) -> str:
        """`since_ms` as ISO 8601, to the second."""
        return datetime.fromtimestamp(self.since_ms / 1000, UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class StoreHealth:
    """What callers meet: scores lack something where there are outages, and are refused where `refusal` says why."""

    outages: tuple[Outage, ...] = ()
    refusal: str | None = None


class Store(Protocol):
    """What the service asks of a store. All methods are safe to call concurrently on one event loop."""

    def stats(self) -> StoreStats:
        """Return how the store is doing."""

    def health(self) -> StoreHealth:
        """Return what is off, since when and why, as it was last seen."""

    async def open(self) -> None:
        """Make the connections ahead of the first call; those that fail are tried again, in the background."""

    async def recall(self, keys: Sequence[str], customer_ids: list[str], merchant_ids: list[str]) -> Recalled:
        """Return the decisions known by `keys` (`DecisionRecord.key`) and the states of customers and merchants."""

    async def record(
        self, decided: Sequence[DecisionRecord], transactions: Records | None, recalled: Recalled | None = None
    ) -> Recorded:
        """Record decisions, each with its own key, and update the states; also those recalled as unrecorded.

        Parameters
        ----------
        decided : sequence of DecisionRecord, n of them
        transactions : (n,) records of `fraud.history.state.TRANSACTION`, or None
            The update of the states by each; None where the decisions have no history.
        recalled : Recalled, optional
            What `recall` returned for them: saves a look at the states if nobody changed them since.
        """

    async def apply_labels(self, labels: Sequence[Label]) -> list[LabelOutcome]:
        """Add labels to those of the recorded transactions; the states follow the label in effect."""

    async def labels(self, key: str) -> list[Label]:
        """Return all labels of a decision (`DecisionRecord.key`), in the order in which they arrived."""

    async def find(self, query: DecisionQuery) -> Page:
        """Return the decisions that match a query, the latest first.

        Raises
        ------
        InvalidRequest
            This store answers by id alone, or the query takes too long.
        """

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


class ShownOutage(TypedDict):
    """An outage as ``/readyz`` shows it."""

    store: str
    since: str
    reason: str
    needs_operator: bool


class ShownHealth(TypedDict):
    """A store's health as ``/readyz`` shows it; `reason` where decisions are refused."""

    status: Literal["ready", "degraded", "refusing"]
    reason: NotRequired[str]
    stores: list[ShownOutage]


def described(health: StoreHealth) -> ShownHealth:
    """Return what ``/readyz`` shows of a store's health: ``ready``, ``degraded`` or ``refusing``, and what is off."""
    if health.refusal is not None:
        return {"status": "refusing", "reason": health.refusal, "stores": _shown(health.outages)}
    return {"status": "degraded" if health.outages else "ready", "stores": _shown(health.outages)}


def _shown(outages: Sequence[Outage]) -> list[ShownOutage]:
    return [
        {
            "store": outage.store,
            "since": outage.since,
            "reason": outage.reason,
            "needs_operator": outage.is_permanent,
        }
        for outage in outages
    ]


def distinct(values: Iterable[str | None]) -> list[str]:
    """Return the values that are not None, each once, in the order they come."""
    return [value for value in dict.fromkeys(values) if value is not None]
