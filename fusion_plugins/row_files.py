"""Rows of JSONL and Parquet files and of datasets of the hub, each with its place."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import DataError
from fusion_plugins.hub import CONTENTS, hub_rows, is_hub

#: ends of the names of files that can be read
SUFFIXES = (".jsonl", ".parquet")
Row = dict[str, Any]


def read_row_file(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Row]]:
    """Yield ``file:number`` and content of every row; lines of JSONL are counted from 1, empty lines are left out.

    Args:
        path: a file that ends in one of :data:`SUFFIXES`, or a dataset of the hub.
        columns: what to read of a Parquet file; the others are None. Default: all.

    Raises:
        DataError: the file is missing, of another kind, or broken; the message names the line.
    """
    for where, row in readable_rows(path, columns):
        if isinstance(row, DataError):
            raise row
        yield where, row


def readable_rows(
    path: str | Path, columns: Sequence[str] | None = None, *, needed: Sequence[str] = CONTENTS
) -> Iterator[tuple[str, Row | DataError]]:
    """Yield every row as :func:`read_row_file` does, and an error in the place of a row that cannot be read.

    Args:
        path: as for :func:`read_row_file`.
        columns: as for :func:`read_row_file`.
        needed: columns of which a dataset of the hub must have one.

    Raises:
        DataError: the file is missing, of another kind, or broken as a whole.
    """
    if is_hub(path):
        yield from hub_rows(path, columns, needed=needed)
        return
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        got = f"a file with the ending {path.suffix!r}" if path.is_file() else "none"
        raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file, got {got}. Name another file.")
    try:
        yield from _parquet_rows(path, columns) if path.suffix == ".parquet" else _jsonl_rows(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Repair the permission or the disk.") from error


def row_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files that are read, in order; names of datasets on the hub as they are.

    Raises:
        DataError: one of them is missing or of another kind, or a folder holds none.
    """
    files: list[Path] = []
    for part in [path] if isinstance(path, str | Path) else path:
        path = Path(part)
        if is_hub(path):
            files.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found or not all(file.is_file() and file.suffix in SUFFIXES for file in found):
            raise DataError(
                f"{path}: expected a {' or '.join(SUFFIXES)} file or a folder of them, got none. Name another."
            )
        files += found
    return files


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row | DataError]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_row(line, where)


def _json_row(line: bytes, where: str) -> Row | DataError:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        return DataError(f"{where}: expected one JSON object per line, in UTF-8, got other bytes: {error}. Convert it.")
    except ValueError as error:
        return DataError(
            f"{where}: expected one JSON object per line, got other text: {error!s:.200}. Correct the line."
        )
    except RecursionError:
        return DataError(f"{where}: expected one JSON object per line, got one that is nested too deeply. Flatten it.")
    if not isinstance(row, dict):
        return DataError(f"{where}: expected a JSON object, got {type(row).__name__}. Correct the line.")
    return row


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[str, Row | DataError]]:
    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        read = [name for name in names if columns is None or name in columns]
        if not read:
            raise DataError(f"{path}: expected some of the columns {', '.join(columns or ())}, got {', '.join(names)}.")
        others = dict.fromkeys(names)
        for batch in file.iter_batches(columns=read):
            for row in _values(batch):
                number += 1
                where = f"{path}:{number}"
                yield where, others | row if isinstance(row, dict) else DataError(f"{where}: {row}. Correct the row.")
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: expected a Parquet file, got other bytes behind row {number}: {error!s:.200}. Write it again."
        ) from error


def _values(batch: pa.RecordBatch) -> Iterator[Row | str]:
    """Yield the rows of a batch, and what is wrong with those that Python cannot hold (a year 294247, no UTF-8)."""
    try:
        rows: list[Row | str] = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from _values(batch.slice(number, 1))
            return
        rows = [f"expected values that can be read, got others: {error!s:.200}"]
    yield from rows


def said_columns(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns for a message, and of which there is no value.

    Example:
        >>> said_columns({"id": "a", "text": None, "messages": []})
        'id, text (null), messages (empty)'
    """
    return ", ".join(name + _lack(value) for name, value in row.items())


def _lack(value: Any) -> str:
    if value is None:
        return " (null)"
    return " (empty)" if isinstance(value, str | list | dict) and not value else ""
