"""Reading a store of log-probabilities: by id, or from the first shard to the last.

Shards are mapped into memory, some at a time, and a record is unpacked when it is asked for. The list of ids costs a
look at each shard's size and ids; a shard's checksum is compared before its first record is returned. A store can be
pickled and forked: a worker opens the files anew, and trusts the checksums that its parent has compared.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.fusion.types import LazyRecord, Record
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store.files import plain_file
from fusion_plugins.store.id_index import IdIndex
from fusion_plugins.store.manifest import TABLE_NAME, Manifest
from fusion_plugins.store.packed import PackedRecord
from fusion_plugins.store.patterns import Array
from fusion_plugins.store.schema import RecordCodec, RecordTable, find_places
from fusion_plugins.store.shards import compare_checksum, map_shard, open_shard, parquet_file, read_table, reading

if TYPE_CHECKING:
    from fusion_plugins.core.text.token_table import TokenTable

#: row groups that a store keeps; of old layouts they are decoded
CACHED_GROUPS = 16
#: shards that a store has open; an operating system maps some 65,000 files into a process
OPEN_SHARDS = 256
#: bytes of the largest token table that is read; a token takes about ten
TABLE_BYTES = 1 << 28


def open_store(path: str | Path) -> "Store":
    """Return a store, open for reading.

    Raises:
        StoreError: the folder is no store, or it is damaged.
    """
    return Store(path)


class CrossEntropies(NamedTuple):
    """Mean cross-entropies of a record over what is supervised, named as in it; nan without anything.

    Attributes:
        ce_per_token: nats/token.
        ce_per_byte: nats/byte.
    """

    ce_per_token: float
    ce_per_byte: float


class Store:
    """A store of log-probabilities, read-only.

    ``store[id]``, ``store.get(id)``, ``id in store``, ``len(store)`` and iteration over records in the order of the
    shards.

    Attributes:
        path: the folder.
        manifest: what was captured, and how.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        self._codec = RecordCodec(self.manifest)
        self._checked: set[int] = set()
        self._open()

    def _open(self) -> None:
        """Start with no file open: at first, and again in a forked worker."""
        # Caches of the instance: as decorators of the methods they would keep every store alive.
        self._pid = os.getpid()
        self._file = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._group = lru_cache(maxsize=CACHED_GROUPS)(self._decode_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path.absolute()), self.manifest.fingerprint, self._checked)

    @cached_property
    def table(self) -> "TokenTable":
        """The tokens of the source's tokenizer.

        Raises:
            StoreError: the table is missing or damaged.
            MismatchError: the table is another tokenizer's.
        """
        from fusion_plugins.core.text.token_table import TokenTable

        path = self.path / TABLE_NAME
        data = self.table_bytes()
        try:
            columns = read_table(parquet_file(pa.py_buffer(data)))
            table = TokenTable.from_columns({name: columns[name].to_pylist() for name in columns.column_names})
            fingerprint = table.fingerprint
        except Exception as error:  # as in `shards.reading`: what a broken file makes a library raise
            raise StoreError(f"{path} cannot be read: {str(error):.300}. Restore it from a copy.") from error
        if fingerprint != self.manifest.tokenizer_fingerprint:
            raise MismatchError(
                f"{path}: expected the table of tokenizer {self.manifest.tokenizer_fingerprint}, as the manifest says, "
                f"got {fingerprint}. One of the two files is of another store: restore it from a copy."
            )
        return table

    def table_bytes(self) -> bytes:
        """Return the file of the token table as it is.

        Its checksum also covers what the tokenizer's fingerprint leaves out: the pad token and the end of a turn.

        Raises:
            StoreError: it is missing, or not the file that was written.
        """
        path = self.path / TABLE_NAME
        try:
            file = plain_file(path)
            size = file.stat().st_size
            if size > TABLE_BYTES:
                raise StoreError(
                    f"{path} is damaged: expected at most {TABLE_BYTES:,} bytes, got {size:,}. Restore it from a copy."
                )
            data = file.read_bytes()
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}. Restore it from a copy.") from error
        found = hashlib.sha256(data).hexdigest()
        expected = self.manifest.files.get(TABLE_NAME, found)
        if expected != found:
            raise MismatchError(
                f"{path} cannot be read as the file that was written: expected sha256 {expected[:12]}..., got "
                f"{found[:12]}.... One of the two files is of another store, or damaged: restore it from a copy."
            )
        return data

    @cached_property
    def _index(self) -> IdIndex:
        # One shard at a time: a million ids as Python strings are 70 MB.
        return IdIndex(self._ids_of_shard(number) for number in range(len(self.manifest.shards)))

    def _ids_of_shard(self, number: int) -> list[str]:
        opened = self._file(number)
        with reading(self.path, self.manifest.shards[number]):
            return self._codec.keys(read_table(opened.file, columns=self._codec.key_columns))

    @cached_property
    def _shard_starts(self) -> list[int]:
        return [0, *accumulate(shard.rows for shard in self.manifest.shards)]

    def _open_shard(self, shard: int) -> "_OpenShard":
        info = self.manifest.shards[shard]
        data = map_shard(self.path, info)
        file = open_shard(self.path, info, self._codec.identity, data)
        with reading(self.path, info):
            rows = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            return _OpenShard(data, file, [0, *accumulate(rows)], np.zeros((info.rows, 2), np.uint32))

    def _decode_group(self, shard: int, group: int) -> RecordTable:
        info = self.manifest.shards[shard]
        self._compare_checksum(shard)
        with reading(self.path, info):
            return self._codec.decode_table(read_table(self._file(shard).file, group), info.version)

    def _compare_checksum(self, shard: int) -> None:
        """Compare the checksum of a shard before its first record is returned."""
        if shard not in self._checked:
            compare_checksum(self.path, self.manifest.shards[shard])
            self._checked.add(shard)

    def _read(self, number: int, id: str | None = None) -> Record:
        """Return the record with that number; faster with its id."""
        shard, row = self._locate(number)
        with self._reading(shard):
            found = self._found(shard, row, id)
            return found.unpack() if isinstance(found, PackedRecord) else found

    def _found(self, shard: int, row: int, id: str | None) -> PackedRecord | Record:
        """Return a record as its bytes where they are; a record of an old layout as it is."""
        opened = self._file(shard)
        if id is not None:
            self._compare_checksum(shard)
            start, stop = opened.place(row)
            if stop:
                return PackedRecord(id, opened.data.slice(start, stop - start), self.manifest.top_k)
        group = opened.group(row)
        return self._group(shard, group).item(row - opened.starts[group])

    def _reading(self, shard: int) -> AbstractContextManager[None]:
        return reading(self.path, self.manifest.shards[shard])

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the shard of a record and its row there."""
        if self._pid != os.getpid():
            self._open()
        shard = bisect_right(self._shard_starts, number) - 1
        return shard, number - self._shard_starts[shard]

    def text(self, id: str) -> TokenizedText:
        """Return the text of the record of that id, without unpacking its distributions.

        Raises:
            KeyError: there is none.
        """
        shard, row = self._locate(self._number(id))
        with self._reading(shard):
            found = self._found(shard, row, str(id))
            return found.text() if isinstance(found, PackedRecord) else found.text

    def cross_entropies(self, id: str) -> CrossEntropies:
        """Return those of the record of that id, of which nothing is unpacked.

        Raises:
            KeyError: there is none.
        """
        shard, row = self._locate(self._number(id))
        with self._reading(shard):
            found = self._found(shard, row, str(id))
            return CrossEntropies(found.ce_per_token, found.ce_per_byte)

    def lazy(self, id: str) -> LazyRecord:
        """Return the record of that id; its distributions are unpacked when they are asked for.

        Raises:
            KeyError: there is none.
        """
        number = self._number(id)
        shard, row = self._locate(number)
        with self._reading(shard):
            found = self._found(shard, row, str(id))
            text = found.text() if isinstance(found, PackedRecord) else found.text
            return LazyRecord(
                str(id), text, found.ce_per_token, found.ce_per_byte, lambda: self._read(number, str(id)).topk
            )

    def ids(self) -> list[str]:
        """Return all ids, in the order of the shards."""
        return self._index.ids()

    def get(self, id: str, default: Record | None = None) -> Record | None:
        """Return the record of that id, or the default."""
        number = self._index.find(id)
        return default if number is None else self._read(number, str(id))

    def __getitem__(self, id: str) -> Record:
        return self._read(self._number(id), str(id))

    def _number(self, id: str) -> int:
        number = self._index.find(id)
        if number is None:
            raise KeyError(f"{self.path} holds no record {id!r}")
        return number

    def __contains__(self, id: object) -> bool:
        return self._index.find(id) is not None

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[Record]:
        return map(self._read, range(len(self)))


@dataclass(frozen=True)
class _OpenShard:
    """A shard that is mapped into memory.

    Attributes:
        data: the whole file.
        file: the same as Parquet, which compares the checksums of pages.
        starts: first row of each row group, and the number of rows.
        places: (rows, 2) start and end of the bytes of each record in ``data``; 0 until one of its row group is read.
    """

    data: pa.Buffer
    file: pq.ParquetFile
    starts: list[int]
    places: Array

    def group(self, row: int) -> int:
        """Return the row group of a row."""
        return bisect_right(self.starts, row) - 1

    def place(self, row: int) -> tuple[int, int]:
        """Return start and end of the bytes of a record in ``data``; 0 and 0 where they are not there as they are."""
        if not self.places[row, 1]:
            group = self.group(row)
            found = find_places(self.data, self.file, group)
            if found is not None:
                self.places[self.starts[group] : self.starts[group + 1]] = found
        start, stop = self.places[row].tolist()
        return start, stop


def _reopen(path: str, fingerprint: str, checked: set[int]) -> Store:
    store = Store(path)
    store._checked = checked  # by the process that pickled it: not every worker needs to read the whole store
    if store.manifest.fingerprint != fingerprint:
        raise MismatchError(
            f"{path} changed while it was in use: expected fingerprint {fingerprint}, got "
            f"{store.manifest.fingerprint}. Let nothing write to a store that is being read, and start again."
        )
    return store
