"""The first token of an answer, where white space that is no part of the answer is written in one piece with it.

A template writes a space between a question and its answer (``[/INST] 12``), or a tokenizer puts one before a text. The
token ``" 12"`` then begins before the answer, so that no position lies where the answer starts, or one that has not
read the space. But what the space is, is known. So the first position takes the source's distribution from before the
space, of which only the tokens that go on with the space say something of the answer:

* The *source's prefix* is taken off these tokens; all others count as unmapped. The *target's prefix* is put before
  what remains, and that is mapped as any token is: to the target token of these bytes; else to that of the source token
  of these bytes; else to the longest target token at its beginning.
* A space may be a token of its own (``" "``, ``"12"``). To a source it is then the beginning of the answer's first
  token: in the place of the space come the source's distribution after it, times its probability. An entry of a space
  alone that is not the text's own token belongs to continuations that nobody knows; it counts as unmapped.
* Of a target, a space of its own is a label too. The position after it can only be reached by answers that the target
  begins so: others are unmapped there.

The text that goes on with these tokens decides, as at any other position (:mod:`fusion_plugins.core.fusion.project`).
So each such position is projected as a text of its own, in which both prefixes are part of the answer, by the same
kernel and with tables in which the source's tokens appear as they are, and once more with their prefix changed
(:mod:`fusion_plugins.core.fusion.prefixed_tables`). There are one or two of them per turn; all others are as before.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray, as_array
from fusion_plugins.core.fusion.flat import Entries, Texts
from fusion_plugins.core.fusion.prefixed_tables import Prefixes
from fusion_plugins.core.jit import compiled

Numbers = npt.NDArray[np.int64]

# How the first token of a span begins: with the span; with white space before it; behind a space of its own; unknown.
WITH_IT, BEFORE, BEHIND_A_SPACE, _UNKNOWN = range(4)
_SPACE = ord(" ")
#: bytes of white space before an answer, at most: so many fit into one number
_MOST_BYTES = 7


class Beginning(NamedTuple):
    """How a span begins on both sides, at least one of which has a prefix.

    Attributes:
        text: number of the text.
        span: number of the span in the text.
        s_form: ``WITH_IT``, ``BEFORE`` or ``BEHIND_A_SPACE``, of the source.
        s_first: the source's first token with bytes of the span, among all its tokens.
        s_before: bytes of this token before the span.
        s_code: the prefix as a number: these bytes, or the space.
        t_form: as of the source.
        t_first: as of the source.
        t_before: as of the source.
        t_code: as of the source.
    """

    text: int
    span: int
    s_form: int
    s_first: int
    s_before: int
    s_code: int
    t_form: int
    t_first: int
    t_before: int
    t_code: int

    @property
    def both_behind_a_space(self) -> bool:
        """Whether both have read the same space as a token of its own."""
        return self.s_form == self.t_form == BEHIND_A_SPACE


class _Start(NamedTuple):
    """One first position. Bytes count from the start of the span, less the target's prefix.

    Attributes:
        at: the target's position.
        label: the position of its label.
        label_end: where the label ends.
        t_stop: where the target's span ends.
        origin: the position from which the source speaks.
        first: the first token of its way.
        last: the token in which the label ends, or the last of the text.
        shift: what makes an end in the source's text a place in the span.
        s_stop: where the source's span ends.
    """

    at: int
    label: int
    label_end: int
    t_stop: int
    origin: int
    first: int
    last: int
    shift: int
    s_stop: int


class FirstPositions(NamedTuple):
    """Some first positions as texts of their own, all with the same prefixes.

    Attributes:
        positions: (P,) where they are among the positions of the target, ascending.
        source: P texts.
        entries: what the source says in them, about the tokens of tables with these prefixes.
        target: P texts of two tokens, the second of which is the label.
        matched: the source's position of each position of ``target``.
    """

    positions: Numbers
    source: Texts
    entries: Entries
    target: Texts
    matched: IntArray


def starts_of_answers(
    beginnings: Numbers,
    matched: IntArray,
    source: Texts,
    entries: Entries,
    target: Texts,
    size: int,
    *,
    strict: bool = False,
    wanted: BoolArray | None = None,
) -> list[tuple[Prefixes, FirstPositions]]:
    """Return the first positions behind a prefix of which the source says something, those of equal prefixes together.

    Args:
        beginnings: what :func:`span_beginnings` returns.
        matched: (N,) int32 source position, inside its text, of each position of the target.
        source: the texts in the source's tokens.
        entries: what the source says at each of them.
        target: the texts in the target's tokens, N in all.
        size: W, the number of the source's tokens.
        strict: whether the source's first token must end where the label does.
        wanted: (N,) bool, positions of the target that may be taken; all by default.
    """
    groups: defaultdict[Prefixes, list[_Start]] = defaultdict(list)
    last = -1
    for beginning in map(Beginning._make, beginnings.tolist()):
        for prefixes, start in _starts_of_span(beginning, matched, source, target):
            first_end = start.label_end if start.first < beginning.s_first else source.ends[start.first] + start.shift
            if start.at <= last or (wanted is not None and not wanted[start.at]):
                continue
            if (strict and first_end != start.label_end) or not _is_said(start, prefixes, entries):
                continue
            groups[prefixes].append(start)
            last = start.at
    return [
        (prefixes, _as_texts(starts, prefixes, source, entries, target, size)) for prefixes, starts in groups.items()
    ]


def _starts_of_span(
    own: Beginning, matched: IntArray, source: Texts, target: Texts
) -> Iterator[tuple[Prefixes, _Start]]:
    """Yield the one or two first positions of a span, by ascending position."""
    s_prefix, t_prefix = _bytes_of(own.s_code), _bytes_of(own.t_code)
    origin = own.s_first - (2 if own.s_form == BEHIND_A_SPACE else 1)
    at, label_end = own.t_first - 1, int(target.ends[own.t_first] - target.spans_of(own.text)[own.span, 0])

    def start(at: int, label_end: int, first: int, before: int) -> _Start:
        (s_start, s_stop), (t_start, t_stop) = source.spans_of(own.text)[own.span], target.spans_of(own.text)[own.span]
        last, shift = first, before - int(s_start)
        while first == own.s_first and last + 1 < source.starts[own.text + 1] and source.ends[last] + shift < label_end:
            last += 1
        t_bytes, s_bytes = int(t_stop - t_start) + before, int(s_stop - s_start) + before
        return _Start(at, at + 1, label_end, t_bytes, origin, first, last, shift, s_bytes)

    joined = own.s_form == BEHIND_A_SPACE and not own.both_behind_a_space
    # The same on both sides is like text that they have in common.
    same = s_prefix == t_prefix and not joined
    prefixes = Prefixes() if same else Prefixes(s_prefix, t_prefix, joined=joined)
    if own.both_behind_a_space:
        # The label is the space itself. Behind it both have read the same.
        if matched[at - 1] < 0:
            yield prefixes, start(at - 1, 1, own.s_first - 1, 1)
    elif own.t_form == BEHIND_A_SPACE:
        yield prefixes, start(at - 1, 1, own.s_first, 1)
        yield Prefixes(s_prefix, read=t_prefix), start(at, label_end, own.s_first, 0)
    elif not same or matched[at] != origin - source.starts[own.text]:
        yield prefixes, start(at, label_end + own.t_before, own.s_first, own.t_before)


def _bytes_of(code: int) -> bytes:
    return code.to_bytes(_MOST_BYTES, "big").lstrip(b"\0")


def _is_said(start: _Start, prefixes: Prefixes, entries: Entries) -> bool:
    """Whether a store has what the source says: it keeps the distributions that its own spans need."""
    if not (entries.ids[start.origin] >= 0).any():
        return False
    known = (entries.ids[start.first - 1] >= 0).any() and not np.isnan(entries.next[start.origin])
    return not prefixes.joined or bool(known)


def _as_texts(
    starts: Sequence[_Start], prefixes: Prefixes, source: Texts, entries: Entries, target: Texts, size: int
) -> FirstPositions:
    n, rows = len(starts), np.array(starts, np.int64)
    at_target, label, label_end, t_stop, origin, first, last, shift, s_stop = rows.T
    lengths = last - first + 2
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    begins = bounds[:-1]
    # The position from which the source speaks, then the tokens that it goes on with.
    at = np.arange(bounds[-1]) - np.repeat(begins + 1 - first, lengths)
    at[begins] = origin
    ids = _moved(source.ids[at], 0, size)
    ids[begins + 1] += prefixes.block_behind * size
    ends = source.ends[at] + np.repeat(shift, lengths)
    ends[begins] = 0
    one_each, two_each, none = np.arange(n + 1), np.arange(0, 2 * n + 1, 2), np.zeros(n)
    return FirstPositions(
        at_target,
        Texts(
            ids,
            as_array(ends, np.int32),
            np.ones(len(ids), np.bool_),
            as_array(np.stack([none, s_stop], axis=1), np.int32),
            bounds,
            one_each,
        ),
        _entries(at, begins, prefixes, source, entries, size),
        Texts(
            as_array(target.ids[np.stack([at_target, label], axis=1)].reshape(-1), np.int32),
            as_array(np.stack([none, label_end], axis=1).reshape(-1), np.int32),
            np.ones(2 * n, np.bool_),
            as_array(np.stack([none, t_stop], axis=1), np.int32),
            two_each,
            one_each,
        ),
        np.tile(np.array([0, -1], np.int32), n),
    )


def _entries(at: Numbers, begins: Numbers, prefixes: Prefixes, source: Texts, entries: Entries, size: int) -> Entries:
    """Collect what the source says; at the first positions about the tokens without their prefix."""
    logprobs, following = entries.logprobs[at], entries.next[at]
    # A token beyond the vocabulary must not be taken for one of the copies.
    ids, first = _moved(entries.ids[at], 0, size), _moved(entries.ids[at[begins]], prefixes.block, size)
    if prefixes.joined:
        # The distribution behind the space stands in the place of the space.
        space, width = at[begins + 1] - 1, ids.shape[1]
        first[entries.ids[at[begins]] == source.ids[space][:, None]] = -1
        ids = np.pad(ids, ((0, 0), (0, width)), constant_values=-1)
        logprobs = np.pad(logprobs, ((0, 0), (0, width)), constant_values=-np.inf)
        ids[begins, width:] = _moved(entries.ids[space], prefixes.block_behind, size)
        logprobs[begins, width:] = entries.logprobs[space] + following[begins][:, None]
        ids[begins, :width] = first
        following[begins] += entries.next[space]
    else:
        ids[begins] = first
    return Entries(as_array(ids, np.int32), as_array(logprobs, np.float32), as_array(following, np.float32))


def _moved(ids: IntArray, block: int, size: int) -> IntArray:
    """Name the tokens of another block; ids beyond the vocabulary, as of a padded output layer, stay no token."""
    beyond = np.where(ids < size, ids + block * size, np.iinfo(np.int32).max)
    return np.where(ids >= 0, beyond, -1).astype(np.int32)


@compiled
def span_beginnings(source, target, s_tokens, t_tokens):  # type: ignore[no-untyped-def]
    """Say how the first token of each span begins, on both sides.

    Args:
        source: the texts in the source's tokens.
        target: the same in the target's, with spans that correspond by their number.
        s_tokens: the source's vocabulary.
        t_tokens: the target's.

    Returns:
        (P, 10) int64, the fields of :class:`Beginning`, of the spans at which a side has a prefix.
    """
    out, n = np.empty((len(target.spans), 10), np.int64), 0
    for b in range(len(target.starts) - 1):
        own, other = slice(source.starts[b], source.starts[b + 1]), slice(target.starts[b], target.starts[b + 1])
        s_side = source.ids[own], source.ends[own], source.exact[own]
        t_side = target.ids[other], target.ends[other], target.exact[other]
        for k in range(target.span_starts[b + 1] - target.span_starts[b]):
            s_span, t_span = source.spans[source.span_starts[b] + k], target.spans[target.span_starts[b] + k]
            s_form, f, taken, s_code = _first_token(s_side, s_span, s_tokens)
            t_form, g, put, t_code = _first_token(t_side, t_span, t_tokens)
            if s_form == _UNKNOWN or t_form == _UNKNOWN or s_form == t_form == WITH_IT:
                continue
            if _agree(s_side[0][f], taken, s_tokens, t_side[0][g], put, t_tokens):
                out[n] = b, k, s_form, source.starts[b] + f, taken, s_code, t_form, target.starts[b] + g, put, t_code
                n += 1
    return out[:n]


@compiled
def _agree(s_id, taken, s_tokens, t_id, put, t_tokens):  # type: ignore[no-untyped-def]
    """Whether two tokens spell the same bytes behind their prefixes, as far as both go."""
    s_flat, s_starts, t_flat, t_starts = s_tokens.flat, s_tokens.starts, t_tokens.flat, t_tokens.starts
    start, t_start, same = s_starts[s_id] + taken, t_starts[t_id] + put, True
    for k in range(min(s_starts[s_id + 1] - start, t_starts[t_id + 1] - t_start)):
        same &= s_flat[start + k] == t_flat[t_start + k]
    return same


@compiled
def _first_token(side, span, tokens):  # type: ignore[no-untyped-def]
    """Find the first token that holds bytes of a span.

    Returns:
        How it begins, the token, the number of bytes before the span that it spells, and these bytes, or the token of
        a space alone before it, as one number.
    """
    ids, ends, exact = side
    flat, starts, special = tokens.flat, tokens.starts, tokens.special
    start, stop = span
    f = np.searchsorted(ends, start, side="right")
    none = _UNKNOWN, f, np.int64(0), np.int64(0)
    if start == stop or f == 0 or f == len(ids) or not exact[f - 1] or not exact[f]:
        return none
    if ids[f] >= len(special) or special[ids[f]]:
        return none
    first = starts[ids[f]]
    length, inside, gap = starts[ids[f] + 1] - first, np.int64(ends[f] - start), np.int64(start - ends[f - 1])
    n = length - inside
    if n == 0 and gap == 0:
        space = ids[f - 1]
        is_space = f >= 2 and space < len(special) and not special[space]
        is_space = is_space and starts[space + 1] - starts[space] == 1 and flat[starts[space]] == _SPACE
        if is_space and exact[f - 2] and start - ends[f - 2] <= 1:
            return BEHIND_A_SPACE, f, np.int64(0), np.int64(_SPACE)
        return WITH_IT, f, np.int64(0), np.int64(0)
    # One byte more than the text has is the tokenizer's own space.
    if not gap <= n <= gap + 1 or n > _MOST_BYTES or (n > gap and flat[first] != _SPACE):
        return none
    code = np.int64(0)
    for k in range(n):
        byte = flat[first + k]
        if byte != _SPACE and not 9 <= byte <= 13:
            return none
        code = (code << 8) + byte
    return BEFORE, f, n, code
