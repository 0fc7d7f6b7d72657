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
character that a normaliser changed); where the label reaches over the end of a message into the template; and where a
special token of one side is something else on the other. At the end of a message, the tokens that end a turn or a text
are matched whatever their names.

**First positions.** White space before an answer is no part of it, but may be of its first token on either side
(``"▁The"``): :mod:`fusion_plugins.core.fusion.answer_starts`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray, as_array
from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import Alignment, checked_positions
from fusion_plugins.core.fusion.answer_starts import span_beginnings, starts_of_answers
from fusion_plugins.core.fusion.flat import Entries, Texts
from fusion_plugins.core.fusion.prefixed_tables import PrefixedTables
from fusion_plugins.core.fusion.projection_kernel import (
    COUNTS,
    IS_EXACT,
    MASSES,
    POSITION_KINDS,
    SUPERVISED,
    Tables,
    in_spans,
    project_texts,
)
from fusion_plugins.core.fusion.types import Record, Shares, SparseDistributions, VocabularyMap
from fusion_plugins.core.fusion.vocabulary_map import ASKED_THE_TOKENIZER
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.core.text.token_index import Strings, TokenIndex
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import ConfigError, MismatchError


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
    """What one source says about a text, or about several texts one after the other, for the target.

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
        mapping: the vocabulary map.
        tables: all of these in the form of the kernel.
        options: see :class:`ProjectionOptions`.
        prefixed: the tables of answers that begin behind a prefix.
    """

    source_bytes: TokenBytes
    target_bytes: TokenBytes
    mapping: VocabularyMap
    tables: Tables
    options: ProjectionOptions
    prefixed: PrefixedTables

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

        Raises:
            MismatchError: the map is of another vocabulary.
        """
        if len(vocabulary.target_ids) != source.vocab_size:
            raise MismatchError(
                f"expected a vocabulary map of the source's {source.vocab_size} tokens, got one of "
                f"{len(vocabulary.target_ids)}. Make the map from these two token tables."
            )
        tables = _tables(source, target, vocabulary)
        prefixed = PrefixedTables(source.packed, target.packed, target.ordinary, tables, vocabulary.method)
        return cls(source.packed, target.packed, vocabulary, tables, options, prefixed)

    def __call__(self, record: Record, alignment: Alignment, target: TokenizedText) -> Projection:
        """Rewrite a source's distributions of one text over the target's vocabulary.

        Args:
            record: U positions of the source with K entries each.
            alignment: which of them belongs to which of the target's T positions.
            target: the target's tokens of the same text; position ``t`` is labelled ``input_ids[t + 1]``.

        Raises:
            AlignmentError: the alignment is not one of these two texts.
        """
        matched = checked_positions(alignment, record.text, target)
        given = Texts.of([record.text]), Entries.of([record]), matched, Texts.of([target])
        return self.project(*given, strict=alignment.strict)

    def project(
        self,
        source: Texts,
        entries: Entries,
        matched: IntArray,
        target: Texts,
        *,
        most: int | None = None,
        strict: bool = False,
        wanted: BoolArray | None = None,
    ) -> Projection:
        """Rewrite a source's distributions of B texts at once.

        Args:
            source: the texts in the source's tokens.
            entries: what the source says at each of them.
            matched: (N,) int32 source position, counted from the start of its text, of each position of the target; -1
                for none.
            target: the texts in the target's tokens, N in all.
            most: entries per position that are kept, the most probable ones; all by default. The others are left out
                before the entries are scaled, and are no part of the kept mass.
            strict: whether the alignment is, see :func:`~fusion_plugins.core.fusion.align.align_texts`.
            wanted: (N,) bool, the supervised positions of the texts, of which the spans of ``target`` may hold a part;
                where it is not given, a space before an answer that is a token of its own is taught as well.
        """
        width = np.iinfo(np.int32).max if most is None else most
        beginnings = span_beginnings(source, target, self.source_bytes, self.target_bytes)
        given = beginnings, matched, source, entries, target, len(self.source_bytes.special)
        starts = starts_of_answers(*given, strict=strict, wanted=wanted) if len(beginnings) else []
        if starts:
            matched, counted = matched.copy(), in_spans(target)
            matched[np.concatenate([own.positions for _, own in starts])] = -1
        out = self._project(matched, source, entries, target, self.tables, width)
        ids, logprobs, leftover, kept, label_logprobs, counts, masses = out
        for prefixes, own in starts:
            parts = self._project(
                own.matched, own.source, own.entries, own.target, self.prefixed.of(prefixes), ids.shape[1]
            )
            ids[own.positions, : parts[0].shape[1]] = parts[0][::2]
            logprobs[own.positions, : parts[0].shape[1]] = parts[1][::2]
            for values, part in zip((leftover, kept, label_logprobs), parts[2:5], strict=True):
                values[own.positions] = part[::2]
            counts += parts[5]
            counts[SUPERVISED] -= int(counted[own.positions].sum())  # these are counted already
            masses += parts[6]
        return Projection(SparseDistributions(ids, logprobs, leftover, kept), label_logprobs, _report(counts, masses))

    def _project(
        self, matched: IntArray, source: Texts, entries: Entries, target: Texts, tables: Tables, most: int
    ) -> tuple[Any, ...]:
        options = self.options
        found: tuple[Any, ...] = project_texts(
            matched, source, entries, target, tables, options.chain, options.renormalize, float(options.min_mass), most
        )
        return found


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
    found = TokenIndex.of(target.packed, target.ordinary).longest(Strings.of(source.packed))
    return np.where(source.special, np.int32(-1), found)


def _tables(source: TokenTable, target: TokenTable, vocabulary: VocabularyMap) -> Tables:
    asked = vocabulary.method in ASKED_THE_TOKENIZER
    begins = np.full(source.vocab_size, -1, np.int32) if asked else longest_beginnings(source, target)
    # An id beyond the target's tokens, as in a padded output layer, is none.
    known = np.where(vocabulary.target_ids < target.vocab_size, vocabulary.target_ids, -1)
    shares = vocabulary.shares or Shares(
        np.zeros(source.vocab_size + 1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    )
    starts = as_array(shares.starts, np.int32)
    return Tables(
        mapped=np.stack([known, np.where(vocabulary.exact, IS_EXACT, begins)], axis=1).astype(np.int32),
        share_starts=starts,
        share_ids=as_array(shares.target_ids, np.int32),
        share_weights=as_array(shares.weights, np.float32),
        **_named("s", source.packed),
        **_named("t", target.packed),
        most=int(np.diff(starts).max(initial=1)),
    )


def _named(side: str, tokens: TokenBytes) -> dict[str, Any]:
    return dict(
        zip(
            (f"{side}_{name}" for name in ("bytes", "starts", "special", "closing")),
            (tokens.flat, tokens.starts, tokens.special, tokens.closing),
            strict=True,
        )
    )


def _report(counts: IntArray, masses: FloatArray) -> ProjectionReport:
    named: dict[str, Any] = {name: int(count) for name, count in zip(COUNTS, counts, strict=True)}
    seen = sum(named[name] for name in POSITION_KINDS)
    named |= {name: float(mass) for name, mass in zip(MASSES, masses, strict=True)}
    return ProjectionReport(unaligned=named["positions"] - seen, **named)
