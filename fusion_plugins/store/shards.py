"""Shards as files: how items of one kind become Parquet, and how a shard is read without trusting it.

Opening a shard compares what is cheap to compare: its size, its number of rows, the folder that it says it belongs to,
and the checksums of the pages that are read. Before items are returned, the sha256 of the whole file is compared with
the manifest, once. All of that may be a stranger's work and agree, so what a file says about its own size is looked at
before it is unpacked, and whatever it makes a library raise is an error about the file.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import FusionError, MismatchError, StoreError
from fusion_plugins.store.files import plain_file
from fusion_plugins.store.manifest import ShardInfo

#: name under which a Parquet file says which folder it belongs to
STAMP = b"fusion_plugins"
#: most rows and unpacked bytes that are read at once; writers stay far below
MOST_ROWS, MOST_BYTES = 1 << 20, 1 << 32

T = TypeVar("T")


class Codec(Protocol[T]):
    """How items of one kind (records, rows) become rows of a Parquet table, and back.

    Attributes:
        identity: digest of the settings of the folder; its shards carry it.
        version: the layout that :meth:`encode` writes; :meth:`decode` and :meth:`packed` read it and all older ones.
        key_columns: the columns that :meth:`keys` needs.
        shard_tokens: tokens after which a shard is written without being asked; bounds the writer's memory.
        group_tokens: tokens per row group, which is what one random access decodes.
        parquet: options of :func:`pyarrow.parquet.write_table`.
    """

    identity: str
    version: int
    key_columns: list[str]
    shard_tokens: int
    group_tokens: int
    parquet: dict[str, Any]

    def encode(self, items: list[T]) -> pa.Table:
        """Return a table with one row per item."""

    def decode(self, table: pa.Table, version: int) -> Iterable[T]:
        """Return the items of a table that was written with that version."""

    def packed(self, table: pa.Table, version: int) -> Iterable[Any]:
        """Return the items of a table to be written again: all methods take them, and none does more than it must."""

    def key(self, item: T) -> Hashable:
        """Return the key of an item, unique within a folder."""

    def keys(self, table: pa.Table) -> list[Any]:
        """Return the keys of a table's rows."""

    def tokens(self, item: T) -> int:
        """Return the number of tokens in an item; 0 where tokens do not matter."""


def encode_shard(items: list[T], codec: Codec[T]) -> tuple[memoryview, int]:
    """Return items as the bytes of a Parquet file, and the number of tokens in them."""
    tokens = sum(map(codec.tokens, items))
    # The stamp tells whoever finds the file without its manifest what it belongs to and how it is laid out.
    stamp = json.dumps({"identity": codec.identity, "version": codec.version})
    table = codec.encode(items).replace_schema_metadata({STAMP: stamp})
    group_rows = max(1, len(items) * codec.group_tokens // tokens) if tokens else None
    sink = pa.BufferOutputStream()
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True} | codec.parquet
    pq.write_table(table, sink, row_group_size=group_rows, **options)
    return memoryview(sink.getvalue()), tokens


def read_items(folder: Path, shard: ShardInfo, codec: Codec[T]) -> list[T]:
    """Return the items of a shard, in order, after comparing the whole file with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    return _read(folder, shard, codec.identity, codec.decode)


def read_packed(folder: Path, shard: ShardInfo, codec: Codec[Any]) -> list[Any]:
    """Return the items of a shard as :func:`read_items` does, to be written again and for nothing else.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    return _read(folder, shard, codec.identity, codec.packed)


def _read(folder: Path, shard: ShardInfo, identity: str, items: Callable[[pa.Table, int], Iterable[T]]) -> list[T]:
    compare_checksum(folder, shard)
    file = open_shard(folder, shard, identity)
    with reading(folder, shard):
        return list(items(read_table(file), shard.version))


def read_keys(folder: Path, shard: ShardInfo, codec: Codec[T]) -> list[Any]:
    """Return the keys of a shard; reads little else of it.

    Raises:
        StoreError: the shard is missing, or has another size than it should, or these columns are damaged.
    """
    file = open_shard(folder, shard, codec.identity)
    with reading(folder, shard):
        return codec.keys(read_table(file, columns=codec.key_columns))


def read_unlisted(path: Path, codec: Codec[T], identities: Collection[str] = ()) -> list[T] | None:
    """Return the items of a shard that no manifest lists; None if it has another identity or is damaged.

    Args:
        path: the file.
        codec: of the folder.
        identities: further identities that it may have.
    """
    try:
        file = parquet_file(pa.memory_map(str(plain_file(path))).read_buffer())
        stamp = stamp_of(file)
        if stamp.get("identity") not in (codec.identity, *identities) or not 1 <= stamp["version"] <= codec.version:
            return None
        return list(codec.decode(read_table(file), stamp["version"]))
    except Exception:  # see `reading`
        return None


def open_shard(folder: Path, shard: ShardInfo, identity: str, data: pa.Buffer | None = None) -> pq.ParquetFile:
    """Map a shard into memory and compare its size, rows and identity with the manifest: cheap at any size.

    Args:
        folder: of the shard.
        shard: as the manifest describes it.
        identity: digest of the settings of the folder.
        data: the shard if it is mapped already.

    Raises:
        StoreError: the shard is missing, or is not what the manifest says.
        MismatchError: it was made with other settings than the manifest has.
    """
    buffer = map_shard(folder, shard) if data is None else data
    with reading(folder, shard):
        file = parquet_file(buffer)
        stamp = stamp_of(file)
        if file.metadata.num_rows != shard.rows:
            raise ValueError(f"expected {shard.rows} rows, got {file.metadata.num_rows}")
        if shard.rows > MOST_ROWS:
            raise ValueError(f"expected at most {MOST_ROWS} rows, got {shard.rows}")
        if stamp.get("version", shard.version) != shard.version:
            raise ValueError(f"expected layout {shard.version}, got {stamp['version']!r:.40}")
    # Not damage: nothing may be dropped because of it. Shards of the first version carry no stamp.
    wanted = shard.identity or identity  # a shard that a merge has linked carries the identity of its part
    if stamp.get("identity", wanted) != wanted:
        raise MismatchError(
            f"{folder / shard.name} was made with other settings than the manifest says: one of the two was edited, or "
            f"is of another folder. Restore both from one copy."
        )
    return file


@contextmanager
def reading(folder: Path, shard: ShardInfo) -> Iterator[None]:
    """Turn whatever a file makes a library raise into an error that names the file.

    Raises:
        StoreError: the block raised something.
    """
    try:
        yield
    except FusionError:
        raise
    # Bytes that are not what they should be show as almost any exception: of Arrow, Unicode, JSON, numpy, a KeyError
    # for a missing column, a MemoryError for a size that is a lie.
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise _damaged(folder, shard, f"{kind}{str(error):.300}") from error


def parquet_file(data: pa.Buffer) -> pq.ParquetFile:
    """Open a Parquet file that may lie; its pages are compared with their checksums, where they have any."""
    return pq.ParquetFile(
        pa.BufferReader(data),
        page_checksum_verification=True,
        thrift_string_size_limit=1 << 26,
        thrift_container_size_limit=1 << 22,
    )


def read_table(file: pq.ParquetFile, group: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """Return columns of a Parquet file, all by default, or of one of its row groups.

    Raises:
        ValueError: the file says that they would take more memory than anything that was written by us.
    """
    # Only of whole row groups: pyarrow ends the process when it is asked for a column whose statistics are broken.
    meta = file.metadata
    groups = [meta.row_group(number) for number in (range(meta.num_row_groups) if group is None else [group])]
    rows, size = sum(one.num_rows for one in groups), sum(one.total_byte_size for one in groups)
    if rows > MOST_ROWS or size > MOST_BYTES:
        raise ValueError(f"expected at most {MOST_ROWS} rows and {MOST_BYTES} bytes, got {rows} and {size}")
    if group is None:
        return file.read(columns=columns, use_threads=False)
    return file.read_row_group(group, columns=columns, use_threads=False)


def stamp_of(file: pq.ParquetFile) -> dict[str, Any]:
    """Return what a shard says about itself: ``identity`` and ``version``, or nothing."""
    stamp = json.loads((file.schema_arrow.metadata or {}).get(STAMP, b"{}"))
    if not isinstance(stamp, dict):
        raise ValueError(f"expected a JSON object as the stamp of the shard, got {stamp!r:.40}")
    return stamp


def compare_checksum(folder: Path, shard: ShardInfo) -> None:
    """Read a shard to the last byte and compare it with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    found = hashlib.sha256(map_shard(folder, shard)).hexdigest()
    if found != shard.sha256:
        raise _damaged(folder, shard, f"expected sha256 {shard.sha256[:12]}..., got {found[:12]}...")


def cure(folder: Path) -> str:
    """Return what to do about a damaged shard, for the end of a message."""
    return (
        f"Restore the file from a copy; or run `fusion store verify {folder} --drop-damaged` and then the command that "
        f"made the folder, which makes the lost part again."
    )


def map_shard(folder: Path, shard: ShardInfo) -> pa.Buffer:
    """Map a shard into memory.

    Raises:
        StoreError: the shard is missing, or has another size than the manifest says.
    """
    path = folder / shard.name
    try:
        found = plain_file(path)
        size = found.stat().st_size
        if size != shard.bytes:
            raise _damaged(folder, shard, f"expected {shard.bytes} bytes, got {size}")
        return pa.memory_map(str(found)).read_buffer()
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read: {error}. If the folder was compacted meanwhile, open it again. {cure(folder)}"
        ) from error


def _damaged(folder: Path, shard: ShardInfo, problem: object) -> StoreError:
    return StoreError(f"{folder / shard.name} is damaged: {problem}. {cure(folder)}")
