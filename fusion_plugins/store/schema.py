"""Records as rows of a Parquet shard, and back: two columns, the id and the record as bytes.

``docs/store.md`` describes layout 3, which is written. :mod:`~fusion_plugins.store.old_layouts` reads the older ones.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusion_plugins.core.fusion.types import Record
from fusion_plugins.store import shards
from fusion_plugins.store.manifest import Manifest
from fusion_plugins.store.old_layouts import decode_table
from fusion_plugins.store.packed import PackedRecord, pack
from fusion_plugins.store.patterns import Array

if TYPE_CHECKING:
    from fusion_plugins.core.text.token_table import TokenTable

#: log-probabilities per row group: what is looked through when one of its records is first read
GROUP_VALUES = 1 << 16
#: log-probabilities per shard
SHARD_VALUES = 1 << 24
#: Records are packed one by one. Parquet's own packing would unpack a whole group; no reader uses statistics.
PARQUET_OPTIONS: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
_COLUMNS = pa.schema([("id", pa.string()), ("record", pa.binary())])
#: number of the column with the records
_RECORD_COLUMN = 1
#: the length of a value in Parquet's plain encoding
_LENGTH = struct.Struct("<I")
#: more bytes than the header of a page without statistics and the levels behind it take; ours take about 40
_PAGE_HEADER = 256


class RecordTable(Protocol):
    """Some records of a shard."""

    def item(self, row: int) -> Record | PackedRecord:
        """Return one record, as bytes where the layout allows it; its arrays are read-only and belong to it alone."""

    def records(self) -> Iterator[Record]:
        """Return all records, in order."""


class RecordCodec:
    """How the records of a store are kept.

    Args:
        manifest: of the store.
        table: its tokens, for a codec that packs records.
    """

    version = Manifest.LAYOUT
    key_columns = ["id"]
    parquet = PARQUET_OPTIONS

    def __init__(self, manifest: Manifest, table: "TokenTable | None" = None) -> None:
        self._table = table
        self.identity = manifest.identity_digest
        self.top_k = manifest.top_k
        self.shard_tokens = max(1, SHARD_VALUES // manifest.top_k)
        self.group_tokens = max(1, GROUP_VALUES // manifest.top_k)

    def encode(self, items: Sequence[Record | PackedRecord]) -> pa.Table:
        """Return one table row per record, in the layout of the current version."""
        columns = [[item.id for item in items], [_bytes_of(item, self._table) for item in items]]
        return pa.table(
            [pa.array(column, kind) for column, kind in zip(columns, _COLUMNS.types, strict=True)], _COLUMNS
        )

    def decode(self, table: pa.Table, version: int) -> Iterator[Record]:
        """Return the records of a table that was written with that version."""
        return self.decode_table(table, version).records()

    def packed(self, table: pa.Table, version: int) -> Iterable[Record | PackedRecord]:
        """Return the records of a table to be written again: those of the current layout are bytes and stay so."""
        return self.decode(table, version) if version < 3 else PackedTable(table, self.top_k).packed()

    def decode_table(self, table: pa.Table, version: int) -> RecordTable:
        """Return the records of a table; what no record can be is refused, here or when a record is taken.

        Raises:
            ValueError: naming what is wrong.
        """
        return decode_table(table, version, self.top_k) if version < 3 else PackedTable(table, self.top_k)

    def key(self, item: Record | PackedRecord) -> str:
        """Return the id of a record."""
        return item.id

    def keys(self, table: pa.Table) -> list[str]:
        """Return the ids of a table's rows.

        Raises:
            ValueError: a row has none.
        """
        if table["id"].type != pa.string() or table["id"].null_count:
            raise ValueError("id: expected a string in every row")
        return table["id"].to_pylist()

    def tokens(self, item: Record | PackedRecord) -> int:
        """Return the number of tokens of a record."""
        return item.header[0] if isinstance(item, PackedRecord) else len(item.text.input_ids)


class PackedTable:
    """Records of layout 3, of which each is unpacked when it is asked for.

    Raises:
        ValueError: the columns are others.
    """

    def __init__(self, table: pa.Table, top_k: int) -> None:
        if not table.schema.equals(_COLUMNS):
            found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
            raise ValueError(f"expected the columns id string, record binary, got {found:.200}")
        if any(column.null_count for column in table.columns):
            raise ValueError("expected an id and a record in every row")
        self._table, self._top_k = table.combine_chunks(), top_k

    def item(self, row: int) -> PackedRecord:
        """Return one record as bytes."""
        id, data = (self._table[name][row] for name in _COLUMNS.names)
        return PackedRecord(id.as_py(), data.as_buffer(), self._top_k)

    def records(self) -> Iterator[Record]:
        """Return all records, in order.

        Raises:
            ValueError: they would take more memory than anything that was written by us.
        """
        return (record.unpack() for record in self.packed())

    def packed(self) -> list[PackedRecord]:
        """Return all records, in order, of which only the headers were read.

        Raises:
            ValueError: they would take more memory than anything that was written by us.
        """
        packed = [self.item(row) for row in range(self._table.num_rows)]
        size = sum(record.size for record in packed)
        if size > shards.MOST_BYTES:
            raise ValueError(f"expected at most {shards.MOST_BYTES} bytes, got {size}")
        return packed


def find_places(shard: pa.Buffer, file: pq.ParquetFile, group: int) -> Array | None:
    """Return (N, 2) uint32, where the bytes of each record of a row group start and end in a shard.

    Parquet's plain encoding is the length of a value, four bytes, and the value; nothing follows the last one. How long
    the header before the first one is, is not looked up but tried: from the right place N values end at the column's
    end. Where that is so from a second place too, as with few records at times, none is taken. So no record is copied,
    and a file of another kind only costs time.

    Args:
        shard: the whole file.
        file: the same as Parquet.
        group: number of the row group.

    Returns:
        The places; None if they are not certain, or the bytes are not there: the shard is of an old layout or of other
        columns, or it was compressed, or has several pages per row group.
    """
    meta = file.metadata.row_group(group)
    if meta.num_columns != len(_COLUMNS) or not file.schema_arrow.equals(_COLUMNS):
        return None
    column = meta.column(_RECORD_COLUMN)
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        return None
    first, stop = column.data_page_offset, column.data_page_offset + column.total_compressed_size
    if not 0 <= first <= stop <= min(shard.size, np.iinfo(np.uint32).max):
        return None
    data = memoryview(shard)
    tried = (_values(data, start, stop) for start in range(first, min(first + _PAGE_HEADER, stop)))
    fitting = [found for found in tried if len(found) == meta.num_rows]
    return np.array(fitting[0], np.uint32) if len(fitting) == 1 else None


def _values(data: memoryview, at: int, stop: int) -> list[tuple[int, int]]:
    """Return start and end of each value in plain encoding from ``at`` on; nothing if they do not end at ``stop``."""
    found = []
    while at + _LENGTH.size < stop:
        (length,) = _LENGTH.unpack_from(data, at)
        start, at = at + _LENGTH.size, at + _LENGTH.size + length
        found.append((start, at))
        if not length:  # no record is empty
            return []
    return found if at == stop else []


def _bytes_of(item: Record | PackedRecord, table: "TokenTable | None") -> bytes:
    # Not a view: pyarrow 26 never frees a memoryview that it has made an array of.
    return item.data.to_pybytes() if isinstance(item, PackedRecord) else pack(item, table)
