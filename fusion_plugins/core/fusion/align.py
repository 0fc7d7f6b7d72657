"""Two tokenizations of one text -> which source row speaks of the same position as which target row.

Third step of the way of the data: ``TokenizedText``, ``Record`` -> :class:`Alignment` -> projection.

``offsets`` (the default) compares bytes: target row ``t`` may take source row ``u`` exactly when both models have read
the same bytes of the same supervised span. There is one such alignment, it costs O(T + U), and no row in it is wrong.
``dtw`` is the published method, dynamic time warping over edit distances (:mod:`fusion_plugins.core.fusion.dtw`).

**Boundary rows.** Row ``t`` stands at byte ``ends[t]``. When several tokens end at one byte (BOS, a dummy prefix), only
the last of them has seen all that comes before the next byte, so it alone is the row there. At the end of the text
it is the other way round: the first token that ends there predicts the end, the ones after it (EOS) predict nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusion_plugins.core.arrays import IntArray, as_array
from fusion_plugins.core.fusion.dtw import dtw_path, path_ranges
from fusion_plugins.core.fusion.types import Record
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.surfaces import common_bytes
from fusion_plugins.core.text.types import TokenizedText
from fusion_plugins.errors import AlignmentError

__all__ = ["ALIGNERS", "Alignment", "align_dtw", "align_offsets", "align_texts", "align_tokens"]

Tokens = Sequence[str] | Sequence[bytes]


@dataclass(frozen=True)
class Alignment:
    """Which source row belongs to which target row, and which tokens share text.

    Attributes:
        source_rows: (T,) int32, the source row that may teach each target row; -1 where there is none.
        target_ranges: (T, 2) int32, first and last source token that each target token is matched with; (0, -1) for
            none.
        source_ranges: (U, 2) int32, the same from the source's side.
        coverage: share of the target rows that have a source row, among the rows that could have one, in [0, 1].
        cost: sum of the token distances along the DTW path; None for ``offsets``.
    """

    source_rows: IntArray
    target_ranges: IntArray
    source_ranges: IntArray
    coverage: float
    cost: int | None = None

    @cached_property
    def target_to_source(self) -> list[list[int]]:
        """For each target token the ascending source positions that it is matched with."""
        return [list(range(first, last + 1)) for first, last in self.target_ranges.tolist()]

    @cached_property
    def source_to_target(self) -> list[list[int]]:
        """For each source token the ascending target positions that it is matched with."""
        return [list(range(first, last + 1)) for first, last in self.source_ranges.tolist()]


def align_tokens(
    source_tokens: Tokens,
    target_tokens: Tokens,
    *,
    method: str | Callable[..., Alignment] = "offsets",
    tie_order: str = "fusellm",
) -> Alignment:
    """Align two lists of tokens of one text.

    Args:
        source_tokens: U tokens, bytes or str. Surfaces with a boundary character (``▁``, ``Ġ``) are recognised.
        target_tokens: T tokens.
        method: ``offsets``, ``offsets_strict`` or ``dtw``, or a registered aligner.
        tie_order: ``fusellm`` (diagonal, up, left) or ``fusechat`` (diagonal, left, up; and its rule for tokens that
            consist of the boundary character alone). Only ``dtw`` looks at it.

    Raises:
        AlignmentError: the tokens do not spell the same text (``offsets``), or an unknown method or tie order.

    Example:
        >>> align_tokens([b"the", b" 1", b"2"], [b"the", b" 12"]).target_to_source
        [[0], [1, 2]]
    """
    if callable(method):
        return method(source_tokens, target_tokens, tie_order=tie_order)
    if method not in ALIGNERS:
        raise AlignmentError(f"unknown alignment method {method!r}; expected one of {', '.join(sorted(ALIGNERS))}")
    return ALIGNERS[method](source_tokens, target_tokens, tie_order=tie_order)


def align_offsets(
    source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm", strict: bool = False
) -> Alignment:
    """Align tokens by the bytes at which they end; see :func:`align_tokens`. ``tie_order`` has nothing to decide.

    Raises:
        AlignmentError: the two lists spell different texts; the message gives the first byte that differs.
    """
    source, target = common_bytes(source_tokens, target_tokens)
    return align_texts(_whole_text(source), _whole_text(target), strict=strict)


def align_offsets_strict(source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm") -> Alignment:
    """Like :func:`align_offsets`, but a row also needs next tokens that end at the same byte."""
    return align_offsets(source_tokens, target_tokens, tie_order=tie_order, strict=True)


def align_dtw(
    source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm", band: int | None = None
) -> Alignment:
    """Align tokens by dynamic time warping over edit distances; see :func:`align_tokens`.

    A target row takes the last source token that it is matched with, if it is itself the last target token that this
    source token is matched with: then the path says that both prefixes end together (it may be mistaken). ``band``: see
    :func:`fusion_plugins.core.fusion.dtw.dtw_path`; the result is the same.
    """
    path, cost = dtw_path(source_tokens, target_tokens, tie_order=tie_order, band=band)
    target_ranges = path_ranges(path, axis=1, size=len(target_tokens))
    source_ranges = path_ranges(path, axis=0, size=len(source_tokens))
    last = target_ranges[:, 1]
    rows = np.where(source_ranges[last, 1] == np.arange(len(last)), last, -1).astype(np.int32)
    return Alignment(rows, target_ranges, source_ranges, float(np.mean(rows >= 0)) if len(rows) else 1.0, cost)


def align_texts(source: TokenizedText | Record, target: TokenizedText, *, strict: bool = False) -> Alignment:
    """Align two tokenizations by the byte, inside each supervised span, at which their tokens end.

    Args:
        source: U tokens of one tokenizer: its tokenized text or the record of a store.
        target: T tokens of another tokenizer, of the same text or of the same chat in another template.
        strict: a row also needs next tokens that end at the same byte, so that one source token predicts exactly
            what the target's next token is.

    Raises:
        AlignmentError: the two have different spans, so they are not the same text.
    """
    source_ends = source.offsets if isinstance(source, Record) else source.ends
    _check_spans(source.spans, target.spans)
    s_ends, s_spans = as_array(source_ends, np.int32), as_array(source.spans, np.int32)
    t_ends, t_spans = as_array(target.ends, np.int32), as_array(target.spans, np.int32)
    s_exact, t_exact = as_array(source.exact, np.bool_), as_array(target.exact, np.bool_)
    rows, n_rows = _match_rows(s_ends, s_exact, s_spans, t_ends, t_exact, t_spans, strict)
    source_ranges, target_ranges = _overlaps(s_ends, s_spans, t_ends, t_spans)
    coverage = float((rows >= 0).sum() / n_rows) if n_rows else 1.0
    return Alignment(rows, target_ranges, source_ranges, coverage)


ALIGNERS: dict[str, Callable[..., Alignment]] = {
    "offsets": align_offsets,
    "offsets_strict": align_offsets_strict,
    "dtw": align_dtw,
}
"""Name -> function of (source_tokens, target_tokens, *, tie_order)."""


def _whole_text(tokens: list[bytes]) -> TokenizedText:
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int32).astype(np.int32)
    n_bytes = int(ends[-1]) if len(ends) else 0
    return TokenizedText(
        np.zeros(len(ends), np.int32), ends, np.array([[0, n_bytes]], np.int32), np.ones(len(ends), np.bool_)
    )


def _check_spans(source: IntArray, target: IntArray) -> None:
    if len(source) != len(target):
        raise AlignmentError(
            f"expected the same supervised spans on both sides; the source has {len(source)}, the target "
            f"{len(target)}: they are not the same chat. Capture the store again from the texts that you train on."
        )


@compiled
def _boundaries(ends, exact):  # type: ignore[no-untyped-def]
    """(T,) bool, True for the one row at each byte."""
    last = len(ends) - 1
    rows = exact.copy()
    for t in range(len(ends)):
        if ends[t] == ends[last]:
            rows[t] &= t == 0 or ends[t - 1] < ends[t]
        else:
            rows[t] &= ends[t + 1] > ends[t]
    return rows


@compiled
def _match_rows(s_ends, s_exact, s_spans, t_ends, t_exact, t_spans, strict):  # type: ignore[no-untyped-def]
    """Merge the boundary rows of both sides, span by span; also count the target's."""
    s_rows, t_rows = _boundaries(s_ends, s_exact), _boundaries(t_ends, t_exact)
    rows = np.full(len(t_ends), -1, np.int32)
    could = np.zeros(len(t_ends), np.bool_)
    for m in range(len(t_spans)):
        (s_start, s_stop), (t_start, t_stop) = s_spans[m], t_spans[m]
        u, t = np.searchsorted(s_ends, s_start), np.searchsorted(t_ends, t_start)
        while t < len(t_ends) and t_ends[t] <= t_stop:
            could[t] |= t_rows[t]
            while u < len(s_ends) and (s_ends[u] - s_start < t_ends[t] - t_start or not s_rows[u]):
                u += 1
            if u == len(s_ends) or s_ends[u] > s_stop:
                t += 1
                continue
            if t_rows[t] and s_ends[u] - s_start == t_ends[t] - t_start:
                if not strict or _same_next(s_ends, s_start, s_stop, u, t_ends, t_start, t_stop, t):
                    rows[t] = u
            t += 1
    return rows, could.sum()


@compiled
def _same_next(s_ends, s_start, s_stop, u, t_ends, t_start, t_stop, t):  # type: ignore[no-untyped-def]
    """Whether the tokens after two corresponding rows end at the same byte, or are both the ones after the span."""
    if u + 1 == len(s_ends) or t + 1 == len(t_ends):
        return False
    if s_ends[u] == s_stop and t_ends[t] == t_stop:
        return True
    return s_ends[u + 1] - s_start == t_ends[t + 1] - t_start


@compiled
def _overlaps(s_ends, s_spans, t_ends, t_spans):  # type: ignore[no-untyped-def]
    """First and last token of the other side that shares bytes with each token, inside the spans.

    A token without bytes is matched with the one that stands in the same place on the other side, if there is one.
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
            share = both_empty or max(s_begin, t_begin, 0) < min(s_end, t_end)
            if share:
                _extend(s_out, u, t)
                _extend(t_out, t, u)
            # Of two tokens that end together, the one without bytes comes later.
            step_s = s_end < t_end or (s_end == t_end and not (s_empty and not t_empty))
            step_t = t_end < s_end or (s_end == t_end and not (t_empty and not s_empty))
            u += step_s
            t += step_t
    return s_out, t_out


@compiled
def _extend(ranges, row, other):  # type: ignore[no-untyped-def]
    if ranges[row, 1] < 0:
        ranges[row, 0] = other
    ranges[row, 1] = other
