"""Looks up many byte strings among the tokens of a vocabulary at once.

A string is looked up by a hash of its bytes. The hash grows byte by byte, so one pass over a string finds the longest
token at its beginning as well.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_bytes import TokenBytes

Bytes = npt.NDArray[np.uint8]
Starts = npt.NDArray[np.int64]

# FNV-1a with 64 bits.
_EMPTY = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_HALF = np.uint64(32)


class Strings(NamedTuple):
    """Byte strings one after the other: string ``i`` is ``flat[starts[i] : starts[i + 1]]``.

    Attributes:
        flat: uint8, their bytes.
        starts: (N + 1,) int64.
    """

    flat: Bytes
    starts: Starts

    @property
    def lengths(self) -> Starts:
        """(N,) bytes of each."""
        return np.diff(self.starts)

    def start_with(self, prefix: bytes) -> BoolArray:
        """(N,) bool, the strings that begin with ``prefix``."""
        found = self.lengths >= len(prefix)
        for place, byte in enumerate(prefix):
            found[found] = self.flat[self.starts[:-1][found] + place] == byte
        return found

    def replaced(self, chosen: BoolArray, taken: int, put: bytes) -> "Strings":
        """Return the strings with ``put`` in the place of their first bytes.

        Args:
            chosen: (N,) bool, the strings to return so; the others become empty.
            taken: number of bytes that are replaced; a chosen string has so many.
            put: the new bytes.
        """
        lengths = np.where(chosen, self.lengths + len(put) - taken, 0)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.empty(starts[-1], np.uint8)
        _replace(self.flat, self.starts, taken, np.frombuffer(put, np.uint8), flat, starts)
        return Strings(flat, starts)


class TokenIndex(NamedTuple):
    """The tokens of a vocabulary that strings are looked up among; of equal tokens the one with the lowest id.

    Attributes:
        tokens: the whole vocabulary.
        slots: (2**n,) int32, a hash table of ids; -1 is free.
    """

    tokens: Strings
    slots: IntArray

    @classmethod
    def of(cls, tokens: TokenBytes, chosen: BoolArray) -> "TokenIndex":
        """Index some tokens of a vocabulary.

        Args:
            tokens: the W tokens.
            chosen: (W,) bool, those that can be found; an empty one never is.
        """
        slots = np.full(1 << int(2 * max(1, chosen.sum())).bit_length(), -1, np.int32)
        _insert(tokens.flat, tokens.starts, np.flatnonzero(chosen), slots)
        return cls(Strings(tokens.flat, tokens.starts), slots)

    def find(self, strings: Strings) -> IntArray:
        """Return (N,) int32: the token of the same bytes as each string, -1 for none."""
        found: IntArray = _look_up(*strings, *self.tokens, self.slots, True)
        return found

    def longest(self, strings: Strings) -> IntArray:
        """Return (N,) int32: the longest token that each string begins with, -1 for none."""
        found: IntArray = _look_up(*strings, *self.tokens, self.slots, False)
        return found


@compiled
def _replace(flat, starts, taken, put, out, out_starts):  # type: ignore[no-untyped-def]
    for i in range(len(out_starts) - 1):
        if out_starts[i] < out_starts[i + 1]:
            rest = out_starts[i] + len(put)
            out[out_starts[i] : rest] = put
            out[rest : out_starts[i + 1]] = flat[starts[i] + taken : starts[i + 1]]


@compiled
def _insert(flat, starts, ids, slots):  # type: ignore[no-untyped-def]
    for i in ids:
        start, stop = starts[i], starts[i + 1]
        if start == stop:
            continue
        hashed = _EMPTY
        for at in range(start, stop):
            hashed = (hashed ^ np.uint64(flat[at])) * _PRIME
        slot = _slot(hashed, flat, start, stop, flat, starts, slots)
        if slots[slot] < 0:
            slots[slot] = i


@compiled
def _look_up(flat, starts, t_flat, t_starts, slots, whole):  # type: ignore[no-untyped-def]
    out = np.full(len(starts) - 1, -1, np.int32)
    longest = np.int64(0)
    for i in slots:
        if i >= 0:
            longest = max(longest, t_starts[i + 1] - t_starts[i])
    for n in range(len(out)):
        start, stop = starts[n], starts[n + 1]
        if whole and stop - start > longest:
            continue
        hashed = _EMPTY
        for at in range(start, min(stop, start + longest)):
            hashed = (hashed ^ np.uint64(flat[at])) * _PRIME
            if whole and at + 1 < stop:
                continue
            found = slots[_slot(hashed, flat, start, at + 1, t_flat, t_starts, slots)]
            if found >= 0:
                out[n] = found
    return out


@compiled
def _slot(hashed, flat, start, stop, t_flat, t_starts, slots):  # type: ignore[no-untyped-def]
    """Find the slot of a string: that of the token of its bytes, or a free one."""
    mask = np.int64(len(slots) - 1)
    slot = np.int64(hashed ^ (hashed >> _HALF)) & mask
    while slots[slot] >= 0:
        first, last = t_starts[slots[slot]], t_starts[slots[slot] + 1]
        if last - first == stop - start:
            same = True
            for k in range(stop - start):
                same &= flat[start + k] == t_flat[first + k]
            if same:
                break
        slot = (slot + 1) & mask
    return slot
