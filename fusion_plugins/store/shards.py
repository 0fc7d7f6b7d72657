"""Shards as files: how items of one kind become Parquet, and how a shard is read without trusting it.

Opening a shard compares what is cheap to compare: its size, its number of rows, and the checksums of the pages that are
read. Before items are returned, the sha256 of the whole file is compared with the manifest, once.
"""

import hashlib
import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import StoreError
from fusion_plugins.store.manifest import ShardInfo

#: name under which a Parquet file says which folder it belongs to
STAMP = b"fusion_plugins"

T = TypeVar("T")


class Codec(Protocol[T]):
    """How items of one kind (records, rows) become rows of a Parquet table, and back.

    Attributes:
        version: the layout that :meth:`encode` writes; :meth:`decode` reads it and all older ones.
        key_columns: the columns that :meth:`keys` needs.
        shard_tokens: tokens after which a shard is written without being asked; bounds the writer's memory.
        group_tokens: tokens per row group, which is what one random access decodes.
        parquet: options of :func:`pyarrow.parquet.write_table`.
    """

    version: int
    key_columns: list[str]
    shard_tokens: int
    group_tokens: int
    parquet: dict[str, Any]

    def encode(self, items: list[T]) -> pa.Table:
        """Return a table with one row per item."""

    def decode(self, table: pa.Table, version: int) -> Iterable[T]:
        """Return the items of a table that was written with that version."""

    def key(self, item: T) -> Hashable:
        """Return the key of an item, unique within a folder."""

    def keys(self, table: pa.Table) -> list[Any]:
        """Return the keys of a table's rows."""

    def tokens(self, item: T) -> int:
        """Return the number of tokens in an item; 0 where tokens do not matter."""


def encode_shard(items: list[T], codec: Codec[T], identity: str) -> tuple[memoryview, int]:
    """Return items as the bytes of a Parquet file, and the number of tokens in them."""
    tokens = sum(map(codec.tokens, items))
    # The stamp tells whoever finds the file without its manifest what it belongs to and how it is laid out.
    stamp = json.dumps({"identity": identity, "version": codec.version})
    table = codec.encode(items).replace_schema_metadata({STAMP: stamp})
    group_rows = max(1, len(items) * codec.group_tokens // tokens) if tokens else None
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True} | codec.parquet
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    return memoryview(sink.getvalue()), tokens


def read_items(folder: Path, shard: ShardInfo, codec: Codec[T]) -> Iterable[T]:
    """Return the items of a shard, in order, after comparing the whole file with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    compare_checksum(folder, shard)
    return codec.decode(read_columns(folder, shard, open_shard(folder, shard)), shard.version)


def read_keys(folder: Path, shard: ShardInfo, codec: Codec[T]) -> list[Any]:
    """Return the keys of a shard; reads little else of it.

    Raises:
        StoreError: the shard is missing, or has another size than it should, or these columns are damaged.
    """
    return codec.keys(read_columns(folder, shard, open_shard(folder, shard), codec.key_columns))


def read_columns(folder: Path, shard: ShardInfo, file: pq.ParquetFile, columns: list[str] | None = None) -> pa.Table:
    """Return columns of an open shard, all of them by default.

    Raises:
        StoreError: their pages do not match their checksums.
    """
    try:
        return file.read(columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, shard, error) from error


def read_unlisted(path: Path, codec: Codec[T], identity: str) -> list[T] | None:
    """Return the items of a shard that no manifest lists; None if it has another identity or is damaged."""
    try:
        file = _parquet_file(pa.memory_map(str(path)).read_buffer())
        stamp = json.loads((file.schema_arrow.metadata or {}).get(STAMP, b"{}"))
        if stamp.get("identity") != identity or stamp["version"] > codec.version:
            return None
        return list(codec.decode(file.read(use_threads=False), stamp["version"]))
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None


def open_shard(folder: Path, shard: ShardInfo) -> pq.ParquetFile:
    """Map a shard into memory and compare its size and number of rows with the manifest: cheap at any size.

    Raises:
        StoreError: the shard is missing, or is not what the manifest says.
    """
    try:
        file = _parquet_file(_buffer(folder, shard))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, shard, error) from error
    if file.metadata.num_rows != shard.rows:
        raise _damaged(folder, shard, f"expected {shard.rows} rows, got {file.metadata.num_rows}")
    return file


def compare_checksum(folder: Path, shard: ShardInfo) -> None:
    """Read a shard to the last byte and compare it with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    found = hashlib.sha256(_buffer(folder, shard)).hexdigest()
    if found != shard.sha256:
        raise _damaged(folder, shard, f"expected sha256 {shard.sha256[:12]}..., got {found[:12]}...")


def cure(folder: Path) -> str:
    """Return what to do about a damaged shard, for the end of a message."""
    return (
        f"Restore the file from a copy; or run `fusion store verify {folder} --drop-damaged` and then the command that "
        f"made the folder, which makes the lost part again."
    )


def _buffer(folder: Path, shard: ShardInfo) -> pa.Buffer:
    path = folder / shard.name
    try:
        data = pa.memory_map(str(path)).read_buffer()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error}. If the folder was compacted meanwhile, open it again. {cure(folder)}"
        ) from error
    if len(data) != shard.bytes:
        raise _damaged(folder, shard, f"expected {shard.bytes} bytes, got {len(data)}")
    return data


def _parquet_file(data: pa.Buffer) -> pq.ParquetFile:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)


def _damaged(folder: Path, shard: ShardInfo, problem: object) -> StoreError:
    return StoreError(f"{folder / shard.name} is damaged: {problem}. {cure(folder)}")
