"""Times in commands: options are read as UTC, and what is shown is in UTC, to the second."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import overload


@overload
def utc_ms(moment: datetime) -> int: ...


@overload
def utc_ms(moment: None) -> None: ...


def utc_ms(moment: datetime | None) -> int | None:
    """Return a time of an option, which has no zone, in ms since the epoch; None for an option that is not given."""
    return None if moment is None else int(moment.replace(tzinfo=UTC).timestamp() * 1000)


def shown_time(ms: int) -> str:
    """Return a time, ms since the epoch, in ISO 8601."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
