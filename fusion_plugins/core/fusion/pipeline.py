"""The whole way of one text: records of S sources -> one fused target. This is what an adapter calls.

Align, project and fuse, step by step as the modules of that name say, and count what became of everything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.fusion.accounting import FusionReport
from fusion_plugins.core.fusion.align import Alignment, align_texts, align_tokens
from fusion_plugins.core.fusion.common_text import common_text, comparable
from fusion_plugins.core.fusion.fuse import Rule, fuse, min_ce_choice, truncate
from fusion_plugins.core.fusion.project import Projection, ProjectionOptions, project_record, with_labels
from fusion_plugins.core.fusion.record import build_record, stored_rows
from fusion_plugins.core.fusion.types import Record, SparseDistributions, VocabularyMap
from fusion_plugins.core.text.token_bytes import longest_beginnings
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError, MismatchError

__all__ = ["FusionPlan", "SourcePlan", "fuse_text", "warm_up"]


@dataclass(frozen=True)
class SourcePlan:
    """One source.

    Attributes:
        name: as in the configuration and in reports.
        table: its token table.
        vocabulary: its ids -> the target's ids.
    """

    name: str
    table: TokenTable
    vocabulary: VocabularyMap


@dataclass(frozen=True)
class FusionPlan:
    """Everything that stays the same from text to text.

    Attributes:
        target_table: the target's token table.
        sources: at least one; the order decides ties.
        rule: name of a fusion rule, or the rule itself.
        rule_options: what the rule takes besides (``temperature`` of ``avg_ce``, ``missing`` of ``min_ce``).
        per_token: give the rule (S, T) cross-entropies of the target's next token instead of (S,) per text. Always so
            for ``token_min_ce``.
        metric: cross-entropy per text in nats per ``byte`` (comparable across tokenizers) or per source ``token``.
        width: entries per fused row.
        alignment: ``offsets``, ``offsets_strict``, or an aligner of tokens (see ``core.align.ALIGNERS``).
        projection: options of the projection, for every source; its fallback stands where the fused row is empty.
        tie_order: for aligners of tokens; see :func:`~fusion_plugins.core.fusion.align.align_tokens`.
    """

    target_table: TokenTable
    sources: tuple[SourcePlan, ...]
    rule: str | Rule = "min_ce"
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    per_token: bool = False
    metric: Literal["byte", "token"] = "byte"
    width: int = 10
    alignment: str | Callable[..., Alignment] = "offsets"
    projection: ProjectionOptions = ProjectionOptions()
    tie_order: str = "fusellm"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("fusion needs at least one source")
        if self.width < 1:
            raise ConfigError(f"width must be at least 1, not {self.width}")
        if self.metric not in ("byte", "token"):
            raise ConfigError(f"metric must be 'byte' or 'token', not {self.metric!r}")
        for source in self.sources:
            # Made here, before worker processes are forked.
            longest_beginnings(source.table, self.target_table)


def fuse_text(
    plan: FusionPlan, target: TokenizedText, records: Sequence[Record]
) -> tuple[SparseDistributions, FusionReport]:
    """Fuse the sources' records of one text into a target for each of its rows.

    Args:
        plan: what to do.
        target: T tokens of the text; row ``t`` is labelled ``input_ids[t + 1]``.
        records: one record of this text per source, in the plan's order.

    Returns:
        (T, width) fused rows, empty where nothing may be taught (the last row always), and the counters.

    Raises:
        MismatchError: the records are not one per source, or not of one text.
        AlignmentError: source and target did not read the same text.
    """
    _check_records(plan, records)
    common = [_common(plan, source, record, target) for source, record in zip(plan.sources, records, strict=True)]
    projections = [_project(plan, source, *sides) for source, sides in zip(plan.sources, common, strict=True)]
    records = comparable(records, common)
    distributions = [p.distributions for p in projections]
    chosen = int(min_ce_choice(_metric(plan, records)))
    fused = fuse(distributions, _cross_entropies(plan, records, projections), rule=plan.rule, **plan.rule_options)
    fused = truncate(fused, plan.width, renormalize=plan.projection.tail == "renormalize")
    labelled = stored_rows(target) & ~fused.rows & (plan.projection.fallback == "next_label")
    fused = with_labels(fused, labelled, target)
    return fused, FusionReport(
        texts=1,
        rows=int(stored_rows(target).sum()),
        fused_rows=int(fused.rows.sum()),
        chosen={s.name: int(index == chosen) for index, s in enumerate(plan.sources)},
        sources={
            s.name: replace(p.report, fallback=int((labelled & ~p.distributions.rows).sum()))
            for s, p in zip(plan.sources, projections, strict=True)
        },
    )


def _check_records(plan: FusionPlan, records: Sequence[Record]) -> None:
    if len(records) != len(plan.sources):
        names = ", ".join(source.name for source in plan.sources)
        raise MismatchError(f"expected one record per source ({names}); came {len(records)}")
    ids = {record.id for record in records}
    if len(ids) > 1:
        found = ", ".join(f"{s.name}: {r.id!r}" for s, r in zip(plan.sources, records, strict=True))
        raise MismatchError(f"expected records of one text; came {found}. Join stores by id, never by row number.")


def _common(
    plan: FusionPlan, source: SourcePlan, record: Record, target: TokenizedText
) -> tuple[Record, TokenizedText]:
    try:
        return common_text(record, target, source_table=source.table, target_table=plan.target_table)
    except AlignmentError as error:
        raise AlignmentError(f"source {source.name!r}: {error}") from error


def _project(plan: FusionPlan, source: SourcePlan, record: Record, target: TokenizedText) -> Projection:
    """Project one source, without the fallback: a label must not be mixed into, or chosen before, a source's row."""
    return project_record(
        record,
        _align(plan, source, record, target),
        source.vocabulary,
        target,
        source_table=source.table,
        target_table=plan.target_table,
        options=replace(plan.projection, fallback="mask"),
    )


def _align(plan: FusionPlan, source: SourcePlan, record: Record, target: TokenizedText) -> Alignment:
    """Align by ends, or hand the tokens of each span to an aligner of tokens."""
    by_ends = align_texts(record, target, strict=plan.alignment == "offsets_strict")
    if plan.alignment in ("offsets", "offsets_strict"):
        return by_ends
    rows, could = np.full(len(target.ends), -1, np.int32), 0
    for (start, stop), (t_start, t_stop) in zip(record.spans.tolist(), target.spans.tolist(), strict=True):
        own = np.flatnonzero((record.offsets > start) & (record.offsets <= stop))
        other = np.flatnonzero((target.ends > t_start) & (target.ends <= t_stop))
        if own.size and other.size:
            alignment = align_tokens(
                [source.table.bytes_of(i) for i in record.input_ids[own].tolist()],
                [plan.target_table.bytes_of(i) for i in target.input_ids[other].tolist()],
                method=plan.alignment,
                tie_order=plan.tie_order,
            )
            found = alignment.source_rows
            rows[other] = np.where(found >= 0, own[found], -1)
        # What predicts a span's first token stands before the span; only the ends can tell which row that is.
        before = target.ends == t_start
        rows[before] = by_ends.source_rows[before]
        could += len(other) + int(before.any())
    return replace(by_ends, source_rows=rows, coverage=float((rows >= 0).sum() / could) if could else 1.0)


def _cross_entropies(
    plan: FusionPlan, records: Sequence[Record], projections: Sequence[Projection]
) -> npt.NDArray[np.float64]:
    if plan.per_token or plan.rule == "token_min_ce":
        return -np.stack([p.label_logprobs for p in projections]).astype(np.float64)
    return _metric(plan, records)


def _metric(plan: FusionPlan, records: Sequence[Record]) -> npt.NDArray[np.float64]:
    return np.array([record.ce_per_byte if plan.metric == "byte" else record.ce_per_token for record in records])


def warm_up() -> None:
    """Load every compiled kernel, or compile it once for the disk cache.

    Call it before worker processes are forked, so that they neither compile nor load anything themselves.
    """
    table = TokenTable([b"a", b"b", b"ab"], [None, None, None], {}, False, "byte_level")
    vocabulary = VocabularyMap(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), "exact")
    target = TokenizedText(
        np.array([0, 1, 2], np.int32), np.array([1, 2, 4], np.int32), np.array([[0, 4]], np.int32), np.ones(3, np.bool_)
    )
    record = build_record("", target, np.ones((3, 1), np.int32), np.zeros((3, 1), np.float32), np.zeros(3, np.float32))
    source = SourcePlan("a", table, vocabulary)
    for rule, alignment in (("avg_ce", "dtw"), ("token_min_ce", "offsets")):
        fuse_text(FusionPlan(table, (source, source), rule=rule, alignment=alignment), target, [record, record])
