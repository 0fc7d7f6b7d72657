"""Reading a store of log-probabilities: by id, or from the first shard to the last.

Shards are mapped into memory, compared with their checksums when they are first touched, and decoded a row group at a
time. A store can be pickled and forked: a worker opens the files anew.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from fusion_plugins.core.types import Record
from fusion_plugins.errors import MismatchError, StoreError
from fusion_plugins.store.manifest import Manifest
from fusion_plugins.store.schema import RecordTable, decode_records
from fusion_plugins.store.shards import open_shard
from fusion_plugins.store.writer import TABLE_NAME

if TYPE_CHECKING:
    from fusion_plugins.core.token_table import TokenTable

__all__ = ["Store", "open_store"]

#: decoded row groups that a store keeps
CACHED_GROUPS = 4


def open_store(path: str | Path) -> "Store":
    """Open a store for reading.

    Raises:
        StoreError: the folder is no store, or it is damaged.
    """
    return Store(path)


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
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], RecordTable] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (str(self.path),)

    @cached_property
    def table(self) -> "TokenTable":
        """The tokens of the source's tokenizer.

        Raises:
            StoreError: the table is missing or damaged.
            MismatchError: the table is another tokenizer's.
        """
        from fusion_plugins.core.token_table import TokenTable

        path = self.path / TABLE_NAME
        try:
            columns = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read: {error}. Restore it from a copy.") from error
        table = TokenTable.from_columns({name: columns[name].to_pylist() for name in columns.column_names})
        if table.fingerprint != self.manifest.tokenizer_fingerprint:
            raise MismatchError(
                f"{path} is tokenizer {table.fingerprint}, the manifest says {self.manifest.tokenizer_fingerprint}. "
                f"One of the two comes from another store: restore it from a copy."
            )
        return table

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, int]]:
        """Id -> (shard, row group, row in it)."""
        places: dict[str, tuple[int, int, int]] = {}
        for shard in range(len(self.manifest.shards)):
            file = self._file(shard)
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["id"], use_threads=False)["id"].to_pylist()
                places.update((id, (shard, group, row)) for row, id in enumerate(ids))
        return places

    def _file(self, shard: int) -> pq.ParquetFile:
        if self._pid != os.getpid():
            self._forget()
        if shard not in self._files:
            self._files[shard] = open_shard(self.path, self.manifest.shards[shard])
        return self._files[shard]

    def _group(self, shard: int, group: int) -> RecordTable:
        file = self._file(shard)
        place = (shard, group)
        if place not in self._groups:
            table = file.read_row_group(group, use_threads=False)
            self._groups[place] = decode_records(table, self.manifest.schema_version)
            if len(self._groups) > CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(place)
        return self._groups[place]

    def ids(self) -> list[str]:
        """Return all ids, in the order of the shards."""
        return list(self._places)

    def get(self, id: str, default: Record | None = None) -> Record | None:
        """Return the record of that id, or the default."""
        return self[id] if id in self._places else default

    def __getitem__(self, id: str) -> Record:
        try:
            shard, group, row = self._places[id]
        except KeyError:
            raise KeyError(f"{self.path} holds no record {id!r}") from None
        return self._group(shard, group).record(row)

    def __contains__(self, id: object) -> bool:
        return id in self._places

    def __len__(self) -> int:
        return self.manifest.rows

    def __iter__(self) -> Iterator[Record]:
        for shard in range(len(self.manifest.shards)):
            for group in range(self._file(shard).num_row_groups):
                records = self._group(shard, group)
                yield from (records.record(row) for row in range(len(records.ids)))
