"""Edit distances between tokens, and the nearest token of a vocabulary.

The distance is Levenshtein's: the least number of insertions, deletions and substitutions of one code point of ``str``
or one byte of ``bytes``.

For one source token the targets are visited by how much their length differs, because that difference bounds the
distance from below. A second bound comes from signatures: a bit for each class of units that occurs in a token, and
one for each class that occurs twice; one edit clears at most one bit on each side. What passes both bounds is compared
with the bit-parallel algorithm of Myers, in the form for the distance of whole strings.

References:
    G. Myers, "A fast bit-vector algorithm for approximate string matching based on dynamic programming", 1999;
    H. Hyyrö, "A bit-vector algorithm for computing Levenshtein and Damerau edit distances", 2003.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.jit import compiled

Words = npt.NDArray[np.uint64]
Starts = npt.NDArray[np.int64]

_WORD = 64
_RARE_FROM = 48
_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


class Packed(NamedTuple):
    """Tokens as one array of units, sorted by length, then index.

    Attributes:
        units: the units of all tokens, as numbers of an alphabet that both sides share.
        starts: (N + 1,) where each token's units start.
        order: (N,) index of each token in the caller's list.
        once: (N,) signature of the classes of units that occur.
        twice: (N,) signature of the classes that occur at least twice.
        by_length: (L + 2,) where the tokens of each length start.
        alphabet: number of different units.
    """

    units: IntArray
    starts: Starts
    order: IntArray
    once: Words
    twice: Words
    by_length: IntArray
    alphabet: int


def pack(source: Sequence[str | bytes], target: Sequence[str | bytes]) -> tuple[Packed, Packed]:
    """Pack both sides over one alphabet, the most frequent units of the target first."""
    orders = [_by_length(tokens) for tokens in (source, target)]
    left, right = (_units([tokens[at] for at in order]) for tokens, order in zip((source, target), orders, strict=True))
    values, numbers = np.unique(np.concatenate([left, right]), return_inverse=True)
    frequency = np.bincount(numbers[len(left) :], minlength=len(values))
    rank = np.empty(len(values), np.int32)
    rank[np.argsort(-frequency, kind="stable")] = np.arange(len(values), dtype=np.int32)
    units = rank[numbers]
    return (
        _build(source, orders[0], units[: len(left)], len(values)),
        _build(target, orders[1], units[len(left) :], len(values)),
    )


def _by_length(tokens: Sequence[str | bytes]) -> IntArray:
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    return np.argsort(lengths, kind="stable").astype(np.int32)


def _units(tokens: Sequence[str | bytes]) -> npt.NDArray[np.uint32]:
    if isinstance(tokens[0], bytes):
        return np.frombuffer(b"".join(tokens), np.uint8).astype(np.uint32)  # type: ignore[arg-type]
    return np.frombuffer("".join(tokens).encode("utf-32-le", "surrogatepass"), np.uint32)  # type: ignore[arg-type]


def _build(tokens: Sequence[str | bytes], order: IntArray, units: IntArray, alphabet: int) -> Packed:
    lengths = np.fromiter((len(tokens[at]) for at in order), np.int64, len(order))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    once, twice = np.zeros(len(order), np.uint64), np.zeros(len(order), np.uint64)
    _sign(units, starts, once, twice)
    by_length = np.searchsorted(lengths, np.arange(lengths[-1] + 2)).astype(np.int32)
    return Packed(units, starts, order, once, twice, by_length, alphabet)


@compiled
def _sign(units, starts, once, twice):  # type: ignore[no-untyped-def]
    for at in range(len(once)):
        for place in range(starts[at], starts[at + 1]):
            unit = units[place]
            bit = unit if unit < _RARE_FROM else _RARE_FROM + unit % (_WORD - _RARE_FROM)
            mask = _ONE << np.uint64(bit)
            twice[at] |= once[at] & mask
            once[at] |= mask


@compiled
def _count(word):  # type: ignore[no-untyped-def]
    word = word - ((word >> _ONE) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _myers(masks, size, units, begin, end, limit):  # type: ignore[no-untyped-def]
    """Distance between the pattern of 1 to 64 units behind ``masks`` and ``units[begin:end]``.

    Beyond the limit any number beyond the limit is returned.
    """
    plus, minus, score = _ALL, np.uint64(0), size
    top = _ONE << np.uint64(size - 1)
    for place in range(begin, end):
        equal = masks[units[place]]
        vertical = equal | minus
        horizontal = (((equal & plus) + plus) ^ plus) | equal
        up = minus | ~(horizontal | plus)
        down = plus & horizontal
        if up & top:
            score += 1
        if down & top:
            score -= 1
        if score - (end - 1 - place) > limit:
            return score
        up = (up << _ONE) | _ONE
        plus = (down << _ONE) | ~(vertical | up)
        minus = up & vertical
    return score


@compiled
def _plain(left, right):  # type: ignore[no-untyped-def]
    """Distance by the recurrence over a table, for a source token of more than 64 units."""
    row = np.arange(len(right) + 1)
    for line in range(len(left)):
        diagonal, row[0] = row[0], line + 1
        for column in range(len(right)):
            above = row[column + 1]
            change = diagonal + (left[line] != right[column])
            row[column + 1] = min(change, above + 1, row[column] + 1)
            diagonal = above
    return row[len(right)]


@compiled
def _bound(once, twice, others, others_twice, bounds):  # type: ignore[no-untyped-def]
    """Write the bounds from the signatures; a loop without branches, which the compiler turns into vector code."""
    for at in range(len(others)):
        mine = _count(once & ~others[at]) + _count(twice & ~others_twice[at])
        theirs = _count(others[at] & ~once) + _count(others_twice[at] & ~twice)
        bounds[at] = max(mine, theirs)


@compiled
def _scan(rows, row, table, length, masks, bounds, best):  # type: ignore[no-untyped-def]
    """Look at all targets of one length; return the better of ``best`` and the best of them, as (distance, index)."""
    distance, index = best
    begin, end = rows.starts[row], rows.starts[row + 1]
    first, last = table.by_length[length], table.by_length[length + 1]
    _bound(rows.once[row], rows.twice[row], table.once[first:last], table.twice[first:last], bounds)
    for at in range(first, last):
        bound = bounds[at - first]
        if bound > distance or (bound == distance and table.order[at] > index):
            continue
        left, right = table.starts[at], table.starts[at + 1]
        if begin == end:
            found = length
        elif end - begin <= _WORD:
            found = _myers(masks, end - begin, table.units, left, right, distance)
        else:
            found = _plain(rows.units[begin:end], table.units[left:right])
        if found < distance or (found == distance and table.order[at] < index):
            distance, index = found, np.int64(table.order[at])
    return distance, index


@compiled
def search(rows, table, start, stop, limit, index, distance):  # type: ignore[no-untyped-def]
    """Search for the packed source tokens ``start .. stop - 1``; write into ``index`` and ``distance``."""
    masks = np.zeros(table.alphabet, np.uint64)
    bounds = np.empty(len(table.order), np.uint8)
    longest = len(table.by_length) - 2
    for row in range(start, stop):
        begin, end = rows.starts[row], rows.starts[row + 1]
        size = end - begin
        if size <= _WORD:
            for place in range(begin, end):
                masks[rows.units[place]] |= _ONE << np.uint64(place - begin)
        best = (np.int64(limit) + 1, np.int64(-1))
        delta = 0
        while delta <= best[0] and delta <= max(size, longest):
            if delta <= size and size - delta <= longest:
                best = _scan(rows, row, table, size - delta, masks, bounds, best)
            if delta and size + delta <= longest:
                best = _scan(rows, row, table, size + delta, masks, bounds, best)
            delta += 1
        for place in range(begin, end):
            masks[rows.units[place]] = np.uint64(0)
        if best[1] >= 0:
            index[rows.order[row]], distance[rows.order[row]] = best[1], best[0]


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
