"""What stores and row folders share when they are written: the lock, the buffer, and commits through the manifest."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.store.files import TEMPORARY_SUFFIX, FolderLock, interrupts_deferred, write_atomic
from fusion_plugins.store.manifest import MANIFEST_NAME, ManifestBase, ShardInfo
from fusion_plugins.store.shards import Codec, parquet_bytes, read_shard

__all__ = ["SHARD_ROWS", "ShardWriter"]

T = TypeVar("T")
Companions = Mapping[str, Callable[[], bytes | memoryview]]
SHARD_SUFFIX = ".parquet"
SHARD_PREFIX = "shard-"
#: items per shard
SHARD_ROWS = 1 << 14
#: small shards after which they are joined without being asked, so that frequent commits stay cheap
MANY_SMALL = 64


class ShardWriter(Generic[T]):
    """Buffers items, writes them as shards and commits each through the manifest.

    Args:
        folder: made if it does not exist.
        manifest: what is about to be written; an existing manifest must have the same identity.
        codec: how items become rows.
        flush_rows: items after which a shard is written without being asked.
        companions: name -> content of files that every reader needs; they are there before the manifest is.

    Raises:
        MismatchError: the folder holds something else.
        StoreError: the folder is damaged, or another writer is at work.
    """

    def __init__(
        self,
        folder: Path,
        manifest: ManifestBase,
        codec: Codec[T],
        flush_rows: int = SHARD_ROWS,
        companions: Companions | None = None,
    ) -> None:
        self.folder, self.codec = folder, codec
        self._limits = (flush_rows, codec.shard_tokens)
        self._buffer: list[T] = []
        self._buffered: set[Hashable] = set()
        self._tokens = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            self.manifest = self._resume(manifest, companions or {})
            self._remove_leftovers()
            self.done = set(self._committed_keys())
        except BaseException:
            self._lock.close()
            raise

    def _resume(self, wanted: ManifestBase, companions: Companions) -> ManifestBase:
        if not (self.folder / MANIFEST_NAME).exists():
            shards = sorted(path.name for path in self.folder.glob(f"{SHARD_PREFIX}*"))
            if shards:
                raise StoreError(
                    f"{self.folder} has no {MANIFEST_NAME} but holds {shards[0]}. It is a damaged store or something "
                    f"else: restore the manifest, or give an empty folder."
                )
            for name, content in companions.items():
                write_atomic(self.folder / name, content())
            wanted.save(self.folder)
            return wanted
        found = type(wanted).load(self.folder)
        found.require(
            self.folder,
            "Run with the settings it was made with, give another folder, or delete this one to start afresh.",
            **wanted.identity(),
        )
        # The folder may have been written by an older version; its shards say so themselves.
        return found.model_copy(update={"schema_version": wanted.schema_version})

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

    def holds(self, key: Hashable) -> bool:
        """Return whether an item of that name was written, now or before."""
        return key in self.done or key in self._buffered

    def write(self, item: T) -> None:
        """Take one item; a shard is written when enough have come.

        Raises:
            DataError: an item of that name is already here.
        """
        key = self.codec.key(item)
        if self.holds(key):
            raise DataError(f"{self.folder} already holds {key!r}. Names are unique; skip what is done when you go on.")
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
            self._commit(self._buffer, self._tokens)
            self.done |= self._buffered
            self._buffer, self._buffered, self._tokens = [], set(), 0
        if sum(map(self._is_small, self.manifest.shards)) >= MANY_SMALL:
            self.compact()

    def compact(self) -> None:
        """Join neighbouring small shards, and rewrite those of an older version; a group at a time, each atomically."""
        for group in self._groups():
            items = [item for shard in group for item in self.codec.items(self.folder, shard)]
            self._commit(items, sum(shard.tokens for shard in group), replaces=group)

    def _is_small(self, shard: ShardInfo) -> bool:
        return 2 * shard.rows < self._limits[0] and 2 * shard.tokens < self._limits[1]

    def _groups(self) -> list[list[ShardInfo]]:
        groups: list[list[ShardInfo]] = [[]]
        for shard in self.manifest.shards:
            old = shard.version < self.codec.version
            if not old and not self._is_small(shard):
                groups.append([])
                continue
            together = [*groups[-1], shard]
            full = sum(s.rows for s in together) > self._limits[0] or sum(s.tokens for s in together) > self._limits[1]
            if full:
                groups.append([shard])
            else:
                groups[-1] = together
        return [group for group in groups if len(group) > 1 or any(s.version < self.codec.version for s in group)]

    def _commit(self, items: list[T], tokens: int, replaces: Iterable[ShardInfo] = ()) -> None:
        """Write items as a shard and put it into the manifest, in place of others if they are named."""
        number = 1 + max((_number(shard.name) for shard in self.manifest.shards), default=-1)
        gone = {shard.name for shard in replaces}
        with interrupts_deferred():
            added = self._write_shard(f"{SHARD_PREFIX}{number:06d}{SHARD_SUFFIX}", self.codec.encode(items), tokens)
            try:
                self._update(shards=_replaced(self.manifest.shards, gone, added))
            except BaseException:
                (self.folder / added.name).unlink(missing_ok=True)
                raise
            for name in gone:
                (self.folder / name).unlink(missing_ok=True)

    def _write_shard(self, name: str, table: pa.Table, tokens: int) -> ShardInfo:
        data = parquet_bytes(self.codec, table, tokens)
        write_atomic(self.folder / name, data)
        return ShardInfo(
            name=name,
            rows=table.num_rows,
            tokens=tokens,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            version=self.codec.version,
        )

    def _update(self, **changes: object) -> None:
        updated = self.manifest.model_copy(update=changes)
        updated.save(self.folder)
        self.manifest = updated

    def finish(self) -> None:
        """Commit, join small shards, and note that everything that was asked for is here."""
        self.flush()
        self.compact()
        if not self.manifest.complete:
            with interrupts_deferred():
                self._update(complete=True)

    def close(self) -> None:
        """Commit what is buffered and let the next writer in."""
        try:
            self.flush()
        finally:
            self._lock.close()


def _replaced(shards: list[ShardInfo], gone: set[str], added: ShardInfo) -> list[ShardInfo]:
    """Return the list with ``added`` where the first of ``gone`` stood, or at the end."""
    place = next((index for index, shard in enumerate(shards) if shard.name in gone), len(shards))
    return [*shards[:place], added, *(shard for shard in shards[place:] if shard.name not in gone)]


def _number(name: str) -> int:
    return int(name.removeprefix(SHARD_PREFIX).removesuffix(SHARD_SUFFIX))
