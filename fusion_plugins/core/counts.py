"""How often tokens of two vocabularies were aligned: sparse counts that add up over shards.

A dense matrix of 131,072 x 151,936 counts would take 80 GB; the pairs that ever occur are a few million at most.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusion_plugins.errors import DataError

__all__ = ["AlignmentCounts"]

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
