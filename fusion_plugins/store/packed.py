"""One record as bytes: the column ``record`` of layout 3.

A header, and behind it the record's arrays, one after another, compressed as one. So one record is read without
unpacking its neighbours, and what it became keeps nothing of them in memory. ``docs/store.md`` describes the layout.
"""

import math
import struct
import threading
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import zstandard

from fusion_plugins.core.fusion.answers import answer_logprob
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store.patterns import (
    IN_TOP_K,
    LOGPROBS,
    Array,
    narrowed,
    next_in_top_k,
    patterns_of,
)
from fusion_plugins.store.shards import MOST_BYTES

if TYPE_CHECKING:
    from fusion_plugins.core.text.token_table import TokenTable

#: tokens, spans, bytes per id; cross-entropy per token and per byte
_HEADER = struct.Struct("<IIIdd")
_CODEC = pa.Codec("zstd", compression_level=9)
#: a probability may be this much above 1: some engines round
ROUNDED = 1e-3
#: size of a frame that does not say it
_UNKNOWN = -1


def pack(record: Record, table: "TokenTable | None" = None) -> bytes:
    """Return a record as bytes.

    Args:
        record: the record.
        table: the source's tokens, which tell where an answer ends; None keeps no exact sum of it.
    """
    inputs, topk = record.text.input_ids, record.topk
    ids, patterns = narrowed(topk.ids), patterns_of(topk.logprobs)
    next_patterns = patterns_of(topk.token_logprobs)
    rest = np.float16(np.nan if table is None else _rest_of_answer(record, LOGPROBS[next_patterns], table))
    inside, held = next_in_top_k(inputs, topk.ids, patterns)
    # An engine may give the next token another value than the one among the top k: that one is kept.
    next_patterns = np.where(inside & (next_patterns == held), np.uint16(IN_TOP_K), next_patterns)
    # The last position has no next token: its place holds what the answer's sum lacks.
    next_patterns[-1:] = rest.view(np.uint16)
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


def _rest_of_answer(record: Record, rounded: Array, table: "TokenTable") -> float:
    """Return what the log-probability of the last answer lacks, in nats, when each token's is rounded."""
    kept = replace(record, topk=replace(record.topk, token_logprobs=rounded), answer_rest=0.0)
    exact, sum_of_rounded = (answer_logprob(each, table)[0] for each in (record, kept))
    return exact - sum_of_rounded if math.isfinite(exact) and math.isfinite(sum_of_rounded) else math.nan


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
    def ce_per_token(self) -> float:
        """Mean cross-entropy, nats/token."""
        return self.header[3]

    @property
    def ce_per_byte(self) -> float:
        """Mean cross-entropy, nats/byte."""
        return self.header[4]

    @property
    def size(self) -> int:
        """Bytes that the record takes unpacked."""
        tokens, spans, id_bytes, *_ = self.header
        return 12 * tokens + (tokens + 7) // 8 + 8 * spans + (id_bytes + 2) * self.top_k * tokens

    def unpack(self) -> Record:
        """Return the record; its arrays are read-only and belong to it alone.

        The rest of the program, compiled code included, relies on what is checked here.

        Raises:
            ValueError: naming the array that is wrong; or these are not the bytes that were packed.
        """
        # On first use: numba takes a second to import, and most commands on stores need no record.
        from fusion_plugins.store.unpack_kernel import PROBLEMS, unpack_arrays

        tokens, spans, id_bytes, ce_per_token, ce_per_byte = self.header
        body = np.frombuffer(self._body(), np.uint8)
        entries = (tokens, self.top_k)
        text = _empty_text(tokens, spans)
        topk = TopK(
            ids=np.empty(entries, np.int32),
            logprobs=np.empty(entries, np.float32),
            token_logprobs=np.empty(tokens, np.float32),
        )
        tail = np.empty(tokens, np.float32)
        texts, numbers = (text.input_ids, text.ends, text.exact, text.spans), (*vars(topk).values(), tail)
        problem = unpack_arrays(body, id_bytes, 1 + ROUNDED, LOGPROBS, *texts, *numbers)
        if problem >= 0:
            raise ValueError(PROBLEMS[problem])
        rest = -float(topk.token_logprobs[-1]) if tokens else math.nan  # the table negates what it looks up
        topk.token_logprobs[-1:] = np.nan
        for array in (*texts, *numbers):
            array.setflags(write=False)
        return Record(self.id, text, topk, tail, ce_per_token, ce_per_byte, rest if math.isfinite(rest) else 0.0)

    def text(self) -> TokenizedText:
        """Return only the text of the record: its arrays come first, and no more is unpacked than they need.

        Raises:
            ValueError: naming the array that is wrong.
        """
        from fusion_plugins.store.unpack_kernel import PROBLEMS, unpack_text

        tokens, spans, *_ = self.header
        body = np.frombuffer(self._body(8 * tokens + (tokens + 7) // 8 + 8 * spans), np.uint8)
        found = _empty_text(tokens, spans)
        arrays = (found.input_ids, found.ends, found.exact, found.spans)
        problem = unpack_text(body, *arrays)
        if problem >= 0:
            raise ValueError(PROBLEMS[problem])
        for array in arrays:
            array.setflags(write=False)
        return found

    def _body(self, first: int | None = None) -> bytes:
        """Return the arrays as bytes, exactly as many as they need, or the first of these bytes."""
        size = self.size
        if size > MOST_BYTES:
            raise ValueError(f"expected at most {MOST_BYTES} bytes, got {size}")
        if not size:
            return b""
        frame = memoryview(self.data)[_HEADER.size :]
        try:
            # What a frame says about its own size is believed only if it is what the header says.
            if (said := zstandard.frame_content_size(frame)) not in (size, _UNKNOWN):
                raise ValueError(f"record: expected {size} bytes, got {said}")
            if first is not None:
                with _decompressor().stream_reader(frame) as stream:
                    body: bytes = stream.read(first)
            else:
                body = _decompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"record: expected a zstd frame of {size} bytes, got another: {error}") from error
        wanted = size if first is None else first
        if len(body) != wanted:
            raise ValueError(f"record: expected {wanted} bytes, got {len(body)}")
        return body


def _empty_text(tokens: int, spans: int) -> TokenizedText:
    return TokenizedText(
        input_ids=np.empty(tokens, np.int32),
        ends=np.empty(tokens, np.int32),
        spans=np.empty((spans, 2), np.int32),
        exact=np.empty(tokens, np.bool_),
    )


def warm_up() -> None:
    """Compile what unpacks records, or load it, before processes are started that would each do so."""
    topk = TopK(np.empty((0, 1), np.int32), np.empty((0, 1), np.float32), np.empty(0, np.float32))
    record = Record("", _empty_text(0, 0), topk, np.empty(0, np.float32), 0.0, 0.0)
    packed = PackedRecord("", pa.py_buffer(pack(record)), 1)
    packed.unpack(), packed.text()


_LOCAL = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return the decompressor of this thread: making one costs more than a short record, and no two may share it."""
    found: zstandard.ZstdDecompressor | None = getattr(_LOCAL, "decompressor", None)
    if found is None:
        found = _LOCAL.decompressor = zstandard.ZstdDecompressor()
    return found
