"""Plain files of rows, JSONL or Parquet, read one row at a time with the place where each stands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import DataError

__all__ = ["SUFFIXES", "read_row_file"]

SUFFIXES = (".jsonl", ".parquet")
NOT_UTF8 = "expected one JSON object per line, in UTF-8"


def read_row_file(path: str | Path, *, not_utf8: str = NOT_UTF8) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:number`` and content of every row; lines of JSONL are counted from 1, empty ones are left out.

    Args:
        path: a file that ends in one of :data:`SUFFIXES`.
        not_utf8: what the message says of a line that is no UTF-8.

    Raises:
        DataError: the file is missing, of another kind, or broken; lines are named.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise DataError(f"{path}: expected a {' or '.join(SUFFIXES)} file that exists")
    try:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path, not_utf8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _jsonl_rows(path: Path, not_utf8: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))  # a byte order mark does no harm
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {not_utf8}: {error}; convert the file") from error
            except ValueError as error:
                raise DataError(f"{where}: expected one JSON object per line: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected a JSON object, came {type(row).__name__}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except pa.ArrowException as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
