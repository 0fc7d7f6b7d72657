"""What stores and row folders share: shards that are committed through the manifest, on resume as on the first run."""

import hashlib
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.errors import DataError, MismatchError, StoreError
from fusion_plugins.store.files import TEMPORARY_SUFFIX, FolderLock, interrupts_deferred, write_atomic
from fusion_plugins.store.manifest import MANIFEST_NAME, ManifestBase, ShardInfo

__all__ = ["Codec", "ShardWriter", "read_shard"]

T = TypeVar("T")
SHARD_SUFFIX = ".parquet"
SHARD_PREFIX = "shard-"


class Codec(Generic[T]):
    """How items become table rows and how a row is named.

    Attributes:
        encode: items -> table.
        key: item -> its name.
        keys: table -> names of its rows.
        tokens: item -> tokens in it.
        key_columns: the columns that ``keys`` needs.
        parquet: options of :func:`pyarrow.parquet.write_table`.
    """

    def __init__(
        self,
        encode: Callable[[list[T]], pa.Table],
        key: Callable[[T], Hashable],
        keys: Callable[[pa.Table], list[Any]],
        key_columns: list[str],
        tokens: Callable[[T], int] = lambda item: 0,
        parquet: dict[str, Any] | None = None,
    ) -> None:
        self.encode, self.key, self.keys, self.key_columns, self.tokens = encode, key, keys, key_columns, tokens
        self.parquet = parquet or {}


class ShardWriter(Generic[T]):
    """Buffers items, writes them as shards and commits each through the manifest.

    Args:
        folder: made if it does not exist.
        manifest: what is about to be written; an existing manifest must have the same identity.
        codec: how items become rows.
        flush_rows: items after which a shard is written without being asked.
        flush_tokens: the same for tokens.

    Raises:
        MismatchError: the folder holds something else.
        StoreError: the folder is damaged, or another writer is at work.
    """

    def __init__(
        self, folder: Path, manifest: ManifestBase, codec: Codec[T], flush_rows: int, flush_tokens: int = 1 << 62
    ) -> None:
        self.folder, self.codec = folder, codec
        self._limits = (flush_rows, flush_tokens)
        self._buffer: list[T] = []
        self._buffered: set[Hashable] = set()
        self._tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self.manifest = self._resume(manifest)
            self._remove_leftovers()
            self.done = set(self._committed_keys())
        except BaseException:
            self._lock.release()
            raise

    def _resume(self, wanted: ManifestBase) -> ManifestBase:
        if not (self.folder / MANIFEST_NAME).exists():
            shards = sorted(path.name for path in self.folder.glob(f"*{SHARD_SUFFIX}"))
            if shards:
                raise StoreError(
                    f"{self.folder} has no {MANIFEST_NAME} but holds {shards[0]}. It is a damaged store or something "
                    f"else: restore the manifest, or give an empty folder."
                )
            wanted.save(self.folder)
            return wanted
        found = type(wanted).load(self.folder)
        found.require(
            self.folder,
            "Run with the settings it was made with, give another folder, or delete this one to start afresh.",
            **wanted.identity(),
        )
        if found.schema_version != wanted.schema_version:
            raise MismatchError(
                f"{self.folder} has schema version {found.schema_version}; new shards have {wanted.schema_version}. "
                f"Run `fusion store compact {self.folder}` first: it rewrites the shards."
            )
        return found

    def _remove_leftovers(self) -> None:
        """Delete what a killed writer left: temporary files, and shards that were never committed."""
        known = {shard.name for shard in self.manifest.shards}
        for path in self.folder.iterdir():
            orphan = path.name.startswith(SHARD_PREFIX) and path.name not in known
            if orphan or (path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)):
                path.unlink()

    def _committed_keys(self) -> Iterable[Hashable]:
        for shard in self.manifest.shards:
            yield from self.codec.keys(read_shard(self.folder, shard, self.codec.key_columns))

    def write(self, item: T) -> None:
        """Take one item; a shard is written when enough have come.

        Raises:
            DataError: an item of that name is already here.
        """
        key = self.codec.key(item)
        if key in self.done or key in self._buffered:
            raise DataError(
                f"{self.folder} already holds {key!r}. Names are unique: skip what is in `done` when you go on."
            )
        self._buffer.append(item)
        self._buffered.add(key)
        self._tokens += self.codec.tokens(item)
        if len(self._buffer) >= self._limits[0] or self._tokens >= self._limits[1]:
            self.flush()

    def flush(self) -> None:
        """Commit everything that was written so far."""
        if not self._buffer:
            return
        with interrupts_deferred():
            self.commit([(self.codec.encode(self._buffer), self._tokens)])
            self.done |= self._buffered
            self._buffer, self._buffered, self._tokens = [], set(), 0

    def commit(self, tables: Iterable[tuple[pa.Table, int]], replaces: Iterable[ShardInfo] = ()) -> None:
        """Write tables as shards and put them into the manifest in place of others, in one step."""
        gone = {shard.name for shard in replaces}
        added: list[ShardInfo] = []
        number = 1 + max((_number(shard.name) for shard in self.manifest.shards), default=-1)
        for table, tokens in tables:
            added.append(self._write_shard(f"{SHARD_PREFIX}{number + len(added):06d}{SHARD_SUFFIX}", table, tokens))
        kept = [shard for shard in self.manifest.shards if shard.name not in gone]
        updated = self.manifest.model_copy(update={"shards": kept + added})
        updated.save(self.folder)
        self.manifest = updated
        for name in gone:
            (self.folder / name).unlink(missing_ok=True)

    def _write_shard(self, name: str, table: pa.Table, tokens: int) -> ShardInfo:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", **self.codec.parquet)
        data = memoryview(sink.getvalue())
        write_atomic(self.folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        return ShardInfo(name=name, rows=table.num_rows, tokens=tokens, bytes=len(data), sha256=digest)

    def finish(self) -> None:
        """Commit, and note that everything that was asked for is here."""
        self.flush()
        if not self.manifest.complete:
            updated = self.manifest.model_copy(update={"complete": True})
            updated.save(self.folder)
            self.manifest = updated

    def close(self) -> None:
        """Commit what is buffered and let the next writer in."""
        try:
            self.flush()
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Let the next writer in without committing what is buffered."""
        self._buffer, self._buffered, self._tokens = [], set(), 0
        self._lock.release()


def read_shard(folder: Path, shard: ShardInfo, columns: list[str] | None = None) -> pa.Table:
    """Read a whole shard after comparing it with its checksum.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    return open_shard(folder, shard).read(columns=columns, use_threads=False)


def open_shard(folder: Path, shard: ShardInfo) -> pq.ParquetFile:
    """Map a shard into memory, compare it with its checksum and open it.

    Raises:
        StoreError: the shard is missing or damaged.
    """
    path = folder / shard.name
    try:
        data = pa.memory_map(str(path)).read_buffer()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}. {_cure(folder)}") from error
    if len(data) != shard.bytes:
        raise StoreError(f"{path} is damaged: {len(data)} bytes, the manifest says {shard.bytes}. {_cure(folder)}")
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise StoreError(f"{path} is damaged: its sha256 is not the one in the manifest. {_cure(folder)}")
    return pq.ParquetFile(pa.BufferReader(data))


def _cure(folder: Path) -> str:
    return (
        f"Restore the file from a copy, or run `fusion store verify {folder} --drop-damaged` and then the command that "
        f"made the folder: it makes the lost rows again."
    )


def _number(name: str) -> int:
    return int(name.removeprefix(SHARD_PREFIX).removesuffix(SHARD_SUFFIX))
