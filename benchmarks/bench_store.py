"""Size, speed and error of the store, next to the plain dataset that it replaces: one row per text, lists of floats.

    python benchmarks/bench_store.py [--tokens 40000] [--megabytes 12]

Prints one table per K; exits 1 when the size, the error or the ratio to the plain dataset is worse than promised.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from realistic_rows import make_records

from fusion_plugins.core.fusion.types import Record, TopK
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.store import Manifest, Store, StoreWriter, open_store
from fusion_plugins.store.packed import PackedRecord

BUDGET = {10: 32.0, 64: 160.0}  # bytes per token
MAX_KL = 1e-4
MIN_RATIO = 3.5
SHORT = 50  # tokens
RUNS = 7


def write_store(folder: Path, records: list[Record], table: TokenTable) -> Store:
    """Write a store and open it."""
    manifest = Manifest(
        model="n-gram",
        tokenizer_fingerprint=table.fingerprint,
        vocab_size=table.vocab_size,
        logits_width=table.vocab_size,
        top_k=records[0].topk.ids.shape[1],
        dtype="float64",
        texts_fingerprint="bench",
        engine="bench",
        engine_version="1",
    )
    with StoreWriter(folder, manifest, table) as writer:
        for record in records:
            writer.write(record)
        writer.finish()
    return open_store(folder)


def plain_table(records: list[Record]) -> pa.Table:
    """The same content from Python lists: int64 and float64, as JSON and Hugging Face datasets make them."""
    return pa.Table.from_pylist(
        [
            {
                "id": record.id,
                "input_ids": record.text.input_ids.tolist(),
                "topk_ids": record.topk.ids.tolist(),
                "topk_logprobs": record.topk.logprobs.tolist(),
                "token_logprobs": record.topk.token_logprobs.tolist(),
                "tail": record.tail.tolist(),
                "ends": record.text.ends.tolist(),
            }
            for record in records
        ]
    )


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what the action returns, and the CPU seconds it took: other work on the machine does not count."""
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def divergence(stored: list[Record], exact: list[Record]) -> tuple[float, float]:
    """Return mean and maximum of KL(stored || exact) in nats over the K entries and the tail as one more."""

    def distributions(records: list[Record]) -> np.ndarray:
        parts = [np.column_stack([np.exp(r.topk.logprobs.astype(np.float64)), r.tail]) for r in records]
        held = np.concatenate(parts)
        return held / held.sum(axis=1, keepdims=True)

    p, q = distributions(stored), distributions(exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * np.log(p / q), 0).sum(axis=1)
    return float(kl.mean()), float(kl.max())


def largest_error(stored: Record, exact: Record) -> float:
    """Return the largest error of a log-probability, in nats."""
    held = exact.topk.ids >= 0
    return float(np.abs(stored.topk.logprobs[held] - exact.topk.logprobs[held]).max())


def hardest(records: list[Record]) -> list[Record]:
    """Return the same distributions in random order under random ids: no phrase repeats, no id is typically small."""
    rng = np.random.default_rng(0)
    order = rng.permutation(sum(len(record.topk.ids) for record in records))
    names = rng.permutation(1 + max(int(record.topk.ids.max()) for record in records)).astype(np.int32)
    ids = np.concatenate([record.topk.ids for record in records])
    shuffled = np.where(ids >= 0, names[ids], -1)[order].astype(np.int32)
    values = np.concatenate([record.topk.logprobs for record in records])[order]
    tails = np.concatenate([record.tail for record in records])[order]
    stops = np.cumsum([len(record.topk.ids) for record in records])[:-1]
    parts = zip(records, np.split(shuffled, stops), np.split(values, stops), np.split(tails, stops), strict=True)
    return [replace(r, topk=replace(r.topk, ids=i, logprobs=v), tail=t) for r, i, v, t in parts]


def shortened(record: Record) -> Record:
    """Return the first tokens of a record."""
    text = record.text
    cut = {name: getattr(text, name)[:SHORT] for name in ("input_ids", "ends", "exact")}
    spans = np.array([[0, cut["ends"][-1]]], np.int32)
    topk = TopK(*(values[:SHORT] for values in (record.topk.ids, record.topk.logprobs, record.topk.token_logprobs)))
    return replace(record, text=TokenizedText(spans=spans, **cut), topk=topk, tail=record.tail[:SHORT])


def random_access(records: list[Record], table: TokenTable, folder: Path) -> tuple[float, float, float]:
    """Return CPU seconds per short record by id in random order: in a first pass, later, and decompression alone.

    The first pass opens the store, reads its ids, compares its checksums and finds where each record begins.
    """
    store = write_store(folder, [shortened(record) for record in records], table)
    ids = store.ids() * 10
    random.Random(0).shuffle(ids)
    rows = [row for shard in store.manifest.shards for row in pq.read_table(folder / shard.name)["record"]]
    packed = [PackedRecord("", row.as_buffer(), store.manifest.top_k) for row in rows] * 10
    codec, header = pa.Codec("zstd"), 28
    found = [np.inf, np.inf, np.inf]
    for _ in range(RUNS):
        opened, each = open_store(folder), list(dict.fromkeys(ids))
        _, first = timed(lambda opened=opened, each=each: [opened[id] for id in each])
        _, own = timed(lambda: [store[id] for id in ids])
        _, least = timed(lambda: [codec.decompress(p.data.slice(header), decompressed_size=p.size) for p in packed])
        spent = (first / len(each), own / len(ids), least / len(packed))
        found = [min(pair) for pair in zip(found, spent, strict=True)]
    return found[0], found[1], found[2]


def bench(records: list[Record], table: TokenTable, folder: Path) -> list[str]:
    """Print the table for one K; return what is worse than promised."""
    top_k = records[0].topk.ids.shape[1]
    n_tokens = sum(len(record.text.input_ids) for record in records)
    write_store(folder / "warm", records[:2], table)
    store, wrote = timed(lambda: write_store(folder / "store", records, table))
    back, read = timed(lambda: list(open_store(folder / "store")))
    plain = folder / "plain.parquet"
    lists, listed = timed(lambda: plain_table(records))
    _, plain_wrote = timed(lambda: pq.write_table(lists, plain))
    _, plain_read = timed(lambda: pq.read_table(plain).to_pylist())
    size, plain_size = store.manifest.bytes / n_tokens, plain.stat().st_size / n_tokens
    hard = write_store(folder / "hard", hardest(records), table).manifest.bytes / n_tokens
    mean_kl, max_kl = divergence(back, records)
    error = max(largest_error(stored, exact) for stored, exact in zip(back, records, strict=True))
    ids = store.ids()
    mean_tail = np.mean([record.tail.mean() for record in records])
    _, in_order = timed(lambda: [store[id] for id in ids])
    print(f"\nK = {top_k}, {n_tokens:,} tokens in {len(records)} records, mean tail {mean_tail:.2f}")
    print(f"{'':24}{'store':>12}{'plain lists':>14}{'ratio':>8}")
    for name, ours, theirs in (
        ("bytes/token", size, plain_size),
        ("write, tokens/CPU s", n_tokens / wrote, n_tokens / (listed + plain_wrote)),
        ("read, tokens/CPU s", n_tokens / read, n_tokens / plain_read),
    ):
        ratio = theirs / ours if name == "bytes/token" else ours / theirs
        print(f"{name:24}{ours:12,.1f}{theirs:14,.1f}{ratio:7.1f}x")
    print(f"positions shuffled, ids renamed: {hard:.1f} bytes/token")
    print(f"KL(stored || exact): mean {mean_kl:.1e}, max {max_kl:.1e} nats; largest log-probability error {error:.1e}")
    print(f"by id, in order: {len(ids) / in_order:,.0f} records/CPU s")
    first, own, least = random_access(records, table, folder / "short")
    print(
        f"by id, in random order, {SHORT} tokens each: {1e6 * own:.0f} us per record, {own / least:.1f} times its "
        f"decompression alone; in a first pass {1e6 * first:.0f} us"
    )
    promises = {
        f"{size:.1f} bytes/token, promised {BUDGET[top_k]}": size <= BUDGET[top_k],
        f"KL {max_kl:.1e}, promised {MAX_KL}": max_kl <= MAX_KL,
        f"{plain_size / size:.1f} times smaller, promised {MIN_RATIO}": plain_size / size >= MIN_RATIO,
    }
    return [text for text, kept in promises.items() if not kept]


def main() -> None:
    """Run the benchmark for every K."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000, help="held-out tokens to store")
    parser.add_argument("--megabytes", type=float, default=12, help="text to learn the n-gram model from")
    arguments = parser.parse_args()
    records, table = make_records(arguments.tokens, max(BUDGET), arguments.megabytes)
    broken = []
    for top_k in BUDGET:
        cut = [
            replace(
                record,
                topk=replace(record.topk, ids=record.topk.ids[:, :top_k], logprobs=record.topk.logprobs[:, :top_k]),
                tail=np.clip(1 - np.exp(record.topk.logprobs[:, :top_k].astype(np.float64)).sum(1), 0, 1).astype("f4"),
            )
            for record in records
        ]
        with tempfile.TemporaryDirectory() as folder:
            broken += [f"K = {top_k}: {text}" for text in bench(cut, table, Path(folder))]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
