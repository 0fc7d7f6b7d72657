"""The byte of a text at which each token ends: by the tokens' bytes, or by offsets where a normaliser changed text."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.text.token_table import Role, TokenTable

Positions = npt.NDArray[np.int64]


def token_ends(
    table: TokenTable, ids: IntArray, offsets: Positions, text: str, raw: bytes
) -> tuple[IntArray, BoolArray]:
    """Find the byte at which each token of one encoding ends.

    Args:
        table: the tokenizer's table.
        ids: (T,) int32 token ids.
        offsets: (T, 2) character ranges as the tokenizer reports them.
        text: the text.
        raw: its UTF-8 bytes.

    Returns:
        (T,) int32 ends, non-decreasing, and (T,) bool, whether each end is exact. Text that the tokenizer drops belongs
        to the token before it, so that a token always ends where the next one starts.
    """
    spans = _char_to_byte(text, raw)[offsets]
    size = len(ids)
    found = _Found(table, ids.tolist(), spans[:, 0].tolist(), spans[:, 1].tolist(), raw, [0] * size, [True] * size)
    # A special token that the tokenizer added itself has no bytes of the text.
    content = np.flatnonzero(~table.special[ids] | (offsets[:, 0] < offsets[:, 1]))
    if content.size:
        first, last = int(content[0]), int(content[-1]) + 1
        if not found.by_bytes(first, last, 0, len(raw)):
            found.by_segments(first, last)
    ends = np.maximum.accumulate(np.array(found.ends, np.int32))
    return ends, np.array(found.exact, np.bool_)


def spelled_ends(
    table: TokenTable, ids: Sequence[int], raw: bytes, start: int, least: int
) -> npt.NDArray[np.int32] | None:
    """Return where tokens end that spell the bytes from ``start`` on, perhaps after one space of the tokenizer.

    Args:
        table: the tokenizer's table.
        ids: T token ids.
        raw: the bytes of the text.
        start: the first byte that they spell.
        least: the byte that the last one ends at, or behind.

    Returns:
        (T,) int32; None where they spell other bytes, or end before ``least``.
    """
    lengths = [len(table.tokens[index]) for index in ids]
    spelled = b"".join([table.tokens[index] for index in ids])
    for extra in (0, 1) if table.prefix_space and spelled.startswith(b" ") else (0,):
        stop = start + len(spelled) - extra
        if stop >= least and raw[start:stop] == spelled[extra:]:
            ends = np.cumsum(lengths, dtype=np.int32) + np.int32(start - extra)
            return np.maximum(ends, start).astype(np.int32)
    return None


def ends_by_bytes(table: TokenTable, ids: IntArray, raw: bytes) -> tuple[IntArray, BoolArray] | None:
    """Return what :func:`token_ends` does where the tokens spell the whole text; None where offsets have to say it.

    Special tokens before and after all others are those that the tokenizer added: if they were of the text, the others
    would not spell all of it.
    """
    content = np.flatnonzero(~table.special[ids])
    if not content.size:
        return None
    first, last = int(content[0]), int(content[-1]) + 1
    tokens = table.tokens
    spelled = b"".join([tokens[index] for index in ids[first:last].tolist()])
    extra = _extra_bytes(table, spelled, raw)
    if extra is None:
        return None
    ends = np.zeros(len(ids), np.int32)
    ends[first:last] = np.cumsum(table.lengths[ids[first:last]]) - extra
    return np.maximum.accumulate(ends), np.ones(len(ids), np.bool_)


def _extra_bytes(table: TokenTable, spelled: bytes, raw: bytes) -> int | None:
    """Return how many bytes tokens spell before a text: 0, or 1 for a space that the tokenizer added, or None."""
    extra = len(spelled) - len(raw)
    if extra not in (0, 1) or not spelled.endswith(raw):
        return None
    return None if extra == 1 and not (table.prefix_space and spelled.startswith(b" ")) else extra


def _char_to_byte(text: str, raw: bytes) -> Positions:
    if len(text) == len(raw):
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])


@dataclass
class _Found:
    """The ends of one encoding while they are being found.

    In the methods, tokens ``first .. last - 1`` cover the bytes ``start .. stop - 1``.
    """

    table: TokenTable
    ids: list[int]
    begins: list[int]  # first byte of each token by the tokenizer's offsets
    stops: list[int]  # byte after the last, by the same
    raw: bytes
    ends: list[int]
    exact: list[bool]

    def by_bytes(self, first: int, last: int, start: int, stop: int) -> bool:
        """Take running sums, if the tokens spell the bytes, perhaps after one space that the tokenizer added."""
        extra = _extra_bytes(self.table, self._spelled(first, last), self.raw[start:stop])
        if extra is None:
            return False
        lengths = [len(self.table.tokens[index]) for index in self.ids[first:last]]
        self.ends[first:last] = list(accumulate(lengths, initial=start - extra))[1:]
        return True

    def by_segments(self, first: int, last: int) -> None:
        """Cut at the special tokens that the text contains, and find the ends between them piece by piece."""
        start = 0
        for at in range(first, last):
            if self.table.roles[self.ids[at]] in (None, Role.UNK):
                continue
            end = self.stops[at]
            self._segment(first, at, start, self.begins[at])
            self.ends[at] = end
            first, start = at + 1, end
        self._segment(first, last, start, len(self.raw))

    def _segment(self, first: int, last: int, start: int, stop: int) -> None:
        if self.by_bytes(first, last, start, stop):
            return
        position = start
        for left, right in self._groups(first, last):
            position = self._group(left, right, position)
        if position < stop:
            self._drop(last, stop)

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut where the offsets of neighbours do not overlap: tokens of one group share a character."""
        left, end = first, -1
        for at in range(first, last):
            if at > left and self.begins[at] >= end:
                yield left, at
                left = at
            end = max(end, self.stops[at])
        if left < last:
            yield left, last

    def _group(self, left: int, right: int, position: int) -> int:
        """Locate one group that starts at ``position`` or later, and return where it ends."""
        begin, end = self.begins[left], max(position, *self.stops[left:right])
        if self.by_bytes(left, right, position, end):
            return end
        gap, spelled = self.raw[position:begin], self._spelled(left, right)
        # Offsets may leave out spaces that the token spells; what it does not spell of the gap was dropped.
        dropped = next(cut for cut in range(len(gap) + 1) if spelled.startswith(gap[cut:]))
        if dropped:
            self._drop(left, position + dropped)
            if self.by_bytes(left, right, position + dropped, end):
                return end
        # The normaliser changed these characters: only the end of the whole group is known.
        self.ends[left:right] = self.stops[left:right]
        self.exact[left:right] = [False] * (right - left)
        self._end(right - 1, end)
        return end

    def _drop(self, at: int, position: int) -> None:
        """Give the text before ``position``, which no token spells, to the token before token ``at``."""
        if at > 0:
            self._end(at - 1, position)

    def _end(self, at: int, position: int) -> None:
        """Let a token end next to changed or dropped text; the end is not exact inside a cluster of characters."""
        following = self.raw[position : position + 4].decode(errors="ignore")[:1]
        self.ends[at] = position
        # A normaliser may change a character together with the marks and joiners behind it.
        self.exact[at] = not (following and (unicodedata.category(following)[0] == "M" or following == "\u200d"))

    def _spelled(self, first: int, last: int) -> bytes:
        tokens = self.table.tokens
        return b"".join([tokens[index] for index in self.ids[first:last]])
