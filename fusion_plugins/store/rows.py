"""Folders of plain rows, responses and scored responses, with the same shards, manifest and resume as a store.

A column has a declared type. Parquet readers see strings, numbers and booleans; a ``json`` column holds JSON text,
which :class:`RowStore` turns back into what was written.
"""

import json
from collections.abc import Iterator, Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from fusion_plugins.errors import DataError
from fusion_plugins.store.manifest import RowManifest
from fusion_plugins.store.shard_writer import SHARD_ROWS, ShardWriter
from fusion_plugins.store.shards import read_items, read_keys

Row = dict[str, Any]
Key = tuple[Any, ...]

_ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "json": pa.string(),
    # Parquet calls the items of a list so.
    "int32s": pa.list_(pa.field("element", pa.int32())),
    "float32s": pa.list_(pa.field("element", pa.float32())),
}
_PYTHON: dict[str, tuple[type, ...]] = {
    **{"string": (str,), "int64": (int,), "float64": (float, int), "bool": (bool,)},
    **dict.fromkeys(("int32s", "float32s"), (list, tuple)),
}


class RowCodec:
    """How the rows of a folder are kept: one Parquet column per declared column."""

    version = RowManifest.LAYOUT
    shard_tokens = 1 << 62  # rows have no tokens: their number alone limits a shard
    group_tokens = 1
    parquet: dict[str, Any] = {}

    def __init__(self, manifest: RowManifest) -> None:
        self.identity = manifest.identity_digest
        self.columns = manifest.columns
        self.key_columns = list(manifest.key)

    def encode(self, items: list[Row]) -> pa.Table:
        """Return one table row per row."""
        columns = {}
        for name, kind in self.columns.items():
            values = [row.get(name) for row in items]
            if kind == "json":
                values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            # from_pandas=False: a float nan stays a nan instead of becoming a null
            columns[name] = pa.array(values, _ARROW[kind], from_pandas=False)
        return pa.table(columns)

    def decode(self, table: pa.Table, version: int) -> list[Row]:
        """Return the rows of a table; there is one version.

        Raises:
            ValueError: the columns are not those that are declared, or a key is not whole.
        """
        expected = pa.schema([(name, _ARROW[kind]) for name, kind in self.columns.items()])
        if not table.schema.equals(expected):
            found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
            raise ValueError(f"expected the columns that the manifest declares, got {found:.200}")
        rows: list[Row] = table.to_pylist()
        for name in (name for name, kind in self.columns.items() if kind == "json"):
            for row in rows:
                row[name] = None if row[name] is None else json.loads(row[name])
        self.keys(table)  # a key that is not whole is refused
        return rows

    packed = decode  # rows have no other form

    def key(self, item: Row) -> Key:
        """Return the values of the key columns."""
        return tuple(item[name] for name in self.key_columns)

    def keys(self, table: pa.Table) -> list[Key]:
        """Return the keys of a table's rows.

        Raises:
            ValueError: a row lacks a part of its key.
        """
        if any(table[name].null_count for name in self.key_columns):
            raise ValueError("expected a value in every column of the key, got none")
        return list(zip(*(table[name].to_pylist() for name in self.key_columns), strict=True))

    def tokens(self, item: Row) -> int:
        """Return 0."""
        return 0


class RowWriter(ShardWriter[Row, RowManifest]):
    """Adds rows to a folder; commits and resumes as :class:`~fusion_plugins.store.shard_writer.ShardWriter` says.

    Args:
        path: the folder; made if it does not exist, continued if it does.
        manifest: columns, key and the facts that must be equal to continue.
        flush_rows: rows after which a shard is written without being asked.

    Raises:
        MismatchError: the folder was made with other settings.
        StoreError: the folder is damaged, or another writer is at work.
        DataError: the key names a column that is not declared, or is json, whose values need not be comparable.
    """

    def __init__(self, path: str | Path, manifest: RowManifest, *, flush_rows: int = SHARD_ROWS) -> None:
        wrong = [name for name in manifest.key if manifest.columns.get(name, "json") == "json"]
        if wrong:
            raise DataError(
                f"{path}: expected a key of the declared columns {', '.join(manifest.columns)} that are not json, got "
                f"{wrong[0]!r}. Declare it with another kind, or take it out of the key."
            )
        super().__init__(path, manifest, RowCodec(manifest), flush_rows)

    @property
    def done_keys(self) -> Set[Key]:
        """Keys of the rows that are on the disk; to list them reads the shards."""
        return self.done

    def write(self, item: Mapping[str, Any], /) -> None:
        """Take one row; declared columns that it lacks are None.

        Raises:
            DataError: an undeclared column, a value of another type, or a key that the folder has already.
        """
        self._check(item)
        super().write(dict(item))

    def _check(self, row: Mapping[str, Any]) -> None:
        columns, key = self.manifest.columns, self.manifest.key
        where = f"{self.path}: row {tuple(row.get(name) for name in key)}"
        for name, value in row.items():
            kind = columns.get(name)
            if kind is None:
                raise DataError(
                    f"{where}: expected the declared columns {', '.join(columns)}, got {name!r}. Declare it or drop it."
                )
            if value is None or kind == "json":
                continue
            # In Python a bool is an int, in Parquet it is not.
            if not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise DataError(
                    f"{where}: expected {kind} in column {name!r}, got {value!r} ({type(value).__name__}). Convert "
                    f"the value, or declare the column as json."
                )
        for name in key:
            if row.get(name) is None:
                raise DataError(
                    f"{where}: expected a value in every column of the key, got none in {name!r}. Give one."
                )


def open_rows(path: str | Path) -> "RowStore":
    """Return a folder of rows, open for reading.

    Raises:
        StoreError: the folder holds no rows, or it is damaged.
    """
    return RowStore(path)


class RowStore:
    """A folder of rows, read-only: iteration over dicts in the order of the shards, ``rows[key]``, ``key in rows``.

    Iteration holds one shard in memory, ``key in rows`` all keys, ``rows[key]`` all rows: iterate over what is large.

    Attributes:
        path: the folder.
        manifest: columns, key, facts and counts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = RowManifest.load(self.path)
        self._codec = RowCodec(self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (str(self.path),)

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[Row]:
        for shard in self.manifest.shards:
            yield from read_items(self.path, shard, self._codec)

    @cached_property
    def _by_key(self) -> dict[Key, Row]:
        return {self._codec.key(row): row for row in self}

    @cached_property
    def _key_set(self) -> set[Key]:
        return set(self.keys())

    def keys(self) -> list[Key]:
        """Return the key of every row, in the order of the shards."""
        return [key for shard in self.manifest.shards for key in read_keys(self.path, shard, self._codec)]

    def __getitem__(self, key: Key) -> Row:
        return self._by_key[key]

    def __contains__(self, key: object) -> bool:
        return key in self._key_set
