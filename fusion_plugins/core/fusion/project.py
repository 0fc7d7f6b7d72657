"""A source's rows -> distributions over the target's vocabulary, with the probability mass accounted for.

Fourth step of the way of the data: ``Record`` + ``Alignment`` + ``VocabularyMap`` -> :class:`SparseDistributions`.

A row is used where source and target have read the same bytes. Its candidates go through the vocabulary map; those
that meet on one target token are summed. What a token-to-token map cannot say, the text says. Let ``g`` be the target's
next token and ``y1 y2 ...`` the source's next tokens at a usable row, ``p`` the source's probabilities:

* **The source splits finer** (``"1" "2"`` against ``"12"``). ``g`` gets the chain product ``p(y1) p(y2 | y1) ...``
  of the source's own probabilities over exactly its bytes. Candidates that are strict prefixes of ``g`` lose their
  mass: part of it is what the chain explains, the rest are continuations that the source has not yet spelled out.
* **The source's next token is longer** (``"there"`` against ``"the" "re"``). ``y1`` says that the text goes on with
  ``g``, so its mass goes to ``g``.
* **The tokens cross** (``"ab" "cd"`` against ``"abc" "d"``). The chain runs to the last source token inside ``g`` and
  ends with the probability, in that row, of all candidates that begin with what is left of ``g``.
* **One to one.** ``g`` gets the source's stored probability of ``y1``, also where the top k missed it.

In all four cases a candidate that is no token of the target, and whose longest beginning that is one is ``g``, gives
its mass to ``g``: a nearest token by edit distance is a guess, the beginning is what the target would say first. (A
``first_token`` map has asked the target's tokenizer already and is left alone.) So ``g`` gets the probability that
the target's first token for what the source says next is ``g``, for a target that takes the longest token it knows
and up to segmentations that the source's tokenizer would not choose.
A one-to-many map takes another way with prefixes of ``g``: what the chain does not explain is shared out among the
other target tokens that stand where the source token does.
Without the correction (``chain=False``) only the map speaks, and so it does where an alignment by ``dtw`` has put rows
together that do not end at the same byte.

**Masked rows.** A row is left out where the next token stands for other bytes than the text's on one side only (a dummy
prefix, a character that a normaliser changed), where it reaches over the end of a message into the template, and
where a special token of one side is something else on the other. At the end of a message the tokens that end a turn or
a text correspond, whatever their names.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray, as_array
from fusion_plugins.core.fusion.accounting import ProjectionReport
from fusion_plugins.core.fusion.align import Alignment
from fusion_plugins.core.fusion.projection_kernel import (
    COUNTS,
    MASSES,
    ROW_KINDS,
    Mapping,
    Sides,
    SourceRows,
    TargetRows,
    places,
    project_rows,
)
from fusion_plugins.core.fusion.record import stored_rows
from fusion_plugins.core.fusion.types import Record, Shares, SparseDistributions, VocabularyMap
from fusion_plugins.core.text.token_bytes import longest_beginnings, token_bytes
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError

__all__ = ["Projection", "ProjectionOptions", "project_distributions", "project_record", "with_labels"]


@dataclass(frozen=True)
class ProjectionOptions:
    """How rows are projected.

    Attributes:
        chain: use the text where source and target split it differently (see the module's docstring).
        tail: what becomes of the mass that no entry holds. ``renormalize``: the entries are scaled to sum to 1.
            ``ignore`` and ``bucket``: the entries keep their true probabilities and the rest is ``leftover``; a loss
            with a bucket for everything else counts it, plain cross-entropy ignores it.
        min_mass: a row that keeps less than this share of the probability that its stored entries have is not used:
            what little is left would be scaled up.
        fallback: what stands on a supervised row that is not used. ``mask``: nothing. ``next_label``: probability 1 on
            the target's next token.
    """

    chain: bool = True
    tail: Literal["renormalize", "ignore", "bucket"] = "renormalize"
    min_mass: float = 0.1
    fallback: Literal["mask", "next_label"] = "mask"

    def __post_init__(self) -> None:
        wrong = []
        if self.tail not in ("renormalize", "ignore", "bucket"):
            wrong.append(f"tail must be renormalize, ignore or bucket, not {self.tail!r}")
        if self.fallback not in ("mask", "next_label"):
            wrong.append(f"fallback must be mask or next_label, not {self.fallback!r}")
        if not 0.0 <= self.min_mass <= 1.0:
            wrong.append(f"min_mass must lie in [0, 1], not {self.min_mass!r}")
        if wrong:
            raise ConfigError("; ".join(wrong))


@dataclass(frozen=True)
class Projection:
    """One record projected.

    Attributes:
        distributions: (T, K + 1) rows (wider for a one-to-many map) over the target's vocabulary, by descending
            probability, ties by lowest id.
        label_logprobs: (T,) float32 log-probability that the source gives the target's next token, before
            renormalisation; -inf where the row is not used or does not hold it.
        report: what became of rows, candidates and mass.
    """

    distributions: SparseDistributions
    label_logprobs: FloatArray
    report: ProjectionReport


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
    """Return the rows of :func:`project_record` alone."""
    return project_record(
        source, alignment, vocabulary, target, source_table=source_table, target_table=target_table, options=options
    ).distributions


def project_record(
    source: Record,
    alignment: Alignment,
    vocabulary: VocabularyMap,
    target: TokenizedText,
    *,
    source_table: TokenTable,
    target_table: TokenTable,
    options: ProjectionOptions = ProjectionOptions(),
) -> Projection:
    """Rewrite a source's rows over the target's vocabulary.

    Args:
        source: U rows of one source with K candidates each.
        alignment: which of them belongs to which of the target's T rows.
        vocabulary: source id -> target id.
        target: the target's tokens of the same text; row ``t`` is labelled ``input_ids[t + 1]``, the last row never is.
        source_table: bytes and roles of the source's tokens.
        target_table: bytes and roles of the target's tokens.
        options: see :class:`ProjectionOptions`.

    Raises:
        AlignmentError: the alignment is not one of these two texts.
    """
    n_target, n_source = len(target.input_ids), len(source.input_ids)
    if len(alignment.source_rows) != n_target or alignment.source_rows.max(initial=-1) >= n_source:
        raise AlignmentError(
            f"expected an alignment of {n_source} source and {n_target} target tokens; it has rows for "
            f"{len(alignment.source_rows)} target tokens and names source row {alignment.source_rows.max(initial=-1)}"
        )
    sides = Sides(
        _source_rows(source),
        _target_rows(target),
        _mapping(vocabulary, source_table, target_table),
        token_bytes(source_table),
        token_bytes(target_table),
        options.chain,
    )
    ids, logprobs, kept, label_logprobs, counts, masses = project_rows(
        as_array(alignment.source_rows, np.int32), sides, float(options.min_mass)
    )
    supervised = stored_rows(target)
    distributions = _finish(ids, logprobs, kept, options)
    empty = supervised & (kept == 0.0)
    if options.fallback == "next_label":
        distributions = with_labels(distributions, empty, target)
    report = _report(supervised, empty, counts, masses, options)
    return Projection(distributions, label_logprobs, report)


def _source_rows(source: Record) -> SourceRows:
    ends = as_array(source.offsets, np.int32)
    place, _ = places(ends, as_array(source.spans, np.int32))
    return SourceRows(
        as_array(source.input_ids, np.int32),
        ends,
        place,
        as_array(source.topk_ids, np.int32),
        as_array(source.topk_logprobs, np.float32),
        as_array(source.token_logprobs, np.float32),
    )


def _target_rows(target: TokenizedText) -> TargetRows:
    ends = as_array(target.ends, np.int32)
    return TargetRows(as_array(target.input_ids, np.int32), ends, *places(ends, as_array(target.spans, np.int32)))


_NO_SHARES = Shares(np.zeros(1, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


def _mapping(vocabulary: VocabularyMap, source_table: TokenTable, target_table: TokenTable) -> Mapping:
    begins = longest_beginnings(source_table, target_table)
    if vocabulary.method in ("first_token", "one_to_many"):
        # Such a map has asked the target's tokenizer, which knows better.
        begins = np.full_like(begins, -1)
    shares = vocabulary.shares or _NO_SHARES
    starts = as_array(shares.starts, np.int32)
    return Mapping(
        as_array(vocabulary.target_ids, np.int32),
        vocabulary.distances == 0,
        begins,
        starts,
        as_array(shares.target_ids, np.int32),
        as_array(shares.weights, np.float32),
        int(np.diff(starts).max(initial=1)),
    )


def _finish(ids: IntArray, logprobs: FloatArray, kept: FloatArray, options: ProjectionOptions) -> SparseDistributions:
    used = kept > 0.0
    if options.tail == "renormalize":
        logprobs = logprobs - np.log(np.where(used, kept, 1.0)).astype(np.float32)[:, None]
        leftover = np.where(used, 0.0, 1.0)
    else:
        leftover = np.clip(1.0 - kept, 0.0, 1.0)
    return SparseDistributions(ids, logprobs, leftover.astype(np.float32))


def with_labels(distributions: SparseDistributions, rows: BoolArray, target: TokenizedText) -> SparseDistributions:
    """Return the distributions with probability 1 on the target's next token in some rows that are empty, (T,) bool."""
    if not rows.any():
        return distributions
    ids, logprobs, leftover = distributions.ids.copy(), distributions.logprobs.copy(), distributions.leftover.copy()
    ids[rows, 0], logprobs[rows, 0], leftover[rows] = np.append(target.input_ids[1:], -1)[rows], 0.0, 0.0
    return SparseDistributions(ids, logprobs, leftover)


def _report(
    supervised: BoolArray, empty: BoolArray, counts: IntArray, masses: FloatArray, options: ProjectionOptions
) -> ProjectionReport:
    named: dict[str, Any] = {name: int(count) for name, count in zip(COUNTS, counts, strict=True)}
    seen = sum(named[name] for name in ROW_KINDS)
    named |= {name: float(mass) for name, mass in zip(MASSES, masses, strict=True)}
    return ProjectionReport(
        rows=int(supervised.sum()),
        unaligned=int(supervised.sum()) - seen,
        fallback=int(empty.sum()) if options.fallback == "next_label" else 0,
        **named,
    )
