"""Processor time that capture costs beside the model, by stage, in microseconds per token (part of `bench_capture.py`).

Rows are those of an n-gram model over real text (`realistic_rows.py`), in the form in which vLLM hands them over: flat
Python lists, the next token first, then the most probable ones in order. "Before" is what the stages did one after the
other in the thread that also drives the model: one text at a time, numpy's own conversion of lists, a sort by three
keys, and records that are unpacked and packed again when small shards are joined. The lower bound of a stage is a
library's one call on the same data: the tokenizer in Rust, one copy of the numbers, one run of zstd over the bytes of
each record, one table written.
"""

import time
from array import array
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from realistic_rows import make_records, read_texts, train_tokenizer
from transformers import PreTrainedTokenizerFast

from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize, tokenize_many
from fusion_plugins.sources.backends.topk import topk_of_entries
from fusion_plugins.store import Manifest, packed
from fusion_plugins.store.schema import PackedTable, RecordCodec
from fusion_plugins.store.shards import encode_shard

RUNS = 3
Action = Callable[[], Any]


def lexsorted(ids: Any, logprobs: Any, token_logprobs: Any, k: int, vocab_size: int) -> TopK:
    """Sort by three keys, whether the rows are in order or not."""
    known = (ids >= 0) & (ids < vocab_size)
    logprobs = np.where(known, logprobs, -np.inf).astype(np.float32)
    order = np.lexsort((ids, -logprobs, ~known), axis=-1)[:, :k]
    return TopK(np.take_along_axis(ids, order, axis=-1), np.take_along_axis(logprobs, order, axis=-1), token_logprobs)


def bodies(table: pa.Table, codec: RecordCodec) -> list[bytes]:
    """The bytes of every packed record before they were compressed, without its header."""
    return [
        packed._CODEC.decompress(record.data.slice(packed._HEADER.size), decompressed_size=record.size, asbytes=True)
        for record in PackedTable(table, codec.top_k).packed()
    ]


def written(table: pa.Table, codec: RecordCodec) -> int:
    """Bytes of a table of packed records as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **codec.parquet)
    return int(sink.getvalue().size)


def stages(n_tokens: int, top_k: int) -> tuple[int, dict[str, tuple[Action, Action, Action | None, bool]]]:
    """Return the number of tokens, and name -> (before, now, lower bound, whether the model's thread does it now)."""
    records, table = make_records(n_tokens, top_k, megabytes=2)
    n_tokens = sum(len(record.text.input_ids) for record in records)
    texts = read_texts(1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(texts))
    words = TokenTable.from_tokenizer(tokenizer)
    pieces, length = [], 0
    for text in texts:
        for start in range(0, len(text), 2000):
            found = len(tokenizer(text[start : start + 2000])["input_ids"])
            if length + found <= n_tokens:
                pieces.append(text[start : start + 2000])
                length += found
    scale = n_tokens / length
    rows = [_as_lists(record) for record in records]
    arrays = [(ids[:, 1:], values[:, 1:], values[:, 0]) for ids, values in (_arrays(*row) for row in rows)]
    manifest = Manifest(
        model="n-gram",
        tokenizer_fingerprint=table.fingerprint,
        vocab_size=table.vocab_size,
        logits_width=table.vocab_size,
        top_k=top_k,
        dtype="float64",
        texts_fingerprint="bench",
        engine="bench",
        engine_version="1",
    )
    codec = RecordCodec(manifest)
    encoded = codec.encode(records)
    unpacked = bodies(encoded, codec)
    size = table.vocab_size

    def repeated(action: Action) -> Action:
        return lambda: [action() for _ in range(round(scale))]

    found: dict[str, tuple[Action, Action, Action | None, bool]] = {
        "tokenize": (
            repeated(lambda: [tokenize(tokenizer, words, text) for text in pieces]),
            repeated(lambda: tokenize_many(tokenizer, words, pieces)),
            repeated(lambda: tokenizer.backend_tokenizer.encode_batch(pieces)),
            False,
        ),
        "lists to arrays (vLLM)": (
            lambda: [(np.array(ids, np.int32), np.array(values, np.float32)) for ids, values, _ in rows],
            lambda: [_arrays(*row) for row in rows],
            lambda: [(array("i", ids), array("d", values)) for ids, values, _ in rows],
            True,
        ),
        "sort the entries": (
            lambda: [lexsorted(*row, top_k, size) for row in arrays],
            lambda: [topk_of_entries(*row, top_k, size) for row in arrays],
            lambda: [(ids.copy(), values.copy()) for ids, values, _ in arrays],
            True,
        ),
        "records": (
            lambda: [build_record(record.id, record.text, record.topk) for record in records],
            lambda: [build_record(record.id, record.text, record.topk) for record in records],
            None,
            False,
        ),
        "encode and compress": (
            lambda: encode_shard(records, codec),
            lambda: encode_shard(records, codec),
            lambda: [packed._CODEC.compress(body) for body in unpacked],
            False,
        ),
        "join small shards": (
            lambda: encode_shard(list(codec.decode(encoded, codec.version)), codec),
            lambda: encode_shard(list(codec.packed(encoded, codec.version)), codec),
            lambda: written(encoded, codec),
            False,
        ),
    }
    return n_tokens, found


def _as_lists(record: Record) -> tuple[list[int], list[float], int]:
    """Return what vLLM reports for a text: the next token and the top k at every position but the last."""
    n_positions = len(record.text.input_ids) - 1
    ids = np.column_stack([record.text.input_ids[1:], record.topk.ids[:-1]])
    values = np.column_stack([record.topk.token_logprobs[:-1], record.topk.logprobs[:-1]])
    return ids.ravel().tolist(), values.ravel().tolist(), n_positions


def _arrays(ids: list[int], values: list[float], n_positions: int) -> tuple[Any, Any]:
    shape = n_positions, -1
    return (
        np.frombuffer(array("i", ids), np.int32).reshape(shape),
        np.frombuffer(array("f", values), np.float32).reshape(shape),
    )


def print_table(n_tokens: int, top_k: int) -> float:
    """Print the table, and return how many times longer the model's thread was kept before."""
    n_tokens, found = stages(n_tokens, top_k)
    best: dict[tuple[str, int], float] = {}
    for _ in range(RUNS):  # in turn, so that other work on the machine hits all alike
        for name, actions in found.items():
            for column, action in enumerate(islice(actions, 3)):
                if action is not None:
                    started = time.process_time()
                    action()
                    taken = (time.process_time() - started) / n_tokens * 1e6
                    best[name, column] = min(taken, best.get((name, column), taken))
    print(f"\nprocessor time beside the model, {n_tokens:,} tokens, K = {top_k}, microseconds per token")
    print(f"{'stage':26}{'before':>9}{'now':>9}{'ratio':>8}{'at least':>10}   thread")
    sums = [0.0, 0.0, 0.0]
    waiting = 0.0
    for name, (*_, in_model) in found.items():
        before, now, least = (best.get((name, column), 0.0) for column in range(3))
        sums = [total + part for total, part in zip(sums, (before, now, least), strict=True)]
        waiting += now if in_model else 0
        thread = "the model's" if in_model else "reader" if name == "tokenize" else "writer"
        print(f"{name:26}{before:9.2f}{now:9.2f}{before / now:8.1f}{least or float('nan'):10.2f}   {thread}")
    print(f"{'all':26}{sums[0]:9.2f}{sums[1]:9.2f}{sums[0] / sums[1]:8.1f}{sums[2]:10.2f}")
    print(f"{'the model waits for':26}{sums[0]:9.2f}{waiting:9.2f}{sums[0] / waiting:8.1f}")
    return sums[0] / waiting
