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
kernel and with :class:`Tables` in which the source's tokens appear as they are, and once more with their prefix changed.
There are one or two of them per turn, and whatever else holds no such prefix is not touched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray, as_array
from fusion_plugins.core.fusion.flat import Entries, Texts
from fusion_plugins.core.fusion.projection_kernel import IS_EXACT, Tables
from fusion_plugins.core.fusion.vocabulary_map import ASKED_THE_TOKENIZER
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes, bytes_of_tokens

Numbers = npt.NDArray[np.int64]

# How the first token of a span begins: with the span; with white space before it; behind a space of its own; unknown.
_WITH_IT, _BEFORE, _BEHIND_A_SPACE, _UNKNOWN = range(4)
_SPACE = ord(" ")
#: bytes of white space before an answer, at most: so many fit into one number
_MOST_BYTES = 7
#: columns of :func:`find_starts`
(
    _AT, _LABEL, _LABEL_END, _TARGET_BYTES, _OUTSIDE,
    _FROM, _FIRST, _LAST, _START, _SOURCE_BYTES, _SHIFT,
    _TAKEN_OFF, _PUT_BEFORE, _READ, _JOINED,
) = range(15)  # fmt: skip


class Prefixes(NamedTuple):
    """What stands before an answer, as far as it is part of its first token.

    Attributes:
        source: bytes at the beginning of the source's token.
        target: bytes at the beginning of the target's.
        read: the token of the target that stands before the position, and whose bytes are in the source's token.
        joined: whether the source has a token of its own for its prefix.
    """

    source: bytes
    target: bytes
    read: bytes
    joined: bool

    @property
    def any(self) -> bool:
        """Whether there is anything to change: a prefix that both sides have is left as it is."""
        return bool(self.source or self.target or self.read)


@dataclass(frozen=True)
class PrefixedTables:
    """Makes the tables of prefixes, each pair of them once.

    Attributes:
        source: the source's W tokens.
        target: the target's V tokens.
        ordinary: (V,) bool, the tokens that the target uses for text.
        plain: both for the kernel.
        method: of the vocabulary map.
    """

    source: TokenBytes
    target: TokenBytes
    ordinary: BoolArray
    plain: Tables
    method: str
    made: dict[Prefixes, Tables] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # What is made on the way is neither sent to other processes nor part of what a plan is.
        return {**self.__dict__, "made": {}}

    def of(self, prefixes: Prefixes) -> Tables:
        """Return the tables in which the source's tokens stand without their prefix, behind the tokens as they are."""
        if not prefixes.any:
            return self.plain
        if prefixes not in self.made:
            self.made[prefixes] = _tables(self, prefixes)
        return self.made[prefixes]


class Starts(NamedTuple):
    """Some first positions as texts of their own, all with the same prefixes.

    Attributes:
        positions: (P,) where they are among the positions of the target, ascending.
        source: P texts.
        entries: what the source says in them; ids of :func:`prefixed_tables`.
        target: P texts of two tokens, the second of which is the label.
        matched: the source's position of each position of ``target``.
        inside: how many of the positions lie in a span.
    """

    positions: Numbers
    source: Texts
    entries: Entries
    target: Texts
    matched: IntArray
    inside: int


def starts_of_answers(
    found: Numbers, source: Texts, entries: Entries, target: Texts, size: int
) -> Iterator[tuple[Prefixes, Starts]]:
    """Yield the positions of :func:`find_starts`, those of equal prefixes together.

    Args:
        found: what :func:`find_starts` returns.
        source: the texts in the source's tokens.
        entries: what the source says at each of them.
        target: the texts in the target's tokens.
        size: W, the number of the source's tokens.
    """
    keys, group = np.unique(found[:, _TAKEN_OFF:], axis=0, return_inverse=True)
    for number, (taken_off, put_before, read, joined) in enumerate(keys.tolist()):
        prefixes = Prefixes(_bytes_of(taken_off), _bytes_of(put_before), _bytes_of(read), bool(joined))
        rows = found[group.reshape(-1) == number]
        yield prefixes, _starts(rows, prefixes, source, entries, target, size)


def _bytes_of(code: int) -> bytes:
    return code.to_bytes(_MOST_BYTES, "big").lstrip(b"\0")


def _starts(rows: Numbers, prefixes: Prefixes, source: Texts, entries: Entries, target: Texts, size: int) -> Starts:
    n = len(rows)
    lengths = rows[:, _LAST] - rows[:, _FIRST] + 2
    starts = np.concatenate([[0], np.cumsum(lengths)])
    before = starts[:-1]
    # The position from which the source speaks, then the tokens that it goes on with.
    at = np.arange(starts[-1]) - np.repeat(before + 1 - rows[:, _FIRST], lengths)
    at[before] = rows[:, _FROM]
    ids = source.ids[at].astype(np.int32)
    ids[before + 1] += _block(prefixes, size)
    ends = (source.ends[at] + np.repeat(rows[:, _SHIFT] - rows[:, _START], lengths)).astype(np.int32)
    ends[before] = 0
    s_spans = np.stack([np.zeros(n), rows[:, _SOURCE_BYTES]], axis=1).astype(np.int32)
    t_spans = np.stack([np.zeros(n), rows[:, _TARGET_BYTES]], axis=1).astype(np.int32)
    t_ends = np.stack([np.zeros(n), rows[:, _LABEL_END]], axis=1).astype(np.int32).reshape(-1)
    t_ids = target.ids[rows[:, [_AT, _LABEL]]].reshape(-1).astype(np.int32)
    one_each, two_each = np.arange(n + 1), np.arange(0, 2 * n + 1, 2)
    return Starts(
        rows[:, _AT],
        Texts(ids, ends, np.ones(len(ids), np.bool_), s_spans, starts, one_each),
        _entries(rows, prefixes, source, entries, at, before, size),
        Texts(t_ids, t_ends, np.ones(2 * n, np.bool_), t_spans, two_each, one_each),
        np.tile(np.array([0, -1], np.int32), n),
        n - int(rows[:, _OUTSIDE].sum()),
    )


def _block(prefixes: Prefixes, size: int) -> int:
    """Where the tokens behind the prefix begin among those of :func:`prefixed_tables`."""
    if not prefixes.joined:
        return size if prefixes.any else 0
    return 2 * size if prefixes.target else 0


def _entries(
    rows: Numbers, prefixes: Prefixes, source: Texts, entries: Entries, at: Numbers, before: Numbers, size: int
) -> Entries:
    """Collect what the source says; at the first positions about the tokens without their prefix."""
    ids, logprobs, following = entries.ids[at], entries.logprobs[at], entries.next[at]
    first = _moved(ids[before], size, size if prefixes.any else 0)
    if prefixes.joined:
        # The distribution after the space stands in the place of the space.
        space, width = rows[:, _FIRST] - 1, ids.shape[1]
        first[ids[before] == source.ids[space][:, None]] = -1
        ids = np.pad(ids, ((0, 0), (0, width)), constant_values=-1)
        logprobs = np.pad(logprobs, ((0, 0), (0, width)), constant_values=-np.inf)
        ids[before, width:] = _moved(entries.ids[space], size, _block(prefixes, size))
        logprobs[before, width:] = entries.logprobs[space] + following[before][:, None]
        ids[before, :width] = first
        following[before] += entries.next[space]
    else:
        ids[before] = first
    return Entries(as_array(ids, np.int32), as_array(logprobs, np.float32), as_array(following, np.float32))


def _moved(ids: IntArray, size: int, block: int) -> IntArray:
    """Name the tokens of another block; ids beyond the vocabulary, as of a padded output layer, stay no token."""
    beyond = np.where(ids < size, ids + block, np.iinfo(np.int32).max)
    return np.where(ids >= 0, beyond, -1).astype(np.int32)


def _tables(made: PrefixedTables, prefixes: Prefixes) -> Tables:
    """Put the source's tokens without their prefix, and with the target's, behind the tokens as they are."""
    plain, size = made.plain, len(made.plain.mapped)
    tokens = bytes_of_tokens(made.source, np.arange(size, dtype=np.int32))
    find = _Destinations(made, tokens)
    spelled = [
        prefixes.target + token[len(prefixes.source) :] if token.startswith(prefixes.source) and not special else b""
        for token, special in zip(tokens, plain.s_special.tolist(), strict=True)
    ]
    if prefixes.joined and prefixes.target:
        spelled += [
            prefixes.target + token if token and not special else b""
            for token, special in zip(tokens, plain.s_special.tolist(), strict=True)
        ]
    known = [find(token, prefixes.read) if token else (-1, -1, -1) for token in spelled]
    mapped = np.array(known, np.int32).reshape(-1, 3)
    # A token that is one of the source's is divided as that is.
    widths = np.append(np.diff(plain.share_starts), 0)[mapped[:, 2]]
    own = [np.arange(plain.share_starts[row], plain.share_starts[row + 1]) for row in mapped[widths > 0, 2].tolist()]
    shares = np.concatenate([np.arange(len(plain.share_ids)), *own]).astype(np.int64)
    lengths = np.fromiter(map(len, spelled), np.int64, len(spelled))
    copies = 1 + len(spelled) // size if size else 1
    return plain._replace(
        mapped=np.concatenate([plain.mapped, mapped[:, :2]]),
        share_starts=as_array(
            np.concatenate([plain.share_starts, plain.share_starts[-1] + np.cumsum(widths)]), np.int32
        ),
        share_ids=plain.share_ids[shares],
        share_weights=plain.share_weights[shares],
        s_bytes=np.concatenate([plain.s_bytes, np.frombuffer(b"".join(spelled), np.uint8)]),
        s_starts=np.concatenate([plain.s_starts, plain.s_starts[-1] + np.cumsum(lengths)]),
        s_special=np.tile(plain.s_special, copies),
        s_closing=np.tile(plain.s_closing, copies),
    )


class _Destinations:
    """Says which target token some bytes go to, as the map says it of the source's tokens."""

    def __init__(self, made: PrefixedTables, tokens: Sequence[bytes]) -> None:
        self._mapped, self._method = made.plain.mapped, made.method
        names = bytes_of_tokens(made.target, np.arange(len(made.ordinary), dtype=np.int32))
        self._target = {names[index]: index for index in np.flatnonzero(made.ordinary)[::-1].tolist()}
        ordinary = np.flatnonzero(~made.plain.s_special)[::-1].tolist()
        self._source = {tokens[index]: index for index in ordinary if tokens[index]}
        self._longest = max(map(len, self._target), default=0)

    def __call__(self, token: bytes, read: bytes) -> tuple[int, int, int]:
        """Return a row of `Tables.mapped`, and the source's token of these bytes, -1 for none."""
        if read and self._first(read + token) != self._target.get(read):
            return -1, -1, -1
        if token in self._target:
            return self._target[token], IS_EXACT, -1
        if token in self._source:
            row = self._source[token]
            return int(self._mapped[row, 0]), int(self._mapped[row, 1]), row
        begins = self._beginning(token)
        return (-1 if self._method == "exact" else begins), begins, -1

    def _first(self, token: bytes) -> int | None:
        """Return the target's first token of some bytes, as far as is known."""
        if token in self._target:
            return self._target[token]
        row = self._source.get(token, -1)
        if row >= 0 and self._method in ASKED_THE_TOKENIZER:
            return int(self._mapped[row, 0])
        return self._beginning(token)

    def _beginning(self, token: bytes) -> int:
        """Return the longest target token that some bytes begin with, -1 for none."""
        ends = range(min(len(token), self._longest), 0, -1)
        return next((self._target[token[:end]] for end in ends if token[:end] in self._target), -1)


@compiled
def find_starts(matched, source, entries, target, s_tokens, t_tokens, strict):  # type: ignore[no-untyped-def]
    """Find the first positions of spans at which a side has a prefix that is not part of the span.

    Args:
        matched: (N,) int32 source position, inside its text, of each position of the target.
        source: the texts in the source's tokens.
        entries: what the source says at each of them.
        target: the texts in the target's tokens, N in all.
        s_tokens: the source's vocabulary.
        t_tokens: the target's.
        strict: whether the source's first token must end where the label does.

    Returns:
        (P, 15) int64, ascending by position. Of the target the position, the position of the label, the label's end and
        the bytes of the span, both with the target's prefix, and whether no span holds the position. Of the source the
        position from which it speaks, the first and the last token of its way through the label, the start of the
        span, its bytes with the target's prefix, and the bytes of that. Then the prefixes: see :class:`Prefixes`.
    """
    out, n = np.empty((2 * len(target.spans), 15), np.int64), 0
    for b in range(len(target.starts) - 1):
        own, other = slice(source.starts[b], source.starts[b + 1]), slice(target.starts[b], target.starts[b + 1])
        s_side = source.ids[own], source.ends[own], source.exact[own]
        t_side = target.ids[other], target.ends[other], target.exact[other]
        said = entries.ids[own], entries.next[own]
        spans = target.spans[target.span_starts[b] : target.span_starts[b + 1]]
        last_position = -1
        for m in range(len(spans)):
            s_span = source.spans[source.span_starts[b] + m]
            s_form, f, taken, s_code = _first_token(s_side, s_span, s_tokens)
            t_form, g, put, t_code = _first_token(t_side, spans[m], t_tokens)
            if s_form == _UNKNOWN or t_form == _UNKNOWN or s_form == t_form == _WITH_IT:
                continue
            if not _agree(s_side[0][f], taken, s_tokens, t_side[0][g], put, t_tokens):
                continue
            # A label with the target's prefix, or the prefix alone; then the label behind the prefix.
            for behind in range(2):
                if behind == 0 and t_form == _WITH_IT:
                    continue
                if behind == 1 and (t_form == _BEFORE or s_form == t_form == _BEHIND_A_SPACE):
                    continue
                alone = behind == 0 and t_form == _BEHIND_A_SPACE  # the label is the space
                same_space = alone and s_form == _BEHIND_A_SPACE
                joined = s_form == _BEHIND_A_SPACE and not same_space
                t, label = (g - 2, g - 1) if alone else (g - 1, g)
                u, first = (f - 2 if s_form == _BEHIND_A_SPACE else f - 1), (f - 1 if same_space else f)
                before = np.int64(0)
                if behind == 0:
                    before = np.int64(1 if alone else put)
                shift = before - s_span[0]
                label_end = before if alone else t_side[1][g] - spans[m, 0] + before
                first_end = before if same_space else s_side[1][f] + shift
                if t <= last_position or (strict and first_end != label_end):
                    continue
                # Both read the same: the space is the beginning of both tokens, and no prefix to either.
                if behind == 0 and s_form == t_form == _BEFORE and s_code == t_code and matched[other][t] == u:
                    continue
                if not _is_stored(said, u) or (joined and (not _is_stored(said, f - 1) or np.isnan(said[1][u]))):
                    continue
                # The same prefix on both sides is like text that both have in common.
                same = behind == 0 and not joined and s_code == t_code
                last = first
                while last + 1 < len(s_side[0]) and last >= f and s_side[1][last] + shift < label_end:
                    last += 1
                outside = True
                for k in range(len(spans)):
                    outside &= not spans[k, 0] <= t_side[1][t] <= spans[k, 1]
                out[n] = (
                    target.starts[b] + t, target.starts[b] + label, label_end, spans[m, 1] - spans[m, 0] + before,
                    np.int64(outside), source.starts[b] + u, source.starts[b] + first, source.starts[b] + last,
                    np.int64(s_span[0]), s_span[1] - s_span[0] + before, before,
                    0 if same else s_code, t_code if behind == 0 and not same else 0, t_code if behind == 1 else 0,
                    np.int64(joined),
                )  # fmt: skip
                n += 1
                last_position = t
    return out[:n]


@compiled
def _is_stored(said, u):  # type: ignore[no-untyped-def]
    """Whether the distribution at a position is known: a store has those that its spans need."""
    ids, following = said
    stored = False
    for k in range(ids.shape[1]):
        stored |= ids[u, k] >= 0
    return stored


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
            return _BEHIND_A_SPACE, f, np.int64(0), np.int64(_SPACE)
        return _WITH_IT, f, np.int64(0), np.int64(0)
    # One byte more than the text has is the tokenizer's own space.
    if not gap <= n <= gap + 1 or n > _MOST_BYTES or (n > gap and flat[first] != _SPACE):
        return none
    code = np.int64(0)
    for k in range(n):
        byte = flat[first + k]
        if byte != _SPACE and not 9 <= byte <= 13:
            return none
        code = (code << 8) + byte
    return _BEFORE, f, n, code
