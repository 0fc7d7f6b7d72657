"""Texts cut into minimal common chunks, each along its route: by one source, or by a mixture with fixed weights."""

from collections.abc import Sequence

import numpy as np

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.fusion.accounting import ChunkReport
from fusion_plugins.core.fusion.chunks import TextChunks
from fusion_plugins.core.fusion.flat import places_of, starts_of
from fusion_plugins.core.fusion.pipeline import FusionPlan, chunk_texts
from fusion_plugins.core.fusion.routing import Route, records_of_route, routed_plan, texts_of_routes
from fusion_plugins.core.fusion.types import FusedTexts, Record
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError


def cut_routed(
    plan: FusionPlan,
    targets: Sequence[TokenizedText],
    records: Sequence[Sequence[Record | None]],
    labelled: Sequence[BoolArray],
    trained: Sequence[IntArray | None],
    routes: Sequence[Route],
    *,
    on_unusable: str = "raise",
) -> tuple[TextChunks, ChunkReport]:
    """Cut B texts into chunks; see :func:`~fusion_plugins.core.fusion.pipeline.chunk_texts`.

    Args:
        plan: all sources and the rules.
        targets: B texts in the target's tokens.
        records: as in :func:`~fusion_plugins.core.fusion.routing.fuse_routed`.
        labelled: per text, (T,) bool, whether the next token of a position is trained on.
        trained: per text, the byte ranges that are trained on, or None for all spans.
        routes: per text, its route.
        on_unusable: as for ``chunk_texts``.

    Returns:
        The chunks, none in a text without a source, and the counters.

    Raises:
        ConfigError: several sources teach a text by a rule that gives them no weights.
        MismatchError, AlignmentError: as for ``chunk_texts`` and ``fuse_routed``.
    """
    starts = starts_of([text.input_ids for text in targets])
    place, logprobs = np.zeros(int(starts[-1]), np.int32), np.zeros(int(starts[-1]), np.float32)
    source, unusable = np.full(int(starts[-1]), -1, np.int16), dict[int, AlignmentError]()
    report = ChunkReport()
    for route, members in texts_of_routes(routes).items():
        if not route.sources:
            report += ChunkReport(texts=len(members), positions=sum(int(labelled[b].sum()) for b in members))
            continue
        found, counted = chunk_texts(
            routed_plan(plan, route),
            [targets[b] for b in members],
            [records_of_route(plan, records, number, members) for number in route.sources],
            [labelled[b] for b in members],
            [trained[b] for b in members],
            weights=_weights(plan, route),
            on_unusable=on_unusable,
        )
        places = places_of(starts, np.array(members))
        place[places], logprobs[places] = found.place, found.logprobs
        source[places] = np.array([*route.sources, -1], np.int16)[found.source]  # -1 is the last one
        unusable |= {members[at]: error for at, error in found.unusable.items()}
        report += counted
    return TextChunks(place, logprobs, starts, source, unusable), report


def as_taught(chunks: TextChunks) -> FusedTexts:
    """Return chunks as distributions of one entry, for those who count which source teaches which position."""
    present, texts = chunks.place > 0, len(chunks.offsets) - 1
    entries = np.where(present, 0, -1).astype(np.int32)[:, None]
    kept = present.astype(np.float32)
    none = np.full(texts, -1, np.int16)
    logprobs = chunks.logprobs[:, None]
    return FusedTexts(entries, logprobs, kept, chunks.offsets, kept, chunks.source, none, chunks.unusable)


def _weights(plan: FusionPlan, route: Route) -> tuple[float, ...]:
    rule, _ = plan.rule_of(route.domain)
    if not getattr(rule, "weighted", False):
        if len(route.sources) == 1:
            return (1.0,)
        names = ", ".join(plan.sources[number].name for number in route.sources)
        raise ConfigError(
            f"fusion.rule: {getattr(rule, '__name__', rule)} cannot fuse chunks of {names}, which all teach texts of "
            f"the domain {route.domain!r}: by cross-entropy it would prefer, on the target's own answers, the source "
            "that shares the target's mistakes, and another rule works on distributions. Set rule: fixed_weights, or "
            "give each text one source (domains or where)."
        )
    return tuple(plan.sources[number].weight_in(route.domain) for number in route.sources)
