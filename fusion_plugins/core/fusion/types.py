"""The frozen dataclasses that flow between the steps of the fusion.

``Record -> Alignment -> SparseDistributions (projected) -> SparseDistributions (fused)``

**Positions.** The distribution at position ``t`` is over token ``t + 1``, after reading tokens ``0..t``.

Shape letters: T target tokens, U source tokens, K kept entries, M spans, V and W target and source vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray

__all__ = ["Record", "Shares", "SparseDistributions", "VocabularyMap"]


@dataclass(frozen=True)
class Record:
    """One text as one source model sees it: a row of a store.

    Attributes:
        id: joins texts, stores and data sets.
        input_ids: (U,) int32.
        offsets: (U,) int32 byte offset at which each token ends (``TokenizedText.ends``).
        exact: (U,) bool, as in :class:`TokenizedText`.
        spans: (M, 2) int32 supervised byte ranges.
        topk_ids: (U, K) int32, by descending probability, ties by lowest id; -1 where fewer than K are stored.
        topk_logprobs: (U, K) float32 true log-probabilities in nats; -inf where the id is -1.
        token_logprobs: (U,) float32, row convention: log p(input_ids[u + 1] | input_ids[: u + 1]); nan in the last row.
        tail: (U,) float32 probability mass outside the top k.
        ce_per_token: mean cross-entropy over the supervised tokens, nats/token.
        ce_per_byte: the same sum over the number of supervised bytes, nats/byte.
    """

    id: str
    input_ids: IntArray
    offsets: IntArray
    exact: BoolArray
    spans: IntArray
    topk_ids: IntArray
    topk_logprobs: FloatArray
    token_logprobs: FloatArray
    tail: FloatArray
    ce_per_token: float
    ce_per_byte: float


@dataclass(frozen=True)
class SparseDistributions:
    """One sparse distribution per position; the one form that crosses modules.

    Attributes:
        ids: (T, K) int32, -1 for an empty entry. Entries of a row are distinct.
        logprobs: (T, K) float32 natural logarithms, -inf for an empty entry.
        leftover: (T,) float32 probability mass that no entry holds; 1 for a row without entries.
    """

    ids: IntArray
    logprobs: FloatArray
    leftover: FloatArray

    @property
    def mask(self) -> BoolArray:
        """(T, K) bool, True where an entry holds a probability."""
        return self.ids >= 0

    @property
    def rows(self) -> BoolArray:
        """(T,) bool, True where the row has at least one entry."""
        return np.any(self.mask, axis=-1)


@dataclass(frozen=True)
class Shares:
    """How the probability of each of W source tokens is shared out among several target tokens (a sparse matrix).

    Attributes:
        starts: (W + 1,) int32; source token ``s`` has the entries ``starts[s]`` to ``starts[s + 1]``, or none.
        target_ids: (E,) int32 target tokens, distinct within a source token.
        weights: (E,) float32, positive; those of one source token sum to 1.
    """

    starts: IntArray
    target_ids: IntArray
    weights: FloatArray


@dataclass(frozen=True)
class VocabularyMap:
    """Source token id -> target token id.

    Attributes:
        target_ids: (W,) int32, -1 where the source token has no counterpart.
        distances: (W,) int32 edit distance of the pair; 0 for an exact match, -1 where unmapped.
        method: how it was made.
        shares: of a one-to-many map; a source token without entries there goes to its one ``target_ids``.
    """

    target_ids: IntArray
    distances: IntArray
    method: str
    shares: Shares | None = None
