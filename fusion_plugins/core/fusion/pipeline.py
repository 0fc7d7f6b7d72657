"""Everything that happens to one text: records of S sources -> one fused distribution per position.

This is what an adapter calls. It aligns, projects and fuses, as the modules of these names say, and counts the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.align import TextAligner, align_by_tokens, align_dtw, align_texts
from fusion_plugins.core.fusion.common_text import common_text, comparable, intersection, within
from fusion_plugins.core.fusion.fuse import (
    FusionRule,
    avg_ce,
    fuse,
    kept_mass,
    min_ce,
    min_ce_choice,
    token_min_ce,
    truncate,
)
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.record import build_record, supervised_positions
from fusion_plugins.core.fusion.types import FusedTexts, Record, SparseDistributions, TopK, VocabularyMap
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError, MismatchError

#: name -> cross-entropy of a record: nats per byte, comparable across tokenizers, or per source token, as published
METRICS: dict[str, Callable[[Record], float]] = {"byte": attrgetter("ce_per_byte"), "token": attrgetter("ce_per_token")}


@dataclass(frozen=True)
class FusionSource:
    """One source, prepared.

    Attributes:
        name: as in the configuration and in reports.
        projector: rewrites its distributions over the target's vocabulary.
        align: finds its position for each position of the target.
    """

    name: str
    projector: Projector
    align: TextAligner = align_texts


@dataclass(frozen=True)
class FusionPlan:
    """Everything that stays the same from text to text. Made once, before worker processes are forked.

    Attributes:
        sources: at least one; the order decides ties.
        rule: fuses the sources' distributions.
        rule_options: keyword arguments of the rule.
        metric: cross-entropy of a record by which the rule ranks the sources of one text; see :data:`METRICS`.
        width: entries per fused distribution.
        label_fallback: put probability 1 on the label where no source has a distribution.
    """

    sources: tuple[FusionSource, ...]
    rule: FusionRule = min_ce
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    metric: Callable[[Record], float] = METRICS["byte"]
    width: int = 10
    label_fallback: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("expected at least one source to fuse, got none. Name stores in fusion.sources.")
        if self.width < 1:
            raise ConfigError(f"expected a width of at least 1 entry, got {self.width}. Raise fusion.top_k.")


def fuse_text(
    plan: FusionPlan, target: TokenizedText, records: Sequence[Record], trained: IntArray | None = None
) -> tuple[SparseDistributions, FusionReport]:
    """Fuse the sources' records of one text; for many texts :func:`fuse_texts` is faster.

    Args:
        plan: what to do.
        target: T tokens of the text; position ``t`` is labelled ``input_ids[t + 1]``.
        records: one record of this text per source, in the plan's order.
        trained: (R, 2) byte ranges of the target's text that are trained on, ascending; all spans if None.

    Returns:
        (T, width) fused distributions, empty where nothing can be taught (the last position always), and the counters.

    Raises:
        MismatchError: the records are not one per source, or not of one text.
        AlignmentError: source and target did not read the same text.
    """
    fused, report = fuse_texts(plan, [target], [[record] for record in records], [trained])
    return SparseDistributions(fused.ids, fused.logprobs, fused.leftover, fused.kept, fused.source), report


def fuse_texts(
    plan: FusionPlan,
    targets: Sequence[TokenizedText],
    records: Sequence[Sequence[Record]],
    trained: Sequence[IntArray | None] | None = None,
    *,
    on_unusable: str = "raise",
) -> tuple[FusedTexts, FusionReport]:
    """Fuse the sources' records of B texts into flat arrays.

    Args:
        plan: what to do.
        targets: B texts in the target's tokens; position ``t`` of a text is labelled ``input_ids[t + 1]``.
        records: per source, in the plan's order, its records of the B texts.
        trained: per text, (R, 2) byte ranges of the target's text that are trained on, ascending, or None for all
            spans; None for all spans of all texts.
        on_unusable: what happens to a text that a source has not read as the target does. ``raise``, or ``skip``: its
            positions stay empty, and ``unusable`` has the error.

    Returns:
        (N, width) fused distributions of all positions, empty where nothing can be taught (the last position of a text
        always), and the counters of the texts that were used.

    Raises:
        MismatchError: the records are not one per source and text, or not of one text.
        AlignmentError: source and target did not read the same text.
        ConfigError: an unknown value of ``on_unusable``.
    """
    if on_unusable not in ("raise", "skip"):
        raise ConfigError(f"on_unusable: expected 'raise' or 'skip', got {on_unusable!r}")
    _check_records(plan, targets, records)
    trained = [None] * len(targets) if trained is None else trained
    parts, total, best, unusable = [], FusionReport(), [], {}
    for b, target in enumerate(targets):
        try:
            fused, chosen, report = _fuse_one(plan, target, [own[b] for own in records], trained[b])
        except AlignmentError as error:
            if on_unusable == "raise":
                raise
            fused, chosen, report = _nothing(len(target.input_ids), plan.width), -1, FusionReport()
            unusable[b] = error
        parts.append(fused)
        best.append(chosen)
        total += report
    empty = _nothing(0, plan.width)
    ids, logprobs, leftover, kept, source = (
        np.concatenate([getattr(part, name) for part in [empty, *parts]])
        for name in ("ids", "logprobs", "leftover", "kept", "source")
    )
    offsets = np.cumsum([0, *(len(target.input_ids) for target in targets)], dtype=np.int64)
    return FusedTexts(ids, logprobs, leftover, offsets, kept, source, np.array(best, np.int16), unusable), total


def _nothing(n: int, width: int) -> SparseDistributions:
    """Return ``n`` positions without entries."""
    ids, logprobs = np.full((n, width), -1, np.int32), np.full((n, width), -np.inf, np.float32)
    zeros = np.zeros(n, np.float32)
    return SparseDistributions(ids, logprobs, zeros + 1, zeros, np.full(n, -1, np.int16))


def _fuse_one(
    plan: FusionPlan, target: TokenizedText, records: Sequence[Record], trained: IntArray | None
) -> tuple[SparseDistributions, int, FusionReport]:
    common = [_common(source, record, target) for source, record in zip(plan.sources, records, strict=True)]
    if trained is not None:
        common = [within(*sides, trained) for sides in common]
        target = replace(target, spans=intersection(target.spans, trained))
    projections = [
        source.projector(record, source.align(record.text, text), text)
        for source, (record, text) in zip(plan.sources, common, strict=True)
    ]
    distributions = [projection.distributions for projection in projections]
    per_text = np.array([plan.metric(record) for record in comparable(records, common)])
    if getattr(plan.rule, "per_token", False):
        costs = -np.stack([projection.label_logprobs for projection in projections]).astype(np.float64)
    else:
        costs = per_text
    fused = fuse(distributions, costs, rule=plan.rule, **plan.rule_options)
    renormalize = all(source.projector.options.renormalize for source in plan.sources)
    fused = _described(truncate(fused, plan.width, renormalize=renormalize), distributions)
    supervised = supervised_positions(target)
    missing = [int(supervised.sum() - supervised_positions(text).sum()) for _, text in common]
    # Labels are filled in after fusion, so that no rule mixes one into, or prefers it to, a source's distribution.
    labelled = supervised & ~fused.present & plan.label_fallback
    fused = _with_labels(fused, labelled, target)
    best = int(min_ce_choice(per_text))
    report = FusionReport(
        texts=1,
        positions=int(supervised.sum()),
        fused_positions=int(fused.present.sum()),
        chosen={source.name: int(index == best) for index, source in enumerate(plan.sources)},
        sources={
            source.name: replace(
                p.report,
                positions=p.report.positions + lost,
                left_out=lost,
                fallback=int((labelled & ~p.distributions.present).sum()),
            )
            for source, p, lost in zip(plan.sources, projections, missing, strict=True)
        },
    )
    return fused, best, report


def _described(fused: SparseDistributions, distributions: Sequence[SparseDistributions]) -> SparseDistributions:
    """Fill in the kept mass and the source where a rule of another package does not say them."""
    present = fused.present
    kept, source = fused.kept, fused.source
    if kept is None:
        taking_part = np.stack([d.present for d in distributions])
        mean = kept_mass(distributions).sum(axis=0) / np.maximum(taking_part.sum(axis=0), 1)
        kept = mean.astype(np.float32)
    if source is None:
        source = np.full(len(present), 0 if len(distributions) == 1 else -1, np.int16)
    return replace(fused, kept=np.where(present, kept, np.float32(0)), source=np.where(present, source, np.int16(-1)))


def _check_records(plan: FusionPlan, targets: Sequence[TokenizedText], records: Sequence[Sequence[Record]]) -> None:
    if len(records) != len(plan.sources) or any(len(own) != len(targets) for own in records):
        names = ", ".join(source.name for source in plan.sources)
        got = ", ".join(str(len(own)) for own in records) or "none"
        raise MismatchError(
            f"expected one record per source ({names}) and text ({len(targets)}), got {got}. Open every source's store."
        )
    for same_text in zip(*records, strict=True):
        if any(record.id != same_text[0].id for record in same_text[1:]):
            found = ", ".join(f"{s.name}: {r.id!r}" for s, r in zip(plan.sources, same_text, strict=True))
            raise MismatchError(f"expected records of one text, got {found}. Join stores by id, never by row number.")


def _common(source: FusionSource, record: Record, target: TokenizedText) -> tuple[Record, TokenizedText]:
    try:
        return common_text(record, target, source.projector.source_bytes, source.projector.target_bytes)
    except AlignmentError as error:
        raise AlignmentError(f"source {source.name!r}: {error}") from error


def _with_labels(fused: SparseDistributions, positions: BoolArray, target: TokenizedText) -> SparseDistributions:
    """Put probability 1 on the label at some empty positions, (T,) bool."""
    if not positions.any():
        return fused
    ids, logprobs, leftover = fused.ids.copy(), fused.logprobs.copy(), fused.leftover.copy()
    ids[positions, 0] = np.append(target.input_ids[1:], -1)[positions]
    logprobs[positions, 0], leftover[positions] = 0.0, 0.0
    return replace(fused, ids=ids, logprobs=logprobs, leftover=leftover)


def warm_up() -> None:
    """Load every compiled kernel, or compile it once for the disk cache.

    Call it before worker processes are forked, so that they neither compile nor load anything themselves.
    """
    table = TokenTable([b"a", b"b", b"ab"], [None, None, None], {}, False, "byte_level")
    vocabulary = VocabularyMap(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), "exact")
    target = TokenizedText(
        np.array([0, 1, 2], np.int32), np.array([1, 2, 4], np.int32), np.array([[0, 4]], np.int32), np.ones(3, np.bool_)
    )
    topk = TopK(np.ones((3, 1), np.int32), np.zeros((3, 1), np.float32), np.zeros(3, np.float32))
    record, projector = build_record("", target, topk), Projector.of(table, table, vocabulary)
    dtw = align_by_tokens(align_dtw, table.packed, table.packed)
    align_texts(target, target).ranges()
    for rule, align in ((avg_ce, dtw), (token_min_ce, align_texts)):
        source = FusionSource("a", projector, align)
        fuse_text(FusionPlan((source, source), rule=rule), target, [record, record])
