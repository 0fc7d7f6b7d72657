"""Records as rows of a Parquet shard, and back.

One row per record; one list per column, U tokens long; the K entries of a token as one fixed-size list.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_plugins.core.types import Record

__all__ = ["PARQUET_OPTIONS", "RecordTable", "decode_records", "encode_records"]

PARQUET_OPTIONS: dict[str, Any] = {"use_dictionary": False}


def encode_records(records: list[Record]) -> pa.Table:
    """Return one table row per record; every record has the same K.

    Raises:
        ValueError: pyarrow cannot hold the arrays.
    """
    lengths = [len(record.input_ids) for record in records]
    width = records[0].topk_ids.shape[1]
    return pa.table(
        {
            "id": pa.array([record.id for record in records], pa.string()),
            "input_ids": _lists([record.input_ids for record in records], lengths),
            "ends": _lists([record.offsets for record in records], lengths),
            "exact": _lists([record.exact for record in records], lengths),
            "spans": _lists([record.spans.ravel() for record in records], [record.spans.size for record in records]),
            "topk_ids": _lists([record.topk_ids for record in records], lengths, width),
            "topk_logprobs": _lists([record.topk_logprobs for record in records], lengths, width),
            "token_logprobs": _lists([record.token_logprobs for record in records], lengths),
            "tail": _lists([record.tail for record in records], lengths),
            "ce_per_token": pa.array([record.ce_per_token for record in records], pa.float64(), from_pandas=False),
            "ce_per_byte": pa.array([record.ce_per_byte for record in records], pa.float64(), from_pandas=False),
        }
    )


def _lists(parts: list[Any], lengths: list[int], width: int | None = None) -> pa.Array:
    values = pa.array(np.concatenate(parts).ravel())
    if width is not None:
        values = pa.FixedSizeListArray.from_arrays(values, width)
    return pa.ListArray.from_arrays(pa.array(_starts(lengths)), values)


def _starts(lengths: list[int]) -> Any:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@dataclass(frozen=True)
class RecordTable:
    """Some decoded rows of a shard: N records of together U tokens, as flat read-only arrays.

    Attributes:
        ids: (N,) names.
        starts: (N + 1,) first token of each record.
        span_starts: (N + 1,) first span of each record.
        columns: field of :class:`Record` -> (U,) or (U, K) array; spans (M, 2); cross-entropies (N,).
    """

    ids: list[str]
    starts: Any
    span_starts: Any
    columns: dict[str, Any]

    def record(self, row: int) -> Record:
        """Return one record; its arrays are read-only views."""
        tokens = slice(self.starts[row], self.starts[row + 1])
        column = self.columns
        return Record(
            id=self.ids[row],
            input_ids=column["input_ids"][tokens],
            offsets=column["offsets"][tokens],
            exact=column["exact"][tokens],
            spans=column["spans"][self.span_starts[row] : self.span_starts[row + 1]],
            topk_ids=column["topk_ids"][tokens],
            topk_logprobs=column["topk_logprobs"][tokens],
            token_logprobs=column["token_logprobs"][tokens],
            tail=column["tail"][tokens],
            ce_per_token=float(column["ce_per_token"][row]),
            ce_per_byte=float(column["ce_per_byte"][row]),
        )


def decode_records(table: pa.Table, version: int) -> RecordTable:
    """Return the rows of a table that a store of that schema version wrote."""
    starts, input_ids = _flat(table, "input_ids")
    span_starts, spans = _flat(table, "spans")
    columns = {
        "input_ids": input_ids,
        "offsets": _flat(table, "ends")[1],
        "exact": _flat(table, "exact")[1],
        "spans": spans.reshape(-1, 2),
        "topk_ids": _flat(table, "topk_ids")[1],
        "topk_logprobs": _flat(table, "topk_logprobs")[1],
        "token_logprobs": _flat(table, "token_logprobs")[1],
        "tail": _flat(table, "tail")[1],
        "ce_per_token": table["ce_per_token"].to_numpy(),
        "ce_per_byte": table["ce_per_byte"].to_numpy(),
    }
    for array in columns.values():
        array.flags.writeable = False
    return RecordTable(table["id"].to_pylist(), starts, span_starts // 2, columns)


def _flat(table: pa.Table, name: str) -> tuple[Any, Any]:
    """Return where each list starts, and all values, (U,) or (U, K)."""
    lists = table[name].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):  # no rows at all
        lists = pa.array([], lists.type)
    starts = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    values = lists.flatten()
    if pa.types.is_fixed_size_list(values.type):
        return starts, values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    return starts, values.to_numpy(zero_copy_only=False)
