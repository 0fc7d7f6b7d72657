"""What stores and row folders share when they are written: the lock, the buffer, and commits through the manifest."""

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa

from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.store.files import (
    TEMPORARY_SUFFIX,
    FolderLock,
    interrupts_deferred,
    make_folder,
    sync_folder,
    write_atomic,
)
from fusion_plugins.store.manifest import MANIFEST_NAME, ManifestBase, ShardInfo
from fusion_plugins.store.shards import Codec, parquet_bytes, read_keys, read_unlisted, stamped

__all__ = ["SHARD_ROWS", "ShardWriter"]

T = TypeVar("T")
Companions = Mapping[str, Callable[[], bytes | memoryview]]
SHARD_SUFFIX = ".parquet"
SHARD_PREFIX = "shard-"
SHARD_NAME = re.compile(rf"{SHARD_PREFIX}(\d+){re.escape(SHARD_SUFFIX)}")
#: before the name of a file that looks like a shard and is none of this folder's
ASIDE_PREFIX = "orphan-"
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
        self._failed = False
        make_folder(folder)
        self._lock = FolderLock(folder)
        try:
            self.manifest = self._resume(manifest, companions or {})
            # What is listed is looked at first: while a shard is missing, an unlisted one may be all that is left.
            self.done: set[Hashable] = set()
            for shard in self.manifest.shards:
                self.done.update(read_keys(folder, shard, codec))
            self._settle_leftovers()
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise StoreError(f"cannot clear up {folder}: {error}. Nothing is lost; repair the disk.") from error
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

    def _settle_leftovers(self) -> None:
        """Delete temporary files, and take in the rows of shards that the manifest does not list.

        There are such shards when a writer was stopped before it could list or delete them, and when an older manifest
        was put back. Nothing is deleted unless its rows are here.
        """
        listed = {shard.name for shard in self.manifest.shards}
        held = len(self.done)
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX):
                path.unlink()
            elif path.name.startswith(SHARD_PREFIX) and path.name not in listed:
                self._take_in(path)
        if len(self.done) > held:
            _say(f"{self.folder}: took in {len(self.done) - held} rows of shards that were not in the manifest.")

    def _take_in(self, path: Path) -> None:
        items = read_unlisted(path, self.codec, self.manifest.identity_digest)
        if items is None:
            aside = _free_name(path.with_name(f"{ASIDE_PREFIX}{path.name}"))
            path.rename(aside)
            _say(f"{path} is not in the manifest, and damaged or made with other settings. It is now {aside.name}.")
            return
        for item in items:
            if not self.holds(self.codec.key(item)):
                self.write(item)
        self.flush()
        sync_folder(self.folder)  # also the manifest that an earlier run could not flush
        path.unlink()

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

    def drop(self, keys: Collection[Hashable]) -> None:
        """Take items out, a shard at a time. A writer that is killed between may bring some of them back."""
        self.flush()
        gone = set(keys)
        for shard in self.manifest.shards:
            if not gone.isdisjoint(read_keys(self.folder, shard, self.codec)):
                kept = [item for item in self.codec.items(self.folder, shard) if self.codec.key(item) not in gone]
                self._commit(kept, sum(map(self.codec.tokens, kept)), replaces=[shard])
        self.done -= gone

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

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """Let only the next writer go on when the block fails, because it looks at what the disk holds then."""
        if self._failed:
            raise StoreError(f"{self.folder}: an earlier write failed. Run the same command again to go on.")
        with interrupts_deferred():
            try:
                yield
            except BaseException:
                self._failed = True
                raise

    def _commit(self, items: list[T], tokens: int, replaces: Iterable[ShardInfo] = ()) -> None:
        """Write items as a shard and put it into the manifest, in place of others if they are named."""
        gone = {shard.name for shard in replaces}
        with self._committing():
            added = [self._write_shard(self._new_name(), self.codec.encode(items), tokens)] if items else []
            self._update(shards=_replaced(self.manifest.shards, gone, added))
        for name in gone:
            with suppress(OSError):  # the next writer deletes it
                (self.folder / name).unlink(missing_ok=True)

    def _new_name(self) -> str:
        """Return a name that no file has: a shard that the manifest does not list may still hold rows."""
        names = [shard.name for shard in self.manifest.shards] + [path.name for path in self.folder.iterdir()]
        numbers = [int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match]
        return f"{SHARD_PREFIX}{1 + max(numbers, default=-1):06d}{SHARD_SUFFIX}"

    def _write_shard(self, name: str, table: pa.Table, tokens: int) -> ShardInfo:
        table = stamped(table, self.manifest.identity_digest, self.codec.version)
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
        if updated.rows != self.manifest.rows:
            updated.complete = False  # until finish() says so: what is being added may be stopped half way
        updated.save(self.folder)
        self.manifest = updated

    def finish(self) -> None:
        """Commit, join small shards, and note that everything that was asked for is here."""
        self.flush()
        self.compact()
        if not self.manifest.complete:
            with self._committing():
                self._update(complete=True)

    def close(self) -> None:
        """Commit what is buffered and let the next writer in."""
        try:
            if not self._failed:
                self.flush()
        finally:
            self._lock.close()


def _replaced(shards: list[ShardInfo], gone: set[str], added: list[ShardInfo]) -> list[ShardInfo]:
    """Return the list with ``added`` where the first of ``gone`` stood, or at the end."""
    place = next((index for index, shard in enumerate(shards) if shard.name in gone), len(shards))
    return [*shards[:place], *added, *(shard for shard in shards[place:] if shard.name not in gone)]


def _free_name(path: Path) -> Path:
    """Return the name, or one like it that no file has."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    return next(name for name in chain([path], names) if not name.exists())


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
