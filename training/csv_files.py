"""CSV files as Arrow tables of text: values are not changed, and unreadable ones are reported with their place."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from fraud.errors import DataError
from training.csv_quotes import Place, QuoteCheck

SUFFIXES = (".csv", ".csv.gz", ".csv.zst", ".csv.bz2")
DELIMITERS = (",", ";", "\t", "|")
NULLS = ("", "NULL", "\\N")
BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
ROWS_SHOWN = 5
_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialect:
    """The CSV dialect that a mapping states; None is detected from the file."""

    delimiter: str | None = None
    encoding: str | None = None
    escape: str | None = None


@dataclass(frozen=True)
class CsvFile:
    """One CSV file with its header read and its dialect complete."""

    path: Path
    delimiter: str
    encoding: str
    escape: str | None
    escape_is_given: bool
    header: list[str]
    nulls: tuple[str, ...] = NULLS

    @classmethod
    def open(cls, path: Path, dialect: Dialect, wanted: Collection[str]) -> CsvFile:
        """Read the header.

        Parameters
        ----------
        path : Path
        dialect : Dialect
        wanted : collection of str
            Columns that the file should have; the usual delimiter that yields most of them is used.

        Raises
        ------
        DataError
            The file is empty, or its header is not text in the encoding.
        """
        start = _first_bytes(path)
        if not start.strip():
            raise DataError(f"{path.name}: cannot be read as CSV: Empty CSV file")
        encoding = dialect.encoding or _encoding_of(path.name, start)
        escape = None if dialect.escape == '"' else dialect.escape
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(start)
        except UnicodeDecodeError as error:
            if b"\n" in start[: error.start] or b"\r" in start[: error.start]:
                text = start[: error.start].decode(encoding)  # the header is valid; reading the rows finds the place
            else:
                raise DataError(f"{path.name}: {_not_text('the header', start[: error.end][-20:], encoding)}") from None
        text = text.removeprefix("\ufeff")
        headers = {d: _header(text, d, escape) for d in ([dialect.delimiter] if dialect.delimiter else DELIMITERS)}
        delimiter = max(headers, key=lambda d: (len(set(wanted) & set(headers[d])), len(headers[d]), d == ","))
        return cls(path, delimiter, encoding, escape, dialect.escape is not None, headers[delimiter])

    def read(self, columns: Sequence[str], block_bytes: int = BLOCK_BYTES) -> pa.Table:
        """Return columns as large_string, null where a field is empty, ``NULL`` or ``\\N``.

        So an id keeps its zeros, and a bad value can be shown as it stands.

        Parameters
        ----------
        columns : sequence of str
        block_bytes : int
            How many bytes Arrow parses at a time; a longer row makes it more.

        Raises
        ------
        DataError
            A row has another number of fields than the header, a quote opens or closes where it may not, or a
            column is not text in the encoding.
        """
        stream = self._stream()
        broken: list[Any] = []
        try:
            table = self._parse(stream, columns, pa.large_string(), broken, block_bytes)
        except pa.ArrowInvalid as error:
            self._refuse_quotes(self._all_quotes())  # what follows an open quote is one long row, or no UTF-8
            if "straddling" in str(error) and block_bytes < MAX_ROW_BYTES:
                return self.read(columns, block_bytes * 16)
            if "UTF8" in str(error):
                self._refuse_bytes(columns, block_bytes)
            raise DataError(f"{self.path.name}: cannot be read as CSV: {error}") from error
        except UnicodeDecodeError as error:
            shown = error.object[max(0, error.start - 10) : error.end]
            raise DataError(f"{self.path.name}: {_not_text('it', shown, self.encoding)}") from None
        self._refuse_quotes(stream.quotes)
        if broken:
            self._refuse_rows(broken)
        return table

    def first_rows(self) -> pa.RecordBatch | None:
        """Return all columns of the first rows as large_string, as many as Arrow parses at a time; None without rows.

        Raises
        ------
        DataError
            As `read` does.
        """
        try:
            return self._first_rows()
        except StopIteration:
            return None
        except pa.ArrowInvalid as error:
            self._refuse_quotes(self._all_quotes())
            if "UTF8" in str(error):
                self._refuse_bytes(self.header, BLOCK_BYTES)
            raise DataError(f"{self.path.name}: cannot be read as CSV: {error}") from error

    def _first_rows(self) -> pa.RecordBatch:
        with pyarrow.csv.open_csv(
            self._stream(),
            read_options=pyarrow.csv.ReadOptions(block_size=8 * BLOCK_BYTES),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=lambda row: "skip"
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(self.header, pa.large_string()),
                strings_can_be_null=True,
                null_values=list(self.nulls),
            ),
        ) as rows:
            return rows.read_next_batch()

    def _parse(
        self, stream: _Stream, columns: Sequence[str], kind: pa.DataType, broken: list[Any], block_bytes: int
    ) -> pa.Table:
        def note(row: Any) -> str:
            broken.append(row)
            return "skip"

        def parse(source: _Stream, use_threads: bool) -> pa.Table:
            return pyarrow.csv.read_csv(
                source,
                read_options=pyarrow.csv.ReadOptions(use_threads=use_threads, block_size=block_bytes),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter=self.delimiter,
                    escape_char=self.escape or False,
                    newlines_in_values=True,
                    invalid_row_handler=note,
                ),
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(columns),
                    column_types=dict.fromkeys(columns, kind),
                    check_utf8=kind == pa.large_string(),
                    strings_can_be_null=True,
                    null_values=list(self.nulls),
                ),
            )

        table = parse(stream, use_threads=True)
        if broken:
            broken.clear()
            parse(self._stream(), use_threads=False)  # only a single thread knows the numbers of rows
        return table

    def _stream(self) -> _Stream:
        nulls = None
        if self.escape == "\\":  # Arrow would read \N as an escaped N: it is emptied before, where it is a whole field
            bounds = rb"[^" + re.escape(self.delimiter.encode()) + rb"\r\n]"
            field = rb'"(?:[^"\\]|\\.|"")*"|\\N(?!' + bounds + rb")"
            nulls = re.compile(rb"(?<!" + bounds + rb")(?:" + field + rb")", re.DOTALL)
        return _Stream(self.path, self.encoding, QuoteCheck(self.delimiter, self.escape), nulls)

    def _all_quotes(self) -> QuoteCheck:
        with self._stream() as stream:
            while stream.read(BLOCK_BYTES):
                pass
            return stream.quotes

    def _refuse_rows(self, broken: Sequence[Any]) -> None:
        first = ", ".join(f"row {row.number - 1} has {row.actual_columns}" for row in broken[:ROWS_SHOWN])
        raise DataError(
            f"{self.path.name}: each row must have {broken[0].expected_columns} fields, as the header has; "
            f"{len(broken):,} {'breaks' if len(broken) == 1 else 'break'} this: {first}"
            f"{', …' if len(broken) > ROWS_SHOWN else ''}"
        )

    def _refuse_quotes(self, quotes: QuoteCheck) -> None:
        advice = "; double a quote that belongs to a field"
        if not self.escape_is_given and quotes.backslash_before_quote is not None:
            advice = (
                "; if a backslash before a quote escapes it, write escape: '\\' into the mapping, "
                "otherwise double a quote that belongs to a field"
            )
        if (place := quotes.text_after_quote) is not None:
            raise DataError(f"{self._at(place)} goes on after its closing quote{advice}")
        if (place := quotes.unclosed) is not None:
            raise DataError(f"{self._at(place)} has a quote that is never closed{advice}")

    def _at(self, place: Place) -> str:
        row = "the header" if place.row == 0 else f"row {place.row}"
        known = place.field < len(self.header)
        return f"{self.path.name}: {row}, " + (
            f"column {self.header[place.field]!r}" if known else f"field {place.field + 1}"
        )

    def _refuse_bytes(self, columns: Sequence[str], block_bytes: int) -> None:
        """Report the columns and rows with bytes that are not UTF-8."""
        table = self._parse(self._stream(), columns, pa.large_binary(), [], block_bytes)
        problems = []
        for name in columns:
            values = table.column(name).combine_chunks()
            bad = np.flatnonzero(_no_utf_8(values))
            if len(bad):
                shown = ", ".join(f"row {row + 1} ({values[row].as_py()[:40]!r})" for row in bad[:ROWS_SHOWN])
                problems.append(
                    f"{self.path.name}: column {name!r} is not UTF-8; {len(bad):,} of {len(values):,} rows "
                    f"{'breaks' if len(bad) == 1 else 'break'} this: {shown}{', …' if len(bad) > ROWS_SHOWN else ''}"
                    f"{_encoding_advice(values[int(bad[0])].as_py())}"
                )
        raise DataError("\n".join(problems))


class _Stream(io.RawIOBase):
    """A file's bytes for Arrow, in UTF-8 and followed by a `QuoteCheck`.

    No piece ends between a carriage return and a line feed: Arrow takes a line feed at the start of a piece for the
    rest of a line's end, although it may stand inside quotes.
    """

    def __init__(self, path: Path, encoding: str, quotes: QuoteCheck, nulls: re.Pattern[bytes] | None) -> None:
        super().__init__()
        self.quotes = quotes
        self._source = pa.input_stream(str(path), compression="detect")
        self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
        self._nulls = nulls
        self._begun = self._ended = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._ended and (size < 0 or len(self._ready) <= size):  # one byte more shows what follows a CR
            self._fetch(BLOCK_BYTES if size < 0 else size)
        end = len(self._ready) if size < 0 else min(size, len(self._ready))
        if end > 1 and self._ready[end - 1 : end + 1] == b"\r\n":
            end -= 1
        piece, self._ready = self._ready[:end], self._ready[end:]
        self.quotes.feed(piece)
        return piece

    def _fetch(self, size: int) -> None:
        piece: bytes = self._source.read(size) if self._nulls is None else self._source.read()
        self._ended = not piece
        if self._decoder is not None:
            piece = self._decoder.decode(piece, final=self._ended).encode()
        if not self._begun:
            piece, self._begun = piece.removeprefix(codecs.BOM_UTF8), True
        if self._nulls is not None and b"\\N" in piece:
            piece = self._nulls.sub(lambda found: b"" if found[0] == b"\\N" else found[0], piece)
        self._ready += piece

    def close(self) -> None:
        self._source.close()
        super().close()


def _first_bytes(path: Path) -> bytes:
    with pa.input_stream(str(path), compression="detect") as source:
        start: bytes = source.read(BLOCK_BYTES)
    return start


def _encoding_of(name: str, start: bytes) -> str:
    for mark, encoding in _UTF_16.items():
        if start.startswith(mark):
            _logger.warning("%s: is %s, as its byte order mark says", name, encoding.upper())
            return encoding
    if b"\0" in start[:4096]:
        raise DataError(
            f"{name}: has zero bytes, as UTF-16 has; write encoding: utf-16-le into the mapping, or save it as UTF-8"
        )
    return "utf-8"


def _header(text: str, delimiter: str, escape: str | None) -> list[str]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, escapechar=escape)
    try:
        return next((row for row in rows if row), [])
    except csv.Error:  # a field longer than the csv module reads: no header by this delimiter
        return []


def _no_utf_8(values: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    try:
        pc.cast(values, pa.large_string())
    except pa.ArrowInvalid:
        return np.array([value is not None and not _is_utf_8(value) for value in values.to_pylist()])
    return np.zeros(len(values), bool)


def _is_utf_8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _not_text(what: str, shown: bytes, encoding: str) -> str:
    return f"{what} is not {encoding.upper()} ({shown!r}){_encoding_advice(shown) if encoding == 'utf-8' else ''}"


def _encoding_advice(value: bytes) -> str:
    advice = "; save the file as UTF-8, or write its encoding into the mapping"
    try:
        return f"{advice}: encoding: cp1252 would read {value.decode('cp1252')[:40]!r}"
    except UnicodeDecodeError:
        return advice
