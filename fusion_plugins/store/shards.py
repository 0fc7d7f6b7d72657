"""Shards as files: what a kind of item tells us about them, and reading one after comparing it with its checksum."""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import StoreError
from fusion_plugins.store.manifest import ShardInfo

__all__ = ["Codec", "open_shard", "parquet_bytes", "read_shard"]

T = TypeVar("T")


@dataclass(frozen=True)
class Codec(Generic[T]):
    """How items of one kind become table rows, and back.

    Attributes:
        encode: items -> table.
        decode: table, version it was written with -> items.
        key: item -> its name, unique within a folder.
        keys: table -> names of its rows.
        key_columns: the columns that ``keys`` needs.
        tokens: item -> tokens in it.
        version: the version that ``encode`` writes.
        shard_tokens: tokens after which a shard is written without being asked; bounds the writer's memory.
        group_tokens: tokens per row group, the unit that is decoded at once.
        parquet: options of :func:`pyarrow.parquet.write_table`.
    """

    encode: Callable[[list[T]], pa.Table]
    decode: Callable[[pa.Table, int], Iterable[T]]
    key: Callable[[T], Hashable]
    keys: Callable[[pa.Table], list[Any]]
    key_columns: list[str]
    tokens: Callable[[T], int] = lambda item: 0
    version: int = 1
    shard_tokens: int = 1 << 62
    group_tokens: int = 1
    parquet: dict[str, Any] = field(default_factory=dict)

    def items(self, folder: Path, shard: ShardInfo) -> Iterable[T]:
        """Return the items of a shard, in order."""
        return self.decode(read_shard(folder, shard), shard.version)


def parquet_bytes(codec: Codec[T], table: pa.Table, tokens: int) -> memoryview:
    """Return a table as the bytes of a Parquet file."""
    group_rows = max(1, table.num_rows * codec.group_tokens // tokens) if tokens else None
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd"} | codec.parquet
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    return memoryview(sink.getvalue())


def read_shard(folder: Path, shard: ShardInfo, columns: list[str] | None = None) -> pa.Table:
    """Read a whole shard.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    return open_shard(folder, shard).read(columns=columns, use_threads=False)


def open_shard(folder: Path, shard: ShardInfo, *, checked: bool = False) -> pq.ParquetFile:
    """Map a shard into memory, compare it with its checksum (unless that was ``checked`` before) and open it.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    path = folder / shard.name
    try:
        data = pa.memory_map(str(path)).read_buffer()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error}. If the folder was compacted meanwhile, open it again. {_cure(folder)}"
        ) from error
    if len(data) != shard.bytes:
        raise StoreError(f"{path} is damaged: {len(data)} bytes, the manifest says {shard.bytes}. {_cure(folder)}")
    if not checked and hashlib.sha256(data).hexdigest() != shard.sha256:
        raise StoreError(f"{path} is damaged: its sha256 is not the one in the manifest. {_cure(folder)}")
    return pq.ParquetFile(pa.BufferReader(data))


def _cure(folder: Path) -> str:
    return (
        f"Restore the file from a copy; or run `fusion store verify {folder} --drop-damaged` and then the command that "
        f"made the folder, which makes the lost rows again."
    )
