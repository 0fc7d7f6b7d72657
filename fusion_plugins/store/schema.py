"""Records as rows of a Parquet shard, and back.

One Parquet row per record, one list per column, U tokens long; the K entries of a position are one value of fixed size.
``docs/store.md`` describes version 2, which is written. Version 1 kept float32 values as they were; it is still read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store.manifest import Manifest

Array = npt.NDArray[Any]

#: log-probabilities per row group: what one random access decodes
GROUP_VALUES = 1 << 17
#: log-probabilities per shard
SHARD_VALUES = 1 << 24
#: in the column `gold` (the next token's log-probability): the value is the one that the top k have for that token
IN_TOP_K = 0xFFFF
#: a logarithm of a probability may be this much above 0
_ROUNDED = 1e-3
#: bit pattern -> log-probability; numpy's own conversion takes five times as long
_LOGPROBS = -np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
# A byte-stream split writes the first bytes of all values of a page, then all second bytes, and so on; for
# `topk_logprobs` that is rank by rank. High bytes of small numbers are zero, and zstd packs runs of zeros into almost
# nothing. Parquet allows it only without a dictionary. `topk_ids` stay together: phrases repeat, and zstd finds that
# only in bytes that are next to each other. No reader uses statistics.
_SPLIT = ("input_ids", "widths", "topk_logprobs", "gold", "tail")
PARQUET_OPTIONS: dict[str, Any] = {
    "compression_level": 9,
    "use_dictionary": False,
    "write_statistics": False,
    "column_encoding": {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _SPLIT},
}


class RecordCodec:
    """How the records of a store are kept."""

    version = Manifest.LAYOUT
    key_columns = ["id"]
    parquet = PARQUET_OPTIONS

    def __init__(self, manifest: Manifest) -> None:
        self.identity = manifest.identity_digest
        self.top_k = manifest.top_k
        self.shard_tokens = max(1, SHARD_VALUES // manifest.top_k)
        self.group_tokens = max(1, GROUP_VALUES // manifest.top_k)

    def encode(self, items: list[Record]) -> pa.Table:
        """Return one table row per record, in the layout of the current version."""
        lengths = [len(record.text.input_ids) for record in items]
        inputs = np.concatenate([record.text.input_ids for record in items])
        ids = np.concatenate([record.topk.ids for record in items])  # (U, K)
        bits = _float16_bits(np.concatenate([record.topk.logprobs for record in items]))
        next_logprobs = _float16_bits(np.concatenate([record.topk.token_logprobs for record in items]))
        inside, held = _next_in_top_k(inputs, ids, bits)
        # Arrays of all records are one: the position after a record's last one belongs to the next record.
        inside[[stop - 1 for stop in np.cumsum(lengths) if stop]] = False
        # The log-probability of the next token is written only where it is not the one that the top k have already. An
        # engine may give another value for the same token: that one is kept.
        next_logprobs = np.where(inside & (next_logprobs == held), np.uint16(IN_TOP_K), next_logprobs)
        tail = np.concatenate([record.tail for record in items]).astype(np.float16).view(np.uint16)
        widths = [np.diff(record.text.ends, prepend=np.int32(0)) for record in items]
        spans = np.concatenate([record.text.spans.ravel() for record in items])
        # Log-probabilities descend, so their magnitudes ascend, and so do the bit patterns, because non-negative floats
        # sort like their patterns read as integers. Each pattern less its left neighbour is a small number.
        steps = np.diff(bits, axis=1, prepend=np.uint16(0))
        return pa.table(
            {
                "id": pa.array([record.id for record in items], pa.string()),
                "input_ids": _lists(pa.array(inputs), lengths),
                "widths": _lists(pa.array(np.concatenate(widths)), lengths),
                "exact": _lists(pa.array(np.concatenate([record.text.exact for record in items])), lengths),
                "spans": _lists(pa.array(spans), [record.text.spans.size for record in items]),
                "topk_ids": _lists(_fixed(_narrowed(ids)), lengths),
                "topk_logprobs": _lists(_fixed(steps), lengths),
                "gold": _lists(pa.array(next_logprobs), lengths),
                "tail": _lists(pa.array(tail), lengths),
                "ce_per_token": pa.array([record.ce_per_token for record in items], pa.float64(), from_pandas=False),
                "ce_per_byte": pa.array([record.ce_per_byte for record in items], pa.float64(), from_pandas=False),
            }
        )

    def decode(self, table: pa.Table, version: int) -> Iterator[Record]:
        """Return the records of a table that was written with that version."""
        return self.decode_table(table, version).records()

    def decode_table(self, table: pa.Table, version: int) -> "RecordTable":
        """Return the records of a table as one; refuse what no record can be.

        The rest of the program, compiled code included, relies on what is checked here.

        Raises:
            ValueError: naming the column that is wrong.
        """
        _check_types(table, version, self.top_k)
        records = decode_records(table, version)
        _check_values(records)
        return records

    def key(self, item: Record) -> str:
        """Return the id of a record."""
        return item.id

    def keys(self, table: pa.Table) -> list[str]:
        """Return the ids of a table's rows."""
        return table["id"].to_pylist()

    def tokens(self, item: Record) -> int:
        """Return the number of tokens of a record."""
        return len(item.text.input_ids)


def _float16_bits(logprobs: Array) -> Array:
    """Return uint16 bit patterns of the magnitudes: 0 for log 1, ascending, 0x7C00 for -inf, 0x7E00 for nan.

    A float16 has 11 significant bits, so the absolute error is smallest near log 1, where most of the probability is.
    """
    with np.errstate(over="ignore"):  # below -65504 nothing is left of a probability
        return np.abs(np.minimum(logprobs, 0)).astype(np.float16).view(np.uint16)


def _next_in_top_k(inputs: Array, ids: Array, values: Array) -> tuple[Array, Array]:
    """Return for each position whether its entries hold the next token, and the value they have for it."""
    matches = ids[:-1] == inputs[1:, None]
    # The last position has no next token. `ids[-1:]` has one element or, without any token, none.
    rank = np.concatenate([matches.argmax(axis=1), np.zeros(len(ids[-1:]), np.int64)])
    inside = np.concatenate([matches.any(axis=1), np.zeros(len(ids[-1:]), np.bool_)])
    return inside, np.take_along_axis(values, rank[:, None], axis=1)[:, 0]


def _narrowed(ids: Array) -> Array:
    """Return ids in two bytes if they fit; -1 becomes the largest number of the type."""
    return ids.astype(np.uint16) if ids.size == 0 or ids.max() < 0xFFFF else ids.astype(np.uint32)


def _fixed(values: Array) -> pa.Array:
    """Return (U, K) values as U values of fixed size; for nested lists, Parquet would keep levels per entry."""
    values = np.ascontiguousarray(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(values.shape[1] * values.itemsize), len(values), [None, pa.py_buffer(values)]
    )


def _lists(values: pa.Array, lengths: list[int]) -> pa.Array:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), values)


@dataclass(frozen=True)
class RecordTable:
    """Some decoded records of a shard: N records of together U tokens, as flat read-only arrays.

    Attributes:
        ids: (N,) names.
        starts: (N + 1,) first token of each record.
        span_starts: (N + 1,) first span of each record.
        columns: name -> (U,) or (U, K) array; spans (M, 2); cross-entropies (N,).
    """

    ids: list[str]
    starts: Array
    span_starts: Array
    columns: dict[str, Array]

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


def _types(version: int, top_k: int) -> dict[str, tuple[str, ...]]:
    """Return the types that each column of a layout may have, as Arrow spells them."""
    numbers, truths, floats, halves = (f"list<item: {kind}>" for kind in ("int32", "bool", "float", "uint16"))
    entries: dict[str, tuple[str, ...]]
    common: dict[str, tuple[str, ...]] = {
        "id": ("string",),
        "input_ids": (numbers,),
        "exact": (truths,),
        "spans": (numbers,),
    }
    means = {"ce_per_token": ("double",), "ce_per_byte": ("double",)}
    if version == 1:
        ids, logprobs = (f"list<item: fixed_size_list<item: {kind}>[{top_k}]>" for kind in ("int32", "float"))
        entries = {"topk_ids": (ids,), "topk_logprobs": (logprobs,)}
        return common | {"ends": (numbers,), **entries, "token_logprobs": (floats,), "tail": (floats,)} | means
    two, four = (f"list<item: fixed_size_binary[{size * top_k}]>" for size in (2, 4))
    entries = {"topk_ids": (two, four), "topk_logprobs": (two,)}
    return common | {"widths": (numbers,), **entries, "gold": (halves,), "tail": (halves,)} | means


def _check_types(table: pa.Table, version: int, top_k: int) -> None:
    """Raise a ValueError unless a table has the columns of a layout, with a value in every row."""
    expected = _types(version, top_k)
    if sorted(table.column_names) != sorted(expected):
        raise ValueError(f"expected the columns {', '.join(expected)}, got {', '.join(table.column_names):.200}")
    for name, types in expected.items():
        column = table[name]
        found = str(column.type).replace("element: ", "item: ")  # the name of an element depends on the writer
        _require(found in types, f"{name}: expected {' or '.join(types)}, got {found:.200}")
        _require(column.null_count == 0, f"{name}: expected a value in every row")


def _check_values(records: "RecordTable") -> None:
    """Raise a ValueError where the arrays of records do not fit together, or hold what no record can have.

    Ids have no upper bound here: a model's head may be wider than its vocabulary, and whoever looks an id up asks for
    its bounds.
    """
    columns, starts = records.columns, records.starts
    for name in ("exact", "ends", "topk_ids", "topk_logprobs", "token_logprobs", "tail"):
        found, wanted = len(columns[name]), len(columns["input_ids"])
        _require(found == wanted, f"{name}: expected a value for each of {wanted} tokens, got {found}")
    _require((columns["input_ids"] >= 0).all(), "input_ids: expected numbers from 0 on, got less")
    _require((columns["topk_ids"] >= -1).all(), "topk_ids: expected numbers from -1 on, got less")
    logprobs, tail = columns["topk_logprobs"], columns["tail"]
    # The comparisons are false for nan. Some engines round a probability of 1 up a little.
    sound = (logprobs <= _ROUNDED).all() and (logprobs[:, 1:] <= logprobs[:, :-1]).all()
    _require(sound, "topk_logprobs: expected descending logarithms of probabilities, got others")
    _require(not (columns["token_logprobs"] > _ROUNDED).any(), "token_logprobs: expected logarithms of probabilities")
    _require(((tail >= 0) & (tail <= 1 + _ROUNDED)).all(), "tail: expected probabilities, got others")
    spans, ends = columns["spans"], columns["ends"]
    _require(((spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1])).all(), "spans: expected 0 <= start <= stop")
    goes_back = ends[1:] < ends[:-1]
    inner = starts[(starts > 0) & (starts < len(ends))]
    goes_back[inner - 1] = False  # from the last token of a record to the first of the next
    _require((ends >= 0).all() and not goes_back.any(), "ends: expected bytes that never go back, got others")


def _require(sound: Any, problem: str) -> None:
    if not sound:
        raise ValueError(problem)


def decode_records(table: pa.Table, version: int) -> RecordTable:
    """Return the records of a table that was written with that version."""
    starts, input_ids = _flat(table, "input_ids")
    span_starts, spans = _flat(table, "spans")
    _require((span_starts % 2 == 0).all(), "spans: expected pairs of start and stop")
    columns = {
        "input_ids": input_ids,
        "exact": _flat(table, "exact")[1],
        "spans": spans.reshape(-1, 2),
        "ce_per_token": table["ce_per_token"].to_numpy(),
        "ce_per_byte": table["ce_per_byte"].to_numpy(),
    }
    if version == 1:
        names = ("ends", "topk_ids", "topk_logprobs", "token_logprobs", "tail")
        columns |= {name: _flat(table, name)[1] for name in names}
    else:
        columns |= _decode_version_2(table, input_ids, starts)
    for array in columns.values():
        array.flags.writeable = False  # records are views of these arrays and share them
    return RecordTable(table["id"].to_pylist(), starts, span_starts // 2, columns)


def _decode_version_2(table: pa.Table, input_ids: Array, starts: Array) -> dict[str, Array]:
    for name in ("widths", "topk_ids", "topk_logprobs", "gold"):
        _require(np.array_equal(_starts(_lists_of(table, name)), starts), f"{name}: expected as many as input_ids")
    running = np.concatenate([[0], np.cumsum(_flat(table, "widths")[1], dtype=np.int64)])
    ends = running[1:] - np.repeat(running[starts[:-1]], np.diff(starts))
    ids = _flat(table, "topk_ids", np.uint16)[1]
    top_k = table["topk_logprobs"].type.value_type.byte_width // 2
    if ids.shape[1] != top_k:
        ids = _flat(table, "topk_ids", np.uint32)[1]
    ids = np.where(ids == np.iinfo(ids.dtype).max, np.int32(-1), ids.astype(np.int32))
    bits = np.cumsum(_flat(table, "topk_logprobs", np.uint16)[1], axis=1, dtype=np.uint16)
    next_logprobs = _flat(table, "gold")[1]
    next_logprobs = np.where(next_logprobs == IN_TOP_K, _next_in_top_k(input_ids, ids, bits)[1], next_logprobs)
    return {
        "ends": ends.astype(np.int32),
        "topk_ids": ids,
        "topk_logprobs": _LOGPROBS.take(bits),
        "token_logprobs": _LOGPROBS.take(next_logprobs),
        "tail": _flat(table, "tail")[1].view(np.float16).astype(np.float32),
    }


def _flat(table: pa.Table, name: str, dtype: Any = None) -> tuple[Array, Array]:
    """Return where each list starts, and all values, (U,) or (U, K); ``dtype`` says what fixed-size values are."""
    lists = _lists_of(table, name)
    starts = _starts(lists)
    values = lists.flatten()
    _require(values.null_count == 0, f"{name}: expected a value at every token")
    if pa.types.is_fixed_size_binary(values.type):
        size = values.type.byte_width
        raw = values.buffers()[1] if len(values) else b""
        start = values.offset * size
        flat = np.frombuffer(raw, np.uint8)[start : start + len(values) * size]
        return starts, flat.view(dtype).reshape(-1, size // np.dtype(dtype).itemsize)
    if pa.types.is_fixed_size_list(values.type):
        return starts, values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    return starts, values.to_numpy(zero_copy_only=False)


def _lists_of(table: pa.Table, name: str) -> pa.ListArray:
    lists = table[name].combine_chunks()
    return pa.array([], lists.type) if isinstance(lists, pa.ChunkedArray) else lists  # chunked: no rows at all


def _starts(lists: pa.ListArray) -> Array:
    starts: Array = lists.offsets.to_numpy() - lists.offsets[0].as_py()
    return starts
