"""Folders of plain rows, responses and scored responses, with the same shards, manifest and resume as a store.

A column has a declared type. Parquet readers see strings, numbers and booleans; a ``json`` column holds JSON text,
which :class:`RowStore` turns back into what was written.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import pyarrow as pa

from fusion_plugins.errors import DataError
from fusion_plugins.store.manifest import RowManifest
from fusion_plugins.store.shard_writer import SHARD_ROWS, ShardWriter
from fusion_plugins.store.shards import Codec, read_keys, read_shard
from fusion_plugins.store.writer import say_how_to_go_on

__all__ = ["Row", "RowStore", "RowWriter", "open_rows", "row_codec"]

Row = Mapping[str, Any]
Key = tuple[Any, ...]

_ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "json": pa.string(),
}
_PYTHON: dict[str, tuple[type, ...]] = {"string": (str,), "int64": (int,), "float64": (float, int), "bool": (bool,)}


def row_codec(manifest: RowManifest) -> Codec[Row]:
    """Return how the rows of a folder are kept."""
    return Codec(
        encode=lambda rows: _encode(rows, manifest),
        decode=lambda table, version: _decode(table, manifest),
        key=lambda row: tuple(row[name] for name in manifest.key),
        keys=lambda table: _keys(table, manifest.key),
        key_columns=list(manifest.key),
    )


class RowWriter:
    """Adds rows to a folder, one shard at a time; the rules are those of :class:`~fusion_plugins.store.StoreWriter`.

    Args:
        path: the folder; made if it does not exist, continued if it does.
        manifest: columns, key and the facts that must be equal to go on.
        flush_rows: rows after which a shard is written without being asked.

    Raises:
        MismatchError: the folder was made with other settings.
        StoreError: the folder is damaged, or another writer is at work.
        DataError: the key names a column that is not declared.
    """

    def __init__(self, path: str | Path, manifest: RowManifest, *, flush_rows: int = SHARD_ROWS) -> None:
        self.path = Path(path)
        missing = [name for name in manifest.key if name not in manifest.columns]
        if missing:
            raise DataError(f"{path}: key column {missing[0]!r} is not declared in columns {list(manifest.columns)}")
        self._shards = ShardWriter(self.path, manifest, row_codec(manifest), flush_rows)

    @property
    def manifest(self) -> RowManifest:
        """The manifest as it is on the disk."""
        return cast(RowManifest, self._shards.manifest)

    @property
    def done_keys(self) -> set[Key]:
        """Keys of the rows that are safely on the disk."""
        return cast(set[Key], self._shards.done)

    def write(self, row: Row) -> None:
        """Take one row; declared columns that it lacks are None.

        Raises:
            DataError: an undeclared column, a value of another type, or a key that is already here.
        """
        _check(row, self.manifest)
        self._shards.write(dict(row))

    def drop(self, keys: Collection[Key]) -> None:
        """Take rows out, so that they can be written anew."""
        self._shards.drop(keys)

    def flush(self) -> None:
        """Commit the rows that came so far as a shard of their own."""
        self._shards.flush()

    def finish(self) -> None:
        """Commit, and mark the folder complete."""
        self._shards.finish()

    def close(self) -> None:
        """Commit what came so far and let the next writer in."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is KeyboardInterrupt:
            say_how_to_go_on(self.path, len(self.done_keys), "rows")


def open_rows(path: str | Path) -> "RowStore":
    """Open a folder of rows for reading.

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

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (str(self.path),)

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.manifest.shards:
            yield from _decode(read_shard(self.path, shard), self.manifest)

    @cached_property
    def _by_key(self) -> dict[Key, dict[str, Any]]:
        return {tuple(row[name] for name in self.manifest.key): row for row in self}

    @cached_property
    def _key_set(self) -> set[Key]:
        return set(self.keys())

    def keys(self) -> list[Key]:
        """Return the key of every row, in the order of the shards."""
        codec = row_codec(self.manifest)
        return [key for shard in self.manifest.shards for key in read_keys(self.path, shard, codec)]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._by_key[key]

    def __contains__(self, key: object) -> bool:
        return key in self._key_set


def _check(row: Row, manifest: RowManifest) -> None:
    for name, value in row.items():
        kind = manifest.columns.get(name)
        if kind is None:
            raise DataError(
                f"row has column {name!r}; declared are {', '.join(manifest.columns)}. Declare it or drop it."
            )
        if value is None or kind == "json":
            continue
        if not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind != "bool"):
            raise DataError(f"column {name!r} is {kind}, the row has {value!r} ({type(value).__name__})")
    for name in manifest.key:
        if row.get(name) is None:
            raise DataError(f"row has no {name!r}, which is part of the key {manifest.key}")


def _encode(rows: list[Row], manifest: RowManifest) -> pa.Table:
    columns = {}
    for name, kind in manifest.columns.items():
        values = [row.get(name) for row in rows]
        if kind == "json":
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        columns[name] = pa.array(values, _ARROW[kind], from_pandas=False)
    return pa.table(columns)


def _decode(table: pa.Table, manifest: RowManifest) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    for name in (name for name, kind in manifest.columns.items() if kind == "json"):
        for row in rows:
            row[name] = None if row[name] is None else json.loads(row[name])
    return rows


def _keys(table: pa.Table, names: tuple[str, ...]) -> list[Key]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))
