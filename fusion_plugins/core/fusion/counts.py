"""How often tokens of two vocabularies were aligned, and the vocabulary maps that follow from it.

Counts are sparse and add up over shards: a dense matrix of 131,072 x 151,936 counts would take 80 GB, while the pairs
that ever occur are a few million at most.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.nearest import pair_distances
from fusion_plugins.core.fusion.types import Shares
from fusion_plugins.errors import DataError, MismatchError

Keys = npt.NDArray[np.int64]
_SHIFT = 32
_PENDING = 1 << 20


class AlignmentCounts:
    """Counts of aligned (source id, target id) pairs.

    Texts add pairs, one per target position and distinct source id aligned with it; counts of shards are merged with
    :meth:`merge`. Memory is 16 bytes a pair, plus at most 16 MiB of pairs that are not counted yet.
    """

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.int64)
        self._counts: Keys = np.empty(0, np.int64)
        self._pending: list[Keys] = []
        self._waiting = 0

    def add(
        self, source_ids: Sequence[int], target_ids: Sequence[int], target_to_source: Sequence[Sequence[int]]
    ) -> None:
        """Count one aligned text.

        Args:
            source_ids: (U,) token ids of the source.
            target_ids: (T,) token ids of the target.
            target_to_source: (T,) positions of the source that each target position is aligned with. A source id that
                occurs twice among them counts once.

        Raises:
            DataError: the alignment is not of these ids.
        """
        if len(target_to_source) != len(target_ids):
            raise DataError(
                f"expected an alignment of {len(target_ids)} target positions, got one of {len(target_to_source)}. "
                "Align the same tokens that are counted."
            )
        widths = np.fromiter(map(len, target_to_source), np.int64, len(target_ids))
        positions = np.fromiter((at for group in target_to_source for at in group), np.int64, int(widths.sum()))
        if positions.size and not 0 <= positions.min() <= positions.max() < len(source_ids):
            raise DataError(
                f"expected an alignment with positions of {len(source_ids)} source tokens, got {positions.min()} to "
                f"{positions.max()}. Align the same tokens that are counted."
            )
        rows = np.asarray(source_ids, np.int64)[positions]
        columns = np.repeat(np.arange(len(target_ids)), widths)
        # Distinct (target position, source id) pairs.
        distinct = np.unique((columns << _SHIFT) | rows)
        columns, rows = distinct >> _SHIFT, distinct & ((1 << _SHIFT) - 1)
        self._push((rows << _SHIFT) | np.asarray(target_ids, np.int64)[columns])

    def merge(self, other: "AlignmentCounts") -> None:
        """Add the counts of another shard."""
        other._settle()
        self._settle()
        self._combine(other._keys, other._counts)

    def __len__(self) -> int:
        """Return the number of different pairs."""
        self._settle()
        return len(self._keys)

    def pairs(self) -> tuple[Keys, Keys, Keys]:
        """Return the source ids, target ids and counts of all pairs, by source id, then target id; each (P,) int64."""
        self._settle()
        return self._keys >> _SHIFT, self._keys & ((1 << _SHIFT) - 1), self._counts

    @classmethod
    def from_pairs(
        cls, source_ids: Sequence[int], target_ids: Sequence[int], counts: Sequence[int]
    ) -> "AlignmentCounts":
        """Rebuild counts from :meth:`pairs`; pairs that occur twice add up."""
        made = cls()
        keys = (np.asarray(source_ids, np.int64) << _SHIFT) | np.asarray(target_ids, np.int64)
        made._combine(keys, np.asarray(counts, np.int64))
        return made

    def _push(self, keys: Keys) -> None:
        self._pending.append(keys)
        self._waiting += len(keys)
        if self._waiting >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        if self._pending:
            keys, counts = np.unique(np.concatenate(self._pending), return_counts=True)
            self._pending, self._waiting = [], 0
            self._combine(keys, counts)

    def _combine(self, keys: Keys, counts: Keys) -> None:
        merged, place = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._keys, self._counts = merged, total


#: target tokens that a source token is divided among, at most
MOST_SHARES = 16


def by_count(
    source: Sequence[Any], target: Sequence[Any], counts: AlignmentCounts, allowed: npt.NDArray[np.bool_]
) -> IntArray:
    """Choose, for each source token, one of the target tokens that were aligned with it.

    In this order: the equal token; one that begins with it or that it begins with, because only such a pair can
    continue a text in the same way; the most frequent; the nearest; the lowest id.

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
    """Divide each source token among the target tokens that it was aligned with, in proportion to the counts.

    Only pairs of which one begins with the other count (see :func:`by_count`): a digit is divided among the numbers
    that begin with it. Of more than :data:`MOST_SHARES` the most frequent are kept, then the lowest ids. Arguments as
    for :func:`by_count`.
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
