"""The layouts of earlier versions, which are read and no longer written.

One Parquet row per record, one list per column, U tokens long; the K entries of a position are one value of fixed size.
Layout 1 kept float32 values as they were, layout 2 has the bit patterns of :mod:`~fusion_plugins.store.patterns`. A row
group holds about 2^17 log-probabilities and can only be decoded as a whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store.packed import ROUNDED
from fusion_plugins.store.patterns import IN_TOP_K, LOGPROBS, Array, next_in_top_k, widened

_PER_TOKEN = ("input_ids", "ends", "exact", "topk_ids", "topk_logprobs", "token_logprobs", "tail")


def _copy(values: Array) -> Array:
    found = values.copy()
    found.flags.writeable = False
    return found


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

    def item(self, row: int) -> Record:
        """Return one record; its arrays are read-only copies, which do not keep the table in memory."""
        tokens, column = slice(self.starts[row], self.starts[row + 1]), self.columns
        own = {name: _copy(column[name][tokens]) for name in _PER_TOKEN}
        spans = _copy(column["spans"][self.span_starts[row] : self.span_starts[row + 1]])
        return Record(
            id=self.ids[row],
            text=TokenizedText(own["input_ids"], own["ends"], spans, own["exact"]),
            topk=TopK(own["topk_ids"], own["topk_logprobs"], own["token_logprobs"]),
            tail=own["tail"],
            ce_per_token=float(column["ce_per_token"][row]),
            ce_per_byte=float(column["ce_per_byte"][row]),
        )

    def records(self) -> Iterator[Record]:
        """Return all records, in order."""
        return (self.item(row) for row in range(len(self.ids)))


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


def _check_values(records: RecordTable) -> None:
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
    sound = (logprobs <= ROUNDED).all() and (logprobs[:, 1:] <= logprobs[:, :-1]).all()
    _require(sound, "topk_logprobs: expected descending logarithms of probabilities, got others")
    _require(not (columns["token_logprobs"] > ROUNDED).any(), "token_logprobs: expected logarithms of probabilities")
    _require(((tail >= 0) & (tail <= 1 + ROUNDED)).all(), "tail: expected probabilities, got others")
    spans, ends = columns["spans"], columns["ends"]
    _require(((spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1])).all(), "spans: expected 0 <= start <= stop")
    goes_back = ends[1:] < ends[:-1]
    inner = starts[(starts > 0) & (starts < len(ends))]
    goes_back[inner - 1] = False  # from the last token of a record to the first of the next
    _require((ends >= 0).all() and not goes_back.any(), "ends: expected bytes that never go back, got others")


def decode_table(table: pa.Table, version: int, top_k: int) -> RecordTable:
    """Return the records of a table that was written with layout 1 or 2; refuse what no record can be.

    Raises:
        ValueError: naming the column that is wrong.
    """
    _check_types(table, version, top_k)
    records = _decode(table, version)
    _check_values(records)
    return records


def _decode(table: pa.Table, version: int) -> RecordTable:
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
    bits = np.cumsum(_flat(table, "topk_logprobs", np.uint16)[1], axis=1, dtype=np.uint16)
    next_logprobs = _flat(table, "gold")[1]
    next_logprobs = np.where(next_logprobs == IN_TOP_K, next_in_top_k(input_ids, ids, bits)[1], next_logprobs)
    return {
        "ends": ends.astype(np.int32),
        "topk_ids": widened(ids),
        "topk_logprobs": LOGPROBS.take(bits),
        "token_logprobs": LOGPROBS.take(next_logprobs),
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


def _require(sound: object, problem: str) -> None:
    """Raise a ValueError unless something is sound."""
    if not sound:
        raise ValueError(problem)
