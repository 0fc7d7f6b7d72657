"""The generic writer of stores and row folders: the lock, the buffer, and commits through the manifest.

**Order on disk.** First the shard, then the manifest that lists it, then the deletion of shards that it replaces; each
is on the disk before the next begins. So a writer that stops anywhere leaves a manifest whose shards are all there, and
perhaps a shard that no manifest lists; the next writer recovers its items.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.store.files import (
    FolderLock,
    interrupts_deferred,
    make_folder,
    sync_folder,
    write_atomic,
)
from fusion_plugins.store.manifest import MANIFEST_NAME, ManifestBase, ShardInfo
from fusion_plugins.store.shards import Codec, encode_shard, read_items, read_keys, read_unlisted

T = TypeVar("T")
M = TypeVar("M", bound=ManifestBase)
Companions = Mapping[str, Callable[[], bytes | memoryview]]

SHARD_PREFIX = "shard-"
SHARD_NAME = re.compile(rf"{SHARD_PREFIX}([0-9]{{6,12}})\.parquet")
#: what a killed writer of this or an earlier version leaves half written
LEFTOVER = re.compile(rf"\.({SHARD_PREFIX}[0-9]+|manifest|tokens)\.(parquet|json)(\.[0-9a-f]{{16}})?\.tmp")
#: before the name of a file that looks like a shard and does not belong to this folder
ASIDE_PREFIX = "orphan-"
#: items per shard
SHARD_ROWS = 1 << 14
#: small shards after which they are joined without being asked, so that frequent commits stay cheap
MANY_SMALL = 64


class ShardWriter(Generic[T, M]):
    """Adds items to a folder: buffers them, writes them as shards, and commits each shard through the manifest.

    A shard is committed when enough items are buffered, at :meth:`flush`, and at the end of the ``with`` block, also
    when that ends by Ctrl-C or an error. A killed process loses only what was written after the last commit.

    Args:
        path: the folder; made if it does not exist, continued if it does.
        manifest: what is about to be written; an existing manifest must have the same identity.
        codec: how items become rows of Parquet.
        flush_rows: items after which a shard is written without being asked.
        companions: name -> content of files that every reader needs; they are there before the manifest is.

    Attributes:
        path: the folder.
        manifest: the manifest as it is on the disk.
        done: keys of the items that are on the disk.

    Raises:
        MismatchError: the folder was made with other settings; all of them are named.
        StoreError: the folder is damaged, or another writer is at work.
    """

    def __init__(
        self,
        path: str | Path,
        manifest: M,
        codec: Codec[T],
        flush_rows: int = SHARD_ROWS,
        companions: Companions | None = None,
    ) -> None:
        self.path = Path(path)
        self._codec = codec
        self._limits = (flush_rows, codec.shard_tokens)
        self._buffer: list[T] = []
        self._buffered: set[Any] = set()
        self._tokens = 0
        self._failed = False
        make_folder(self.path)
        self._lock = FolderLock(self.path)
        try:
            self.manifest = self._resume(manifest, companions or {})
            # Listed shards are looked at first: while one is missing, an unlisted shard may be all that is left of it.
            self.done: set[Any] = set()
            for shard in self.manifest.shards:
                self.done.update(read_keys(self.path, shard, codec))
            self._recover_unlisted_shards()
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise StoreError(
                    f"cannot clear up {self.path}: {error}. Nothing is lost; repair the disk, then run the same "
                    f"command again."
                ) from error
            raise

    def _resume(self, wanted: M, companions: Companions) -> M:
        if not (self.path / MANIFEST_NAME).exists():
            shards = sorted(path.name for path in self.path.glob(f"{SHARD_PREFIX}*"))
            if shards:
                raise StoreError(
                    f"{self.path}: expected an empty folder or a store, got {shards[0]} without a {MANIFEST_NAME}. "
                    f"Restore the manifest, or name an empty folder."
                )
            fresh = wanted.model_copy(
                update={"schema_version": wanted.VERSION, "files": self._write_companions(companions)}
            )
            fresh.save(self.path)
            return fresh
        found = type(wanted).load(self.path)
        found.require(
            self.path,
            "Run with the settings it was made with, give another folder, or delete this one to start afresh.",
            **wanted.identity(),
        )
        # The folder may have been written by an older version, which noted no checksums of companions; each shard's own
        # version says how to read it.
        missing = {name: content for name, content in companions.items() if name not in found.files}
        files = found.files | self._write_companions(missing)
        return found.model_copy(update={"schema_version": found.VERSION, "files": files})

    def _write_companions(self, companions: Companions) -> dict[str, str]:
        """Write the files that every reader needs; return their checksums."""
        checksums = {}
        for name, content in companions.items():
            data = content()
            write_atomic(self.path / name, data)
            checksums[name] = hashlib.sha256(data).hexdigest()
        return checksums

    def _recover_unlisted_shards(self) -> None:
        """Write the items of shards that the manifest does not list again; delete temporary files.

        There are such shards when a writer was stopped before it could list or delete them, and when an older manifest
        was put back. Nothing is deleted unless its items are in a listed shard.
        """
        listed = {shard.name for shard in self.manifest.shards}
        held = len(self.done)
        for path in sorted(self.path.iterdir()):
            if LEFTOVER.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                path.unlink()
            elif path.name.startswith(SHARD_PREFIX) and path.name not in listed:
                self._recover(path)
        if len(self.done) > held:
            noun = self.manifest.NOUN
            _say(f"{self.path}: recovered {len(self.done) - held} {noun} of shards that were not in the manifest.")

    def _recover(self, path: Path) -> None:
        items = read_unlisted(path, self._codec)
        if items is None:
            names = chain([path.name], (f"{path.stem}-{number}{path.suffix}" for number in count(1)))
            asides = (path.with_name(f"{ASIDE_PREFIX}{name}") for name in names)
            aside = next(aside for aside in asides if not os.path.lexists(aside))
            path.rename(aside)
            _say(f"{path} is not in the manifest, and damaged or made with other settings. It is now {aside.name}.")
            return
        for item in items:
            if not self.holds(self._codec.key(item)):
                self.write(item)
        self.flush()
        # Items that are listed already may be so by a manifest whose rename an earlier run could not flush to the disk.
        sync_folder(self.path)
        path.unlink()

    def holds(self, key: Hashable) -> bool:
        """Return whether an item with that key was written, now or before."""
        return key in self.done or key in self._buffered

    def write(self, item: T, /) -> None:
        """Take one item; a shard is written when enough are buffered.

        Raises:
            DataError: the folder has an item with that key already.
        """
        key = self._codec.key(item)
        if self.holds(key):
            raise DataError(
                f"{self.path} already holds {key!r}, expected every key once. Skip what is done when you resume."
            )
        self._buffer.append(item)
        self._buffered.add(key)
        self._tokens += self._codec.tokens(item)
        if len(self._buffer) >= self._limits[0] or self._tokens >= self._limits[1]:
            self.flush()

    def flush(self) -> None:
        """Commit everything that was written so far."""
        if not self._buffer:
            return
        with interrupts_deferred():
            self._commit(self._buffer)
            self.done |= self._buffered
            self._buffer, self._buffered, self._tokens = [], set(), 0
        if sum(map(self._is_small, self.manifest.shards)) >= MANY_SMALL:
            self.compact()

    def compact(self) -> None:
        """Join neighbouring small shards, and rewrite those of an older version; a group at a time, each atomically."""
        for group in self._groups():
            self._commit([item for shard in group for item in read_items(self.path, shard, self._codec)], group)

    def drop(self, keys: Collection[Hashable]) -> None:
        """Take items out, a shard at a time, so that they can be written anew.

        A writer that is killed between the commit and the deletion of the old shard may bring some of them back.
        """
        self.flush()
        gone = set(keys)
        for shard in self.manifest.shards:
            if not gone.isdisjoint(read_keys(self.path, shard, self._codec)):
                items = read_items(self.path, shard, self._codec)
                self._commit([item for item in items if self._codec.key(item) not in gone], [shard])
        self.done -= gone

    def _is_small(self, shard: ShardInfo) -> bool:
        return 2 * shard.rows < self._limits[0] and 2 * shard.tokens < self._limits[1]

    def _groups(self) -> list[list[ShardInfo]]:
        """Return runs of neighbouring shards that fit into one, and shards of an older version, alone if need be."""
        groups: list[list[ShardInfo]] = [[]]
        for shard in self.manifest.shards:
            if shard.version >= self._codec.version and not self._is_small(shard):
                groups.append([])
                continue
            together = [*groups[-1], shard]
            full = sum(s.rows for s in together) > self._limits[0] or sum(s.tokens for s in together) > self._limits[1]
            if full:
                groups.append([shard])
            else:
                groups[-1] = together
        return [group for group in groups if len(group) > 1 or any(s.version < self._codec.version for s in group)]

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """Refuse every later commit of this writer when the block fails.

        After a failed call it is unknown what the disk holds: a rename that raised may have happened. The next writer
        reads it from the disk.
        """
        if self._failed:
            raise StoreError(f"{self.path}: an earlier write failed. Run the same command again to continue.")
        with interrupts_deferred():
            try:
                yield
            except BaseException:
                self._failed = True
                raise

    def _commit(self, items: list[T], replaced: Collection[ShardInfo] = ()) -> None:
        """Write items as a shard and put it into the manifest, in place of others if they are named."""
        gone = {shard.name for shard in replaced}
        with self._committing():
            added = [self._write_shard(items)] if items else []
            shards = self.manifest.shards
            place = next((index for index, shard in enumerate(shards) if shard.name in gone), len(shards))
            kept = [shard for shard in shards[place:] if shard.name not in gone]
            self._update(shards=[*shards[:place], *added, *kept])
        for name in gone:
            with suppress(OSError):  # the next writer deletes it
                (self.path / name).unlink(missing_ok=True)

    def _write_shard(self, items: list[T]) -> ShardInfo:
        # A name that no file has, rather than none in the manifest: a shard that is not listed may still be needed.
        names = [shard.name for shard in self.manifest.shards] + [path.name for path in self.path.iterdir()]
        numbers = [int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match]
        name = f"{SHARD_PREFIX}{1 + max(numbers, default=-1):06d}.parquet"
        data, tokens = encode_shard(items, self._codec)
        write_atomic(self.path / name, data)
        return ShardInfo(
            name=name,
            rows=len(items),
            tokens=tokens,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            version=self._codec.version,
        )

    def _update(self, **changes: object) -> None:
        updated = self.manifest.model_copy(update=changes)
        if updated.rows != self.manifest.rows:
            updated.complete = False  # until finish() says so: what is being added may be stopped half way
        updated.save(self.path)
        self.manifest = updated

    def finish(self) -> None:
        """Commit, join small shards, and mark the folder complete."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is KeyboardInterrupt:
            _say(
                f"Stopped. {len(self.done)} {self.manifest.NOUN} are safe in {self.path}; run the same command again "
                f"to resume."
            )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
