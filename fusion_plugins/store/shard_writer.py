"""The generic writer of stores and row folders: the lock, the buffer, and commits through the manifest.

**Order on disk.** First the shard, then the manifest or the line of its journal that lists it, then the deletion of
shards that it replaces; each is on the disk before the next begins. So a writer that stops anywhere leaves a manifest
whose shards are all there, and perhaps a shard that no manifest lists; the next writer recovers its items.
"""

import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from fusion_plugins.core.key_set import KeySet
from fusion_plugins.errors import DataError, StoreError
from fusion_plugins.store.done_keys import DoneKeys
from fusion_plugins.store.files import (
    FolderLock,
    interrupts_deferred,
    link_or_copy,
    make_folder,
    plain_file,
    sync_folder,
    write_atomic,
)
from fusion_plugins.store.journal import JOURNAL_NAME, Entry, append_entry
from fusion_plugins.store.manifest import MANIFEST_NAME, ManifestBase, ShardInfo
from fusion_plugins.store.shard_limits import ShardLimits
from fusion_plugins.store.shards import Codec, compare_checksum, encode_shard, read_keys, read_packed, read_unlisted

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
#: small shards at the end of a folder after which they are joined, also where they do not fill a shard
MANY_SMALL = 64
#: commits after which the manifest is written as a whole, if it lists fewer shards; otherwise after as many as it lists
MANY_ENTRIES = 64


class ShardWriter(Generic[T, M]):
    """Adds items to a folder: buffers them, writes them as shards, and commits each shard through the manifest.

    A shard is committed when enough items are buffered, at :meth:`flush`, and at the end of the ``with`` block, also
    when that ends by Ctrl-C or an error. A killed process loses only what was written after the last commit.

    One thread at a time may write; :meth:`holds` may be called by others meanwhile. What is in the folder is remembered
    in 32 to 64 bytes per key, and a commit takes the same time whatever the number of shards.

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
        self._limits = ShardLimits(flush_rows, codec.shard_tokens, codec.version)
        self._buffer: list[T] = []
        self._buffered: set[Any] = set()
        self._tokens = 0
        self._failed = False
        #: checksum of the state on the disk, None where the manifest has to be written first; entries of the journal
        #: since it was written, and shards that it lists
        self._state: str | None = None
        self._entries = self._saved = 0
        self._reading = threading.Lock()
        make_folder(self.path)
        self._lock = FolderLock(self.path)
        try:
            self.manifest = self._resume(manifest, companions or {})
            # Listed shards are looked at first: while one is missing, an unlisted shard may be all that is left of it.
            self._keys = KeySet(self.keys())
            names = [shard.name for shard in self.manifest.shards] + [path.name for path in self.path.iterdir()]
            numbers = [int(match[1]) for match in map(SHARD_NAME.fullmatch, names) if match]
            # A name that no file has, rather than none in the manifest: a shard that is not listed may still be needed.
            self._next_number = 1 + max(numbers, default=-1)
            self._recover_unlisted_shards()
            if (self.path / JOURNAL_NAME).exists():  # of a writer that was stopped
                self._save(self.manifest)
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
            self._state = fresh.save(self.path)
            return fresh
        found = type(wanted).load(self.path)
        found.require(
            self.path,
            "Run with the settings it was made with, give another folder, or delete this one to start afresh.",
            **wanted.identity(),
        )
        # The folder may have been written by an older version, which noted no checksums of companions; each shard's own
        # version says how to read it.
        if older := sum(shard.version < self._codec.version for shard in found.shards):
            _say(
                f"{self.path}: {older} of {len(found.shards)} shards are of an earlier layout, and are read as they "
                f"are; `fusion store compact {self.path}` rewrites them."
            )
        missing = {name: content for name, content in companions.items() if name not in found.files}
        files = found.files | self._write_companions(missing)
        joined = sorted({*found.joined, *wanted.joined})
        return found.model_copy(update={"schema_version": found.VERSION, "files": files, "joined": joined})

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
        held = self.manifest.rows
        for path in sorted(self.path.iterdir()):
            if LEFTOVER.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
                path.unlink()
            elif path.name.startswith(SHARD_PREFIX) and path.name not in listed:
                self._recover(path)
        if self.manifest.rows > held:
            noun = self.manifest.NOUN
            _say(f"{self.path}: recovered {self.manifest.rows - held} {noun} of shards that were not in the manifest.")

    def _recover(self, path: Path) -> None:
        items = read_unlisted(path, self._codec, self.manifest.joined)
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
        with self._reading:  # a set that grows moves its keys
            return key in self._buffered or key in self._keys

    @property
    def index(self) -> KeySet:
        """Keys of the items on the disk. A number may be kept with each, until items are dropped; add no others."""
        return self._keys

    @property
    def done(self) -> DoneKeys:
        """Keys of the items that are on the disk."""
        return DoneKeys(self._is_done, self.keys, lambda: len(self._keys))

    def _is_done(self, key: Hashable) -> bool:
        with self._reading:
            return key in self._keys

    def keys(self) -> Iterator[Any]:
        """Yield the key of every item that is on the disk; reads one shard at a time."""
        for shard in self.manifest.shards:
            yield from read_keys(self.path, shard, self._codec)

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
        if self._limits.filled(len(self._buffer), self._tokens):
            self.flush()

    def flush(self) -> None:
        """Commit everything that was written so far."""
        if not self._buffer:
            return
        with interrupts_deferred():
            self._commit(self._buffer)
            with self._reading:
                for key in self._buffered:
                    self._keys.add(key)
                self._buffer, self._buffered, self._tokens = [], set(), 0
        tail = self._limits.small_tail(self.manifest.shards)
        rows, tokens = sum(shard.rows for shard in tail), sum(shard.tokens for shard in tail)
        # As soon as they fill a shard: many at once would keep the writer busy for a minute.
        if len(tail) >= MANY_SMALL or self._limits.filled(rows, tokens):
            self._join(tail)

    def adopt(self, folder: Path, shard: ShardInfo, keys: Collection[Hashable], identity: str) -> None:
        """Take a whole shard of another folder: link it or, on another file system, copy it.

        Args:
            folder: the other folder.
            shard: one of its shards, in the layout that this writer writes.
            keys: its keys; the folder must hold none of them.
            identity: digest that the shard carries.

        Raises:
            StoreError: the shard is damaged, or the disk is full.
        """
        self.flush()
        compare_checksum(folder, shard)
        with self._committing():
            taken = shard.model_copy(update={"name": self._new_name(), "identity": identity})
            if taken.identity == self._codec.identity:
                taken = taken.model_copy(update={"identity": None})
            if not link_or_copy(plain_file(folder / shard.name), self.path / taken.name):
                compare_checksum(self.path, taken)
            self._list([taken])
        with self._reading:
            for key in keys:
                self._keys.add(key)

    def compact(self) -> None:
        """Join neighbouring small shards, and rewrite those of an older version; a group at a time, each atomically."""
        self._join(self.manifest.shards)

    def _join(self, shards: Sequence[ShardInfo], *, older: bool = True) -> None:
        """Join small shards; pack those of an older version anew, which takes long, only if that is wanted."""
        for group in self._limits.groups(shards, older=older):
            self._commit([item for shard in group for item in read_packed(self.path, shard, self._codec)], group)

    def drop(self, keys: Collection[Hashable]) -> None:
        """Take items out, a shard at a time, so that they can be written anew.

        A writer that is killed between the commit and the deletion of the old shard may bring some of them back.
        """
        self.flush()
        gone = set(keys)
        for shard in self.manifest.shards:
            if not gone.isdisjoint(read_keys(self.path, shard, self._codec)):
                items = read_packed(self.path, shard, self._codec)
                self._commit([item for item in items if self._codec.key(item) not in gone], [shard])
        with self._reading:
            self._keys = KeySet(self.keys())

    def is_small(self, shard: ShardInfo) -> bool:
        """Return whether a shard is to be joined with its neighbours."""
        return self._limits.is_small(shard)

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
        """Write items as a shard and list it, in place of others if they are named."""
        with self._committing():
            self._list([self._write_shard(items)] if items else [], [shard.name for shard in replaced])
        for shard in replaced:
            with suppress(OSError):  # the next writer deletes it
                (self.path / shard.name).unlink(missing_ok=True)

    def _new_name(self) -> str:
        name = f"{SHARD_PREFIX}{self._next_number:06d}.parquet"
        self._next_number += 1
        return name

    def _write_shard(self, items: list[T]) -> ShardInfo:
        name = self._new_name()
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

    def _list(self, added: list[ShardInfo], removed: Sequence[str] = ()) -> None:
        """Put shards into the manifest, in place of those that are removed; this is the commit."""
        entry = Entry(after=self._state or "0" * 64, removed=list(removed), added=added)
        updated = self.manifest.model_copy(update={"shards": entry.applied(self.manifest.shards)})
        if updated.complete and updated.rows != self.manifest.rows:
            updated.complete = False  # until finish() says so: what is being added may be stopped half way
        many = self._entries >= max(MANY_ENTRIES, self._saved)
        if self._state is None or many or updated.complete != self.manifest.complete:
            self._save(updated)
            return
        append_entry(self.path, entry)
        self._state, self._entries, self.manifest = entry.checksum, self._entries + 1, updated

    def _save(self, manifest: M) -> None:
        self._state = manifest.save(self.path)
        self._entries, self._saved, self.manifest = 0, len(manifest.shards), manifest

    def finish(self) -> None:
        """Commit, join small shards, and mark the folder complete.

        Shards of an older version stay as they are: :meth:`compact` takes as long as writing the folder did.
        """
        self.flush()
        self._join(self.manifest.shards, older=False)
        if not self.manifest.complete:
            with self._committing():
                self._save(self.manifest.model_copy(update={"complete": True}))

    def close(self) -> None:
        """Commit what is buffered, put the journal into the manifest, and let the next writer in."""
        try:
            if not self._failed:
                self.flush()
                if self._entries:
                    with self._committing():
                        self._save(self.manifest)
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
                f"Stopped. {self.manifest.rows} {self.manifest.NOUN} are safe in {self.path}; run the same command "
                f"again to resume."
            )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
