"""Choose a target token, or several, for each source token from how often they were aligned."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.counts import AlignmentCounts
from fusion_plugins.core.distance import pair_distances
from fusion_plugins.core.types import IntArray, Shares
from fusion_plugins.errors import MismatchError

__all__ = ["by_count", "by_published_score", "shares_by_count"]

#: target tokens that a source token is shared out among, at most
MOST_SHARES = 16

_MARKERS = ("\u2581", "\u0120")  # SentencePiece, byte-level BPE


def by_count(
    source: Sequence[Any], target: Sequence[Any], counts: AlignmentCounts, allowed: npt.NDArray[np.bool_]
) -> IntArray:
    """Choose the aligned target token that says most about what comes next.

    In this order: the equal token; a token of which one begins with the other, because only such a pair can stand for
    one and the same next text; the most frequent; the nearest; the lowest id.

    Args:
        source: (W,) source tokens.
        target: (V,) target tokens, of the same type.
        counts: the counts.
        allowed: (V,) bool, target tokens that may be chosen.

    Returns:
        (W,) int32 target ids, -1 for source tokens that were never aligned with an allowed token.
    """
    rows, columns, number = _pairs(source, counts, allowed)
    left, right = [source[row] for row in rows], [target[column] for column in columns]
    distance = pair_distances(left, right)
    apart = np.fromiter((not _begins(a, b) for a, b in zip(left, right, strict=True)), np.bool_)
    return _choose(len(source), rows, np.lexsort((columns, distance, -number, apart, distance > 0, rows)), columns)


def shares_by_count(
    source: Sequence[Any], target: Sequence[Any], counts: AlignmentCounts, allowed: npt.NDArray[np.bool_]
) -> Shares:
    """Share each source token out among the target tokens it was aligned with, in proportion to the counts.

    Only pairs of which one begins with the other count (see :func:`by_count`): a digit is shared out among the numbers
    that begin with it. Of more than :data:`MOST_SHARES` the most frequent stay, then the lowest ids. Arguments are
    those of :func:`by_count`.
    """
    rows, columns, number = _pairs(source, counts, allowed)
    starts_same = np.fromiter(
        (_begins(source[row], target[column]) for row, column in zip(rows, columns, strict=True)), np.bool_, len(rows)
    )
    rows, columns, number = rows[starts_same], columns[starts_same], number[starts_same]
    order = np.lexsort((columns, -number, rows))
    rows, columns, number = rows[order], columns[order], number[order]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, columns, number = (array[place < MOST_SHARES] for array in (rows, columns, number))
    totals = np.bincount(rows, weights=number, minlength=len(source))
    starts = np.searchsorted(rows, np.arange(len(source) + 1)).astype(np.int32)
    return Shares(starts, columns.astype(np.int32), (number / totals[rows]).astype(np.float32))


def _begins(left: Any, right: Any) -> bool:
    found: bool = left.startswith(right) or right.startswith(left)
    return found


def by_published_score(
    source: Sequence[Any], target: Sequence[Any], counts: AlignmentCounts, allowed: npt.NDArray[np.bool_]
) -> IntArray:
    """Choose the least ``distance * weight * sigmoid(count)``, the lowest id on ties, as FuseChat's code does.

    The distance is that of the tokens without space marks; if one is then empty, that of the source token with its mark
    replaced by the target's. The weight is 0.1 where one of the compared strings contains the other, else 1. Arguments
    and result are those of :func:`by_count`.
    """
    rows, columns, number = _pairs(source, counts, allowed)
    left, right = _marker(source), _marker(target)
    pairs = [_compared(source[row], target[column], left, right) for row, column in zip(rows, columns, strict=True)]
    distance = pair_distances([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    weight = np.fromiter((0.1 if a in b or b in a else 1.0 for a, b in pairs), np.float64, len(pairs))
    score = distance * weight / (1 + np.exp(-number.astype(np.float64)))
    return _choose(len(source), rows, np.lexsort((columns, score, rows)), columns)


def _pairs(
    source: Sequence[Any], counts: AlignmentCounts, allowed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], ...]:
    """Return source ids, target ids and counts of the pairs whose target token is allowed."""
    rows, columns, number = counts.pairs()
    if len(rows) and (rows.max() >= len(source) or columns.max() >= len(allowed)):
        raise MismatchError(
            f"expected counts of vocabularies of {len(source)} and {len(allowed)} tokens, got pairs up to "
            f"({rows.max()}, {columns.max()}): they are of other tokenizers, or source and target are swapped. "
            "Count again with these tokenizers."
        )
    keep = allowed[columns]
    return rows[keep], columns[keep], number[keep]


def _choose(
    size: int, rows: npt.NDArray[np.int64], order: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]
) -> IntArray:
    """Take the first pair of each row in the given order."""
    chosen = np.full(size, -1, np.int32)
    found, first = np.unique(rows[order], return_index=True)
    chosen[found] = columns[order][first]
    return chosen


def _marker(tokens: Sequence[Any]) -> Any:
    """Return the space mark of a vocabulary: a space for bytes, else the one that starts more tokens."""
    if len(tokens) and isinstance(tokens[0], bytes):
        return b" "
    return max(_MARKERS, key=lambda marker: sum(token.startswith(marker) for token in tokens))


def _compared(source: Any, target: Any, source_marker: Any, target_marker: Any) -> tuple[Any, Any]:
    nothing = type(source)()
    left, right = source.replace(source_marker, nothing), target.replace(target_marker, nothing)
    return (left, right) if left and right else (source.replace(source_marker, target_marker), target)
