"""The bytes of a vocabulary in arrays, as compiled kernels read them."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import BoolArray, IntArray
from fusion_plugins.core.jit import compiled
from fusion_plugins.core.text.token_table import Role, TokenTable

__all__ = ["TokenBytes", "is_prefix", "longest_beginnings", "token_bytes"]

_CACHED = 32
_BYTES: dict[Any, "TokenBytes"] = {}
_BEGINNINGS: dict[Any, IntArray] = {}


class TokenBytes(NamedTuple):
    """Token ``i`` is ``flat[starts[i] : starts[i + 1]]``.

    Attributes:
        flat: all bytes, uint8.
        starts: (W + 1,) int64.
        special: (W,) bool.
        closing: (W,) bool, the tokens that end a turn or a text.
    """

    flat: npt.NDArray[np.uint8]
    starts: npt.NDArray[np.int64]
    special: BoolArray
    closing: BoolArray


def token_bytes(table: TokenTable) -> TokenBytes:
    """Return the arrays of a table; made once per process and vocabulary."""
    key = _key(table)
    found = _BYTES.get(key)
    if found is None:
        flat = np.frombuffer(b"".join(table.tokens), np.uint8).copy()
        starts = np.concatenate([[0], np.cumsum(table.lengths, dtype=np.int64)])
        closing = np.zeros(table.vocab_size, np.bool_)
        closing[_closing_ids(table)] = True
        found = TokenBytes(flat, starts, table.special.copy(), closing)
        _keep(_BYTES, key, found)
    return found


def longest_beginnings(source: TokenTable, target: TokenTable) -> IntArray:
    """Return (W,) int32: the longest ordinary target token that each source token begins with, -1 for none.

    Of equal target tokens the lowest id counts. Made once per process and pair of vocabularies.
    """
    key = _key(source), _key(target)
    found = _BEGINNINGS.get(key)
    if found is None:
        ids = {target.tokens[i]: i for i in np.flatnonzero(target.ordinary)[::-1].tolist()}
        longest = int(target.lengths.max(initial=0))
        found = np.full(source.vocab_size, -1, np.int32)
        for row in np.flatnonzero(~source.special).tolist():
            token = source.tokens[row]
            ends = range(min(len(token), longest), 0, -1)
            found[row] = next((ids[token[:end]] for end in ends if token[:end] in ids), -1)
        _keep(_BEGINNINGS, key, found)
    return found


def _closing_ids(table: TokenTable) -> list[int]:
    return [table.role_ids[role] for role in (Role.EOS, Role.END_OF_TURN) if role in table.role_ids]


def _key(table: TokenTable) -> tuple[Any, ...]:
    """What the arrays depend on: besides the fingerprint, which leaves out the end of a turn, what it leaves out."""
    return table.fingerprint, table.byte_fallback, *_closing_ids(table)


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _CACHED:
        cache.pop(next(iter(cache)))
    cache[key] = value


@compiled
def is_prefix(short, short_id, long, long_id, skipped):  # type: ignore[no-untyped-def]
    """Whether a token's bytes, after the first ``skipped``, are not empty and begin another token's bytes."""
    start = short.starts[short_id] + skipped
    length = short.starts[short_id + 1] - start
    other = long.starts[long_id]
    if length <= 0 or length > long.starts[long_id + 1] - other:
        return False
    for i in range(length):
        if short.flat[start + i] != long.flat[other + i]:
            return False
    return True
