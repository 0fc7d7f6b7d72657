"""Looks up many byte strings among the tokens of a vocabulary at once.

A string is looked up by a hash of its bytes. The hash grows byte by byte, so one pass over a string makes those of all
its beginnings, and the longest that is a token is tried first: most strings are a token, or nearly one.
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
_ID = (1 << 32) - 1


class Strings(NamedTuple):
    """Byte strings one after the other: string ``i`` is ``flat[starts[i] : starts[i + 1]]``.

    Attributes:
        flat: uint8, their bytes.
        starts: (N + 1,) int64.
    """

    flat: Bytes
    starts: Starts

    @classmethod
    def of(cls, tokens: TokenBytes) -> "Strings":
        """Return the tokens of a vocabulary."""
        return cls(tokens.flat, tokens.starts)

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
        slots: (2**n,) int64, a hash table: 31 bits of the hash, then the id; -1 is free.
    """

    tokens: Strings
    slots: npt.NDArray[np.int64]

    @classmethod
    def of(cls, tokens: TokenBytes, chosen: BoolArray) -> "TokenIndex":
        """Index some tokens of a vocabulary.

        Args:
            tokens: the W tokens.
            chosen: (W,) bool, those that can be found; an empty one never is.
        """
        slots = np.full(1 << int(2 * max(1, chosen.sum())).bit_length(), -1, np.int64)
        _insert(tokens.flat, tokens.starts, np.flatnonzero(chosen), slots)
        return cls(Strings.of(tokens), slots)

    def find(self, strings: Strings) -> IntArray:
        """Return (N,) int32: the token of the same bytes as each string, -1 for none."""
        found: IntArray = _look_up(*strings, *self.tokens, self.slots, True)
        return found

    def longest(self, strings: Strings) -> IntArray:
        """Return (N,) int32: the longest token that each string begins with, -1 for none."""
        found: IntArray = _look_up(*strings, *self.tokens, self.slots, False)
        return found

    def are_whole(self, found: IntArray, strings: Strings) -> BoolArray:
        """Return (N,) bool: where the longest token that a string begins with is the whole string."""
        whole: BoolArray = (found >= 0) & (np.append(self.tokens.lengths, 0)[found] == strings.lengths)
        return whole


@compiled
def _replace(flat, starts, taken, put, out, out_starts):  # type: ignore[no-untyped-def]
    for i in range(len(out_starts) - 1):
        if out_starts[i] < out_starts[i + 1]:
            rest = out_starts[i] + len(put)
            out[out_starts[i] : rest] = put
            out[rest : out_starts[i + 1]] = flat[starts[i] + taken : starts[i + 1]]


@compiled
def _insert(flat, starts, ids, slots):  # type: ignore[no-untyped-def]
    mask = len(slots) - 1
    for i in ids:
        if starts[i] == starts[i + 1]:
            continue
        hashed = _EMPTY
        for at in range(starts[i], starts[i + 1]):
            hashed = (hashed ^ np.uint64(flat[at])) * _PRIME
        slot, tag = _place(hashed, mask)
        # Equal tokens lie one behind the other; the first is found.
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = (tag << 32) | i


@compiled
def _look_up(flat, starts, t_flat, t_starts, slots, whole):  # type: ignore[no-untyped-def]
    out = np.full(len(starts) - 1, -1, np.int32)
    longest = np.int64(0)
    for entry in slots:
        if entry >= 0:
            i = entry & _ID
            longest = max(longest, t_starts[i + 1] - t_starts[i])
    hashes = np.empty(longest + 1, np.uint64)
    for n in range(len(out)):
        start, size = starts[n], starts[n + 1] - starts[n]
        if whole and size > longest:
            continue
        size, hashes[0] = min(size, longest), _EMPTY
        for k in range(size):
            hashes[k + 1] = (hashes[k] ^ np.uint64(flat[start + k])) * _PRIME
        for k in range(size, size - 1 if whole else 0, -1):
            out[n] = _token(hashes[k], flat[start : start + k], t_flat, t_starts, slots)
            if out[n] >= 0:
                break
    return out


@compiled
def _token(hashed, string, t_flat, t_starts, slots):  # type: ignore[no-untyped-def]
    """Find the token of some bytes, -1 for none."""
    mask = len(slots) - 1
    slot, tag = _place(hashed, mask)
    while slots[slot] >= 0:
        if slots[slot] >> 32 == tag:
            i = slots[slot] & _ID
            first = t_starts[i]
            same = t_starts[i + 1] - first == len(string)
            k = 0
            while same and k < len(string):
                same = string[k] == t_flat[first + k]
                k += 1
            if same:
                return i
        slot = (slot + 1) & mask
    return np.int64(-1)


@compiled
def _place(hashed, mask):  # type: ignore[no-untyped-def]
    """Return where to look for a hash first, and its upper 31 bits, which tell most other strings apart."""
    return np.int64(hashed ^ (hashed >> np.uint64(32))) & mask, np.int64(hashed >> np.uint64(33))
