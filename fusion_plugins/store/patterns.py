"""Log-probabilities as float16 bit patterns, and ids in as few bytes as they need: the numbers of all layouts since 2.

Log-probabilities descend, so their magnitudes ascend, and so do the bit patterns, because non-negative floats sort like
their patterns read as integers. ``docs/store.md`` says what follows from that.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: pattern of a probability of 0; what is above is no number
NOTHING = 0x7C00
#: in place of the next token's pattern: it is the one that the top k have for that token
IN_TOP_K = 0xFFFF
#: bit pattern -> log-probability; numpy's own conversion takes five times as long
LOGPROBS = -np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def patterns_of(logprobs: Array) -> Array:
    """Return uint16 bit patterns of the magnitudes: 0 for log 1, ascending, 0x7C00 for -inf, 0x7E00 for nan.

    A float16 has 11 significant bits, so the absolute error is smallest near log 1, where most of the probability is.
    """
    with np.errstate(over="ignore"):  # below -65504 nothing is left of a probability
        return np.abs(np.minimum(logprobs, 0)).astype(np.float16).view(np.uint16)


def next_in_top_k(inputs: Array, ids: Array, values: Array) -> tuple[Array, Array]:
    """Return for each of U positions whether its K entries hold the next token, and the value they have for it.

    Args:
        inputs: (U,) tokens.
        ids: (U, K) entries.
        values: (U, K) value of each entry.
    """
    matches = ids[:-1] == inputs[1:, None]
    # The last position has no next token. `ids[-1:]` has one element or, without any token, none.
    rank = np.concatenate([matches.argmax(axis=1), np.zeros(len(ids[-1:]), np.int64)])
    inside = np.concatenate([matches.any(axis=1), np.zeros(len(ids[-1:]), np.bool_)])
    return inside, np.take_along_axis(values, rank[:, None], axis=1)[:, 0]


def narrowed(ids: Array) -> Array:
    """Return ids in two bytes if they fit, in four otherwise; -1 becomes the largest number of the type."""
    return ids.astype(np.uint16) if ids.size == 0 or ids.max() < 0xFFFF else ids.astype(np.uint32)


def widened(ids: Array) -> Array:
    """Return int32 ids of what :func:`narrowed` made."""
    # The largest number and one is 0 again: cheaper than to look for it.
    found: Array = (ids + ids.dtype.type(1)).astype(np.int32)
    found -= 1
    return found
