"""What is done for cases beside the service: derive them from the decision log, and write the labels of resolutions."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fraud.decisions.labels import LabelOutcome
from fraud.errors import StoreDown, StoreError
from fraud.settings import Settings
from fraud.stores.cases import AT_ONCE, CaseStore, open_cases
from fraud.stores.opening import StoreOptions, open_store
from fraud.stores.protocol import Store

logger = logging.getLogger("fraud.stores.cases")

LOOK_S = 0.5
"""Between two looks at the log, seconds."""
LABELS_AT_ONCE = 50
"""Labels in one call of the store: no score waits long for them."""


async def work_for(settings: Settings, is_over: Callable[[], bool]) -> None:
    """Open the stores that settings name, and `work` on them.

    Raises
    ------
    StoreError
        A store cannot be opened, or is a Redis alone.
    """
    async with _opened(settings) as (cases, store):
        await work(cases, store, is_over)


async def work_once(settings: Settings) -> tuple[int, int]:
    """Do what there is to do now; return how many decisions were read, and how many cases are resolved."""
    async with _opened(settings) as (cases, store):
        read = 0
        while n := await asyncio.to_thread(cases.derive):
            read += n
        return read, await settle(cases, store)


async def work(cases: CaseStore, store: Store, is_over: Callable[[], bool]) -> None:
    """Work until it is over; what fails is logged once and tried again at the next look.

    Several processes may do so at once: each decision is derived once, and labels that are written twice count once.
    """
    failed = ""
    while not is_over():
        try:
            while await asyncio.to_thread(cases.derive) == AT_ONCE and not is_over():
                pass
            await settle(cases, store)
            failed = ""
        except StoreError as error:
            if error.message != failed:
                failed = error.message
                logger.log(logging.WARNING if isinstance(error, StoreDown) else logging.ERROR, "cases wait: %s", failed)
        await asyncio.sleep(LOOK_S)


async def settle(cases: CaseStore, store: Store) -> int:
    """Write the labels of the resolutions that can no longer be undone; return how many cases are resolved by that."""
    due = await asyncio.to_thread(cases.due)
    for case, labels in due:
        outcomes: Counter[LabelOutcome] = Counter()
        for start in range(0, len(labels), LABELS_AT_ONCE):
            outcomes.update(await store.apply_labels(labels[start : start + LABELS_AT_ONCE]))
        detail = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items())) or "no labels"
        await asyncio.to_thread(cases.settled, case.id, detail)
        logger.info("case %d resolved as %s by %s: %s", case.id, case.resolution, case.resolved_by, detail)
    return len(due)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[tuple[CaseStore, Store]]:
    cases = open_cases(settings)
    store = open_store(settings.store.url, StoreOptions.of(settings))
    try:
        await store.open()
        yield cases, store
    finally:
        await store.close()
        cases.close()
