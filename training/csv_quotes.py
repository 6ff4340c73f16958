"""Detects misplaced quotes, which Arrow's CSV reader accepts silently.

Arrow reads ``"Joe\\"s Diner"`` as ``Joe\\s Diner"`` and a quote that is never closed as one field up to the end of
the file. Both change data silently, so each file's bytes pass through `QuoteCheck` on their way to Arrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fraud.compiling import compiled

QUOTE, BACKSLASH, CR, LF = 0x22, 0x5C, 0x0D, 0x0A
ROW_START, FIELD_START, PLAIN, QUOTED, AFTER_QUOTE = range(5)
STATE, ROW, FIELD, ESCAPED, LAST, OPENED_ROW, OPENED_FIELD, TEXT_ROW, TEXT_FIELD, BACKSLASH_ROW = range(10)
NONE = -1


@dataclass(frozen=True)
class Place:
    """A field of a row, both counted from 0; row 0 is the header."""

    row: int
    field: int


class QuoteCheck:
    """Tracks the quotes of a CSV file through its bytes, piece by piece.

    Parameters
    ----------
    delimiter : str
    escape : str, optional
        The escape character, besides the doubled quote of RFC 4180.
    """

    def __init__(self, delimiter: str, escape: str | None) -> None:
        self._delimiter = ord(delimiter)
        self._escape = NONE if escape is None else ord(escape)
        self._at = np.full(BACKSLASH_ROW + 1, NONE, np.int64)
        self._at[[STATE, ROW, FIELD, ESCAPED, LAST]] = ROW_START, 0, 0, 0, 0

    def feed(self, piece: bytes) -> None:
        """Follow the next bytes of the file."""
        _follow(np.frombuffer(piece, np.uint8), self._delimiter, self._escape, self._at)

    @property
    def text_after_quote(self) -> Place | None:
        """The first field that goes on after its closing quote."""
        return None if self._at[TEXT_ROW] == NONE else Place(int(self._at[TEXT_ROW]), int(self._at[TEXT_FIELD]))

    @property
    def backslash_before_quote(self) -> int | None:
        """The first row in which a backslash stands before a quote inside quotes."""
        return None if self._at[BACKSLASH_ROW] == NONE else int(self._at[BACKSLASH_ROW])

    @property
    def unclosed(self) -> Place | None:
        """The place of a quote that is still open at the end."""
        return Place(int(self._at[OPENED_ROW]), int(self._at[OPENED_FIELD])) if self._at[STATE] == QUOTED else None


@compiled
def _follow(piece: Any, delimiter: Any, escape: Any, at: Any) -> Any:
    """Step through the states of RFC 4180 (`ROW_START` to `AFTER_QUOTE`); empty lines are no rows, as for Arrow."""
    state, last = at[STATE], at[LAST]
    for byte in piece:
        if at[ESCAPED]:
            at[ESCAPED] = 0
            if state != QUOTED:
                state = PLAIN
        elif byte == escape:
            at[ESCAPED] = 1
        elif state == QUOTED:
            if byte == QUOTE:
                state = AFTER_QUOTE
                if last == BACKSLASH and at[BACKSLASH_ROW] == NONE:
                    at[BACKSLASH_ROW] = at[ROW]
        elif byte == QUOTE and state == AFTER_QUOTE:
            state = QUOTED
        elif byte == QUOTE and state <= FIELD_START:
            state, at[OPENED_ROW], at[OPENED_FIELD] = QUOTED, at[ROW], at[FIELD]
        elif byte in (CR, LF):
            if state != ROW_START:
                at[ROW] += 1
                at[FIELD] = 0
            state = ROW_START
        elif byte == delimiter:
            state = FIELD_START
            at[FIELD] += 1
        else:
            if state == AFTER_QUOTE and at[TEXT_ROW] == NONE:
                at[TEXT_ROW], at[TEXT_FIELD] = at[ROW], at[FIELD]
            state = PLAIN
        last = byte
    at[STATE], at[LAST] = state, last
