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
from fusion_plugins.core.fusion.fuse import FusionRule, avg_ce, fuse, min_ce, min_ce_choice, token_min_ce, truncate
from fusion_plugins.core.fusion.project import Projector
from fusion_plugins.core.fusion.record import build_record, supervised_positions
from fusion_plugins.core.fusion.types import Record, SparseDistributions, TopK, VocabularyMap
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
    """Fuse the sources' records of one text.

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
    _check_records(plan, records)
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
    fused = truncate(fused, plan.width, renormalize=renormalize)
    supervised = supervised_positions(target)
    missing = [int(supervised.sum() - supervised_positions(text).sum()) for _, text in common]
    # Labels are filled in after fusion, so that no rule mixes one into, or prefers it to, a source's distribution.
    labelled = supervised & ~fused.present & plan.label_fallback
    fused = _with_labels(fused, labelled, target)
    best = int(min_ce_choice(per_text))
    return fused, FusionReport(
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


def _check_records(plan: FusionPlan, records: Sequence[Record]) -> None:
    if len(records) != len(plan.sources):
        names = ", ".join(source.name for source in plan.sources)
        raise MismatchError(f"expected one record per source ({names}), got {len(records)}. Open every source's store.")
    if len({record.id for record in records}) > 1:
        found = ", ".join(f"{s.name}: {r.id!r}" for s, r in zip(plan.sources, records, strict=True))
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
    return SparseDistributions(ids, logprobs, leftover)


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
