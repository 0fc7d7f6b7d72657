"""The dataclasses that pass between the steps of the fusion.

``TokenizedText`` + ``TopK`` -> ``Record`` -> ``Alignment`` -> ``SparseDistributions`` (projected, then fused)

**Positions.** The distribution at position ``t`` is over token ``t + 1``, after reading tokens ``0..t``. So position
``t`` is labelled ``input_ids[t + 1]``, and the last position of a text has no label.

Shape letters: T target tokens, U source tokens, K entries, V and W target and source vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError


@dataclass(frozen=True)
class TopK:
    """The most probable next tokens at each of U positions, as one source model gives them.

    Attributes:
        ids: (U, K) int32, by descending probability, ties by lowest id; -1 where fewer than K are stored.
        logprobs: (U, K) float32 true log-probabilities (full normaliser) in nats; -inf where the id is -1.
        token_logprobs: (U,) float32 log-probability of the token that follows, log p(input_ids[u + 1] | tokens 0..u);
            nan at the last position.
    """

    ids: IntArray
    logprobs: FloatArray
    token_logprobs: FloatArray


@dataclass(frozen=True)
class Record:
    """One text as one source model sees it; what a store holds per text.

    Attributes:
        id: joins texts, stores and datasets.
        text: the source's U tokens.
        topk: its distributions.
        tail: (U,) float32 probability mass outside the top k.
        ce_per_token: mean cross-entropy over the supervised tokens, nats/token; nan without any.
        ce_per_byte: the same sum over the number of supervised bytes, nats/byte.
        answer_rest: what the sum of the last answer's log-probabilities lacks, nats, because a store has rounded each
            of them; 0 where nothing was rounded, and where a store does not know it.
    """

    id: str
    text: TokenizedText
    topk: TopK
    tail: FloatArray
    ce_per_token: float
    ce_per_byte: float
    answer_rest: float = 0.0


@dataclass(frozen=True)
class LazyRecord:
    """A record of which the distributions are read when they are asked for: often another source is chosen.

    Attributes:
        id: as in :class:`Record`, like all others.
        text: the source's U tokens.
        ce_per_token: nats/token.
        ce_per_byte: nats/byte.
        read: returns the distributions.
    """

    id: str
    text: TokenizedText
    ce_per_token: float
    ce_per_byte: float
    read: Callable[[], TopK]

    @cached_property
    def topk(self) -> TopK:
        """The distributions."""
        return self.read()


AnyRecord: TypeAlias = Record | LazyRecord


@dataclass(frozen=True)
class SparseDistributions:
    """One sparse distribution per position; the one form in which distributions cross modules.

    Attributes:
        ids: (T, K) int32, -1 for an empty entry. The entries of a position are distinct and in descending order of
            probability, ties by lowest id.
        logprobs: (T, K) float32 natural logarithms, -inf for an empty entry.
        leftover: (T,) float32 probability mass that no entry holds; 1 at a position without entries.
        kept: (T,) float32 true probability of the source that the entries hold, before they were scaled to sum to 1;
            None where nobody has counted it.
        source: (T,) int16 number of the source that the entries are from, -1 for a mixture of several or none; None
            where it is not known.
    """

    ids: IntArray
    logprobs: FloatArray
    leftover: FloatArray
    kept: FloatArray | None = None
    source: npt.NDArray[np.int16] | None = None

    def at(self, positions: slice) -> "SparseDistributions":
        """Return some of the positions of one text."""
        kept = None if self.kept is None else self.kept[positions]
        source = None if self.source is None else self.source[positions]
        return SparseDistributions(
            self.ids[positions], self.logprobs[positions], self.leftover[positions], kept, source
        )

    @property
    def mask(self) -> BoolArray:
        """(T, K) bool, True where an entry holds a probability."""
        return self.ids >= 0

    @property
    def present(self) -> BoolArray:
        """(T,) bool, True at the positions that have at least one entry."""
        return has_entries(self.ids)


def has_entries(ids: IntArray) -> BoolArray:
    """(..., T) bool, True at the positions that have an entry; from ids (..., T, K), where -1 is none."""
    if not ids.shape[-1]:
        return np.zeros(ids.shape[:-1], np.bool_)
    # Nearly always the first column alone says it.
    found: BoolArray = ids[..., 0] >= 0
    rest = ~found
    found[rest] = (ids[rest] >= 0).any(axis=-1)
    return found


@dataclass(frozen=True)
class FusedTexts:
    """The fused distributions of B texts, one text after the other: N positions in all.

    Text ``b`` has the positions ``offsets[b]`` to ``offsets[b + 1]``, one per token of the target.

    Attributes:
        ids: (N, K) int32, as in :class:`SparseDistributions`.
        logprobs: (N, K) float32.
        leftover: (N,) float32.
        offsets: (B + 1,) int64.
        kept: (N,) float32 true probability of the source that the entries hold; 0 where no source teaches.
        source: (N,) int16 number of the source that teaches the position, in the plan's order; -1 for a mixture of
            several, for a label that was filled in, and where nothing is taught.
        best: (B,) int16 number of the source with the lowest cross-entropy; -1 for a text that was left out.
        unusable: number of a text that was left out -> why. Its positions are empty.
    """

    ids: IntArray
    logprobs: FloatArray
    leftover: FloatArray
    offsets: npt.NDArray[np.int64]
    kept: FloatArray
    source: npt.NDArray[np.int16]
    best: npt.NDArray[np.int16]
    unusable: Mapping[int, AlignmentError] = field(default_factory=dict)


@dataclass(frozen=True)
class Shares:
    """How each of W source tokens is divided among several target tokens: a sparse matrix of weights.

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
        method: how the map was made.
        shares: only in a one-to-many map; a source token without entries in it goes to its one ``target_ids``.
    """

    target_ids: IntArray
    distances: IntArray
    method: str
    shares: Shares | None = None

    @property
    def exact(self) -> BoolArray:
        """(W,) bool, True where source and target have the same token."""
        found: BoolArray = (self.distances == 0) & (self.target_ids >= 0)
        return found
