"""The files of a table: one, several, a folder's or a pattern's, read one after the other as one Arrow table."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fraud.errors import DataError
from training import csv_files
from training.columns import is_text
from training.csv_files import CsvFile, Dialect

PARQUET = (".parquet", ".pq")
SUFFIXES = (*PARQUET, *csv_files.SUFFIXES)

_logger = logging.getLogger(__name__)

Given = str | Path | Sequence[str | Path]
Choice = Callable[[str, list[str]], list[str]]
"""From the name and the columns of a file to the columns to read."""


@dataclass(frozen=True)
class Files:
    """Files that hold one table, in the order in which they are read."""

    paths: tuple[Path, ...]
    name: str
    """What messages call them: the file, or the first of them and how many more."""

    @classmethod
    def find(cls, given: Given) -> Files:
        """Return the files meant by a path, a folder, a pattern such as ``data/*.csv``, or several of these.

        The files of a folder or of a pattern come in the order of their names; a folder's are those of a known type,
        in it and below.

        Raises
        ------
        DataError
            There is no such file, or one is of no known type.
        """
        several = [given] if isinstance(given, str | Path) else list(given)
        paths = list(dict.fromkeys(path for one in several for path in _meant(Path(one))))
        if not paths:
            raise DataError("no file was given")
        for path in paths:
            if not path.name.lower().endswith(SUFFIXES):
                raise DataError(f"{path.name}: unknown file type; give one of {', '.join(SUFFIXES)}")
        return cls(tuple(paths), paths[0].name + (f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""))

    @property
    def nulls(self) -> tuple[str, ...]:
        """The texts that are empty fields: those of CSV, as Parquet has missing values of its own."""
        return csv_files.NULLS if any(_is_csv(path) for path in self.paths) else ()

    def digest(self) -> str:
        """``sha256:`` and the hexadecimal SHA-256 of the file's bytes; of several, that of their digests' lines."""
        digests = []
        for path in self.paths:
            with path.open("rb") as file:
                digests.append(f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}")
        if len(digests) == 1:
            return digests[0]
        lines = "".join(digest + "\n" for digest in digests)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"

    def read(self, wanted: Sequence[str], choose: Choice, dialect: Dialect) -> tuple[pa.Table, list[int]]:
        """Return the chosen columns of all rows, and how many rows each file has.

        Parameters
        ----------
        wanted : sequence of str
            Columns that every file should have, used to detect the delimiter of a CSV file.
        choose : callable
            Returns the columns to read from a file's name and its columns.
        dialect : Dialect
            How CSV files are written.

        Raises
        ------
        DataError
            A file cannot be read, has no rows, or has other columns than the first, or one of another type.
        """
        tables: list[pa.Table] = []
        logged: set[str] = set()
        for path in self.paths:
            tables.append(_read(path, wanted, choose, dialect, logged))
            if tables[-1].num_rows == 0:
                raise DataError(f"{path.name}: the file has no rows")
            other = set(tables[-1].column_names) ^ set(tables[0].column_names)
            if other:
                raise DataError(
                    f"{path.name}: column {min(other)!r} is not in this file and {self.paths[0].name} both, "
                    "although the mapping takes it"
                )
        return self._joined(tables), [table.num_rows for table in tables]

    def _joined(self, tables: list[pa.Table]) -> pa.Table:
        if len(tables) == 1:
            return tables[0]
        return pa.table({name: self._column(name, tables) for name in tables[0].column_names})

    def _column(self, name: str, tables: list[pa.Table]) -> pa.ChunkedArray:
        parts = [_plain(table.column(name)) for table in tables]
        kind = _widest([part.type for part in parts])
        chunks = []
        for path, part in zip(self.paths, parts, strict=True):
            try:
                if kind is None:
                    raise pa.ArrowInvalid("no type holds both")
                chunks += pc.cast(part, kind).chunks  # refuses a number that the wider type does not hold exactly
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                kinds = ", ".join(dict.fromkeys(str(part.type) for part in parts))
                raise DataError(
                    f"{path.name}: column {name!r} does not hold the same in every file ({kinds}); store it as one type"
                ) from None
        return pa.chunked_array(chunks, kind)


def _read(path: Path, wanted: Sequence[str], choose: Choice, dialect: Dialect, logged: set[str]) -> pa.Table:
    """Return the chosen columns of a file; a detected delimiter is logged once, and added to `logged`."""
    is_csv = _is_csv(path)
    try:
        if is_csv:
            file = CsvFile.open(path, dialect, wanted)
            if file.delimiter not in {dialect.delimiter or ",", *logged}:
                logged.add(file.delimiter)
                _logger.warning("%s: the fields are separated by %r", path.name, file.delimiter)
            return file.read(choose(path.name, file.header))
        return pq.read_table(path, columns=choose(path.name, pq.read_schema(path).names), partitioning=None)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path.name}: cannot be read as {'CSV' if is_csv else 'Parquet'}: {error}") from error


def _is_csv(path: Path) -> bool:
    return path.name.lower().endswith(csv_files.SUFFIXES)


def _meant(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
        if not found:
            raise DataError(f"{path.name}: the folder has no file that ends in {', '.join(SUFFIXES)}")
        return found
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{path.name}: no such file")
    return [file for one in found for file in _meant(one)]


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.cast(column, column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _widest(all_kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    """The widest of the types; None if text meets numbers, or times with a zone meet times without."""
    kinds = list(dict.fromkeys(kind for kind in all_kinds if not pa.types.is_null(kind)))
    if len(kinds) < 2:
        return kinds[0] if kinds else pa.null()
    if all(pa.types.is_integer(kind) for kind in kinds):
        return pa.int64()
    if all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in kinds):
        return pa.float64()
    if all(is_text(kind) for kind in kinds):
        return pa.large_string()
    if all(pa.types.is_timestamp(kind) for kind in kinds) and len({kind.tz for kind in kinds}) == 1:
        return pa.timestamp("us", kinds[0].tz)
    return None
