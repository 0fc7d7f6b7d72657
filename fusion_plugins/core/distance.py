"""Edit distances between tokens, and the nearest token of a vocabulary.

The distance is Levenshtein's: the least number of insertions, deletions and substitutions of one unit, where a unit is
a byte of ``bytes`` and a code point of ``str``.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rapidfuzz.distance import Levenshtein

from fusion_plugins.core.nearest import pack, search
from fusion_plugins.core.types import IntArray

__all__ = ["edit_distance", "nearest_tokens", "pair_distances"]

Text = str | bytes
_ROWS_PER_TASK = 512
_UNBOUNDED = 2**30


def edit_distance(left: Text, right: Text) -> int:
    """Return the edit distance of two tokens, both ``str`` or both ``bytes``."""
    return int(Levenshtein.distance(left, right))


def pair_distances(left: Sequence[Text], right: Sequence[Text]) -> IntArray:
    """Return the (N,) int32 edit distances of the pairs ``left[n], right[n]``."""
    pairs = zip(left, right, strict=True)
    return np.fromiter((Levenshtein.distance(a, b) for a, b in pairs), np.int32, len(left))


def nearest_tokens(
    source: Sequence[Text], target: Sequence[Text], *, max_distance: int | None = None, threads: int | None = None
) -> tuple[IntArray, IntArray]:
    """Find, for each source token, the target token at the least edit distance; the first in ``target`` on ties.

    Args:
        source: (N,) tokens, all ``str`` or all ``bytes``.
        target: (M,) tokens of the same type.
        max_distance: give up beyond this distance.
        threads: threads to use; all cores by default. The result does not depend on it.

    Returns:
        (N,) int32 index into ``target`` and (N,) int32 distance; both -1 where nothing is near enough.
    """
    index = np.full(len(source), -1, np.int32)
    distance = np.full(len(source), -1, np.int32)
    if not len(source) or not len(target):
        return index, distance
    rows, table = pack(source, target)
    limit = _UNBOUNDED if max_distance is None else max_distance

    def run(start: int) -> None:
        search(rows, table, start, min(start + _ROWS_PER_TASK, len(source)), limit, index, distance)

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        list(pool.map(run, range(0, len(source), _ROWS_PER_TASK)))
    return index, distance
