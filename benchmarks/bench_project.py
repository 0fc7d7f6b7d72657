"""Speed of the whole path, records of three sources -> fused rows of a target, with real tokenizers and K = 10.

    python benchmarks/bench_project.py [--texts 40] [--width 10]

Sources: tekken (131,072 tokens) twice and the target's own tokenizer; target: 32,000 tokens. The rows are made up: the
next token and its neighbours in the vocabulary. In the same process the plain reference (tests/support/reference.py)
fuses the first texts from the ends of the tokens, and the published path (time warping with one compiled distance per
cell, then its row transfer) aligns the first 512 tokens of one. Times are core seconds. Exits 1 when a result differs
or the figure is missed.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import reference
import tiny
from bench_align import published_dtw
from published_alignment import PublishedText, PublishedVocabulary, published_rows
from records import record_of

from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, fuse_text, warm_up
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.types import Record, SparseDistributions
from fusion_plugins.core.fusion.vocabulary_map import map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.core.text.types import TokenizedText

REACH = 100_000  # target tokens per core second
PLAIN_TEXTS = 3
PUBLISHED_TOKENS = 512


def make_record(text: TokenizedText, table: TokenTable, k: int, seed: int) -> Record:
    """A source that gives its next token 30 % at most rows and spreads the rest over tokens near it."""
    rng, n = np.random.default_rng(seed), len(text.input_ids)
    following = np.append(text.input_ids[1:], 0)
    near = (following[:, None] + rng.integers(-200, 200, (n, k))) % table.vocab_size
    ids = np.sort(near, axis=1)
    # Entries of a row are distinct; the reference knows no special tokens.
    ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    ids[(ids == following[:, None]) | table.special[ids]] = -1
    place = np.arange(n), rng.integers(0, k, n)
    ids[place] = following
    weights = np.where(ids >= 0, rng.dirichlet(np.full(k, 0.5), n) * 0.6, 0.0)
    weights[place] = 0.3
    order = np.argsort(-weights, axis=1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    ids = np.where(weights > 0, ids, -1)
    with np.errstate(divide="ignore"):
        return record_of("text", text, ids, np.log(weights), np.full(n, np.log(0.3), np.float32))


def read_texts(count: int) -> list[str]:
    """Python sources of the standard library, 8,000 characters each."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text for file in files if len(text := file.read_text(encoding="utf-8", errors="ignore")) > 8_000]
    return [text[:8_000] for text in texts[:count]]


def make_plan(width: int) -> tuple[FusionPlan, list[Any], list[TokenTable]]:
    """Return the plan, and tokenizers and token tables of its sources; the last source is the target's own."""
    tokenizers = [tiny.tekken(), tiny.tekken(), tiny.mistral_v1()]
    tables = [TokenTable.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    maps = [map_vocabulary(table, tables[2]) for table in (tables[0], tables[2])]
    sources = [
        FusionSource(name, Projector.of(table, tables[2], mapping))
        for name, table, mapping in zip(
            ("tekken-1", "tekken-2", "own"), tables, (maps[0], maps[0], maps[1]), strict=True
        )
    ]
    return FusionPlan(tuple(sources), width=width), tokenizers, tables


def make_records(
    tokenizers: list[Any], tables: list[TokenTable], text: str, width: int, seed: int
) -> tuple[TokenizedText, list[Record]]:
    """Return the target's tokens of a text, and a record per source."""
    parts = [
        tokenize(tokenizer, table, text, special_tokens=False, append_eos=False)
        for tokenizer, table in zip(tokenizers, tables, strict=True)
    ]
    records = [
        make_record(part, table, width, 3 * seed + index)
        for index, (part, table) in enumerate(zip(parts, tables, strict=True))
    ]
    return parts[2], records


def fuse_all(plan: FusionPlan, rows: list[Any]) -> tuple[list[SparseDistributions], FusionReport, float]:
    """Return the fused texts, the counters and the core time; each text's is the best of three runs."""
    fused, total, seconds = [], FusionReport(), 0.0
    for text, records in rows:
        runs = []
        for _ in range(3):
            start = time.process_time()
            result, report = fuse_text(plan, text, records)
            runs.append(time.process_time() - start)
        fused.append(result)
        total += report
        seconds += min(runs)
    return fused, total, seconds


def plain_rate(
    plan: FusionPlan, tables: list[TokenTable], rows: list[Any], fused: list[SparseDistributions]
) -> tuple[float, bool]:
    """Return tokens per core second of the plain reference, and whether it gives the same distributions."""
    maps = [(s.projector.mapping.target_ids.tolist(), s.projector.mapping.exact.tolist()) for s in plan.sources]
    tokens = [table.tokens for table in tables], tables[2].tokens
    start = time.process_time()
    plain = [reference.fuse_text(r, t.input_ids, t.ends, maps, *tokens, plan.width) for t, r in rows]
    seconds = time.process_time() - start
    equal = all(_same(found, wanted) for found, wanted in zip(fused, plain, strict=True))
    return sum(len(text.input_ids) for text, _ in rows) / seconds, equal


def published_rate(
    plan: FusionPlan, tokenizers: list[Any], text: TokenizedText, records: list[Record], tokens: int = PUBLISHED_TOKENS
) -> float:
    """Return tokens per core second of the published alignment and row transfer, for the first tokens of a text.

    The target's own source needs neither.
    """
    target = tokenizers[2].convert_ids_to_tokens(text.input_ids[:tokens].tolist())
    start = time.process_time()
    for source, tokenizer, record in zip(plan.sources[:2], tokenizers, records, strict=False):
        surfaces = tokenizer.convert_ids_to_tokens(record.text.input_ids[:tokens].tolist())
        path = published_dtw(surfaces, target)
        matched: list[list[int]] = [[] for _ in target]
        for i, j in path:
            matched[j].append(i)
        pairs = zip(record.topk.ids[: len(surfaces)], record.topk.logprobs, strict=False)
        kept = [(ids[ids >= 0].tolist(), logprobs[ids >= 0].tolist()) for ids, logprobs in pairs]
        names = {i: tokenizer.convert_ids_to_tokens(i) for ids, _ in kept for i in ids}
        nearest = {
            name.replace("Ġ", "▁"): tokenizers[2].convert_ids_to_tokens(int(source.projector.mapping.target_ids[i]))
            for i, name in names.items()
        }
        topk = [logprobs for _, logprobs in kept], [ids for ids, _ in kept]
        published = PublishedText(surfaces, target, text.input_ids.tolist(), matched, *topk, "Ġ", "▁")
        vocabulary = PublishedVocabulary(names, tokenizers[2].get_vocab(), nearest, {})
        published_rows(published, vocabulary, family="fusellm", mode="soft")
    return len(target) / (time.process_time() - start)


def main() -> int:
    """Fuse the texts both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--width", type=int, default=10)
    arguments = parser.parse_args()
    plan, tokenizers, tables = make_plan(arguments.width)
    rows = [
        make_records(tokenizers, tables, text, arguments.width, seed)
        for seed, text in enumerate(read_texts(arguments.texts))
    ]
    start = time.perf_counter()
    warm_up()
    fuse_text(plan, *rows[0])
    print(f"first call, kernels from the disk cache or compiled: {time.perf_counter() - start:.2f} s")
    fused, total, seconds = fuse_all(plan, rows)
    tokens = sum(len(text.input_ids) for text, _ in rows)
    rate = tokens / seconds
    plain, equal = plain_rate(plan, tables, rows[:PLAIN_TEXTS], fused[:PLAIN_TEXTS])
    published = published_rate(plan, tokenizers, *rows[0])
    print(f"{len(rows)} texts, {tokens:,} target tokens, 3 sources, K = {plan.width}: {rate:,.0f} tokens/s/core")
    print(f"plain Python over ends: {plain:,.0f} tokens/s/core, ratio {rate / plain:,.0f}x, equal: {equal}")
    print(f"published path, {PUBLISHED_TOKENS} tokens: {published:,.0f} tokens/s/core, ratio {rate / published:,.0f}x")
    for name, report in total.sources.items():
        shares = f"coverage {report.coverage:.3f}, mass kept {report.mass_kept:.3f}"
        print(f"  {name}: {shares}, positions {report.positions:,}")
    good = equal and rate >= REACH
    print("reached" if good else "NOT reached")
    return 0 if good else 1


def _same(fused: SparseDistributions, rows: list[dict[int, float]]) -> bool:
    for ids, logprobs, row in zip(fused.ids, fused.logprobs, rows, strict=False):
        got = [float(np.exp(p)) for i, p in zip(ids, logprobs, strict=True) if i >= 0]
        # Entries of equal probability may differ at the cut; the reference masks nothing.
        if got and not np.allclose(sorted(got), sorted(row.values()), rtol=1e-3):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
