"""The bytes of a vocabulary in arrays, as compiled kernels read them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.jit import compiled
from fusion_plugins.core.token_table import Role, TokenTable
from fusion_plugins.core.types import BoolArray

__all__ = ["TokenBytes", "is_prefix", "token_bytes"]

_CACHE: dict[str, "TokenBytes"] = {}
_CACHED_TABLES = 32


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
    found = _CACHE.get(table.fingerprint)
    if found is None:
        flat = np.frombuffer(b"".join(table.tokens), np.uint8).copy()
        starts = np.concatenate([[0], np.cumsum(table.lengths, dtype=np.int64)])
        closing = np.zeros(table.vocab_size, np.bool_)
        closing[[table.role_ids[role] for role in (Role.EOS, Role.END_OF_TURN) if role in table.role_ids]] = True
        found = TokenBytes(flat, starts, table.special.copy(), closing)
        if len(_CACHE) >= _CACHED_TABLES:
            _CACHE.pop(next(iter(_CACHE)))
        _CACHE[table.fingerprint] = found
    return found


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
