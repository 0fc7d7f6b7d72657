"""Shards as files: what a kind of item tells us about them, and reading one without trusting it.

Opening one compares what is cheap to compare: its size and its number of rows, and of the pages that are read their
checksums. Before rows are handed out, the whole file is compared with the checksum in the manifest, once.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import StoreError
from fusion_plugins.store.manifest import ShardInfo

__all__ = [
    "Codec",
    "compare_checksum",
    "open_shard",
    "parquet_bytes",
    "read_columns",
    "read_keys",
    "read_shard",
    "read_unlisted",
    "stamped",
]

#: name under which a Parquet file says which folder it belongs to
STAMP = b"fusion_plugins"

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
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True} | codec.parquet
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    return memoryview(sink.getvalue())


def stamped(table: pa.Table, identity: str, version: int) -> pa.Table:
    """Note in a table, for whoever finds it without its manifest, what it belongs to and how it is laid out."""
    return table.replace_schema_metadata({STAMP: json.dumps({"identity": identity, "version": version})})


def read_unlisted(path: Path, codec: Codec[T], identity: str) -> list[T] | None:
    """Return the items of a shard that no manifest lists; None if it is not of that identity, or not sound."""
    try:
        file = _parquet_file(pa.memory_map(str(path)).read_buffer())
        stamp = json.loads((file.schema_arrow.metadata or {}).get(STAMP, b"{}"))
        if stamp.get("identity") != identity or stamp["version"] > codec.version:
            return None
        return list(codec.decode(file.read(use_threads=False), stamp["version"]))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


def read_shard(folder: Path, shard: ShardInfo) -> pa.Table:
    """Read a whole shard, after comparing it with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    compare_checksum(folder, shard)
    return read_columns(folder, shard, open_shard(folder, shard))


def read_keys(folder: Path, shard: ShardInfo, codec: Codec[T]) -> list[Any]:
    """Return the names of a shard's rows; reads little else of it.

    Raises:
        StoreError: the shard is missing, or has another size than it should, or these columns are damaged.
    """
    return codec.keys(read_columns(folder, shard, open_shard(folder, shard), codec.key_columns))


def read_columns(folder: Path, shard: ShardInfo, file: pq.ParquetFile, columns: list[str] | None = None) -> pa.Table:
    """Read columns of an open shard.

    Raises:
        StoreError: their pages do not match their checksums.
    """
    try:
        return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{folder / shard.name} is damaged: {error}. {_cure(folder)}") from error


def open_shard(folder: Path, shard: ShardInfo) -> pq.ParquetFile:
    """Map a shard into memory, and compare its size and its number of rows with the manifest: cheap at any size.

    Raises:
        StoreError: the shard is missing, or is not what the manifest says.
    """
    path = folder / shard.name
    try:
        file = _parquet_file(_buffer(folder, shard))
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is damaged: {error}. {_cure(folder)}") from error
    if file.metadata.num_rows != shard.rows:
        raise StoreError(
            f"{path} is damaged: {file.metadata.num_rows} rows, the manifest says {shard.rows}. {_cure(folder)}"
        )
    return file


def compare_checksum(folder: Path, shard: ShardInfo) -> None:
    """Read a shard to the last byte and compare it with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    if hashlib.sha256(_buffer(folder, shard)).hexdigest() != shard.sha256:
        raise StoreError(
            f"{folder / shard.name} is damaged: its sha256 is not the one in the manifest. {_cure(folder)}"
        )


def _buffer(folder: Path, shard: ShardInfo) -> pa.Buffer:
    path = folder / shard.name
    try:
        data = pa.memory_map(str(path)).read_buffer()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error}. If the folder was compacted meanwhile, open it again. {_cure(folder)}"
        ) from error
    if len(data) != shard.bytes:
        raise StoreError(f"{path} is damaged: {len(data)} bytes, the manifest says {shard.bytes}. {_cure(folder)}")
    return data


def _parquet_file(data: pa.Buffer) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


def _cure(folder: Path) -> str:
    return (
        f"Restore the file from a copy; or run `fusion store verify {folder} --drop-damaged` and then the command that "
        f"made the folder, which makes the lost rows again."
    )
