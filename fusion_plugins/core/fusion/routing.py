"""Which sources teach a text, and by which rule: routes of texts, and the fusion of a batch of texts along them.

Texts of one route are fused together. A source that takes no part in a text need not have a record of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.fusion.accounting import FusionReport, ProjectionReport
from fusion_plugins.core.fusion.flat import places_of, starts_of
from fusion_plugins.core.fusion.pipeline import FusionPlan, fuse_texts
from fusion_plugins.core.fusion.record import supervised_positions
from fusion_plugins.core.fusion.teachers import teacher_names, teacher_numbers
from fusion_plugins.core.fusion.types import AnyRecord, FusedTexts, has_entries
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, MismatchError

R = TypeVar("R", bound=AnyRecord)


@dataclass(frozen=True)
class Route:
    """How one text is taught.

    Attributes:
        sources: numbers of the sources that take part, ascending, in the order of the plan; none may.
        domain: of the text, which decides the rule and is reported.
    """

    sources: tuple[int, ...]
    domain: str = ""


def routed_plan(plan: FusionPlan, route: Route) -> FusionPlan:
    """Return the plan of the texts of one route, which has at least one source."""
    rule, options = plan.rule_of(route.domain)
    sources = tuple(plan.sources[number] for number in route.sources)
    if getattr(rule, "weighted", False):
        options = {**options, "weights": tuple(source.weight_in(route.domain) for source in sources)}
    return replace(plan, sources=sources, rule=rule, rule_options=options)


def texts_of_routes(routes: Sequence[Route]) -> dict[Route, list[int]]:
    """Return route -> the numbers of its texts, ascending."""
    groups: dict[Route, list[int]] = {}
    for b, route in enumerate(routes):
        groups.setdefault(route, []).append(b)
    return groups


def fuse_routed(
    plan: FusionPlan,
    targets: Sequence[TokenizedText],
    records: Sequence[Sequence[AnyRecord | None]],
    trained: Sequence[IntArray | None],
    routes: Sequence[Route],
    *,
    counted: Sequence[bool] | None = None,
    on_unusable: str = "raise",
) -> tuple[FusedTexts, FusionReport]:
    """Fuse the records of B texts, each along its route; see :func:`~fusion_plugins.core.fusion.pipeline.fuse_texts`.

    Args:
        plan: all sources and the rules.
        targets: B texts in the target's tokens.
        records: per source, in the plan's order, its records of the B texts; those of sources that take no part are not
            looked at, and may be None.
        trained: per text, the byte ranges that are trained on, or None for all spans.
        routes: per text, its route.
        counted: as for ``fuse_texts``.
        on_unusable: as for ``fuse_texts``.

    Returns:
        The distributions, empty for a text without a source, and the counters.

    Raises:
        MismatchError: a source has no record of a text that it takes part in.
    """
    groups = texts_of_routes(routes)
    every = tuple(range(len(plan.sources)))
    if len(groups) == 1 and routes[0].sources == every:  # nothing is to be put together
        whole = [records_of_route(plan, records, number, range(len(targets))) for number in every]
        own_plan = routed_plan(plan, routes[0])
        return fuse_texts(own_plan, targets, whole, trained, counted=counted, on_unusable=on_unusable)
    starts = starts_of([text.input_ids for text in targets])
    found = _Joined(plan.width, starts)
    report = FusionReport(sources={source.name: ProjectionReport() for source in plan.sources})
    for route, members in groups.items():
        own = [targets[b] for b in members]
        if not route.sources:
            report += _untaught([_narrowed(targets[b], trained[b]) for b in members])
            continue
        fused, counters = fuse_texts(
            routed_plan(plan, route),
            own,
            [records_of_route(plan, records, number, members) for number in route.sources],
            [trained[b] for b in members],
            counted=None if counted is None else [counted[b] for b in members],
            on_unusable=on_unusable,
        )
        found.add(fused, members, route.sources)
        report += counters
    names = [source.name for source in plan.sources]
    ordered = {name: report.sources[name] for name in names}
    return found.texts(), replace(report, sources=ordered, chosen={name: report.chosen.get(name, 0) for name in names})


def taught_positions(
    fused: FusedTexts, trained: BoolArray, names: Sequence[str], domains: Sequence[str]
) -> dict[str, dict[str, int]]:
    """Count, per domain, which source taught how many positions.

    Args:
        fused: the distributions of B texts; those of positions that are not trained on are empty.
        trained: (N,) bool, the positions with a label.
        names: of the sources, in the plan's order.
        domains: of the B texts.

    Returns:
        domain -> name of a source, or another one of :func:`~fusion_plugins.core.fusion.teachers.teacher_names` ->
        positions.
    """
    labels = teacher_names(names)
    teachers = teacher_numbers(has_entries(fused.ids), fused.source, fused.kept, len(names))
    known = {domain: number for number, domain in enumerate(dict.fromkeys(domains))}
    of_text = np.array([known[domain] for domain in domains], np.int64)
    of_position = np.repeat(of_text, np.diff(fused.offsets))
    width = len(labels)
    counts = np.bincount((of_position * width + teachers)[trained], minlength=len(known) * width).reshape(-1, width)
    return {
        domain: {label: int(counts[number, at]) for at, label in enumerate(labels) if counts[number, at]}
        for domain, number in known.items()
    }


class _Joined:
    """Distributions of B texts, put together from those of groups of them."""

    def __init__(self, width: int, starts: npt.NDArray[np.int64]) -> None:
        size = int(starts[-1])
        self._starts = starts
        self._ids = np.full((size, width), -1, np.int32)
        self._logprobs = np.full((size, width), -np.inf, np.float32)
        self._leftover, self._kept = np.ones(size, np.float32), np.zeros(size, np.float32)
        self._source, self._best = np.full(size, -1, np.int16), np.full(len(starts) - 1, -1, np.int16)
        self._unusable: dict[int, AlignmentError] = {}

    def add(self, fused: FusedTexts, members: Sequence[int], sources: Sequence[int]) -> None:
        """Put the distributions of some texts in their places; ``sources`` are the numbers of the group's sources."""
        numbers = np.array([*sources, -1], np.int16)  # -1 is the last one
        places = places_of(self._starts, np.array(members))
        self._ids[places], self._logprobs[places] = fused.ids, fused.logprobs
        self._leftover[places], self._kept[places] = fused.leftover, fused.kept
        self._source[places], self._best[list(members)] = numbers[fused.source], numbers[fused.best]
        self._unusable |= {members[place]: error for place, error in fused.unusable.items()}

    def texts(self) -> FusedTexts:
        """Return them."""
        parts = (self._ids, self._logprobs, self._leftover, self._starts, self._kept, self._source, self._best)
        return FusedTexts(*parts, unusable=self._unusable)


def records_of_route(
    plan: FusionPlan, records: Sequence[Sequence[R | None]], number: int, members: Sequence[int]
) -> list[R]:
    """Return the records of a source of some texts; raises MismatchError where one is missing."""
    found = []
    for b in members:
        record = records[number][b]
        if record is None:
            raise MismatchError(
                f"expected a record of text {b} of source {plan.sources[number].name!r}, whose route it is, got none. "
                "Capture the store to the end."
            )
        found.append(record)
    return found


def _narrowed(text: TokenizedText, trained: IntArray | None) -> TokenizedText:
    return text if trained is None else replace(text, spans=trained)


def _untaught(texts: Sequence[TokenizedText]) -> FusionReport:
    positions = sum(int(supervised_positions(text).sum()) for text in texts)
    return FusionReport(texts=len(texts), positions=positions, untaught=len(texts))
