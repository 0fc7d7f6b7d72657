"""Minimal common chunks: how probable a source finds the pieces of a text that both tokenizations have.

A source gives a probability to its own tokens. Where source and target both end a token at the bytes ``a`` and ``b`` of
a text, and nowhere between them, the bytes from ``a`` to ``b`` are a *minimal common chunk*. Its log-probability is the
sum over the source's tokens in it, and over the target's for the target. Nothing smaller is known of the source: a
target's token inside a longer source token has no probability of its own, and the sum is not shared out.

A chunk's tokens spell the same bytes on both sides. The first chunk of an answer may begin with white space that a
template or a tokenizer writes before the answer (:mod:`fusion_plugins.core.fusion.answer_starts`): the bytes behind it
are compared, and its log-probability is, on each side, that of the tokens as they are. A space of the target's own that
is not trained on is in no chunk, and then neither is what the source writes in one piece with it. Where the two have
the same tokens, each token is a chunk. The token that ends a turn or a text is a chunk of one token, by its role: the
two need not have one name. A text that was cut has none, and what is behind its last common end is in no chunk.

Letters: B texts, N tokens of the target in all of them, C chunks, S sources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, FloatArray, IntArray
from fusion_plugins.core.fusion.accounting import ChunkReport
from fusion_plugins.core.fusion.align import boundaries_of_texts
from fusion_plugins.core.fusion.answer_starts import BEHIND_A_SPACE, Beginning, span_beginnings
from fusion_plugins.core.fusion.flat import Texts
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes
from fusion_plugins.errors import AlignmentError, ConfigError

Logprobs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TextChunks:
    """The chunks of B texts, one text after the other: N positions in all.

    Attributes:
        place: (N,) int32 place of the position in its chunk, from 1 on; 0 where it is in none.
        logprobs: (N,) float32 log-probability of the position's whole chunk under the sources, nats; 0 where it is in
            none.
        offsets: (B + 1,) int64 where the positions of each text begin.
        source: (N,) int16 number of the source that teaches the position; -1 for a mixture of several, and for none.
        unusable: number of a text that was left out -> why. Its positions are in no chunk.
    """

    place: IntArray
    logprobs: FloatArray
    offsets: npt.NDArray[np.int64]
    source: npt.NDArray[np.int16]
    unusable: Mapping[int, AlignmentError] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkSide:
    """One source's tokens of B texts, and the target's, with spans that correspond by their number.

    Attributes:
        source: its tokens.
        target: the target's.
        following: (U,) float32 log-probability of the source's next token, nats.
        tokens: vocabulary of the source, and of the target.
    """

    source: Texts
    target: Texts
    following: FloatArray
    tokens: tuple[TokenBytes, TokenBytes]


def common_chunks(
    sides: Sequence[ChunkSide], weights: Sequence[float], trained: BoolArray
) -> tuple[TextChunks, ChunkReport]:
    """Cut B texts where all sources and the target end a token, and say how probable the sources find each piece.

    Args:
        sides: S sources; the target's tokens are the same in all of them.
        weights: S weights of the mixture ``sum_s w_s p_s(chunk)``, scaled to sum to 1. A source with weight 0 cuts
            nothing either.
        trained: (N,) bool, whether the next token of a position is trained on. A chunk with a token that is not is
            left out.

    Returns:
        The chunks and their counters.

    Raises:
        ConfigError: not one weight per source, or weights that cannot be.
    """
    numbers, shares = _shares(weights, len(sides))
    target, used = sides[0].target, [sides[number] for number in numbers]
    ends = _ends(target)
    matches = [_matches(side.source, _ends(side.source), side.target, ends, *side.tokens) for side in used]
    for side, (begins, _, _) in zip(used, matches, strict=True):
        _begin_before_white_space(side, begins, trained)
    begin, end, turn = (np.logical_and.reduce([match[at][:, 0] >= 0 for match in matches]) for at in range(3))
    chunks = _cut(begin, end, turn, trained, target.starts)
    said = [
        _said(chunks, match, side.source, side.following, target, side.tokens)
        for side, match in zip(used, matches, strict=True)
    ]
    logprobs = _mixture(np.stack(said), shares)
    chunks, logprobs = chunks[~np.isnan(logprobs)], logprobs[~np.isnan(logprobs)]
    place, of_position, n_bytes = _written(chunks, logprobs, target.ends)
    source = np.where(place > 0, numbers[0] if len(numbers) == 1 else -1, -1).astype(np.int16)
    report = ChunkReport(
        texts=len(target.starts) - 1,
        positions=int(trained.sum()),
        chunk_positions=int((place > 0).sum()),
        chunks=len(chunks),
        single=int((chunks[:, 2] - chunks[:, 1] == 1).sum()),
        bytes=int(_next_bytes(target)[trained].sum()),
        chunk_bytes=int(n_bytes),
    )
    return TextChunks(place, of_position, target.starts, source), report


def _ends(texts: Texts) -> BoolArray:
    """(N,) bool, the positions at which a chunk can begin or end."""
    found: BoolArray = boundaries_of_texts(texts.ends, texts.exact, texts.starts)
    return found


def _shares(weights: Sequence[float], n_sources: int) -> tuple[list[int], Logprobs]:
    """Return the numbers of the sources that have a weight, and their shares."""
    given = np.asarray(weights, np.float64)
    if given.shape != (n_sources,) or not (np.isfinite(given) & (given >= 0)).all() or not given.any():
        raise ConfigError(
            f"expected {n_sources} weights of sources, none below 0 and not all of them 0, got {given.tolist()}. Give "
            "each source a weight."
        )
    numbers = np.flatnonzero(given)
    return numbers.tolist(), given[numbers] / given.sum()


def _mixture(said: Logprobs, shares: Logprobs) -> Logprobs:
    """Return (C,) ``log sum_s w_s p_s`` of (S, C) log-probabilities; NaN where a source says nothing."""
    if len(said) == 1:
        found: Logprobs = said[0]
        return found
    return np.asarray(np.logaddexp.reduce(said + np.log(shares)[:, None], axis=0), np.float64)


def _begin_before_white_space(side: ChunkSide, begins: IntArray, trained: BoolArray) -> None:
    """Let the first chunk of an answer begin before the white space that is written in one piece with it."""
    found = span_beginnings(side.source, side.target, *side.tokens)
    for own in map(Beginning._make, found.tolist()):
        s_space, t_space = own.s_form == BEHIND_A_SPACE, own.t_form == BEHIND_A_SPACE
        first, u = own.t_first - 1 - t_space, own.s_first - 1 - s_space
        if own.both_behind_a_space or not trained[first]:
            continue
        begins[own.t_first - 1] = -1
        begins[first] = (
            u - side.source.starts[own.text], own.span, False, own.s_before + s_space, own.t_before + t_space,
        )  # fmt: skip


def _next_bytes(target: Texts) -> IntArray:
    """(N,) how many bytes of the text the next token of each position has; 0 at the last of a text."""
    widths = np.append(np.diff(target.ends), 0)
    widths[target.starts[1:] - 1] = 0
    return np.asarray(widths, np.int32)


@compiled
def _matches(source, s_bounds, target, t_bounds, s_tokens, t_tokens):  # type: ignore[no-untyped-def]
    """Find the source position at which a chunk can begin, end, or be the end of a turn.

    Returns:
        Three times (N, 5) int32: the source's position, -1 for none; the number of the span; whether the span has the
        same tokens on both sides; and the bytes of the source's and the target's tokens that are before the span, 0.
        Where two spans touch in the target alone, a chunk ends elsewhere in the source than the next one begins.
    """
    n = len(target.ends)
    begins, ends = np.full((n, 5), np.int32(-1)), np.full((n, 5), np.int32(-1))
    turns = np.full((n, 5), np.int32(-1))
    for b in range(len(target.starts) - 1):
        own, other = slice(source.starts[b], source.starts[b + 1]), slice(target.starts[b], target.starts[b + 1])
        s_side = source.ids[own], source.ends[own], s_bounds[own]
        t_side = target.ids[other], target.ends[other], t_bounds[other]
        out = begins[other], ends[other], turns[other]
        for m in range(target.span_starts[b + 1] - target.span_starts[b]):
            s_span, t_span = source.spans[source.span_starts[b] + m], target.spans[target.span_starts[b] + m]
            _match_span(s_side, s_span, t_side, t_span, s_tokens, t_tokens, m, out)
    return begins, ends, turns


@compiled
def _match_span(s_side, s_span, t_side, t_span, s_tokens, t_tokens, m, out):  # type: ignore[no-untyped-def]
    """Match the positions of the m-th span of one text."""
    (s_ids, s_ends, s_boundary), (t_ids, t_ends, t_boundary) = s_side, t_side
    begins, ends, turns = out
    first, stop = np.searchsorted(t_ends, t_span[0]), _last_position(t_ends, t_span[1])
    u = np.searchsorted(s_ends, s_span[0])
    size, shift = stop - first + 1, u - first
    same = _last_position(s_ends, s_span[1]) - u + 1 == size and _same_tokens(
        s_ids[u : u + size], s_ends[u : u + size] - s_span[0], s_tokens,
        t_ids[first : stop + 1], t_ends[first : stop + 1] - t_span[0], t_tokens,
    )  # fmt: skip
    for t in range(first, stop + 1):
        place, width = t_ends[t] - t_span[0], t_span[1] - t_span[0]
        while not same and u < len(s_ends) and (s_ends[u] - s_span[0] < place or not s_boundary[u]):
            u += 1
        if same:
            u = t + shift
        elif not t_boundary[t] or u == len(s_ends) or s_ends[u] - s_span[0] != place:
            continue
        if place > 0 or (same and t > first):
            _put(ends, t, u, m, same)
        if place < width or (same and t < stop):
            _put(begins, t, u, m, same)
        elif t + 1 < len(t_ids) and u + 1 < len(s_ids) and _both_close(s_ids[u + 1], s_tokens, t_ids[t + 1], t_tokens):
            _put(turns, t, u, m, same)


@compiled
def _put(out, t, u, m, same):  # type: ignore[no-untyped-def]
    out[t, 0], out[t, 1], out[t, 2], out[t, 3], out[t, 4] = u, m, same, 0, 0


@compiled
def _both_close(s_id, s_tokens, t_id, t_tokens):  # type: ignore[no-untyped-def]
    """Whether both tokens end a turn or a text."""
    known = s_id < len(s_tokens.closing) and t_id < len(t_tokens.closing)
    return known and s_tokens.closing[s_id] and t_tokens.closing[t_id]


@compiled
def _same_tokens(s_ids, s_ends, s_tokens, t_ids, t_ends, t_tokens):  # type: ignore[no-untyped-def]
    """Whether both sides have the same tokens, by id and bytes, at the same places. The first may be before the span.

    So it is with one tokenizer, also where a token has no bytes or the tokenizer changed the text.
    """
    for k in range(len(t_ids)):
        if s_ends[k] != t_ends[k]:
            return False
        inside = k > 0 or t_ends[k] > 0
        if inside and (
            s_ids[k] != t_ids[k] or not _same_bytes(s_ids[k : k + 1], s_tokens, 0, t_ids[k : k + 1], t_tokens, 0)
        ):
            return False
    return True


@compiled
def _last_position(ends, stop):  # type: ignore[no-untyped-def]
    """The last position of a span; at the end of a text, what has no bytes is behind it."""
    if len(ends) and stop >= ends[-1]:
        return np.searchsorted(ends, ends[-1])
    return np.searchsorted(ends, stop, side="right") - 1


@compiled
def _cut(can_begin, can_end, can_turn, trained, starts):  # type: ignore[no-untyped-def]
    """Return (C, 4) int64: text, first position, position behind the last, and whether it is the end of a turn."""
    out, n = np.empty((len(can_begin), 4), np.int64), 0
    for b in range(len(starts) - 1):
        first = -1
        for t in range(starts[b], starts[b + 1]):
            if can_end[t] and first >= 0:
                if trained[first:t].all():
                    out[n] = b, first, t, 0
                    n += 1
                first = -1
            if can_begin[t]:
                first = t
            if can_turn[t] and trained[t]:
                out[n] = b, t, t + 1, 1
                n += 1
    return out[:n]


@compiled
def _said(chunks, matches, source, following, target, tokens):  # type: ignore[no-untyped-def]
    """Return (C,) float64: the source's log-probability of each chunk, NaN where it says nothing of these bytes."""
    (begins, ends, turns), (s_tokens, t_tokens) = matches, tokens
    out = np.full(len(chunks), np.nan)
    for c in range(len(chunks)):
        b, first, stop, is_turn = chunks[c]
        offset = source.starts[b]
        if is_turn:
            if turns[first, 0] >= 0:
                out[c] = following[offset + turns[first, 0]]
            continue
        if begins[first, 0] < 0 or ends[stop, 0] < 0 or begins[first, 1] != ends[stop, 1]:
            continue
        u, v = offset + begins[first, 0], offset + ends[stop, 0]
        if begins[first, 2] or (
            _same_bytes(
                source.ids[u + 1 : v + 1],
                s_tokens,
                begins[first, 3],
                target.ids[first + 1 : stop + 1],
                t_tokens,
                begins[first, 4],
            )
            and _spelled(source, u, v, s_tokens)
            and _spelled(target, first, stop, t_tokens)
        ):
            total = 0.0
            for at in range(u, v):
                total += following[at]
            out[c] = total
    return out


@compiled
def _same_bytes(s_ids, s_tokens, s_skip, t_ids, t_tokens, t_skip):  # type: ignore[no-untyped-def]
    """Whether tokens of two vocabularies spell the same bytes, but for some at the beginning of each side."""
    s_flat, s_starts, t_flat, t_starts = s_tokens.flat, s_tokens.starts, t_tokens.flat, t_tokens.starts
    t, at, stop = -1, np.int64(0), np.int64(0)
    skip = np.int64(t_skip)
    for s in range(len(s_ids)):
        if s_ids[s] >= len(s_starts) - 1:
            return False
        for k in range(s_starts[s_ids[s]], s_starts[s_ids[s] + 1]):
            if s_skip > 0:
                s_skip -= 1
                continue
            while at == stop:
                t += 1
                if t == len(t_ids) or t_ids[t] >= len(t_starts) - 1:
                    return False
                at, stop = t_starts[t_ids[t]], t_starts[t_ids[t] + 1]
                cut = min(skip, stop - at)
                at, skip = at + cut, skip - cut
            if s_flat[k] != t_flat[at]:
                return False
            at += 1
    while at == stop and t + 1 < len(t_ids):
        t += 1
        if t_ids[t] >= len(t_starts) - 1:
            return False
        at, stop = t_starts[t_ids[t]], t_starts[t_ids[t] + 1]
    return at == stop


@compiled
def _spelled(texts, first, stop, tokens):  # type: ignore[no-untyped-def]
    """Whether the special tokens among those after ``first`` have as many bytes in the text as in their name.

    The unknown token has those of the text that it stands for.
    """
    for at in range(first + 1, stop + 1):
        token = texts.ids[at]
        if tokens.special[token]:
            if tokens.starts[token + 1] - tokens.starts[token] != texts.ends[at] - texts.ends[at - 1]:
                return False
    return True


@compiled
def _written(chunks, logprobs, ends):  # type: ignore[no-untyped-def]
    """Write chunks as places and log-probabilities of N positions; also count their bytes."""
    place, of_chunk, n_bytes = np.zeros(len(ends), np.int32), np.zeros(len(ends), np.float32), 0
    for c in range(len(chunks)):
        _, first, stop, is_turn = chunks[c]
        for t in range(first, stop):
            place[t], of_chunk[t] = t - first + 1, logprobs[c]
        n_bytes += ends[stop] - ends[first]
    return place, of_chunk, n_bytes
