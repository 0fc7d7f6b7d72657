"""Everything that happens to one text: records of S sources -> one fused distribution per position.

This is what an adapter calls. It aligns, projects and fuses, as the modules of these names say, and counts the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.fusion.accounting import ChunkReport, FusionReport, ProjectionReport
from fusion_plugins.core.fusion.align import TextAligner, align_by_tokens, align_dtw, align_many, align_texts, is_strict
from fusion_plugins.core.fusion.chunks import ChunkSide, TextChunks, common_chunks
from fusion_plugins.core.fusion.common_text import common_texts, comparable, narrowed
from fusion_plugins.core.fusion.flat import Entries, Starts, Texts, joined, places_of
from fusion_plugins.core.fusion.fuse import (
    FusionRule,
    avg_ce,
    chooses_by_text,
    fuse,
    kept_mass,
    min_ce,
    min_ce_choice,
    padded,
    token_min_ce,
    truncate,
)
from fusion_plugins.core.fusion.project import Projection, Projector
from fusion_plugins.core.fusion.projection_kernel import in_spans, supervised_texts
from fusion_plugins.core.fusion.record import build_record
from fusion_plugins.core.fusion.types import AnyRecord, FusedTexts, Record, SparseDistributions, TopK, VocabularyMap
from fusion_plugins.core.text.token_table import TokenTable
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError, MismatchError

#: name -> cross-entropy of a record: nats per byte, comparable across tokenizers, or per source token, as published
METRICS: dict[str, Callable[[Any], float]] = {"byte": attrgetter("ce_per_byte"), "token": attrgetter("ce_per_token")}
_NO_RANGES = np.empty((0, 2), np.int32)


@dataclass(frozen=True)
class FusionSource:
    """One source, prepared.

    Attributes:
        name: as in the configuration and in reports.
        projector: rewrites its distributions over the target's vocabulary.
        align: finds its position for each position of the target.
        weight: in a mixture by fixed weights.
        weights: domain -> weight there, where it is another one.
    """

    name: str
    projector: Projector
    align: TextAligner = align_texts
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def weight_in(self, domain: str) -> float:
        """Return the weight of the source in a domain."""
        return self.weights.get(domain, self.weight)


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
        rules: domain -> rule and its options, for texts of domains with a rule of their own.
    """

    sources: tuple[FusionSource, ...]
    rule: FusionRule = min_ce
    rule_options: Mapping[str, Any] = field(default_factory=dict)
    metric: Callable[[Any], float] = METRICS["byte"]
    width: int = 10
    label_fallback: bool = False
    rules: Mapping[str, tuple[FusionRule, Mapping[str, Any]]] = field(default_factory=dict)

    def rule_of(self, domain: str) -> tuple[FusionRule, Mapping[str, Any]]:
        """Return the rule of the texts of a domain, and its options."""
        return self.rules.get(domain, (self.rule, self.rule_options))

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("expected at least one source to fuse, got none. Name stores in fusion.sources.")
        if self.width < 1:
            raise ConfigError(f"expected a width of at least 1 entry, got {self.width}. Raise fusion.top_k.")

    @property
    def chooses_by_text(self) -> bool:
        """Whether all of a text is from one source, which the cross-entropies alone tell."""
        return chooses_by_text(self.rule, self.rule_options)


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
    records: Sequence[Sequence[AnyRecord]],
    trained: Sequence[IntArray | None] | None = None,
    *,
    counted: Sequence[bool] | BoolArray | None = None,
    on_unusable: str = "raise",
) -> tuple[FusedTexts, FusionReport]:
    """Fuse the sources' records of B texts into flat arrays.

    Args:
        plan: what to do.
        targets: B texts in the target's tokens; position ``t`` of a text is labelled ``input_ids[t + 1]``.
        records: per source, in the plan's order, its records of the B texts.
        trained: per text, (R, 2) byte ranges of the target's text that are trained on, ascending, or None for all
            spans; None for all spans of all texts.
        counted: (B,) texts of which all sources are projected and counted; all by default. Where the cross-entropies
            alone tell which source is taken, the others of a text that is not counted are not projected, and the
            distributions of a :class:`~fusion_plugins.core.fusion.types.LazyRecord` are not read.
        on_unusable: what happens to a text that a source has not read as the target does. ``raise``, or ``skip``: its
            positions stay empty, and ``unusable`` has the error.

    Some ten thousand tokens per call are fastest: then the calls cost nothing beside them.

    Returns:
        (N, width) fused distributions of all positions, empty where nothing can be taught (the last position of a text
        always), and the counters of the texts that were used; those of each source are of the counted texts.

    Raises:
        MismatchError: the records are not one per source and text, or not of one text.
        AlignmentError: source and target did not read the same text, or the aligner refuses it.
        ConfigError: an unknown value of ``on_unusable``.
    """
    if on_unusable not in ("raise", "skip"):
        raise ConfigError(f"on_unusable: expected 'raise' or 'skip', got {on_unusable!r}")
    _check_records(plan, targets, records)
    if not targets:
        return _nothing(plan.width), FusionReport()
    wanted = Texts.of(targets)
    sides, unusable = _common_sides(plan, wanted, targets, records)
    if trained is not None:
        wanted = narrowed(wanted, wanted, trained)[1]
        sides = [side.narrowed(trained) for side in sides]
    matched = [_align(source, side, unusable) for source, side in zip(plan.sources, sides, strict=True)]
    if unusable:
        if on_unusable == "raise":
            raise unusable[min(unusable)]
        # A text without spans has no supervised position, and nothing of it is counted.
        ranges = [_NO_RANGES if b in unusable else None for b in range(len(targets))]
        wanted = narrowed(wanted, wanted, ranges)[1]
        sides = [side.narrowed(ranges) for side in sides]
        left_out = np.repeat([b in unusable for b in range(len(targets))], np.diff(wanted.starts))
        matched = [np.where(left_out, np.int32(-1), positions) for positions in matched]
    costs = _cross_entropies(plan, sides)
    best = min_ce_choice(costs).astype(np.int16)
    parts = _parts(plan, best, counted)
    fused_parts, reports = zip(*(_fuse_part(plan, part, wanted, sides, matched, costs) for part in parts), strict=True)
    fused = _in_place(wanted.starts, parts, fused_parts)
    best[list(unusable)] = -1
    chosen = {source.name: int((best == s).sum()) for s, source in enumerate(plan.sources)}
    report = sum(reports, FusionReport(texts=len(targets) - len(unusable), chosen=chosen))
    return FusedTexts(
        fused.ids,
        fused.logprobs,
        fused.leftover,
        wanted.starts,
        kept=cast("FloatArray", fused.kept),
        source=cast("npt.NDArray[np.int16]", fused.source),
        best=best,
        unusable=unusable,
    ), report


def chunk_texts(
    plan: FusionPlan,
    targets: Sequence[TokenizedText],
    records: Sequence[Sequence[Record]],
    labelled: Sequence[BoolArray],
    trained: Sequence[IntArray | None] | None = None,
    *,
    weights: Sequence[float],
    on_unusable: str = "raise",
) -> tuple[TextChunks, ChunkReport]:
    """Cut B texts into minimal common chunks; see :mod:`fusion_plugins.core.fusion.chunks`.

    Nothing is aligned but ends of tokens, and nothing is projected: of the plan only the sources count.

    Args:
        plan: the sources.
        targets: B texts in the target's tokens.
        records: per source, in the plan's order, its records of the B texts.
        labelled: per text, (T,) bool, whether the next token of a position is trained on.
        trained: as in :func:`fuse_texts`.
        weights: of the sources in the mixture.
        on_unusable: as in :func:`fuse_texts`.

    Raises:
        MismatchError, AlignmentError, ConfigError: as in :func:`fuse_texts`.
    """
    if on_unusable not in ("raise", "skip"):
        raise ConfigError(f"on_unusable: expected 'raise' or 'skip', got {on_unusable!r}")
    _check_records(plan, targets, records)
    if not targets:
        none, zeros = np.empty(0, np.int32), np.empty(0, np.float32)
        return TextChunks(none, zeros, np.zeros(1, np.int64), none.astype(np.int16)), ChunkReport()
    wanted = Texts.of(targets)
    sides, unusable = _common_sides(plan, wanted, targets, records)
    if trained is not None:
        sides = [side.narrowed(trained) for side in sides]
    if unusable and on_unusable == "raise":
        raise unusable[min(unusable)]
    wanted_positions = np.concatenate(labelled)
    if unusable:
        sides = [side.narrowed([_NO_RANGES if b in unusable else None for b in range(len(targets))]) for side in sides]
        wanted_positions &= np.repeat([b not in unusable for b in range(len(targets))], np.diff(wanted.starts))
    chunks, report = common_chunks(
        [
            ChunkSide(
                side.source,
                side.target,
                joined([record.topk.token_logprobs for record in side.records], np.float32),
                (source.projector.source_bytes, source.projector.target_bytes),
            )
            for source, side in zip(plan.sources, sides, strict=True)
        ],
        weights,
        wanted_positions,
    )
    return replace(chunks, unusable=unusable), replace(report, texts=len(targets) - len(unusable))


@dataclass(frozen=True)
class _Side:
    """One source's records of B texts, and the part of the texts that it has in common with the target.

    ``source`` and ``target`` are both tokenizations, with spans that correspond by their number.
    """

    records: Sequence[AnyRecord]
    targets: Sequence[TokenizedText]
    source: Texts
    target: Texts

    def take(self, numbers: npt.NDArray[np.intp]) -> "_Side":
        """Return some of the texts, by ascending numbers."""
        if len(numbers) == len(self.records):
            return self
        records, targets = [self.records[b] for b in numbers], [self.targets[b] for b in numbers]
        return _Side(records, targets, self.source.take(numbers), self.target.take(numbers))

    def narrowed(self, ranges: Sequence[IntArray | None]) -> "_Side":
        source, target = narrowed(self.source, self.target, ranges)
        return replace(self, source=source, target=target)

    def pair(self, b: int) -> tuple[AnyRecord, TokenizedText]:
        """Return both sides of one text with the spans that they have in common."""
        record = self.records[b]
        return (
            replace(record, text=replace(record.text, spans=self.source.spans_of(b))),
            replace(self.targets[b], spans=self.target.spans_of(b)),
        )

    def texts(self, b: int) -> tuple[TokenizedText, TokenizedText]:
        record, target = self.pair(b)
        return record.text, target

    def read_all(self) -> BoolArray:
        """(B,) bool, whether all that the source's cross-entropy is about is in the common part."""
        whole = np.array([int((r.text.spans[:, 1] - r.text.spans[:, 0]).sum()) for r in self.records])
        found: BoolArray = self.target.n_bytes() == whole
        return found


def _nothing(width: int) -> FusedTexts:
    zeros, none = np.empty(0, np.float32), np.empty(0, np.int16)
    ids, logprobs = np.empty((0, width), np.int32), np.empty((0, width), np.float32)
    return FusedTexts(ids, logprobs, zeros, np.zeros(1, np.int64), zeros, none, none)


def _common_sides(
    plan: FusionPlan, wanted: Texts, targets: Sequence[TokenizedText], records: Sequence[Sequence[AnyRecord]]
) -> tuple[list[_Side], dict[int, AlignmentError]]:
    """Find what each source's texts have in common with the target's, and the texts that are not the same."""
    sides: list[_Side] = []
    unusable: dict[int, AlignmentError] = {}
    for source, own in zip(plan.sources, records, strict=True):
        tokens = source.projector.source_bytes, source.projector.target_bytes
        whole = Texts.of([record.text for record in own])
        common, target, errors = common_texts(whole, wanted, own, targets, tokens)
        sides.append(_Side(own, targets, common, target))
        _name(unusable, source, errors)
    return sides, unusable


def _align(source: FusionSource, side: _Side, unusable: dict[int, AlignmentError]) -> IntArray:
    matched, errors = align_many(source.align, side.source, side.target, side.texts)
    _name(unusable, source, errors)
    return matched


def _name(unusable: dict[int, AlignmentError], source: FusionSource, errors: Mapping[int, AlignmentError]) -> None:
    """Add what is wrong with some texts of a source; the first source that says it counts."""
    for b, error in errors.items():
        unusable.setdefault(b, AlignmentError(f"source {source.name!r}: {error}"))


def _cross_entropies(plan: FusionPlan, sides: Sequence[_Side]) -> npt.NDArray[np.float64]:
    """Return (S, B): by the plan's metric, over the bytes of each text that all sources have read."""
    as_stored = np.logical_and.reduce(
        [side.read_all() & side.target.same_spans(sides[0].target) for side in sides], axis=0
    )
    costs = np.empty((len(sides), len(as_stored)))
    for b, plain in enumerate(as_stored.tolist()):
        records = [side.records[b] for side in sides]
        if not plain:
            records = comparable(records, [side.pair(b) for side in sides])
        costs[:, b] = [plan.metric(record) for record in records]
    return costs


@dataclass(frozen=True)
class _Part:
    """Some texts of a call, and the sources that are projected for them.

    Attributes:
        texts: ascending numbers.
        sources: numbers, in the plan's order.
        counted: whether the sources are counted in the report.
    """

    texts: npt.NDArray[np.intp]
    sources: Sequence[int]
    counted: bool = False


def _parts(plan: FusionPlan, best: npt.NDArray[np.int16], counted: Sequence[bool] | BoolArray | None) -> list[_Part]:
    """Divide the texts into those that need all sources, and those that need only their best one."""
    every = np.ones(len(best), np.bool_)
    if counted is not None and plan.chooses_by_text:
        every = np.asarray(counted, np.bool_)
    numbers = range(len(plan.sources))
    parts = [_Part(np.flatnonzero(every), numbers, counted=True)]
    parts += [_Part(np.flatnonzero(~every & (best == s)), [s]) for s in numbers]
    return [part for part in parts if part.texts.size]


def _fuse_part(
    plan: FusionPlan,
    part: _Part,
    wanted: Texts,
    sides: Sequence[_Side],
    matched: Sequence[IntArray],
    costs: npt.NDArray[np.float64],
) -> tuple[SparseDistributions, FusionReport]:
    """Project and fuse some of the texts; the report has the counters of positions and sources."""
    positions, wanted = places_of(wanted.starts, part.texts), wanted.take(part.texts)
    # Such a rule takes whole distributions, so it makes no difference that they are cut and scaled before it.
    most = plan.width if getattr(plan.rule, "selects", False) else None
    projections, supervised = [], supervised_texts(wanted)
    for s in part.sources:
        source, side = plan.sources[s], sides[s].take(part.texts)
        given = side.source, Entries.of(side.records), matched[s][positions], side.target
        projections.append(
            source.projector.project(*given, most=most, strict=is_strict(source.align), wanted=supervised)
        )
    fused = _fused(plan, projections, costs[list(part.sources)][:, part.texts], wanted)
    present = fused.present
    # Labels are filled in after fusion, so that no rule mixes one into, or prefers it to, a source's distribution.
    labelled = supervised & ~present & plan.label_fallback
    fused = _with_labels(fused, labelled, wanted.ids)
    if not part.counted:  # the rule has seen one source, which was number 0 to it
        fused = replace(fused, source=np.where(fused.source == 0, part.sources[0], -1).astype(np.int16))
    names = [plan.sources[s].name for s in part.sources] if part.counted else []
    return fused, FusionReport(
        positions=int(supervised.sum()),
        fused_positions=int((present | labelled).sum()),
        sources={
            name: _source_report(projection, supervised, labelled)
            for name, projection in zip(names, projections, strict=False)
        },
    )


def _in_place(starts: Starts, parts: Sequence[_Part], fused: Sequence[SparseDistributions]) -> SparseDistributions:
    """Put the texts of all parts into their order."""
    if len(parts) == 1:
        return fused[0]
    found = {}
    for name in ("ids", "logprobs", "leftover", "kept", "source"):
        first = getattr(fused[0], name)
        found[name] = np.empty((starts[-1], *first.shape[1:]), first.dtype)
    for part, own in zip(parts, fused, strict=True):
        positions = places_of(starts, part.texts)
        for name, values in found.items():
            values[positions] = getattr(own, name)
    return SparseDistributions(**found)


def _fused(
    plan: FusionPlan, projections: Sequence[Projection], costs: npt.NDArray[np.float64], wanted: Texts
) -> SparseDistributions:
    """Apply the rule: to all texts at once if it treats every position alone, else text by text."""
    distributions = [projection.distributions for projection in projections]
    per_token = getattr(plan.rule, "per_token", False)
    if per_token:
        costs = -np.stack([projection.label_logprobs for projection in projections]).astype(np.float64)
    renormalize = all(source.projector.options.renormalize for source in plan.sources)

    def apply(given: Sequence[SparseDistributions], costs: npt.NDArray[np.float64]) -> SparseDistributions:
        fused = fuse(given, costs, rule=plan.rule, **plan.rule_options)
        cut = getattr(plan.rule, "selects", False)
        fused = padded(fused, plan.width) if cut else truncate(fused, plan.width, renormalize=renormalize)
        return _described(fused, given)

    if getattr(plan.rule, "by_position", False):
        return apply(distributions, costs if per_token else np.repeat(costs, np.diff(wanted.starts), axis=1))
    parts = []
    for b, (start, stop) in enumerate(pairwise(wanted.starts.tolist())):
        own = slice(start, stop)
        parts.append(apply([d.at(own) for d in distributions], costs[:, own] if per_token else costs[:, b]))
    return SparseDistributions(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "logprobs", "leftover", "kept", "source")
        )
    )


def _source_report(projection: Projection, supervised: BoolArray, labelled: BoolArray) -> ProjectionReport:
    """Complete the counters of a source by what it has no text for."""
    report, total = projection.report, int(supervised.sum())
    fallback = int((~projection.distributions.present[labelled]).sum())
    return replace(report, positions=total, left_out=total - report.positions, fallback=fallback)


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


def _check_records(plan: FusionPlan, targets: Sequence[TokenizedText], records: Sequence[Sequence[AnyRecord]]) -> None:
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


def _with_labels(fused: SparseDistributions, positions: BoolArray, target_ids: IntArray) -> SparseDistributions:
    """Put probability 1 on the label at some empty positions, (N,) bool."""
    if not positions.any():
        return fused
    ids, logprobs, leftover = fused.ids.copy(), fused.logprobs.copy(), fused.leftover.copy()
    ids[positions, 0] = np.append(target_ids[1:], -1)[positions]
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
    in_spans(Texts.of([target]))  # of answers behind white space alone
    for rule, align in ((avg_ce, dtw), (token_min_ce, align_texts)):
        source = FusionSource("a", projector, align)
        plan = FusionPlan((source, source), rule=rule)
        fuse_text(plan, target, [record, record])
    chunk_texts(plan, [target], [[record], [record]], [np.ones(3, np.bool_)], weights=[0.5, 0.5])
