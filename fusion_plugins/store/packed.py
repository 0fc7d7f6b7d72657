"""One record as bytes: the column ``record`` of layout 3.

A header, and behind it the record's arrays, one after another, compressed as one. So one record is read without
unpacking its neighbours, and what it became keeps nothing of them in memory. ``docs/store.md`` describes the layout.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store.patterns import (
    IN_TOP_K,
    LOGPROBS,
    NOTHING,
    Array,
    narrowed,
    next_in_top_k,
    patterns_of,
    widened,
)
from fusion_plugins.store.shards import MOST_BYTES

#: tokens, spans, bytes per id; cross-entropy per token and per byte
_HEADER = struct.Struct("<IIIdd")
_CODEC = pa.Codec("zstd", compression_level=9)
#: a probability may be this much above 1: some engines round
ROUNDED = 1e-3


def pack(record: Record) -> bytes:
    """Return a record as bytes."""
    inputs, topk = record.text.input_ids, record.topk
    ids, patterns = narrowed(topk.ids), patterns_of(topk.logprobs)
    next_patterns = patterns_of(topk.token_logprobs)
    inside, held = next_in_top_k(inputs, topk.ids, patterns)
    # An engine may give the next token another value than the one among the top k: that one is kept.
    next_patterns = np.where(inside & (next_patterns == held), np.uint16(IN_TOP_K), next_patterns)
    parts = (
        _apart(inputs.astype(np.int32)),
        _apart(np.diff(record.text.ends, prepend=np.int32(0)).astype(np.int32)),
        np.packbits(record.text.exact),
        record.text.spans.astype(np.int32),
        # Phrases repeat, and zstd finds that only in bytes that are next to each other.
        ids,
        _apart(np.diff(patterns, axis=1, prepend=np.uint16(0))),
        _apart(next_patterns),
        _apart(record.tail.astype(np.float16)),
    )
    header = _HEADER.pack(len(inputs), len(record.text.spans), ids.itemsize, record.ce_per_token, record.ce_per_byte)
    body: bytes = _CODEC.compress(b"".join(part.tobytes() for part in parts), asbytes=True)
    return header + body


def _apart(values: Array) -> Array:
    """Return the first bytes of all values (U,) or, for each rank, (U, K); then all second bytes, and so on.

    High bytes of small numbers are zero, and zstd packs runs of zeros into almost nothing.
    """
    return np.ascontiguousarray(values if values.ndim == 2 else values[:, None]).view(np.uint8).T


@dataclass(frozen=True)
class PackedRecord:
    """A record as bytes, of which only the header is read.

    Attributes:
        id: its name.
        data: what :func:`pack` made.
        top_k: entries per position.
    """

    id: str
    data: pa.Buffer
    top_k: int

    @cached_property
    def header(self) -> tuple[int, int, int, float, float]:
        """Tokens, spans, bytes per id; cross-entropy per token and per byte.

        Raises:
            ValueError: no record has such a header.
        """
        if self.data.size < _HEADER.size:
            raise ValueError(f"record: expected at least {_HEADER.size} bytes, got {self.data.size}")
        found = _HEADER.unpack_from(memoryview(self.data))
        if found[2] not in (2, 4):
            raise ValueError(f"record: expected ids of 2 or 4 bytes, got {found[2]}")
        return found

    @property
    def size(self) -> int:
        """Bytes that the record takes unpacked."""
        tokens, spans, id_bytes, *_ = self.header
        return 12 * tokens + (tokens + 7) // 8 + 8 * spans + (id_bytes + 2) * self.top_k * tokens

    def unpack(self) -> Record:
        """Return the record; its arrays are read-only and belong to it alone.

        The rest of the program, compiled code included, relies on what is checked here.

        Raises:
            ValueError: naming the array that is wrong.
            OSError: these are not the bytes that were packed.
        """
        tokens, spans, id_bytes, ce_per_token, ce_per_byte = self.header
        if self.size > MOST_BYTES:
            raise ValueError(f"expected at most {MOST_BYTES} bytes, got {self.size}")
        body = _CODEC.decompress(self.data.slice(_HEADER.size), decompressed_size=self.size) if self.size else b""
        read = _Reader(np.frombuffer(body, np.uint8))
        inputs, widths = read.numbers(tokens, np.dtype("<i4")), read.numbers(tokens, np.dtype("<i4"))
        exact = np.unpackbits(read.bytes((tokens + 7) // 8), count=tokens).view(np.bool_)
        pairs = read.bytes(8 * spans).view("<i4").reshape(-1, 2)
        ids = widened(read.bytes(id_bytes * self.top_k * tokens).view(f"<u{id_bytes}").reshape(tokens, self.top_k))
        patterns = read.ranks(tokens, self.top_k)  # (K, U)
        np.cumsum(patterns, axis=0, out=patterns, dtype=np.uint16)
        gold, tail = read.numbers(tokens, np.dtype("<u2")), read.numbers(tokens, np.dtype("<f2"))
        ends = np.cumsum(widths, dtype=np.int64)
        _check(inputs, widths, ends, pairs, ids, patterns, tail)
        inside = np.flatnonzero(gold[:-1] == IN_TOP_K)
        ranks = (ids[inside] == inputs[inside + 1, None]).argmax(axis=1)
        gold[inside] = patterns[ranks, inside]
        text = TokenizedText(inputs, ends.astype(np.int32), pairs.astype(np.int32), exact)
        topk = TopK(ids, LOGPROBS.take(patterns.T), LOGPROBS.take(gold))
        tails = tail.astype(np.float32)
        for array in (*vars(text).values(), *vars(topk).values(), tails):
            array.flags.writeable = False
        return Record(self.id, text, topk, tails, ce_per_token, ce_per_byte)


class _Reader:
    """Takes the arrays of a record off its bytes, one after another."""

    def __init__(self, data: Array) -> None:
        self._data, self._place = data, 0

    def bytes(self, count: int) -> Array:
        """Return the next bytes."""
        self._place += count
        return self._data[self._place - count : self._place]

    def numbers(self, count: int, dtype: "np.dtype[np.generic]") -> Array:
        """Return (count,) numbers whose bytes are apart."""
        planes = self.bytes(count * dtype.itemsize).reshape(dtype.itemsize, count)
        return planes.T.copy().view(dtype).ravel()

    def ranks(self, count: int, top_k: int) -> Array:
        """Return (K, count) uint16 numbers whose bytes are apart, rank by rank."""
        planes = self.bytes(2 * top_k * count).reshape(top_k, 2, count)
        found: Array = planes[:, 1].astype(np.uint16)
        found <<= 8
        found |= planes[:, 0]
        return found


def _check(inputs: Array, widths: Array, ends: Array, spans: Array, ids: Array, patterns: Array, tail: Array) -> None:
    """Raise a ValueError for what no record can have.

    Ids have no upper bound here: a model's head may be wider than its vocabulary, and whoever looks an id up asks for
    its bounds. Log-probabilities are never above 0, because only their magnitudes are kept.
    """
    require((inputs >= 0).all(), "input_ids: expected numbers from 0 on, got less")
    require((widths >= 0).all(), "ends: expected bytes that never go back, got others")
    require(not (ends[-1:] > np.iinfo(np.int32).max).any(), "ends: expected numbers of 31 bits, got more")
    require(((spans[:, 0] >= 0) & (spans[:, 0] <= spans[:, 1])).all(), "spans: expected 0 <= start <= stop")
    require((ids >= -1).all(), "topk_ids: expected numbers from -1 on, got less")
    sound = (patterns[-1:] <= NOTHING).all() and (patterns[1:] >= patterns[:-1]).all()
    require(sound, "topk_logprobs: expected descending logarithms of probabilities, got others")
    # The comparison is false for nan.
    require(((tail >= 0) & (tail <= 1 + ROUNDED)).all(), "tail: expected probabilities, got others")


def require(sound: object, problem: str) -> None:
    """Raise a ValueError unless something is sound."""
    if not sound:
        raise ValueError(problem)
