"""How the published code aligns tokens and transfers distributions, for comparison only; the package does not use it.

Known defects are kept: positions are matched by the current token and not by the context, FuseLLM's fallback repeats
the current token, unmapped candidates vanish without a trace, of duplicates the first wins, logits are not normalised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion_plugins.core.fusion.counts import AlignmentCounts
from fusion_plugins.core.fusion.nearest import pair_distances
from fusion_plugins.errors import ConfigError

__all__ = [
    "PUBLISHED_MODES",
    "PublishedText",
    "PublishedVocabulary",
    "published_map",
    "published_matches",
    "published_rows",
]

PUBLISHED_MODES = {"fusellm": ("hard", "soft"), "fusechat": ("default", "default_matrix", "hard")}
Row = tuple[list[float], list[int]]


@dataclass(frozen=True)
class PublishedText:
    """One text as the published code sees it.

    Attributes:
        source_tokens: (U,) surfaces, or texts decoded token by token for ``fusechat``.
        target_tokens: (T,) the same of the target.
        target_ids: (T,) ids.
        target_to_source: (T,) source positions matched with each target position, as DTW gives them.
        topk_logits: (U, K) descending logits.
        topk_ids: (U, K) their source ids.
        source_marker: boundary character of the source's surfaces.
        target_marker: boundary character of the target's surfaces.
    """

    source_tokens: Sequence[str]
    target_tokens: Sequence[str]
    target_ids: Sequence[int]
    target_to_source: Sequence[Sequence[int]]
    topk_logits: Sequence[Sequence[float]]
    topk_ids: Sequence[Sequence[int]]
    source_marker: str
    target_marker: str


@dataclass(frozen=True)
class PublishedVocabulary:
    """The lookups of the published code.

    Attributes:
        source_surfaces: source id -> surface.
        target_ids: target surface -> id.
        by_surface: source surface in the target's notation -> target surface (FuseLLM ``soft``).
        by_id: source id -> target id (FuseChat ``default``).
    """

    source_surfaces: Mapping[int, str]
    target_ids: Mapping[str, int]
    by_surface: Mapping[str, str]
    by_id: Mapping[int, int]


def published_rows(text: PublishedText, vocabulary: PublishedVocabulary, *, family: str, mode: str) -> list[Row]:
    """Return for each target position the logits and target ids that the published code trains on.

    Args:
        text: the text.
        vocabulary: the lookups.
        family: ``fusellm`` or ``fusechat``.
        mode: one of :data:`PUBLISHED_MODES` of the family.

    Raises:
        ConfigError: an unknown family or mode.
    """
    rows: list[Row] = []
    for t, j in enumerate(published_matches(text, vocabulary, family=family, mode=mode)):
        if isinstance(j, int):
            rows.append(_transfer(text, vocabulary, j, family, mode))
        elif j == "empty":
            rows.append(([], []))
        else:
            label = t if family == "fusellm" else min(t + 1, len(text.target_ids) - 1)
            rows.append(([1.0], [text.target_ids[label]]))
    return rows


def published_matches(
    text: PublishedText, vocabulary: PublishedVocabulary, *, family: str, mode: str
) -> list[int | str]:
    """Return for each target position the source row that the published code transfers, or what stands there instead.

    That is ``one-hot``, or ``empty`` for a row without entries (``default_matrix`` only). Arguments and errors are
    those of :func:`published_rows`; the top k of the text are not looked at.
    """
    if mode not in PUBLISHED_MODES.get(family, ()):
        known = "; ".join(f"{name}: {', '.join(modes)}" for name, modes in PUBLISHED_MODES.items())
        raise ConfigError(f"the published code has no mode {mode!r} of {family!r}; known: {known}")
    pairs = enumerate(text.target_to_source)
    if family == "fusellm":
        return [_fusellm_match(text, vocabulary, t, matched, mode) for t, matched in pairs]
    return [_fusechat_match(text, t, matched, mode) for t, matched in pairs]


def _fusellm_match(
    text: PublishedText, vocabulary: PublishedVocabulary, t: int, matched: Sequence[int], mode: str
) -> int | str:
    if len(matched) != 1:
        return "one-hot"
    target = text.target_tokens[t]
    source = _in_target_notation(text, text.source_tokens[matched[0]])
    mark = text.target_marker
    if t == 0 and text.source_marker == "Ġ" and target.startswith(mark) and not source.startswith(mark):
        source = mark + source
    equal = target == source or (mode == "soft" and vocabulary.by_surface.get(source) == target)
    return matched[0] if equal else "one-hot"


def _fusechat_match(text: PublishedText, t: int, matched: Sequence[int], mode: str) -> int | str:
    target = text.target_tokens[t]
    if len(matched) == 1:
        source = text.source_tokens[matched[0]]
        equal = target == source if mode == "hard" else _one_ends_with_the_other(target, source)
        return matched[0] if equal else "one-hot"
    if mode != "default_matrix":
        return "one-hot"
    target = target.replace(text.target_marker, "")
    pieces = [text.source_tokens[j].replace(text.source_marker, "") for j in matched]
    for j, piece in zip(matched, pieces, strict=True):
        if _one_ends_with_the_other(target, piece):
            return j
    return "empty" if _one_ends_with_the_other(target, "".join(pieces)) else "one-hot"


def _one_ends_with_the_other(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def _transfer(text: PublishedText, vocabulary: PublishedVocabulary, j: int, family: str, mode: str) -> Row:
    logits: list[float] = []
    ids: list[int] = []
    for logit, source_id in zip(text.topk_logits[j], text.topk_ids[j], strict=True):
        surface = _in_target_notation(text, vocabulary.source_surfaces[source_id])
        if mode == "soft":
            surface = vocabulary.by_surface[surface]
        target_id = vocabulary.target_ids.get(surface)
        if target_id is None and family == "fusechat" and mode != "hard":
            target_id = vocabulary.by_id[source_id]
        if target_id is not None and target_id not in ids:
            logits.append(logit)
            ids.append(target_id)
    return logits, ids


def _in_target_notation(text: PublishedText, surface: str) -> str:
    return surface.replace(text.source_marker, text.target_marker)


def published_map(source: Sequence[Any], target: Sequence[Any], counts: AlignmentCounts) -> np.ndarray:
    """Return (W,) int32 target ids by the least ``distance * weight * sigmoid(count)``, as FuseChat's code does.

    The distance is that of the tokens without space marks; if one is then empty, that of the source token with its mark
    replaced by the target's. The weight is 0.1 where one of the compared strings contains the other, else 1. The lowest
    id wins ties; -1 where nothing was aligned.
    """
    rows, columns, number = counts.pairs()
    left, right = _space_mark(source), _space_mark(target)
    pairs = [_compared(source[row], target[column], left, right) for row, column in zip(rows, columns, strict=True)]
    distance = pair_distances([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    weight = np.fromiter((0.1 if a in b or b in a else 1.0 for a, b in pairs), np.float64, len(pairs))
    score = distance * weight / (1 + np.exp(-number.astype(np.float64)))
    order = np.lexsort((columns, score, rows))
    found, first = np.unique(rows[order], return_index=True)
    chosen = np.full(len(source), -1, np.int32)
    chosen[found] = columns[order][first]
    return chosen


def _space_mark(tokens: Sequence[Any]) -> Any:
    """Return the space mark of a vocabulary: a space for bytes, else the one that starts more tokens."""
    if len(tokens) and isinstance(tokens[0], bytes):
        return b" "
    return max(("\u2581", "\u0120"), key=lambda mark: sum(token.startswith(mark) for token in tokens))


def _compared(source: Any, target: Any, source_mark: Any, target_mark: Any) -> tuple[Any, Any]:
    nothing = type(source)()
    left, right = source.replace(source_mark, nothing), target.replace(target_mark, nothing)
    return (left, right) if left and right else (source.replace(source_mark, target_mark), target)
