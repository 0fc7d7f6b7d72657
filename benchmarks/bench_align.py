"""Speed of sequence alignment between two real tokenizers, with equal results and the ratio to plain Python.

    python benchmarks/bench_align.py [--tokens 2048]

`dtw` is held against two references in the same process: the plain one in Python (tests/support/reference.py), and
Python loops with one compiled edit distance per cell, as the published code works. `offsets` is held against a Python
loop over the ends. Times are core seconds, the best of several runs. Exits 1 when a result differs or a figure is
missed.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

import reference
import tiny

from fusion_plugins.core.fusion.align import align_texts
from fusion_plugins.core.fusion.dtw import dtw_path
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.tokenize import tokenize
from fusion_plugins.core.text.types import TokenizedText

REACH_DTW, REACH_DTW_RATIO = 10e-3, 400.0  # core seconds; ratio
REACH_OFFSETS = 50e-6


def best(function: Callable[[], Any], runs: int) -> tuple[Any, float]:
    """Return the result and the shortest core time."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return result, min(times)


def plain_dtw(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """The reference in Python throughout."""
    return reference.dtw([[reference.published_cost(a, b, "Ġ", "▁", "fusellm") for b in target] for a in source])[0]


def published_dtw(source: list[str], target: list[str]) -> list[tuple[int, int]]:
    """Python loops, one compiled distance per cell."""
    total = [[float("inf")] * (len(target) + 1) for _ in range(len(source) + 1)]
    total[0][0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            cost = Levenshtein.distance(a.replace("Ġ", ""), b.replace("▁", ""))
            total[i + 1][j + 1] = cost + min(total[i][j], total[i][j + 1], total[i + 1][j])
    i, j = len(source), len(target)
    path = [(i - 1, j - 1)]
    while (i, j) != (1, 1):
        i, j = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda cell: total[cell[0]][cell[1]])
        path.append((i - 1, j - 1))
    return path[::-1]


def plain_offsets(source_ends: list[int], target_ends: list[int]) -> list[int]:
    """A dictionary from end to position."""
    position_at = {end: position for position, end in enumerate(source_ends)}
    return [position_at.get(end, -1) for end in target_ends]


def bench_dtw(source: list[str], target: list[str]) -> bool:
    """Compare paths and times; return whether the figures are reached."""
    dtw_path(source[:9], target[:9])
    good = True
    (path, cost), ours = best(lambda: dtw_path(source, target), 20)
    for name, function in (("plain Python", plain_dtw), ("published loops", published_dtw)):
        expected, plain = best(lambda f=function: f(source, target), 1)
        equal = path.tolist() == [list(step) for step in expected]
        print(
            f"dtw {len(source)} x {len(target)}: {ours * 1e3:.2f} ms, {name} {plain:.2f} s, "
            f"ratio {plain / ours:,.0f}x, cost {cost}, equal path: {equal}"
        )
        good &= equal and ours <= REACH_DTW and (function is not plain_dtw or plain / ours >= REACH_DTW_RATIO)
    return good


def bench_offsets(source: TokenizedText, target: TokenizedText) -> bool:
    """Time the alignment by ends; return whether the figure is reached."""
    ends = source.ends.tolist(), target.ends.tolist()
    _, plain = best(lambda: plain_offsets(*ends), 20)
    align_texts(source, target)
    alignment, ours = best(lambda: [align_texts(source, target) for _ in range(100)][0], 20)
    ours /= 100
    matched = alignment.source_positions
    right = bool((source.ends[matched] == target.ends)[matched >= 0].all())
    print(
        f"offsets {len(target.ends)}: {ours * 1e6:.1f} us, plain {plain * 1e6:.0f} us, ratio {plain / ours:.1f}x, "
        f"coverage {alignment.coverage:.3f}, ends equal: {right}"
    )
    return right and ours <= REACH_OFFSETS


def main() -> int:
    """Run on code and on prose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    tokens = parser.parse_args().tokens
    tokenizers = tiny.tekken(), tiny.mistral_v1()
    tables = [TokenTable.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    good = True
    for name, text in (("code", inspect.getsource(argparse)), ("prose", inspect.getdoc(np.einsum) * 9)):
        texts = [
            tokenize(tokenizer, table, text[: 8 * tokens], max_length=tokens)
            for tokenizer, table in zip(tokenizers, tables, strict=True)
        ]
        surfaces = [
            tokenizer.convert_ids_to_tokens(part.input_ids.tolist())
            for tokenizer, part in zip(tokenizers, texts, strict=True)
        ]
        print(f"== {name}")
        good &= bench_dtw(*surfaces)
        good &= bench_offsets(*texts)
    print("reached" if good else "NOT reached")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
