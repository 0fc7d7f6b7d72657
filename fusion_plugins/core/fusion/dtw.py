"""Dynamic time warping of two token lists: the published alignment, with identical paths.

With costs ``c[i, j]`` (source token ``i``, target token ``j``)::

    M[i, j] = c[i, j] + min(M[i-1, j], M[i, j-1], M[i-1, j-1])

from (0, 0) to the last pair. Walking back, the cheapest predecessor wins; on equal cost the tie order decides:
``fusellm`` diagonal, up (i-1), left (j-1); ``fusechat`` diagonal, left, up.

Reference: Wan et al., "Knowledge Fusion of Large Language Models", 2024 (arXiv 2401.10491), section 3.2.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fusion_plugins.core.arrays import IntArray
from fusion_plugins.core.fusion.dtw_kernels import warp
from fusion_plugins.core.text.surfaces import space_marker
from fusion_plugins.errors import AlignmentError, ConfigError

TIE_ORDERS = ("fusellm", "fusechat")

Tokens = Sequence[str] | Sequence[bytes]
Index = npt.NDArray[np.uint32]
# One direction byte per cell: 256 MB.
_MAX_CELLS = 2**28


def dtw_path(source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm") -> tuple[IntArray, int]:
    """Return the cheapest path, (P, 2) int32 from (0, 0) to the last pair, and its cost.

    Args:
        source_tokens: U tokens, str or bytes.
        target_tokens: T tokens, str or bytes.
        tie_order: ``fusellm`` or ``fusechat``; ``fusechat`` also compares tokens its own way (:func:`token_costs`).

    Raises:
        AlignmentError: an empty list on one side only, or texts so long that the directions would not fit 256 MB.
        ConfigError: an unknown tie order.
    """
    if tie_order not in TIE_ORDERS:
        raise ConfigError(f"tie_order: expected one of {', '.join(TIE_ORDERS)}, got {tie_order!r}")
    n, m = len(source_tokens), len(target_tokens)
    if not n or not m:
        if n == m:
            return np.zeros((0, 2), np.int32), 0
        raise AlignmentError(
            f"expected tokens on both sides; the source has {n}, the target {m}. Leave out empty texts."
        )
    if n * m > _MAX_CELLS:
        raise AlignmentError(
            f"time warping of {n} x {m} tokens needs more than {_MAX_CELLS >> 20} MB. Use method: offsets, or cut "
            "the text (`fusion cut`)."
        )
    path, cost = warp(*token_costs(source_tokens, target_tokens, tie_order=tie_order), tie_order == "fusellm")
    return path, int(cost)


def token_costs(
    source_tokens: Tokens, target_tokens: Tokens, *, tie_order: str = "fusellm"
) -> tuple[npt.NDArray[np.uint16], Index, Index]:
    """Return the edit distances of the distinct tokens.

    Boundary characters are removed on each side before comparing. ``fusechat`` makes an exception: where one of the
    two would become empty, the source with its boundary character written as the target's is compared with the
    unchanged target. Tokens that are bytes have no boundary character and are compared byte by byte.

    Returns:
        (X, Y) uint16 Levenshtein distances of the X distinct source and the Y distinct target tokens; (U,) and (T,)
        uint32, which of them each token is.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    source, source_index = _distinct(source_tokens)
    target, target_index = _distinct(target_tokens)
    source_mark, target_mark = space_marker(source_tokens), space_marker(target_tokens)
    bare_source = [_without(token, source_mark) for token in source]
    bare_target = [_without(token, target_mark) for token in target]
    costs = cdist(bare_source, bare_target, scorer=Levenshtein.distance, dtype=np.uint16)
    if tie_order == "fusechat":
        _compare_bare_marks(costs, source, target, bare_source, bare_target, source_mark, target_mark)
    return costs, source_index, target_index


def path_ranges(path: IntArray, *, axis: int, size: int) -> IntArray:
    """Return (size, 2) int32: first and last partner of each position of one axis (0 source, 1 target) of a path."""
    ranges = np.zeros((size, 2), np.int32)
    if len(path):
        own, other = path[:, axis], path[:, 1 - axis]
        ranges[own[::-1], 0] = other[::-1]
        ranges[own, 1] = other
    return ranges


def _distinct(tokens: Tokens) -> tuple[list[str | bytes], Index]:
    index: dict[str | bytes, int] = {}
    positions = [index.setdefault(token, len(index)) for token in tokens]
    return list(index), np.array(positions, np.uint32)


def _without(token: str | bytes, mark: str) -> str | bytes:
    return token.replace(mark, "") if mark and isinstance(token, str) else token


def _compare_bare_marks(  # type: ignore[no-untyped-def]
    costs, source, target, bare_source, bare_target, source_mark, target_mark
) -> None:
    from rapidfuzz.distance import Levenshtein

    marked = [t.replace(source_mark, target_mark) if source_mark and isinstance(t, str) else t for t in source]
    for x, bare_x in enumerate(bare_source):
        for y, bare_y in enumerate(bare_target):
            if not bare_x or not bare_y:
                costs[x, y] = Levenshtein.distance(marked[x], target[y])
