"""Records as rows of a Parquet shard, and back.

One row per record, one list per column, U tokens long; the K entries of a token are one value of fixed size.

Version 2, which is written, spends its bytes as follows. Probabilities are float16. Log-probabilities of a row
ascend in magnitude, and so do the bit patterns of non-negative floats: we keep the difference of each pattern to its
left neighbour, which is small. A byte-stream split then puts the bytes of one rank next to each other, where zstd finds
least entropy. The gold log-probability is kept only where the gold token is outside the top k. Ends are widths.
Version 1 kept float32 values as they were; it is still read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store.manifest import Manifest
from fusion_plugins.store.shards import Codec

__all__ = ["RecordTable", "decode_records", "encode_records", "record_codec"]

#: log-probabilities per row group: what one random access decodes
GROUP_VALUES = 1 << 17
#: log-probabilities per shard
SHARD_VALUES = 1 << 24
#: in `gold`: the value is the one that the top k hold for the gold token
IN_TOP_K = 0xFFFF
#: bit pattern -> log-probability; numpy's own conversion takes five times as long
_LOGPROBS = -np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
PARQUET_OPTIONS: dict[str, Any] = {
    "compression_level": 9,
    "use_dictionary": False,
    "write_statistics": False,
    "column_encoding": {
        "input_ids.list.element": "BYTE_STREAM_SPLIT",
        "widths.list.element": "BYTE_STREAM_SPLIT",
        "topk_logprobs.list.element": "BYTE_STREAM_SPLIT",
        "gold.list.element": "BYTE_STREAM_SPLIT",
        "tail.list.element": "BYTE_STREAM_SPLIT",
    },
}


def record_codec(manifest: Manifest) -> Codec[Record]:
    """Return how the records of a store are kept."""
    return Codec(
        encode=encode_records,
        decode=lambda table, version: decode_records(table, version).records(),
        key=lambda record: record.id,
        keys=lambda table: table["id"].to_pylist(),
        key_columns=["id"],
        tokens=lambda record: len(record.text.input_ids),
        version=Manifest.VERSION,
        shard_tokens=max(1, SHARD_VALUES // manifest.top_k),
        group_tokens=max(1, GROUP_VALUES // manifest.top_k),
        parquet=PARQUET_OPTIONS,
    )


def encode_records(records: list[Record]) -> pa.Table:
    """Return one table row per record, in the layout of the current version; every record has the same K."""
    lengths = [len(record.text.input_ids) for record in records]
    inputs = np.concatenate([record.text.input_ids for record in records])
    ids = np.concatenate([record.topk.ids for record in records])  # (U, K)
    bits = _float16_bits(np.concatenate([record.topk.logprobs for record in records]))
    gold = _float16_bits(np.concatenate([record.topk.token_logprobs for record in records]))
    inside, held = _gold_in_top_k(inputs, ids, bits)
    inside[[stop - 1 for stop in np.cumsum(lengths) if stop]] = False  # what follows is another record's token
    gold = np.where(inside & (gold == held), np.uint16(IN_TOP_K), gold)
    tail = np.concatenate([record.tail for record in records]).astype(np.float16).view(np.uint16)
    widths = [np.diff(record.text.ends, prepend=np.int32(0)) for record in records]
    return pa.table(
        {
            "id": pa.array([record.id for record in records], pa.string()),
            "input_ids": _lists(pa.array(inputs), lengths),
            "widths": _lists(pa.array(np.concatenate(widths)), lengths),
            "exact": _lists(pa.array(np.concatenate([record.text.exact for record in records])), lengths),
            "spans": _lists(
                pa.array(np.concatenate([record.text.spans.ravel() for record in records])),
                [record.text.spans.size for record in records],
            ),
            "topk_ids": _lists(_fixed(_narrowed(ids)), lengths),
            "topk_logprobs": _lists(_fixed(np.diff(bits, axis=1, prepend=np.uint16(0))), lengths),
            "gold": _lists(pa.array(gold), lengths),
            "tail": _lists(pa.array(tail), lengths),
            "ce_per_token": pa.array([record.ce_per_token for record in records], pa.float64(), from_pandas=False),
            "ce_per_byte": pa.array([record.ce_per_byte for record in records], pa.float64(), from_pandas=False),
        }
    )


def _float16_bits(logprobs: Any) -> Any:
    """Return uint16 bit patterns of the magnitudes: 0 for log 1, ascending, 0x7C00 for -inf, 0x7E00 for nan."""
    with np.errstate(over="ignore"):  # below -65504 nothing is left of a probability
        return np.abs(np.minimum(logprobs, 0)).astype(np.float16).view(np.uint16)


def _from_bits(bits: Any) -> Any:
    return _LOGPROBS.take(bits)


def _gold_in_top_k(inputs: Any, ids: Any, values: Any) -> tuple[Any, Any]:
    """Return for each row whether its entries hold the next token, and the value they have for it."""
    matches = ids[:-1] == inputs[1:, None]
    rank = np.concatenate([matches.argmax(axis=1), np.zeros(len(ids[-1:]), np.int64)])
    inside = np.concatenate([matches.any(axis=1), np.zeros(len(ids[-1:]), np.bool_)])
    return inside, np.take_along_axis(values, rank[:, None], axis=1)[:, 0]


def _narrowed(ids: Any) -> Any:
    """Return ids in two bytes if they fit; -1 becomes the largest number of the type."""
    return ids.astype(np.uint16) if ids.size == 0 or ids.max() < 0xFFFF else ids.astype(np.uint32)


def _fixed(rows: Any) -> pa.Array:
    """Return (U, K) values as U values of fixed size."""
    rows = np.ascontiguousarray(rows)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(rows.shape[1] * rows.itemsize), len(rows), [None, pa.py_buffer(rows)]
    )


def _lists(values: pa.Array, lengths: list[int]) -> pa.Array:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), values)


@dataclass(frozen=True)
class RecordTable:
    """Some decoded rows of a shard: N records of together U tokens, as flat read-only arrays.

    Attributes:
        ids: (N,) names.
        starts: (N + 1,) first token of each record.
        span_starts: (N + 1,) first span of each record.
        columns: name -> (U,) or (U, K) array; spans (M, 2); cross-entropies (N,).
    """

    ids: list[str]
    starts: Any
    span_starts: Any
    columns: dict[str, Any]

    def record(self, row: int) -> Record:
        """Return one record; its arrays are read-only views."""
        tokens = slice(self.starts[row], self.starts[row + 1])
        column = self.columns
        spans = column["spans"][self.span_starts[row] : self.span_starts[row + 1]]
        return Record(
            id=self.ids[row],
            text=TokenizedText(column["input_ids"][tokens], column["ends"][tokens], spans, column["exact"][tokens]),
            topk=TopK(column["topk_ids"][tokens], column["topk_logprobs"][tokens], column["token_logprobs"][tokens]),
            tail=column["tail"][tokens],
            ce_per_token=float(column["ce_per_token"][row]),
            ce_per_byte=float(column["ce_per_byte"][row]),
        )

    def records(self) -> Iterator[Record]:
        """Return all records, in order."""
        return (self.record(row) for row in range(len(self.ids)))


def decode_records(table: pa.Table, version: int) -> RecordTable:
    """Return the rows of a table of that version."""
    starts, input_ids = _flat(table, "input_ids")
    span_starts, spans = _flat(table, "spans")
    columns = {
        "input_ids": input_ids,
        "exact": _flat(table, "exact")[1],
        "spans": spans.reshape(-1, 2),
        "ce_per_token": table["ce_per_token"].to_numpy(),
        "ce_per_byte": table["ce_per_byte"].to_numpy(),
    }
    columns |= _distributions_v1(table) if version == 1 else _distributions(table, input_ids, starts)
    for array in columns.values():
        array.flags.writeable = False
    return RecordTable(table["id"].to_pylist(), starts, span_starts // 2, columns)


def _distributions(table: pa.Table, input_ids: Any, starts: Any) -> dict[str, Any]:
    widths = _flat(table, "widths")[1]
    running = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    ends = running[1:] - np.repeat(running[starts[:-1]], np.diff(starts))
    ids = _flat(table, "topk_ids", np.uint16)[1]
    width = table["topk_logprobs"].type.value_type.byte_width // 2
    if ids.shape[1] != width:
        ids = _flat(table, "topk_ids", np.uint32)[1]
    empty = np.iinfo(ids.dtype).max
    ids = np.where(ids == empty, np.int32(-1), ids.astype(np.int32))
    bits = np.cumsum(_flat(table, "topk_logprobs", np.uint16)[1], axis=1, dtype=np.uint16)
    gold = _flat(table, "gold")[1]
    gold = np.where(gold == IN_TOP_K, _gold_in_top_k(input_ids, ids, bits)[1], gold)
    return {
        "ends": ends.astype(np.int32),
        "topk_ids": ids,
        "topk_logprobs": _from_bits(bits),
        "token_logprobs": _from_bits(gold),
        "tail": _flat(table, "tail")[1].view(np.float16).astype(np.float32),
    }


def _distributions_v1(table: pa.Table) -> dict[str, Any]:
    return {
        **{name: _flat(table, name)[1] for name in ("ends", "topk_ids", "topk_logprobs", "token_logprobs", "tail")},
    }


def _flat(table: pa.Table, name: str, dtype: Any = None) -> tuple[Any, Any]:
    """Return where each list starts, and all values, (U,) or (U, K); ``dtype`` says what fixed-size values are."""
    lists = table[name].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # no rows at all
        lists = pa.array([], lists.type)
    starts = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    values = lists.flatten()
    if pa.types.is_fixed_size_binary(values.type):
        size = values.type.byte_width
        raw = values.buffers()[1] if len(values) else b""
        start = values.offset * size
        flat = np.frombuffer(raw, np.uint8)[start : start + len(values) * size]
        return starts, flat.view(dtype).reshape(-1, size // np.dtype(dtype).itemsize)
    if pa.types.is_fixed_size_list(values.type):
        return starts, values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    return starts, values.to_numpy(zero_copy_only=False)
