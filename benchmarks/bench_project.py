"""Speed of the whole path, records of three sources -> fused distributions of a target, with real tokenizers.

    python benchmarks/bench_project.py [--texts 40] [--width 10] [--against REV]

Sources: tekken (131,072 tokens) twice and the target's own tokenizer; target: 32,000 tokens. The distributions are made
up: the next token and its neighbours in the vocabulary. In one process:

* the plain reference (tests/support/reference.py) fuses the first texts from the ends of the tokens, and the published
  path (time warping with one compiled distance per cell, then its row transfer) aligns the first 512 tokens of one;
* the projection of every vocabulary map, with and without the chain, in texts of about 200 and 2,000 tokens, is held
  against the least that it must do: a compiled loop over flat arrays that maps, sums, sorts and takes logarithms;
* with ``--against``, the package as it was at another revision (of this git repository) fuses the same texts.

Times are core seconds, the best of several interleaved runs. Exits 1 when a result differs or a figure is missed.
"""

import argparse
import importlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import reference
import tiny
from bench_align import published_dtw
from published_alignment import PublishedText, PublishedVocabulary, published_rows
from records import record_of

from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.align import align_many, align_texts
from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.flat import Entries, Texts
from fusion_plugins.core.fusion.pipeline import FusionPlan, FusionSource, fuse_text, fuse_texts, warm_up
from fusion_plugins.core.fusion.project import ProjectionOptions, Projector
from fusion_plugins.core.fusion.types import Record, SparseDistributions
from fusion_plugins.core.fusion.vocabulary_map import METHODS, map_vocabulary
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.core.text.types import TokenizedText

REACH = 100_000  # target tokens per core second at K = 10
REACH_LEAN = 2.0  # times the lean loop, at K = 64 and 2,000 tokens
BATCH_TOKENS = 4_096
RUNS = 7
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


@numba.njit(nogil=True)
def lean(matched, ids, logprobs, targets, starts, shares, weights, place, out_ids, out):  # type: ignore[no-untyped-def] # noqa: C901
    """The least that a projection does: map, sum, sort, logarithms. ``place`` (V,) is -1 before and after."""
    held, held_ids = np.empty(out.shape[1]), np.empty(out.shape[1], np.int32)
    for t in range(len(matched) - 1):
        u, n, total = matched[t], 0, 0.0
        if u < 0:
            continue
        for k in range(ids.shape[1]):
            z = ids[u, k]
            if z < 0:
                continue
            p = np.exp(np.float64(logprobs[u, k]))
            first, stop = starts[z], starts[z + 1]
            for e in range(first, max(stop, first + 1)):
                to, mass = (shares[e], p * weights[e]) if stop > first else (targets[z], p)
                if to >= 0:
                    total += mass
                    if place[to] < 0:
                        place[to], held_ids[n], held[n] = n, to, 0.0
                        n += 1
                    held[place[to]] += mass
        for i in range(n):
            to, mass, k = held_ids[i], held[i], i
            place[to] = -1
            while k > 0 and (held[k - 1] < mass or (held[k - 1] == mass and held_ids[k - 1] > to)):
                held[k], held_ids[k] = held[k - 1], held_ids[k - 1]
                k -= 1
            held[k], held_ids[k] = mass, to
        log_total = np.float32(np.log(total))
        for i in range(n):
            out_ids[t, i], out[t, i] = held_ids[i], np.float32(np.log(held[i])) - log_total


def interleaved(*functions: Callable[[], Any]) -> list[float]:
    """Return the shortest core time of each; every run does all of them."""
    best = [float("inf")] * len(functions)
    for _ in range(RUNS):
        for index, function in enumerate(functions):
            start = time.process_time()
            function()
            best[index] = min(best[index], time.process_time() - start)
    return best


def lean_times(projector: Projector, rows: list[Any]) -> tuple[float, float, int]:
    """Return the core seconds of the first source's projection, those of the lean loop, and the candidates."""
    records, targets = [records[0] for _, records in rows], [text for text, _ in rows]
    source, target, entries = Texts.of([record.text for record in records]), Texts.of(targets), Entries.of(records)
    matched, _ = align_many(align_texts, source, target, lambda b: (records[b].text, targets[b]))
    tables = projector.tables
    mapped = np.ascontiguousarray(tables.mapped[:, 0])
    base = np.repeat(source.starts[:-1], np.diff(target.starts))
    positions = np.where(matched >= 0, matched + base, -1).astype(np.int32)
    width = (entries.ids.shape[1] + 1) * tables.most + 1
    place = np.full(len(projector.target_bytes.special), -1, np.int32)

    def run_lean() -> None:
        out_ids = np.full((len(matched), width), -1, np.int32)
        out = np.full((len(matched), width), -np.inf, np.float32)
        shares = tables.share_starts, tables.share_ids, tables.share_weights
        lean(positions, entries.ids, entries.logprobs, mapped, *shares, place, out_ids, out)

    run_lean()
    ours, least = interleaved(lambda: projector.project(source, entries, matched, target), run_lean)
    candidates = int((entries.ids[positions[positions >= 0]] >= 0).sum())
    return ours, least, candidates


def bench_maps(tables: list[TokenTable], rows: list[Any], width: int) -> bool:
    """Compare every vocabulary map with the lean loop; return whether the figure is reached."""
    counts = AlignmentCounts()
    for text, records in rows:
        aligned = align_texts(records[0].text, text).target_to_source
        counts.add(records[0].text.input_ids, text.input_ids, aligned)
    good = True
    for method in METHODS:
        mapping = map_vocabulary(tables[0], tables[2], method=method, counts=counts)
        for chain in (True, False):
            projector = Projector.of(tables[0], tables[2], mapping, ProjectionOptions(chain=chain))
            ours, least, candidates = lean_times(projector, rows)
            cost, ratio = ours / candidates * 1e9, ours / least
            print(f"{method}{'' if chain else ', no chain'}: {cost:.1f} ns per candidate, {ratio:.2f}x the lean loop")
            good &= width < 64 or ratio <= REACH_LEAN
    return good


def in_batches(plan: FusionPlan, rows: list[Any]) -> None:
    """Fuse all texts, some thousand tokens per call."""
    size = max(1, BATCH_TOKENS // max(len(text.input_ids) for text, _ in rows))
    for start in range(0, len(rows), size):
        texts, records = zip(*rows[start : start + size], strict=True)
        fuse_texts(plan, texts, list(zip(*records, strict=True)))


def other_revision(rev: str) -> Any:
    """Import the package as it was at another revision, under another name."""
    folder = Path(tempfile.mkdtemp())
    archive = subprocess.run(["git", "archive", rev, "fusion_plugins"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    package = (folder / "fusion_plugins").rename(folder / "fusion_plugins_before")
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("fusion_plugins", "fusion_plugins_before"), encoding="utf-8")
    sys.path.insert(0, str(folder))
    return importlib.import_module("fusion_plugins_before.core.fusion.pipeline")


def bench_against(rev: str, plan: FusionPlan, tables: list[TokenTable], rows: list[Any]) -> None:
    """Print the time of another revision as a multiple of this one's, text by text and in batches."""
    before = other_revision(rev)
    projector = importlib.import_module("fusion_plugins_before.core.fusion.project").Projector
    sources = tuple(
        before.FusionSource(s.name, projector.of(table, tables[2], s.projector.mapping))
        for s, table in zip(plan.sources, tables, strict=True)
    )
    old = before.FusionPlan(sources, width=plan.width)
    before.fuse_text(old, *rows[0])
    times = interleaved(
        lambda: [before.fuse_text(old, *row) for row in rows],
        lambda: [fuse_text(plan, *row) for row in rows],
        lambda: in_batches(plan, rows),
    )
    tokens = sum(len(text.input_ids) for text, _ in rows)
    then, alone, batched = (seconds / tokens * 1e6 for seconds in times)
    print(
        f"about {tokens // len(rows)} tokens a text: {rev} {then:.1f} us per token, one text a call {alone:.1f} "
        f"({then / alone:.1f}x), batches {batched:.1f} ({then / batched:.1f}x)"
    )


def main() -> int:
    """Fuse the texts in every way and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--against", metavar="REV", help="also measure the package as it was at this git revision")
    arguments = parser.parse_args()
    plan, tokenizers, tables = make_plan(arguments.width)
    rows, short = (
        [
            make_records(tokenizers, tables, text[:size], arguments.width, seed)
            for seed, text in enumerate(read_texts(arguments.texts))
        ]
        for size in (8_000, 650)
    )
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
    good = equal and (rate >= REACH or arguments.width > 10)
    for texts in (short, rows):
        print(f"== projection, about {sum(len(text.input_ids) for text, _ in texts) // len(texts)} tokens a text")
        good &= bench_maps(tables, texts, arguments.width) or texts is short
        if arguments.against:
            bench_against(arguments.against, plan, tables, texts)
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
