"""The compiled part of dynamic time warping; :mod:`fusion_plugins.core.fusion.dtw` says what it computes.

Only one direction byte per cell is kept; the sums live in two rows of the matrix.
"""

import numpy as np

from fusion_plugins.core.jit import compiled

DIAGONAL, UP, LEFT = 0, 1, 2
INFINITE = 2**30


@compiled
def warp(costs, source_index, target_index, up_first):  # type: ignore[no-untyped-def]
    """Return the cheapest path and its cost.

    Each row of the matrix takes two loops over its columns. Only the first is serial, because a cell waits for its left
    neighbour; keeping the directions out of it lets the compiler turn the second into vector code.
    """
    n, m = len(source_index), len(target_index)
    direction = np.empty((n, m), np.uint8)
    # Element 0 is the column before the first.
    above, row = np.full(m + 1, INFINITE, np.int32), np.full(m + 1, INFINITE, np.int32)
    above[0] = 0
    for i in range(n):
        row[0] = INFINITE
        _fill_row(above, row, costs[source_index[i]], target_index)
        _directions(above, row, direction[i], up_first)
        above, row = row, above
    return _walk_back(direction), above[m]


@compiled
def _fill_row(above, row, costs, target_index):  # type: ignore[no-untyped-def]
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
def _walk_back(direction):  # type: ignore[no-untyped-def]
    i, j = direction.shape[0] - 1, direction.shape[1] - 1
    path = np.empty((i + j + 1, 2), np.int32)
    at = len(path)
    while True:
        at -= 1
        path[at, 0], path[at, 1] = i, j
        if i == 0 and j == 0:
            return path[at:]
        step = direction[i, j]
        i -= step != LEFT
        j -= step != UP
