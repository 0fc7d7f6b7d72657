"""A source's distributions -> distributions over the target's vocabulary, with the probability mass accounted for.

A position is used where source and target have read the same bytes. Its entries go through the vocabulary map, and
entries that are mapped to the same target token are summed. Where source and target split the text differently, the
text decides about the target's next token (the label). Let ``g`` be the label, ``y1 y2 ...`` the source's next tokens
at a usable position, and ``p`` the source's probabilities:

* **The source splits finer** (``"1" "2"`` against ``"12"``). ``g`` gets the chain product ``p(y1) p(y2 | y1) ...``
  of the source's own probabilities over exactly its bytes. Entries that are strict prefixes of ``g`` lose their
  mass: part of it is in the chain product, the rest belongs to continuations that the source has not yet spelled.
* **The source's next token is longer** (``"there"`` against ``"the" "re"``). ``y1`` says that the text continues with
  ``g``, so its mass goes to ``g``.
* **The tokens cross** (``"ab" "cd"`` against ``"abc" "d"``). The chain runs to the last source token inside ``g`` and
  ends with the probability, at that position, of all entries that begin with the rest of ``g``.
* **One to one.** ``g`` gets the source's stored probability of ``y1``, also where the top k missed it.

In all four cases an entry that is not a token of the target gives its mass to ``g`` if ``g`` is the longest target
token that it begins with: the target would begin this continuation with ``g``, while the nearest token by edit distance
is only a guess. (A ``first_token`` map already follows the target's tokenizer and is not changed.) So ``g`` gets the
probability that the target's first token for the source's continuation is ``g``. This is exact if the target's
tokenizer is greedy (longest match) and the source puts no probability on other splits of the same bytes.

A one-to-many map treats prefixes of ``g`` differently: the mass that is not in the chain product is divided among the
other target tokens that the source token has shares of. Without the correction (``chain=False``) the vocabulary map
alone decides, and also where an alignment by ``dtw`` has matched positions that do not end at the same byte.

**Masked positions.** A position is left out where, on one side only, the next token has other bytes than the text (a
dummy prefix, a character that a normaliser changed); where the label reaches over the end of a message into the
template; and where a special token of one side is something else on the other. At the end of a message, the tokens that
end a turn or a text are matched whatever their names.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import FloatArray, IntArray, as_array
from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import Alignment
from fusion_plugins.core.fusion.projection_kernel import (
    COUNTS,
    MASSES,
    POSITION_KINDS,
    Mapping,
    Sides,
    SourceArrays,
    TargetArrays,
    places,
    project_positions,
)
from fusion_plugins.core.fusion.record import supervised_positions
from fusion_plugins.core.fusion.types import Record, Shares, SparseDistributions, VocabularyMap
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError

#: methods of vocabulary maps that have asked the target's tokenizer for the first token of every source token
_ASKED_THE_TOKENIZER = ("first_token", "one_to_many")
_NO_SHARES = Shares(np.zeros(1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


@dataclass(frozen=True)
class ProjectionOptions:
    """How distributions are projected.

    Attributes:
        chain: use the text where source and target split it differently (see the module's docstring).
        renormalize: scale the entries to sum to 1. Otherwise they keep their true probabilities and the rest is
            ``leftover``: a loss with a bucket for everything else counts it, cross-entropy ignores it.
        min_mass: a position that keeps less than this share of the probability of its stored entries is not used: the
            little that remains would be scaled up.
    """

    chain: bool = True
    renormalize: bool = True
    min_mass: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_mass <= 1.0:
            raise ConfigError(f"min_mass: expected a share in [0, 1], got {self.min_mass!r}")


@dataclass(frozen=True)
class Projection:
    """One record projected.

    Attributes:
        distributions: (T, K + 1) entries (more for a one-to-many map) over the target's vocabulary, by descending
            probability, ties by lowest id.
        label_logprobs: (T,) float32 log-probability that the source gives the target's next token, before
            renormalisation; -inf where the position is not used or does not hold it.
        report: counts of positions, entries and mass.
    """

    distributions: SparseDistributions
    label_logprobs: FloatArray
    report: ProjectionReport


@dataclass(frozen=True)
class Projector:
    """Projects the records of one source; made once by :meth:`of`, because that reads both vocabularies.

    Holds arrays only, so it is cheap to hand to worker processes.

    Attributes:
        source_bytes: the source's vocabulary.
        target_bytes: the target's vocabulary.
        mapping: the vocabulary map in the form of the kernel.
        options: see :class:`ProjectionOptions`.
    """

    source_bytes: TokenBytes
    target_bytes: TokenBytes
    mapping: Mapping
    options: ProjectionOptions

    @classmethod
    def of(
        cls,
        source: TokenTable,
        target: TokenTable,
        vocabulary: VocabularyMap,
        options: ProjectionOptions = ProjectionOptions(),
    ) -> "Projector":
        """Prepare the projection from one vocabulary to another.

        Args:
            source: the source's W tokens.
            target: the target's V tokens.
            vocabulary: source id -> target id.
            options: how to project.
        """
        asked = vocabulary.method in _ASKED_THE_TOKENIZER
        shares = vocabulary.shares or _NO_SHARES
        starts = as_array(shares.starts, np.int32)
        mapping = Mapping(
            target_ids=as_array(vocabulary.target_ids, np.int32),
            exact=vocabulary.distances == 0,
            begins=np.empty(0, np.int32) if asked else longest_beginnings(source, target),
            starts=starts,
            share_ids=as_array(shares.target_ids, np.int32),
            weights=as_array(shares.weights, np.float32),
            most=int(np.diff(starts).max(initial=1)),
        )
        return cls(source.packed, target.packed, mapping, options)

    def __call__(self, record: Record, alignment: Alignment, target: TokenizedText) -> Projection:
        """Rewrite a source's distributions of one text over the target's vocabulary.

        Args:
            record: U positions of the source with K entries each.
            alignment: which of them belongs to which of the target's T positions.
            target: the target's tokens of the same text; position ``t`` is labelled ``input_ids[t + 1]``.

        Raises:
            AlignmentError: the alignment is not one of these two texts.
        """
        matched = as_array(alignment.source_positions, np.int32)
        n_target, n_source = len(target.input_ids), len(record.text.input_ids)
        if len(matched) != n_target or matched.max(initial=-1) >= n_source:
            raise AlignmentError(
                f"expected an alignment of {n_source} source and {n_target} target tokens; got one of {len(matched)} "
                f"target tokens that names source position {matched.max(initial=-1)}. Align these two texts."
            )
        sides = Sides(
            _source_arrays(record),
            _target_arrays(target),
            self.mapping,
            self.source_bytes,
            self.target_bytes,
            self.options.chain,
        )
        ids, logprobs, kept, label_logprobs, counts, masses = project_positions(
            matched, sides, float(self.options.min_mass)
        )
        distributions = self._finish(ids, logprobs, kept)
        return Projection(
            distributions, label_logprobs, _report(int(supervised_positions(target).sum()), counts, masses)
        )

    def _finish(self, ids: IntArray, logprobs: FloatArray, kept: FloatArray) -> SparseDistributions:
        used = kept > 0.0
        if self.options.renormalize:
            logprobs = logprobs - np.log(np.where(used, kept, 1.0)).astype(np.float32)[:, None]
            leftover = np.where(used, 0.0, 1.0)
        else:
            leftover = np.clip(1.0 - kept, 0.0, 1.0)
        return SparseDistributions(ids, logprobs, leftover.astype(np.float32), kept.astype(np.float32))


def project_distributions(
    source: Record,
    alignment: Alignment,
    vocabulary: VocabularyMap,
    target: TokenizedText,
    *,
    source_table: TokenTable,
    target_table: TokenTable,
    options: ProjectionOptions = ProjectionOptions(),
) -> SparseDistributions:
    """Project one record; for more than one, make a :class:`Projector` once and call it.

    Args:
        source: the record.
        alignment: source position per target position.
        vocabulary: source id -> target id.
        target: the target's T tokens of the same text.
        source_table: the source's tokens.
        target_table: the target's tokens.
        options: how to project.

    Returns:
        (T, K + 1) entries over the target's vocabulary.

    Raises:
        AlignmentError: the alignment is not one of these two texts.
    """
    return Projector.of(source_table, target_table, vocabulary, options)(source, alignment, target).distributions


def longest_beginnings(source: TokenTable, target: TokenTable) -> IntArray:
    """Return (W,) int32: the longest ordinary target token that each source token begins with, -1 for none.

    Of equal target tokens the lowest id counts.
    """
    ids = {target.tokens[i]: i for i in np.flatnonzero(target.ordinary)[::-1].tolist()}
    longest = int(target.lengths.max(initial=0))
    found = np.full(source.vocab_size, -1, np.int32)
    for index in np.flatnonzero(~source.special).tolist():
        token = source.tokens[index]
        ends = range(min(len(token), longest), 0, -1)
        found[index] = next((ids[token[:end]] for end in ends if token[:end] in ids), -1)
    return found


def _source_arrays(record: Record) -> SourceArrays:
    ends = as_array(record.text.ends, np.int32)
    place, _ = places(ends, as_array(record.text.spans, np.int32))
    return SourceArrays(
        as_array(record.text.input_ids, np.int32),
        ends,
        place,
        as_array(record.topk.ids, np.int32),
        as_array(record.topk.logprobs, np.float32),
        as_array(record.topk.token_logprobs, np.float32),
    )


def _target_arrays(target: TokenizedText) -> TargetArrays:
    ends = as_array(target.ends, np.int32)
    return TargetArrays(as_array(target.input_ids, np.int32), ends, *places(ends, as_array(target.spans, np.int32)))


def _report(supervised: int, counts: IntArray, masses: FloatArray) -> ProjectionReport:
    named: dict[str, Any] = {name: int(count) for name, count in zip(COUNTS, counts, strict=True)}
    seen = sum(named[name] for name in POSITION_KINDS)
    named |= {name: float(mass) for name, mass in zip(MASSES, masses, strict=True)}
    return ProjectionReport(positions=supervised, unaligned=supervised - seen, **named)
