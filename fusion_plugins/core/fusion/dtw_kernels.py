"""The compiled part of dynamic time warping; :mod:`fusion_plugins.core.fusion.dtw` says what it computes.

A band is given by its first and last column in each row, ``low`` and ``high``, both non-decreasing. The whole matrix is
the widest band. One direction byte per cell of the band is kept; the sums live in two rows.
"""

import numpy as np

from fusion_plugins.core.jit import compiled

__all__ = ["cheapest_way_out", "diagonal_band", "warp"]

DIAGONAL, UP, LEFT = 0, 1, 2
INFINITE = 2**30


@compiled
def diagonal_band(n, m, width):  # type: ignore[no-untyped-def]
    """Return ``low`` and ``high`` (n,): ``width`` columns to both sides of the line from (0, 0) to (n-1, m-1)."""
    low, high = np.empty(n, np.int32), np.empty(n, np.int32)
    for i in range(n):
        centre = i * (m - 1) // max(n - 1, 1)
        low[i], high[i] = max(0, centre - width), min(m - 1, centre + width)
    return low, high


@compiled
def warp(costs, source_index, target_index, low, high, up_first):  # type: ignore[no-untyped-def]
    """Return the cheapest path inside the band and its cost.

    Three loops per row: only the middle one, where each cell waits for its left neighbour, is serial.
    """
    n, m = len(source_index), len(target_index)
    direction = np.empty((n, (high - low).max() + 1), np.uint8)
    above, row = np.full(m + 1, INFINITE, np.int32), np.full(m + 1, INFINITE, np.int32)
    above[0] = 0
    for i in range(n):
        first, last = low[i], high[i]
        if i:
            # Columns that the row above does not reach hold sums of an older row.
            above[high[i - 1] + 2 : last + 2] = INFINITE
        row[first] = INFINITE
        _fill_row(
            above[first : last + 2], row[first : last + 2], costs[source_index[i]], target_index[first : last + 1]
        )
        _directions(above[first : last + 2], row[first : last + 2], direction[i], up_first)
        above, row = row, above
    return _walk_back(direction, low, m), above[m]


@compiled
def _fill_row(above, row, costs, target_index):  # type: ignore[no-untyped-def]
    """Sums of one row; element 0 of ``above`` and ``row`` stands for the column before the first."""
    left, diagonal = np.int64(row[0]), np.int64(above[0])
    for j in range(len(target_index)):
        up = np.int64(above[j + 1])
        best = diagonal if diagonal < up else up
        left = (left if left < best else best) + np.int64(costs[target_index[j]])
        row[j + 1] = left
        diagonal = up


@compiled
def _directions(above, row, direction, up_first):  # type: ignore[no-untyped-def]
    for j in range(len(row) - 1):
        diagonal, up, left = above[j], above[j + 1], row[j]
        not_diagonal = (diagonal > up) | (diagonal > left)
        not_up = (up > left) if up_first else (up >= left)
        direction[j] = np.uint8(not_diagonal) + np.uint8(not_diagonal & not_up)


@compiled
def cheapest_way_out(costs, source_index, target_index, low, high):  # type: ignore[no-untyped-def]
    """Return a cost that no path which leaves the band falls below.

    Such a path has a last cell ``e`` before it first leaves and a first cell ``f`` after it last returns. Up to ``e``
    it costs at least ``F[e]``, the cheapest way inside the band from the start; from ``f`` on at least ``G[f]``, the
    cheapest way inside the band to the end; and it crosses every row between them, each for at least what this row's
    token costs against its nearest token of the other side.
    """
    n, m = len(source_index), len(target_index)
    nearest = np.empty(n, np.int64)
    for i in range(n):
        nearest[i] = costs[source_index[i]].min()
    exits = _edge_sums(costs, source_index, target_index, low, high)
    # The way back is the way there, with both texts reversed.
    entries = _edge_sums(
        costs, source_index[::-1].copy(), target_index[::-1].copy(), (m - 1 - high)[::-1].copy(),
        (m - 1 - low)[::-1].copy(),
    )[::-1]  # fmt: skip
    bound = waiting = np.int64(INFINITE)
    for i in range(n):
        # waiting: the cheapest exit in an earlier row, and the rows crossed since then.
        bound = min(bound, exits[i] + entries[i], waiting + entries[i])
        waiting = min(waiting + nearest[i], exits[i])
    return bound


@compiled
def _edge_sums(costs, source_index, target_index, low, high):  # type: ignore[no-untyped-def]
    """Return (n,): the cheapest way, inside the band, to a cell of each row from which a step leads out of it."""
    n, m = len(source_index), len(target_index)
    out = np.full(n, INFINITE, np.int64)
    above, row = np.full(m + 1, INFINITE, np.int64), np.full(m + 1, INFINITE, np.int64)
    above[0] = 0
    for i in range(n):
        first, last = low[i], high[i]
        if i:
            above[high[i - 1] + 2 : last + 2] = INFINITE
        row[first] = INFINITE
        for j in range(first, last + 1):
            row[j + 1] = min(above[j], above[j + 1], row[j]) + costs[source_index[i], target_index[j]]
        if last < m - 1:
            out[i] = row[last + 1]
        if i < n - 1:
            for j in range(first, low[i + 1]):
                out[i] = min(out[i], row[j + 1])
        above, row = row, above
    return out


@compiled
def _walk_back(direction, low, m):  # type: ignore[no-untyped-def]
    i, j = direction.shape[0] - 1, m - 1
    path = np.empty((i + j + 1, 2), np.int32)
    at = len(path)
    while True:
        at -= 1
        path[at, 0], path[at, 1] = i, j
        if i == 0 and j == 0:
            return path[at:]
        step = direction[i, j - low[i]]
        i -= step != LEFT
        j -= step != UP
