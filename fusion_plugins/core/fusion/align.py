"""Two tokenizations of one text -> which source position belongs to which target position.

``offsets`` (the default) compares bytes: target position ``t`` may take the distribution at source position ``u``
exactly when both models have read the same bytes of the same supervised span. There is one such alignment, it costs
O(T + U), and every match in it is right. ``dtw`` is the published method, dynamic time warping over edit distances
(:mod:`fusion_plugins.core.fusion.dtw`).

**Boundaries.** Position ``t`` lies at byte ``ends[t]``. When several tokens end at one byte (BOS, a dummy prefix), only
the last of them has seen all that comes before the next byte, so its position alone is matched. At the end of the text
it is the other way round: the first token that ends there predicts the end, the ones after it (EOS) predict nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from fusion_plugins.core.arrays import IntArray, as_array
from fusion_plugins.core.fusion.dtw import dtw_path, path_ranges
from fusion_plugins.core.fusion.flat import Texts
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.surfaces import common_bytes
from fusion_plugins.core.text.token_bytes import TokenBytes, bytes_of_tokens
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError, ConfigError

Tokens = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class Alignment:
    """Which source position belongs to which target position.

    Attributes:
        source_positions: (T,) int32, the source position that may teach each target position; -1 where there is none.
        ranges: returns, per target token and per source token, the first and last token of the other side that it is
            matched with, (T, 2) and (U, 2) int32, (0, -1) for none. A function, because training does not need them.
        coverage: share of the target positions that have a source position, among those that could have one, in [0, 1].
        cost: sum of the token distances along the DTW path; None for ``offsets``.
        strict: whether next tokens of one position had to end at the same byte.
    """

    source_positions: IntArray
    ranges: Callable[[], tuple[IntArray, ...]]
    coverage: float
    cost: int | None = None
    strict: bool = False

    @cached_property
    def target_to_source(self) -> list[list[int]]:
        """For each target token the ascending positions of the source tokens that it is matched with."""
        return [list(range(first, last + 1)) for first, last in self.ranges()[0].tolist()]

    @cached_property
    def source_to_target(self) -> list[list[int]]:
        """For each source token the ascending positions of the target tokens that it is matched with."""
        return [list(range(first, last + 1)) for first, last in self.ranges()[1].tolist()]


#: Aligns two token lists of one text; what the hook ``register_aligners`` takes.
TokenAligner = Callable[[Tokens, Tokens], Alignment]
#: Aligns a source's and the target's tokenization of one text; what a fusion plan takes.
TextAligner = Callable[[TokenizedText, TokenizedText], Alignment]


def align_tokens(
    source_tokens: Tokens,
    target_tokens: Tokens,
    *,
    method: str | TokenAligner = "offsets",
    tie_order: str = "fusellm",
) -> Alignment:
    """Align two lists of tokens of one text.

    Args:
        source_tokens: U tokens, bytes or str. Surfaces with a boundary character (``▁``, ``Ġ``) are recognised.
        target_tokens: T tokens.
        method: a name in :data:`ALIGNERS`, or an aligner.
        tie_order: of ``dtw`` alone: ``fusellm`` (diagonal, up, left) or ``fusechat`` (diagonal, left, up; and its rule
            for tokens that consist of the boundary character alone).

    Raises:
        AlignmentError: the tokens do not spell the same text (``offsets``).
        ConfigError: an unknown method or tie order.

    Example:
        >>> align_tokens([b"the", b" 1", b"2"], [b"the", b" 12"]).target_to_source
        [[0], [1, 2]]
    """
    aligner = method if callable(method) else ALIGNERS.get(method)
    if aligner is None:
        raise ConfigError(
            f"method: expected one of {', '.join(sorted(ALIGNERS))} or a function, got {method!r}. Correct it, "
            "or look a plugin's aligner up with fusion_plugins.plugins.lookup."
        )
    if aligner is align_dtw:
        return align_dtw(source_tokens, target_tokens, tie_order=tie_order)
    return aligner(source_tokens, target_tokens)


def align_offsets(source_tokens: Tokens, target_tokens: Tokens, *, strict: bool = False) -> Alignment:
    """Align tokens by the bytes at which they end.

    Args:
        source_tokens: U tokens, bytes or str.
        target_tokens: T tokens.
        strict: see :func:`align_texts`.

    Raises:
        AlignmentError: the two lists spell different texts; the message gives the first byte that differs.
    """
    source, target = common_bytes(source_tokens, target_tokens)
    return align_texts(_whole_text(source), _whole_text(target), strict=strict)


def align_dtw(source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm") -> Alignment:
    """Align tokens by dynamic time warping over edit distances.

    A target position takes the last source token that it is matched with, if it is itself the last target token that
    this source token is matched with: then the path says that both prefixes end together. The path may be mistaken.

    Raises:
        AlignmentError, ConfigError: see :func:`~fusion_plugins.core.fusion.dtw.dtw_path`.
    """
    path, cost = dtw_path(source_tokens, target_tokens, tie_order=tie_order)
    target_ranges = path_ranges(path, axis=1, size=len(target_tokens))
    source_ranges = path_ranges(path, axis=0, size=len(source_tokens))
    last = target_ranges[:, 1]
    positions = np.where(source_ranges[last, 1] == np.arange(len(last)), last, -1).astype(np.int32)
    coverage = float(np.mean(positions >= 0)) if len(positions) else 1.0
    return Alignment(positions, partial(_known, target_ranges, source_ranges), coverage, cost)


def align_texts(source: TokenizedText, target: TokenizedText, *, strict: bool = False) -> Alignment:
    """Align two tokenizations by the byte, inside each supervised span, at which their tokens end.

    Args:
        source: U tokens of one tokenizer.
        target: T tokens of another tokenizer, of the same text or of the same chat in another template.
        strict: a match also needs next tokens that end at the same byte, so that one source token predicts exactly
            what the target's next token is.

    Raises:
        AlignmentError: the two have different numbers of spans, so they are not the same text.
    """
    if len(source.spans) != len(target.spans):
        raise AlignmentError(
            f"expected the same supervised spans on both sides; the source has {len(source.spans)}, the target "
            f"{len(target.spans)}: they are not the same chat. Capture the store again from the texts you train on."
        )
    s_ends, s_spans = as_array(source.ends, np.int32), as_array(source.spans, np.int32)
    t_ends, t_spans = as_array(target.ends, np.int32), as_array(target.spans, np.int32)
    s_exact, t_exact = as_array(source.exact, np.bool_), as_array(target.exact, np.bool_)
    positions, possible = _match_positions(s_ends, s_exact, s_spans, t_ends, t_exact, t_spans, strict)
    coverage = float((positions >= 0).sum() / possible) if possible else 1.0
    return Alignment(positions, partial(_overlaps, s_ends, s_spans, t_ends, t_spans), coverage, strict=strict)


def align_many(
    align: TextAligner, source: Texts, target: Texts, pair: Callable[[int], tuple[TokenizedText, TokenizedText]]
) -> tuple[IntArray, dict[int, AlignmentError]]:
    """Align B pairs of texts.

    Args:
        align: an aligner of one pair; :func:`align_texts` aligns all at once.
        source: the texts in the source's tokens.
        target: the texts in the target's tokens, N in all.
        pair: returns both sides of one text.

    Returns:
        (N,) int32 source position, counted from the start of its text, of each position of the target, -1 for none; and
        number of a text that the aligner refuses -> why. None of its positions is aligned.
    """
    if _plain(align) is align_texts:
        return _match_texts(source, target, is_strict(align)), {}
    matched, errors = np.full(len(target.ids), -1, np.int32), {}
    for b in range(len(target.starts) - 1):
        try:
            own, other = pair(b)
            matched[target.starts[b] : target.starts[b + 1]] = checked_positions(align(own, other), own, other)
        except AlignmentError as error:
            errors[b] = error
    return matched, errors


def is_strict(align: TextAligner) -> bool:
    """Whether an aligner is :func:`align_texts`, asked to be strict."""
    return _plain(align) is align_texts and isinstance(align, partial) and bool(align.keywords["strict"])


def _plain(align: TextAligner) -> TextAligner:
    """Return the aligner without the option ``strict``."""
    if isinstance(align, partial) and not align.args and set(align.keywords) == {"strict"}:
        return align.func
    return align


def checked_positions(alignment: Alignment, source: TokenizedText, target: TokenizedText) -> IntArray:
    """Return the (T,) source positions of an alignment.

    Raises:
        AlignmentError: the alignment is not one of these two texts.
    """
    matched = as_array(alignment.source_positions, np.int32)
    n_target, n_source = len(target.input_ids), len(source.input_ids)
    if len(matched) != n_target or matched.max(initial=-1) >= n_source:
        raise AlignmentError(
            f"expected an alignment of {n_source} source and {n_target} target tokens; got one of {len(matched)} "
            f"target tokens that names source position {matched.max(initial=-1)}. Align these two texts."
        )
    return matched


def align_by_tokens(aligner: TokenAligner, source_bytes: TokenBytes, target_bytes: TokenBytes) -> TextAligner:
    """Turn an aligner of token lists into one of tokenized texts, which it aligns span by span.

    Args:
        aligner: such as :func:`align_dtw`.
        source_bytes: the source's vocabulary.
        target_bytes: the target's vocabulary.
    """
    return partial(_align_spans, aligner, source_bytes, target_bytes)


def _align_spans(
    aligner: TokenAligner,
    source_bytes: TokenBytes,
    target_bytes: TokenBytes,
    source: TokenizedText,
    target: TokenizedText,
) -> Alignment:
    by_ends = align_texts(source, target)
    positions, possible = np.full(len(target.ends), -1, np.int32), 0
    for (start, stop), (t_start, t_stop) in zip(source.spans.tolist(), target.spans.tolist(), strict=True):
        own = np.flatnonzero((source.ends > start) & (source.ends <= stop))
        other = np.flatnonzero((target.ends > t_start) & (target.ends <= t_stop))
        if own.size and other.size:
            found = aligner(
                bytes_of_tokens(source_bytes, source.input_ids[own]),
                bytes_of_tokens(target_bytes, target.input_ids[other]),
            ).source_positions
            positions[other] = np.where(found >= 0, own[found], -1)
        # The position that predicts a span's first token lies before the span; only the ends tell which one that is.
        before = target.ends == t_start
        positions[before] = by_ends.source_positions[before]
        possible += len(other) + int(before.any())
    return Alignment(positions, by_ends.ranges, float((positions >= 0).sum() / possible) if possible else 1.0)


ALIGNERS: dict[str, TokenAligner] = {
    "offsets": align_offsets,
    "offsets_strict": partial(align_offsets, strict=True),
    "dtw": align_dtw,
}
"""Name -> aligner(source_tokens, target_tokens)."""


def _known(*ranges: IntArray) -> tuple[IntArray, ...]:
    # Not a lambda: an alignment must survive being pickled.
    return ranges


def _whole_text(tokens: list[bytes]) -> TokenizedText:
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int32).astype(np.int32)
    n_bytes = int(ends[-1]) if len(ends) else 0
    return TokenizedText(
        np.zeros(len(ends), np.int32), ends, np.array([[0, n_bytes]], np.int32), np.ones(len(ends), np.bool_)
    )


@compiled
def text_boundaries(ends, exact):  # type: ignore[no-untyped-def]
    """(T,) bool, True for the one position at each byte that can be matched."""
    last = len(ends) - 1
    positions = exact.copy()
    for t in range(len(ends)):
        if ends[t] == ends[last]:
            positions[t] &= t == 0 or ends[t - 1] < ends[t]
        else:
            positions[t] &= ends[t + 1] > ends[t]
    return positions


@compiled
def boundaries_of_texts(ends, exact, starts):  # type: ignore[no-untyped-def]
    """(N,) bool, :func:`text_boundaries` of B texts, one behind the other; ``starts`` are (B + 1,) their positions."""
    found = exact.copy()
    for b in range(len(starts) - 1):
        found[starts[b] : starts[b + 1]] = text_boundaries(
            ends[starts[b] : starts[b + 1]], exact[starts[b] : starts[b + 1]]
        )
    return found


@compiled
def _match_positions(s_ends, s_exact, s_spans, t_ends, t_exact, t_spans, strict):  # type: ignore[no-untyped-def]
    """Merge the boundaries of both sides, span by span; also count the target's."""
    s_boundary, t_boundary = text_boundaries(s_ends, s_exact), text_boundaries(t_ends, t_exact)
    positions = np.full(len(t_ends), -1, np.int32)
    possible = np.zeros(len(t_ends), np.bool_)
    for m in range(len(t_spans)):
        (s_start, s_stop), (t_start, t_stop) = s_spans[m], t_spans[m]
        u, t = np.searchsorted(s_ends, s_start), np.searchsorted(t_ends, t_start)
        while t < len(t_ends) and t_ends[t] <= t_stop:
            possible[t] |= t_boundary[t]
            while u < len(s_ends) and (s_ends[u] - s_start < t_ends[t] - t_start or not s_boundary[u]):
                u += 1
            if u == len(s_ends) or s_ends[u] > s_stop:
                t += 1
                continue
            if t_boundary[t] and s_ends[u] - s_start == t_ends[t] - t_start:
                if not strict or _same_next(s_ends, s_start, s_stop, u, t_ends, t_start, t_stop, t):
                    positions[t] = u
            t += 1
    return positions, possible.sum()


@compiled
def _match_texts(source, target, strict):  # type: ignore[no-untyped-def]
    """Match the positions of each text."""
    matched = np.empty(len(target.ends), np.int32)
    for b in range(len(target.starts) - 1):
        own = slice(source.starts[b], source.starts[b + 1])
        other = slice(target.starts[b], target.starts[b + 1])
        s_spans = source.spans[source.span_starts[b] : source.span_starts[b + 1]]
        t_spans = target.spans[target.span_starts[b] : target.span_starts[b + 1]]
        matched[other], _ = _match_positions(
            source.ends[own], source.exact[own], s_spans, target.ends[other], target.exact[other], t_spans, strict
        )
    return matched


@compiled
def _same_next(s_ends, s_start, s_stop, u, t_ends, t_start, t_stop, t):  # type: ignore[no-untyped-def]
    """Whether the tokens after two matched positions end at the same byte, or are both the first after the span."""
    if u + 1 == len(s_ends) or t + 1 == len(t_ends):
        return False
    if s_ends[u] == s_stop and t_ends[t] == t_stop:
        return True
    return s_ends[u + 1] - s_start == t_ends[t + 1] - t_start


@compiled
def _overlaps(s_ends, s_spans, t_ends, t_spans):  # type: ignore[no-untyped-def]
    """First and last token of the other side that shares bytes with each token, for the target, then the source.

    A token without bytes is matched with the one in the same place on the other side, if there is one.
    """
    s_out, t_out = np.zeros((len(s_ends), 2), np.int32), np.zeros((len(t_ends), 2), np.int32)
    s_out[:, 1] = t_out[:, 1] = -1
    for m in range(len(t_spans)):
        u, t = np.searchsorted(s_ends, s_spans[m, 0]), np.searchsorted(t_ends, t_spans[m, 0])
        while u < len(s_ends) and t < len(t_ends) and s_ends[u] <= s_spans[m, 1] and t_ends[t] <= t_spans[m, 1]:
            s_begin = (s_ends[u - 1] if u else 0) - s_spans[m, 0]
            t_begin = (t_ends[t - 1] if t else 0) - t_spans[m, 0]
            s_end, t_end = s_ends[u] - s_spans[m, 0], t_ends[t] - t_spans[m, 0]
            s_empty, t_empty = s_begin == s_end, t_begin == t_end
            both_empty = s_empty and t_empty and s_end == t_end
            if both_empty or max(s_begin, t_begin, 0) < min(s_end, t_end):
                _extend(s_out, u, t)
                _extend(t_out, t, u)
            # Of two tokens that end together, the one without bytes comes later.
            step_s = s_end < t_end or (s_end == t_end and not (s_empty and not t_empty))
            step_t = t_end < s_end or (s_end == t_end and not (t_empty and not s_empty))
            u += step_s
            t += step_t
    return t_out, s_out


@compiled
def _extend(ranges, position, other):  # type: ignore[no-untyped-def]
    if ranges[position, 1] < 0:
        ranges[position, 0] = other
    ranges[position, 1] = other
